//! Where chunks come from: the two traits that everything below the host cache implements.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_convergent::{ChunkId, Digest};
use tokio::sync::mpsc;

use crate::{ChunkRef, FetchError, TierHealth};

/// What a tier sends for each chunk asked: its index in the request, and the ciphertext or why not.
pub type Delivery = (usize, Result<Bytes, FetchError>);

/// Why a tier is offered a chunk that came from one behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offer {
    /// The tier said that it does not have it.
    Missing,
    /// What the tier gave was wrong.
    WasWrong,
    /// The tier was not asked; it may have it.
    Unasked,
}

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
    /// not found. A closed `sink` means that nobody wants the rest: return. What is not there
    /// should be told before what takes long: the next tier is asked for it meanwhile. What is
    /// delivered has memory of its own: it waits in queues that are bounded by its length.
    async fn fetch(&self, chunks: &[ChunkRef], sink: mpsc::Sender<Delivery>);

    /// [`Tier::fetch`] for somebody who only looks, and will not offer what is missing: others must not
    /// wait for that.
    async fn look(&self, chunks: &[ChunkRef], sink: mpsc::Sender<Delivery>) {
        self.fetch(chunks, sink).await;
    }

    /// A chunk that a tier behind this one had, **verified**. Whoever can keep it queues it: this
    /// must not wait.
    fn offer(&self, _id: &ChunkId, _bytes: &Bytes, _why: Offer) {}

    /// What names the servers behind this tier. Tiers of one name and one origin are in trouble
    /// together. `None`: not known.
    fn origin(&self) -> Option<&str> {
        None
    }

    /// The longest that one [`Tier::fetch`] may take, where that is less than the tier's share of
    /// the reader's time.
    fn deadline(&self) -> Option<Duration> {
        None
    }

    /// How it does, beyond what its caller can count.
    fn health(&self) -> TierHealth {
        TierHealth::default()
    }
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
