//! What a mount did, counted.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use parking_lot::RwLock;
use serde::{Deserialize, Serialize};

use crate::error::ErrorKind;
use crate::guard::OriginHealth;
use crate::latency::{Histogram, LatencySnapshot};
use crate::{FetchError, Tier};

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

    pub(crate) fn snapshot(&self) -> HitsSnapshot {
        HitsSnapshot {
            chunks: self.chunks.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
        }
    }
}

/// Counters of one tier of one mount.
pub(crate) struct TierStats {
    pub(crate) name: String,
    pub(crate) requests: AtomicU64,
    pub(crate) delivered: Hits,
    pub(crate) failures: AtomicU64,
    pub(crate) latency: Histogram,
    errors: Errors,
    /// The tier itself, asked for its health as long as it lives.
    tier: RwLock<Option<Weak<dyn Tier>>>,
    /// Whether wrong bytes of this tier have been logged: once is enough.
    pub(crate) corruption_logged: AtomicBool,
}

impl std::fmt::Debug for TierStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.snapshot().fmt(f)
    }
}

#[derive(Debug, Default)]
struct Errors {
    not_found: AtomicU64,
    unauthorized: AtomicU64,
    unavailable: AtomicU64,
    timed_out: AtomicU64,
    corrupt: AtomicU64,
    invalid: AtomicU64,
}

impl TierStats {
    /// Counts a chunk that the tier did not give.
    pub(crate) fn failed(&self, error: &FetchError) {
        self.failures.fetch_add(1, Relaxed);
        let counter = match error.kind() {
            ErrorKind::NotFound => &self.errors.not_found,
            ErrorKind::Unauthorized => &self.errors.unauthorized,
            ErrorKind::Unavailable => &self.errors.unavailable,
            ErrorKind::TimedOut => &self.errors.timed_out,
            ErrorKind::Corrupt => &self.errors.corrupt,
            ErrorKind::Invalid => &self.errors.invalid,
        };
        counter.fetch_add(1, Relaxed);
    }

    /// From now on the health of `tier` is told.
    pub(crate) fn attach(&self, tier: &Arc<dyn Tier>) {
        *self.tier.write() = Some(Arc::downgrade(tier));
    }

    fn snapshot(&self) -> TierSnapshot {
        let tier = self.tier.read().as_ref().and_then(Weak::upgrade);
        let errors = &self.errors;
        TierSnapshot {
            name: self.name.clone(),
            requests: self.requests.load(Relaxed),
            delivered: self.delivered.snapshot(),
            failures: self.failures.load(Relaxed),
            corrupt: errors.corrupt.load(Relaxed),
            latency: self.latency.snapshot(),
            errors: ErrorCounts {
                not_found: errors.not_found.load(Relaxed),
                unauthorized: errors.unauthorized.load(Relaxed),
                unavailable: errors.unavailable.load(Relaxed),
                timed_out: errors.timed_out.load(Relaxed),
                corrupt: errors.corrupt.load(Relaxed),
                invalid: errors.invalid.load(Relaxed),
            },
            health: tier.map(|tier| tier.health()).unwrap_or_default(),
        }
    }
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
            latency: Histogram::default(),
            errors: Errors::default(),
            tier: RwLock::new(None),
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
            tiers: self.tiers.read().iter().map(|t| t.snapshot()).collect(),
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
    /// From asking the tier to each good chunk.
    #[serde(default)]
    pub latency: LatencySnapshot,
    /// `failures` by kind.
    #[serde(default)]
    pub errors: ErrorCounts,
    /// What the tier tells of itself.
    #[serde(default)]
    pub health: TierHealth,
}

/// Chunks that a tier did not give, by why.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ErrorCounts {
    /// It does not have them.
    pub not_found: u64,
    /// It refused us.
    pub unauthorized: u64,
    /// It was in trouble.
    pub unavailable: u64,
    /// It had not answered in time.
    pub timed_out: u64,
    /// Its bytes were wrong.
    pub corrupt: u64,
    /// They can't be asked for.
    pub invalid: u64,
}

/// What a tier tells of itself. A tier that serves several mounts tells of all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TierHealth {
    /// Requests sent to its servers, retries and hedges included.
    pub sent: u64,
    /// Of those, requests sent again after a failure.
    pub retries: u64,
    /// Of those, second requests because the first was slow.
    pub hedges: u64,
    /// Hedges that answered first.
    pub hedges_won: u64,
    /// Each of its servers.
    pub origins: Vec<OriginHealth>,
    /// What it was offered.
    pub write_back: WriteBackSnapshot,
}

/// What became of chunks that a tier was offered.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WriteBackSnapshot {
    /// Chunks put; ciphertext bytes.
    pub put: HitsSnapshot,
    /// Of those, chunks whose copy there was wrong.
    pub repaired: u64,
    /// Chunks that had come there by then.
    pub had: u64,
    /// Chunks passed over because the queue was full or writing rested.
    pub dropped: u64,
    /// Chunks that could not be put.
    pub failed: u64,
    /// Chunks waiting.
    pub queued: u64,
    /// Why writing rests, if it does.
    pub resting: Option<String>,
}
