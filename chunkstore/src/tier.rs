//! Where chunks come from: the two traits that everything below the host cache implements.

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_convergent::Digest;
use tokio::sync::mpsc;

use crate::{ChunkRef, FetchError};

/// What a tier sends for each chunk asked: its index in the request, and the ciphertext or why not.
pub type Delivery = (usize, Result<Bytes, FetchError>);

/// A store of ciphertexts: the registry, a regional store.
///
/// A tier need not verify what it delivers: the caller checks every id before a byte is kept or
/// used. It must not wait for ever, but the caller also bounds it: dropping the future of
/// [`Tier::fetch`] must free what it holds.
#[async_trait]
pub trait Tier: Send + Sync {
    /// A short name for messages and statistics, such as `registry`.
    fn name(&self) -> &str;

    /// Fetches `chunks` in as few round trips as the tier can, and sends one [`Delivery`] for each,
    /// in any order, as soon as it is there. A chunk without a delivery when this returns counts as
    /// not found. A closed `sink` means that nobody wants the rest: return.
    async fn fetch(&self, chunks: &[ChunkRef], sink: mpsc::Sender<Delivery>);
}

/// Ranges of blobs, as a registry serves them.
#[async_trait]
pub trait BlobRanges: Send + Sync {
    /// Exactly `len` bytes of `blob` from `offset` on.
    ///
    /// One attempt: [`crate::PackOrigin`] does retries, deadlines and limits.
    ///
    /// # Errors
    /// [`FetchError::Unavailable`] for what may work a moment later, else what fits.
    async fn read_range(&self, blob: &Digest, offset: u64, len: u64) -> Result<Bytes, FetchError>;
}
