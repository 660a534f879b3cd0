//! The sealed key table: chunk keys under a tenant's key, bound to one chunk table.
//!
//! Layout (`docs/format.md`): magic `LZKT`, version u8 = 1, 3 zero bytes, key id (8), synthetic IV
//! (32), AES-256-GCM ciphertext, tag (16).
//!
//! Sealing is deterministic, so that converting twice gives identical digests: the synthetic IV is
//! an HMAC over binding and plaintext (the construction of SIV, RFC 5297), and a fresh AES key is
//! derived from it, so that key and nonce repeat only for the same table.

use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, KeyInit, Nonce, Tag};
use zeroize::Zeroizing;

use crate::Digest;
use crate::secret::{derive, secret32};

secret32! {
    /// A tenant's key: seals the key tables of the tenant's images.
    TenantKey
}

const MAGIC: &[u8; 4] = b"LZKT";
const VERSION: u8 = 1;
const HEADER_LEN: usize = 4 + 4 + 8 + 32;
const TAG_LEN: usize = 16;

/// What sealing adds to a key table, in bytes.
pub const OVERHEAD: usize = HEADER_LEN + TAG_LEN;

/// A public name of a tenant key (8 bytes), so that an error can say which key is missing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct KeyId(pub [u8; 8]);

impl std::fmt::Display for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&crate::ids::hex(&self.0))
    }
}

impl TenantKey {
    /// The public name of this key.
    pub fn id(&self) -> KeyId {
        let mut id = [0; 8];
        id.copy_from_slice(&derive(b"lazyimg tenant key id v1", self.as_bytes(), &[])[..8]);
        KeyId(id)
    }
}

/// Why a key table does not open.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnsealError {
    /// Not a key table.
    #[error("key table is damaged: {0}")]
    Malformed(&'static str),
    /// Written by a newer lazyimg.
    #[error("key table has version {0}, this lazyimg reads version 1: update lazyimg")]
    Version(u8),
    /// Sealed for somebody else.
    #[error(
        "key table is sealed under tenant key {sealed}, not under yours ({yours}): \
         use the key that the image was converted with (--key-file or --key-command)"
    )]
    WrongKey {
        /// Name of the key that it was sealed under.
        sealed: KeyId,
        /// Name of the key that was tried.
        yours: KeyId,
    },
    /// The key is right, the bytes or the chunk table are not.
    #[error("key table fails authentication: it or the chunk table it belongs to was altered")]
    Forged,
}

/// The name of the key that a sealed table asks for.
///
/// # Errors
/// [`UnsealError::Malformed`] and [`UnsealError::Version`].
pub fn sealed_for(sealed: &[u8]) -> Result<KeyId, UnsealError> {
    if sealed.len() < OVERHEAD {
        return Err(UnsealError::Malformed("shorter than its header"));
    }
    if &sealed[..4] != MAGIC {
        return Err(UnsealError::Malformed("magic number missing"));
    }
    if sealed[4] != VERSION {
        return Err(UnsealError::Version(sealed[4]));
    }
    if sealed[5..8] != [0; 3] {
        return Err(UnsealError::Malformed("reserved bytes are not zero"));
    }
    let mut id = [0; 8];
    id.copy_from_slice(&sealed[8..16]);
    Ok(KeyId(id))
}

/// Seals `keys` (the concatenated chunk keys) for the chunk table with digest `binding`.
pub fn seal(tenant: &TenantKey, binding: &Digest, keys: &[u8]) -> Vec<u8> {
    let siv = derive(
        b"lazyimg key table siv v1",
        tenant.as_bytes(),
        &[&binding.0, &Digest::of(keys).0],
    );
    let mut out = Vec::with_capacity(keys.len() + OVERHEAD);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&[VERSION, 0, 0, 0]);
    out.extend_from_slice(&tenant.id().0);
    out.extend_from_slice(&siv);
    out.extend_from_slice(keys);
    let (header, body) = out.split_at_mut(HEADER_LEN);
    let tag = cipher(tenant, &siv)
        .encrypt_inout_detached(&Nonce::default(), &associated(header, binding), body.into())
        .expect("a key table is far below GCM's limit of 64 GiB");
    out.extend_from_slice(&tag);
    out
}

/// The keys of a sealed table.
///
/// # Errors
/// See [`UnsealError`].
pub fn open(
    tenant: &TenantKey,
    binding: &Digest,
    sealed: &[u8],
) -> Result<Zeroizing<Vec<u8>>, UnsealError> {
    let asked = sealed_for(sealed)?;
    if asked != tenant.id() {
        return Err(UnsealError::WrongKey {
            sealed: asked,
            yours: tenant.id(),
        });
    }
    let (header, rest) = sealed.split_at(HEADER_LEN);
    let (body, tag) = rest.split_at(rest.len() - TAG_LEN);
    let mut siv = [0; 32];
    siv.copy_from_slice(&header[16..]);
    let tag = Tag::try_from(tag).map_err(|_| UnsealError::Malformed("tag cut short"))?;
    let mut keys = Zeroizing::new(body.to_vec());
    cipher(tenant, &siv)
        .decrypt_inout_detached(
            &Nonce::default(),
            &associated(header, binding),
            keys.as_mut_slice().into(),
            &tag,
        )
        .map_err(|_| UnsealError::Forged)?;
    Ok(keys)
}

/// Rotation: the same keys under another tenant key. No chunk is touched.
///
/// # Errors
/// When the table does not open under `old`.
pub fn reseal(
    old: &TenantKey,
    new: &TenantKey,
    binding: &Digest,
    sealed: &[u8],
) -> Result<Vec<u8>, UnsealError> {
    Ok(seal(new, binding, &open(old, binding, sealed)?))
}

fn cipher(tenant: &TenantKey, siv: &[u8; 32]) -> Aes256Gcm {
    let key = Zeroizing::new(derive(siv, tenant.as_bytes(), &[b"lazyimg key table v1"]));
    Aes256Gcm::new((&*key).into())
}

fn associated(header: &[u8], binding: &Digest) -> Vec<u8> {
    [header, &binding.0].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use proptest::prelude::*;

    fn key(n: u8) -> TenantKey {
        TenantKey::from_bytes([n; 32])
    }

    #[test]
    fn sealing_twice_gives_the_same_bytes() {
        let table = Digest::of(b"table");
        assert_eq!(
            seal(&key(1), &table, b"keys"),
            seal(&key(1), &table, b"keys")
        );
    }

    #[test]
    fn the_format_is_pinned_by_a_golden_vector() {
        // docs/format.md has the numbers; computed with Python's cryptography, not with this crate.
        let tenant = TenantKey::from_bytes(golden::array("seal.tenant-key"));
        let sealed = seal(&tenant, &Digest::of(b"table"), &golden::array("seal.table"));
        assert_eq!(tenant.id().0.to_vec(), golden::bytes("seal.key-id"));
        assert_eq!(sealed, golden::bytes("seal.sealed"));
    }

    #[test]
    fn the_wrong_key_is_named() {
        let sealed = seal(&key(1), &Digest::of(b"t"), b"keys");
        assert_eq!(
            open(&key(2), &Digest::of(b"t"), &sealed),
            Err(UnsealError::WrongKey {
                sealed: key(1).id(),
                yours: key(2).id()
            })
        );
    }

    #[test]
    fn a_table_does_not_open_for_another_chunk_table() {
        let sealed = seal(&key(1), &Digest::of(b"t"), b"keys");
        assert_eq!(
            open(&key(1), &Digest::of(b"u"), &sealed),
            Err(UnsealError::Forged)
        );
    }

    #[test]
    fn resealing_changes_the_key_and_keeps_the_table() {
        let table = Digest::of(b"t");
        let sealed = reseal(&key(1), &key(2), &table, &seal(&key(1), &table, b"keys")).unwrap();
        assert_eq!(open(&key(2), &table, &sealed).unwrap().as_slice(), b"keys");
        assert!(open(&key(1), &table, &sealed).is_err());
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_noticed(keys in prop::collection::vec(any::<u8>(), 0..200), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let table = Digest::of(b"t");
            let mut sealed = seal(&key(1), &table, &keys);
            let at = at.index(sealed.len());
            sealed[at] ^= 1 << bit;
            prop_assert!(open(&key(1), &table, &sealed).is_err());
        }

        #[test]
        fn random_tables_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(open(&key(1), &Digest::of(b"t"), &bytes).is_err());
        }
    }
}
