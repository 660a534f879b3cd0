//! Convergent encryption of chunks, and the sealing of their keys.
//!
//! Pure but for [`provider`], which reads key files and runs key commands.
//!
//! * [`payload`]: plaintext ⇄ payload (codec byte and compressed bytes);
//! * [`chunk`]: payload → key → ciphertext → id, and back;
//! * [`salt`]: domains and epochs, the secrets that chunk keys are derived under;
//! * [`seal`]: the key table, sealed under a tenant's key and bound to a chunk table;
//! * [`provider`]: where tenant keys and domain secrets come from.
//!
//! `docs/format.md` has the bytes, `docs/threat-model.md` what they protect.

#[cfg(test)]
mod golden;
mod ids;

pub mod chunk;
pub mod payload;
pub mod provider;
pub mod salt;
pub mod seal;
mod secret;

pub use chunk::ChunkKey;
pub use ids::{ChunkId, Digest, ParseDigestError};
pub use salt::{DomainSecret, Salt};
pub use seal::{KeyId, TenantKey};

/// The largest plaintext of one chunk, in bytes (1 MiB).
///
/// Twice the target: a pack of small files may overshoot the target by one file. It bounds what a
/// reader must hold to serve one byte.
pub const MAX_CHUNK_LEN: usize = 1 << 20;

/// The largest stored (encrypted) form of one chunk, in bytes: a stored payload is its codec byte
/// and its plaintext, the ciphertext adds a 16-byte tag.
pub const MAX_STORED_LEN: usize = MAX_CHUNK_LEN + 1 + chunk::TAG_LEN;
