//! The host cache: ciphertexts in segment files, an index in RocksDB, bounded in bytes.
//!
//! It may forget, never lie. Nothing in it is trusted: a record's header must name the chunk asked
//! for, and the reader's GCM check proves the bytes. So writes need no fsync, and any crash, torn
//! write, full disk or flipped bit costs at most a fetch.
//!
//! Reads run in the caller's thread; writes are queued for one writer thread, and dropped when it
//! is behind, so that no reader waits for the disk to take what it has already got.

mod dir;
mod error;
mod index;
mod record;
mod scrub;
mod segments;
mod writer;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lazyimg_convergent::ChunkId;
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use dir::CacheDir;
use index::{Index, IndexError};
use record::Location;
use segments::{Found, Segments};

pub use error::CacheError;
pub use scrub::Scrubbed;

/// The smallest cache, in bytes: the index's files and a handful of segments.
pub const MIN_CACHE_BYTES: u64 = 16 << 20;

/// Disk that the index takes however little is in it (manifest, RocksDB's log, a table being
/// written, files of a compaction), in bytes.
const INDEX_FIXED_BYTES: u64 = 6 << 20;

/// Largest and smallest default length of a segment, in bytes. Large: few files (RLIMIT_NOFILE),
/// cheap eviction. Small: at least one record fits, and eviction takes little at a time.
const SEGMENT_BYTES: std::ops::RangeInclusive<u64> = (2 << 20)..=(64 << 20);

/// What the cache leaves free of its filesystem by default: this many bytes, or a twentieth of it
/// where that is less. A full filesystem hurts everybody else first.
const MIN_FREE_BYTES: u64 = 1 << 30;

/// Ciphertext that waits for the writer, in bytes. It counts against a mount's memory; at the
/// page cache's speed it is a few milliseconds of work.
const QUEUE_BYTES: usize = 8 << 20;

/// How a [`HostCache`] behaves.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// Bytes of disk the cache may use, index included; at least [`MIN_CACHE_BYTES`].
    pub max_bytes: u64,
    /// Bytes of the filesystem that stay free: below that the cache evicts, then stops caching.
    /// `None`: 1 GiB, or a twentieth of the filesystem where that is less.
    pub min_free_bytes: Option<u64>,
    /// Length at which a segment is full, in bytes; `None`: a 64th of `max_bytes`, from 2 to
    /// 64 MiB.
    pub segment_bytes: Option<u64>,
    /// How long caching rests after a write failed (full disk, read-only filesystem).
    pub rest: Duration,
    /// What the cache is opened for, if not for mounts and if it will end: whoever finds it in use is
    /// told. A command line.
    pub work: Option<&'static str>,
}

impl CacheOptions {
    /// Defaults with this bound in bytes.
    pub fn new(max_bytes: u64) -> Self {
        Self {
            max_bytes,
            min_free_bytes: None,
            segment_bytes: None,
            rest: Duration::from_secs(5),
            work: None,
        }
    }
}

/// Counters of a [`HostCache`] since it was opened, and what it holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheStats {
    /// Disk used now, in bytes; the index's part is an estimate from above.
    pub used_bytes: u64,
    /// The bound, in bytes.
    pub max_bytes: u64,
    /// Segment files.
    pub segments: u64,
    /// Chunks found.
    pub hits: u64,
    /// Chunks not found.
    pub misses: u64,
    /// Records written.
    pub written: u64,
    /// Ciphertext written, in bytes.
    pub written_bytes: u64,
    /// Chunks that were not written because the writer was behind or rested.
    pub dropped: u64,
    /// Copies found bad and forgotten.
    pub bad: u64,
    /// Segments given up to stay within bounds.
    pub evicted_segments: u64,
    /// How often the index was built anew from the segments.
    pub index_rebuilds: u64,
    /// Why caching rests, if it does.
    pub resting: Option<String>,
}

#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    written: AtomicU64,
    written_bytes: AtomicU64,
    dropped: AtomicU64,
    bad: AtomicU64,
    evicted_segments: AtomicU64,
    index_rebuilds: AtomicU64,
}

/// What readers and the writer share.
struct Shared {
    segments: Segments,
    /// `None` while it is rebuilt or cannot be opened: everything is a miss then.
    index: RwLock<Option<Index>>,
    /// Queued for the writer, and readable until they are written.
    pending: Mutex<HashMap<ChunkId, Bytes>>,
    counters: Counters,
    /// Until when the writer rests and why.
    rest: Mutex<Option<(Instant, String)>>,
    rebuild_asked: AtomicBool,
    stopping: AtomicBool,
    /// Disk of the index beyond its estimate, in bytes.
    index_excess: AtomicU64,
    max_bytes: u64,
}

/// Work for the writer.
enum Job {
    Put(ChunkId, Bytes, OwnedSemaphorePermit),
    Rebuild,
    Flush(mpsc::SyncSender<()>),
    Seal(mpsc::SyncSender<()>),
    Trim(u64, mpsc::SyncSender<()>),
    Stop,
}

/// The host cache; one process at a time has it. Share it in an `Arc`.
pub struct HostCache {
    shared: Arc<Shared>,
    room: Arc<Semaphore>,
    jobs: mpsc::Sender<Job>,
    /// Until [`HostCache::close`].
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// A copy in the cache.
pub(crate) enum Lookup {
    /// From a segment: not verified in any way.
    Disk(Vec<u8>, CopyAt),
    /// Still on its way to a segment: verified before it was queued.
    Pending(Bytes),
    /// Not here.
    Miss,
    /// It was here, was not what it should be, and is gone.
    Bad,
}

/// Which copy a [`Lookup::Disk`] was, so that no other one is removed in its place.
#[derive(Clone, Copy)]
pub(crate) struct CopyAt(Location);

impl HostCache {
    /// Opens or makes the cache in `dir` and takes its lock. Damage is repaired or forgotten; a
    /// damaged index is rebuilt in the background.
    ///
    /// # Errors
    /// When the directory is not ours, locked, newer, or cannot be made or opened: [`CacheError`].
    pub fn open(dir: &Path, options: CacheOptions) -> Result<Self, CacheError> {
        if options.max_bytes < MIN_CACHE_BYTES {
            return Err(CacheError::TooSmall {
                asked: options.max_bytes,
                least: MIN_CACHE_BYTES,
            });
        }
        let dir = CacheDir::open(dir, options.work)?;
        let shared = Arc::new(Shared {
            segments: Segments::list(dir.segments()),
            index: RwLock::new(None),
            pending: Mutex::default(),
            counters: Counters::default(),
            rest: Mutex::new(None),
            rebuild_asked: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            index_excess: AtomicU64::new(0),
            max_bytes: options.max_bytes,
        });
        let (jobs, queue) = mpsc::channel();
        let mut writer = writer::Writer::new(Arc::clone(&shared), dir, &options);
        // In a cache without segments there is nothing to find: the writer's thread makes the index
        // while the first chunks come. It syncs files a dozen times, which takes longer than a mount.
        if shared.segments.cost().1 > 0 {
            writer.begin();
        }
        let path_for_error = writer.path().to_owned();
        let writer = std::thread::Builder::new()
            .name("lazyimg-cache".to_owned())
            .spawn(move || writer.run(&queue))
            .map_err(|source| CacheError::Io {
                doing: "start the writer of",
                path: path_for_error,
                source,
            })?;
        Ok(Self {
            shared,
            room: Arc::new(Semaphore::new(QUEUE_BYTES)),
            jobs,
            writer: Mutex::new(Some(writer)),
        })
    }

    /// The stored ciphertext, **unverified**: open it with the chunk's key, or compare its id.
    pub fn get(&self, id: &ChunkId) -> Option<Bytes> {
        match self.lookup(id) {
            Lookup::Disk(bytes, _) => Some(bytes.into()),
            Lookup::Pending(bytes) => Some(bytes),
            Lookup::Miss | Lookup::Bad => None,
        }
    }

    /// A reader's look at a copy, counted.
    pub(crate) fn lookup(&self, id: &ChunkId) -> Lookup {
        let found = self.peek(id);
        let counters = &self.shared.counters;
        match found {
            Lookup::Disk(..) | Lookup::Pending(_) => counters.hits.fetch_add(1, Relaxed),
            Lookup::Miss | Lookup::Bad => counters.misses.fetch_add(1, Relaxed),
        };
        found
    }

    /// A look at a copy that is no reader's, not counted.
    pub(crate) fn peek(&self, id: &ChunkId) -> Lookup {
        if let Some(bytes) = self.shared.pending.lock().get(id) {
            return Lookup::Pending(bytes.clone());
        }
        let Some(at) = self.locate(id) else {
            return Lookup::Miss;
        };
        match self.shared.segments.read(id, at) {
            Found::Bytes(bytes) => Lookup::Disk(bytes, CopyAt(at)),
            Found::Gone => Lookup::Miss,
            Found::Bad if self.forget(id, CopyAt(at)) => Lookup::Bad,
            Found::Bad => Lookup::Miss,
        }
    }

    /// Whether the cache has a copy, as far as its index knows. The copy may still be bad.
    pub fn contains(&self, id: &ChunkId) -> bool {
        self.shared.pending.lock().contains_key(id)
            || self
                .locate(id)
                .is_some_and(|at| self.shared.segments.get(at.segment).is_some())
    }

    /// Queues a ciphertext whose id was **verified by the caller**. Never waits: false when the
    /// queue is full or caching rests.
    pub fn put(&self, id: &ChunkId, ciphertext: Bytes) -> bool {
        let permit = permits(&ciphertext)
            .filter(|_| !self.is_resting())
            .and_then(|n| Arc::clone(&self.room).try_acquire_many_owned(n).ok());
        self.enqueue(id, ciphertext, permit)
    }

    /// [`HostCache::put`], but waits for room in the queue: for prefetch, which exists to fill
    /// the cache.
    pub(crate) async fn put_waiting(&self, id: &ChunkId, ciphertext: Bytes) -> bool {
        let permit = match permits(&ciphertext).filter(|_| !self.is_resting()) {
            Some(n) => Arc::clone(&self.room).acquire_many_owned(n).await.ok(),
            None => None,
        };
        self.enqueue(id, ciphertext, permit)
    }

    fn enqueue(
        &self,
        id: &ChunkId,
        ciphertext: Bytes,
        permit: Option<OwnedSemaphorePermit>,
    ) -> bool {
        let Some(permit) = permit else {
            self.shared.counters.dropped.fetch_add(1, Relaxed);
            return false;
        };
        let known = self
            .shared
            .pending
            .lock()
            .insert(*id, ciphertext.clone())
            .is_some();
        let queued = known || self.jobs.send(Job::Put(*id, ciphertext, permit)).is_ok();
        if !queued {
            // Closed: nobody will take it out again.
            self.shared.pending.lock().remove(id);
        }
        queued
    }

    /// Forgets a copy that the caller found bad; whether there was one.
    pub fn remove(&self, id: &ChunkId) -> bool {
        self.locate(id)
            .is_some_and(|at| self.forget(id, CopyAt(at)))
    }

    /// Forgets this copy, and not a better one that was put since.
    pub(crate) fn forget(&self, id: &ChunkId, at: CopyAt) -> bool {
        let removed = match &*self.shared.index.read() {
            Some(index) => index.remove(id, at.0),
            None => Ok(false),
        };
        let removed = self.on_index(removed).unwrap_or(false);
        if removed {
            self.shared.counters.bad.fetch_add(1, Relaxed);
        }
        removed
    }

    /// Waits until all that was queued before is in the segments, or was dropped.
    pub fn flush(&self) {
        self.have_done(Job::Flush);
    }

    /// Closes the segment that is appended to: the next opening takes the index's word for it.
    fn seal(&self) {
        self.have_done(Job::Seal);
    }

    /// Waits until the writer has done a job, if there is one still.
    fn have_done(&self, job: impl FnOnce(mpsc::SyncSender<()>) -> Job) {
        let (done, wait) = mpsc::sync_channel(1);
        if self.jobs.send(job(done)).is_ok() {
            let _ = wait.recv();
        }
    }

    /// Gives up the least useful segments until at most `bytes` of disk are used, and returns what is
    /// used then. What readers miss afterwards is
    /// fetched again.
    pub fn trim(&self, bytes: u64) -> CacheStats {
        self.have_done(|done| Job::Trim(bytes, done));
        self.stats()
    }

    /// Writes what is queued, notes the order of use, and closes the index and the directory's lock;
    /// from then on everything is a miss and nothing is kept. Dropping the cache does the same. A
    /// process must do one of them before it ends: RocksDB's threads don't survive the end of its
    /// static data.
    pub fn close(&self) {
        // Held to the end: who comes second may end the process when this returns.
        let mut held = self.writer.lock();
        let Some(writer) = held.take() else {
            return;
        };
        self.shared.stopping.store(true, Relaxed);
        let _ = self.jobs.send(Job::Stop);
        if writer.join().is_err() {
            tracing::error!("the cache's writer had panicked");
            // It left open what it closes at its end.
            drop(self.shared.index.write().take());
        }
    }

    /// Counters and sizes now.
    pub fn stats(&self) -> CacheStats {
        let c = &self.shared.counters;
        let (cost, segments) = self.shared.segments.cost();
        CacheStats {
            used_bytes: cost + INDEX_FIXED_BYTES + self.shared.index_excess.load(Relaxed),
            max_bytes: self.shared.max_bytes,
            segments: segments as u64,
            hits: c.hits.load(Relaxed),
            misses: c.misses.load(Relaxed),
            written: c.written.load(Relaxed),
            written_bytes: c.written_bytes.load(Relaxed),
            dropped: c.dropped.load(Relaxed),
            bad: c.bad.load(Relaxed),
            evicted_segments: c.evicted_segments.load(Relaxed),
            index_rebuilds: c.index_rebuilds.load(Relaxed),
            resting: self.shared.rest.lock().as_ref().map(|(_, why)| why.clone()),
        }
    }

    fn locate(&self, id: &ChunkId) -> Option<Location> {
        let found = match &*self.shared.index.read() {
            Some(index) => index.get(id),
            None => Ok(None),
        };
        self.on_index(found).flatten()
    }

    /// Turns an index error into a miss; a damaged index is rebuilt.
    fn on_index<T>(&self, result: Result<T, IndexError>) -> Option<T> {
        let error = match result {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        if error.is_damage() && !self.shared.rebuild_asked.swap(true, Relaxed) {
            tracing::warn!(%error, "the cache's index is damaged, rebuilding it from the segments");
            let _ = self.jobs.send(Job::Rebuild);
        }
        None
    }

    fn is_resting(&self) -> bool {
        matches!(&*self.shared.rest.lock(), Some((until, _)) if Instant::now() < *until)
    }
}

impl Drop for HostCache {
    fn drop(&mut self) {
        self.close();
    }
}

/// The queue's permits for a ciphertext; `None` when it cannot be one.
fn permits(ciphertext: &Bytes) -> Option<u32> {
    u32::try_from(ciphertext.len())
        .ok()
        .filter(|n| record::is_stored_len(*n))
}

#[cfg(test)]
mod tests;
