//! What a mount did, counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use parking_lot::RwLock;
use serde::{Deserialize, Serialize};

/// Counters of one mount. All grow only; read them with [`MountStats::snapshot`].
#[derive(Debug, Default)]
pub struct MountStats {
    pub(crate) reads: AtomicU64,
    pub(crate) bytes_read: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) hot: Hits,
    pub(crate) cache: Hits,
    pub(crate) joined: AtomicU64,
    pub(crate) bad_local_copies: AtomicU64,
    pub(crate) healed: AtomicU64,
    pub(crate) uncached: AtomicU64,
    pub(crate) prefetched: Hits,
    pub(crate) prefetch_failed: AtomicU64,
    tiers: RwLock<Vec<Arc<TierStats>>>,
}

/// A number of chunks and their bytes.
#[derive(Debug, Default)]
pub(crate) struct Hits {
    chunks: AtomicU64,
    bytes: AtomicU64,
}

impl Hits {
    pub(crate) fn add(&self, bytes: usize) {
        self.chunks.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes as u64, Relaxed);
    }

    fn snapshot(&self) -> HitsSnapshot {
        HitsSnapshot {
            chunks: self.chunks.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
        }
    }
}

/// Counters of one tier of one mount.
#[derive(Debug)]
pub(crate) struct TierStats {
    pub(crate) name: String,
    pub(crate) requests: AtomicU64,
    pub(crate) delivered: Hits,
    pub(crate) failures: AtomicU64,
    pub(crate) corrupt: AtomicU64,
    /// Whether wrong bytes of this tier have been logged: once is enough.
    pub(crate) corruption_logged: AtomicBool,
}

impl MountStats {
    /// Zeros.
    pub fn new() -> Self {
        Self::default()
    }

    /// The counters of the tier `name`, made at its first use.
    pub(crate) fn tier(&self, name: &str) -> Arc<TierStats> {
        let mut tiers = self.tiers.write();
        if let Some(known) = tiers.iter().find(|t| t.name == name) {
            return Arc::clone(known);
        }
        let new = Arc::new(TierStats {
            name: name.to_owned(),
            requests: AtomicU64::new(0),
            delivered: Hits::default(),
            failures: AtomicU64::new(0),
            corrupt: AtomicU64::new(0),
            corruption_logged: AtomicBool::new(false),
        });
        tiers.push(Arc::clone(&new));
        new
    }

    /// The counters now. Each is exact, all together are not one instant.
    pub fn snapshot(&self) -> StatsSnapshot {
        StatsSnapshot {
            reads: self.reads.load(Relaxed),
            bytes_read: self.bytes_read.load(Relaxed),
            errors: self.errors.load(Relaxed),
            hot: self.hot.snapshot(),
            cache: self.cache.snapshot(),
            tiers: self
                .tiers
                .read()
                .iter()
                .map(|t| TierSnapshot {
                    name: t.name.clone(),
                    requests: t.requests.load(Relaxed),
                    delivered: t.delivered.snapshot(),
                    failures: t.failures.load(Relaxed),
                    corrupt: t.corrupt.load(Relaxed),
                })
                .collect(),
            joined: self.joined.load(Relaxed),
            bad_local_copies: self.bad_local_copies.load(Relaxed),
            healed: self.healed.load(Relaxed),
            uncached: self.uncached.load(Relaxed),
            prefetched: self.prefetched.snapshot(),
            prefetch_failed: self.prefetch_failed.load(Relaxed),
        }
    }
}

/// [`MountStats`] at one time, for `status --json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatsSnapshot {
    /// Chunk reads answered or failed.
    pub reads: u64,
    /// Plaintext given to readers, in bytes.
    pub bytes_read: u64,
    /// Chunk reads that failed.
    pub errors: u64,
    /// Reads served from memory; plaintext bytes.
    pub hot: HitsSnapshot,
    /// Reads served from the host cache on disk; ciphertext bytes.
    pub cache: HitsSnapshot,
    /// What each tier below the cache did, in the order asked.
    pub tiers: Vec<TierSnapshot>,
    /// Reads that waited for a fetch somebody else had begun.
    pub joined: u64,
    /// Copies in the host cache that turned out wrong and were dropped.
    pub bad_local_copies: u64,
    /// Of those, copies replaced by good ones from a tier.
    pub healed: u64,
    /// Fetched chunks that the host cache did not take (full disk, busy writer).
    pub uncached: u64,
    /// Chunks that prefetch brought into the host cache; ciphertext bytes.
    pub prefetched: HitsSnapshot,
    /// Chunks that prefetch failed to get or had no room to remember.
    pub prefetch_failed: u64,
}

impl StatsSnapshot {
    /// Ciphertext fetched from all tiers, in bytes.
    pub fn fetched_bytes(&self) -> u64 {
        self.tiers.iter().map(|t| t.delivered.bytes).sum()
    }
}

/// A number of chunks and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HitsSnapshot {
    /// How many chunks.
    pub chunks: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What one tier did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierSnapshot {
    /// [`crate::Tier::name`].
    pub name: String,
    /// Calls of [`crate::Tier::fetch`].
    pub requests: u64,
    /// Good chunks it gave; ciphertext bytes.
    pub delivered: HitsSnapshot,
    /// Chunks it was asked for and did not give.
    pub failures: u64,
    /// Of those, chunks whose bytes were wrong.
    pub corrupt: u64,
}
