//! The one thread that writes the cache: appends, evicts, repairs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lazyimg_convergent::ChunkId;

use super::dir::CacheDir;
use super::index::{Index, IndexError};
use super::record::{self, Location, RECORD_HEADER};
use super::segments::{INDEX_BYTES_PER_RECORD, Segment};
use super::{
    CacheOptions, INDEX_FIXED_BYTES, Job, MIN_FREE_BYTES, QUEUE_BYTES, SEGMENT_BYTES, Shared,
};

/// How often the order of use is noted on disk. A crash forgets this much of it.
const NOTE_USE_EVERY: Duration = Duration::from_secs(30);
/// How many bytes are written between two looks at the free space. Must be well below any
/// sensible reserve.
const LOOK_EVERY_BYTES: u64 = 4 << 20;
/// Segments sealed between two flushes of the index: what a crash makes the next open scan.
const FLUSH_EVERY_SEALS: u32 = 8;
/// Segments given up for one write that finds the disk full.
const EVICT_FOR_ONE_WRITE: u32 = 4;

/// Why a chunk was not written.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error("segment: {0}")]
    Segment(#[from] io::Error),
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error("only {free} bytes of the filesystem are free, {reserve} are to stay free")]
    NoRoom { free: u64, reserve: u64 },
}

/// The segment that is appended to.
struct Active {
    segment: Arc<Segment>,
    file: Arc<File>,
}

/// The writer's state.
pub struct Writer {
    shared: Arc<Shared>,
    dir: CacheDir,
    active: Option<Active>,
    /// Bound on segments and their index entries, in bytes.
    max_cost: u64,
    segment_bytes: u64,
    min_free: Option<u64>,
    rest: Duration,
    rested: bool,
    written_since_look: u64,
    seals_since_flush: u32,
    reconciled: bool,
}

impl Writer {
    pub fn new(shared: Arc<Shared>, dir: CacheDir, options: &CacheOptions) -> Self {
        let max_cost = options.max_bytes - INDEX_FIXED_BYTES;
        let segment_bytes = options
            .segment_bytes
            .unwrap_or(options.max_bytes / 64)
            .clamp(*SEGMENT_BYTES.start(), *SEGMENT_BYTES.end())
            .min(max_cost / 4);
        Self {
            shared,
            dir,
            active: None,
            max_cost,
            segment_bytes,
            min_free: options.min_free_bytes,
            rest: options.rest,
            rested: false,
            written_since_look: LOOK_EVERY_BYTES,
            seals_since_flush: 0,
            reconciled: false,
        }
    }

    /// The cache directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// What must be done before the first read: keep the bounds, open the index. Whatever takes
    /// long is left to [`Writer::run`].
    pub fn begin(&mut self) {
        if let Err(e) = self.keep_bounds(0).and_then(|()| self.keep_free()) {
            tracing::warn!(dir = %self.path().display(), error = %e, "the cache begins without room");
        }
        match Index::open(&self.dir.index()) {
            Ok(index) => *self.shared.index.write() = Some(index),
            Err(e) if e.is_damage() => self.shared.rebuild_asked.store(true, Relaxed),
            // Tried again by the first write.
            Err(e) => {
                tracing::warn!(dir = %self.path().display(), error = %e, "the cache's index does not open");
            }
        }
    }

    /// Works until it is told to stop.
    pub fn run(mut self, jobs: &Receiver<Job>) {
        if self.shared.rebuild_asked.load(Relaxed) {
            tracing::warn!(dir = %self.path().display(), "the cache's index is damaged, rebuilding it from the segments");
            self.rebuild();
        } else if let Err(e) = self.have_index() {
            self.recover(&e);
        }
        let mut noted = Instant::now();
        loop {
            match jobs.recv_timeout(NOTE_USE_EVERY) {
                Ok(Job::Put(id, bytes, _permit)) => {
                    self.put(&id, &bytes);
                    self.shared.pending.lock().remove(&id);
                }
                Ok(Job::Rebuild) => self.rebuild(),
                Ok(Job::Flush(done)) => {
                    let _ = done.send(());
                }
                Ok(Job::Seal(done)) => {
                    self.seal();
                    let _ = done.send(());
                }
                Ok(Job::Trim(bytes, done)) => {
                    if let Err(e) = self.trim(bytes) {
                        self.recover(&e);
                    }
                    let _ = done.send(());
                }
                Ok(Job::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if noted.elapsed() >= NOTE_USE_EVERY {
                self.shared.segments.note_use();
                noted = Instant::now();
            }
        }
        self.shared.segments.note_use();
        // Closing flushes it; the directory's lock goes after that.
        drop(self.shared.index.write().take());
    }

    fn put(&mut self, id: &ChunkId, bytes: &Bytes) {
        let resting =
            matches!(&*self.shared.rest.lock(), Some((until, _)) if Instant::now() < *until);
        if resting {
            self.shared.counters.dropped.fetch_add(1, Relaxed);
            return;
        }
        match self.try_put(id, bytes) {
            Ok(()) => {
                if self.shared.rest.lock().take().is_some() {
                    self.rested = false;
                    tracing::info!(dir = %self.path().display(), "caching again");
                }
            }
            Err(e) => {
                self.shared.counters.dropped.fetch_add(1, Relaxed);
                self.recover(&e);
            }
        }
    }

    /// A damaged index is rebuilt; whatever else keeps us from writing may pass.
    fn recover(&mut self, error: &WriteError) {
        match error {
            WriteError::Index(index) if index.is_damage() => {
                tracing::warn!(%error, "the cache's index is damaged, rebuilding it from the segments");
                self.rebuild();
            }
            _ => self.take_a_rest(error),
        }
    }

    fn take_a_rest(&mut self, why: &WriteError) {
        if !std::mem::replace(&mut self.rested, true) {
            tracing::warn!(
                dir = %self.path().display(),
                error = %why,
                "cannot write the cache: reads go on without caching, it is tried again every {:?}",
                self.rest
            );
        }
        *self.shared.rest.lock() = Some((Instant::now() + self.rest, why.to_string()));
    }

    fn try_put(&mut self, id: &ChunkId, bytes: &Bytes) -> Result<(), WriteError> {
        self.have_index()?;
        if self.is_here(id)? {
            return Ok(());
        }
        let size = (RECORD_HEADER + bytes.len()) as u64;
        if self.written_since_look >= LOOK_EVERY_BYTES {
            self.keep_free()?;
            self.written_since_look = 0;
        }
        let mut given_up = 0;
        let at = loop {
            match self.append(id, bytes) {
                Ok(at) => break at,
                Err(e) if is_full(&e) && given_up < EVICT_FOR_ONE_WRITE => {
                    given_up += 1;
                    if !self.evict_one()? {
                        return Err(e.into());
                    }
                }
                Err(e) => return Err(e.into()),
            }
        };
        self.written_since_look += size;
        let counters = &self.shared.counters;
        counters.written.fetch_add(1, Relaxed);
        counters
            .written_bytes
            .fetch_add(bytes.len() as u64, Relaxed);
        match self.with_index(|index| index.put(id, at)) {
            Err(e) => {
                self.close_stuck_index(&e);
                Err(e.into())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Writes one record behind the last one.
    fn append(&mut self, id: &ChunkId, bytes: &Bytes) -> io::Result<Location> {
        let cost = RECORD_HEADER as u64 + bytes.len() as u64 + INDEX_BYTES_PER_RECORD;
        if let Some(active) = &self.active
            && active.segment.cost() + cost > self.segment_bytes
        {
            self.seal();
        }
        if self.active.is_none() {
            self.keep_bounds(self.segment_bytes).map_err(|e| match e {
                WriteError::Segment(e) => e,
                other => io::Error::other(other),
            })?;
            let (segment, file) = self
                .shared
                .segments
                .create(self.shared.segments.next_number())?;
            self.active = Some(Active { segment, file });
        }
        let Some(Active { segment, file }) = &self.active else {
            return Err(io::Error::other("no segment"));
        };
        let at = Location {
            segment: segment.number,
            offset: segment.len(),
            len: bytes.len() as u32,
        };
        let header = record::record_header(at, id);
        let written = file
            .write_all_at(&header, at.offset)
            .and_then(|()| file.write_all_at(bytes, at.offset + RECORD_HEADER as u64));
        if let Err(e) = written {
            // What was written of it is dead weight; if even this fails, begin another file.
            if file.set_len(at.offset).is_err() {
                self.active = None;
            }
            return Err(e);
        }
        segment.set(
            at.offset + (RECORD_HEADER + bytes.len()) as u64,
            segment.records() + 1,
        );
        Ok(at)
    }

    /// Closes the active segment.
    fn seal(&mut self) {
        let Some(Active { segment, .. }) = self.active.take() else {
            return;
        };
        let mut sealed =
            self.with_index(|index| index.seal(segment.number, segment.len(), segment.records()));
        self.seals_since_flush += 1;
        if sealed.is_ok() && self.seals_since_flush >= FLUSH_EVERY_SEALS {
            self.seals_since_flush = 0;
            sealed = self.with_index(|index| index.flush(false));
        }
        if let Err(e) = sealed {
            // The next open scans the segment instead.
            tracing::debug!(segment = segment.number, error = %e, "a segment stays unsealed");
        }
    }

    fn is_here(&self, id: &ChunkId) -> Result<bool, IndexError> {
        let at = self.with_index(|index| index.get(id))?;
        let segment = at.and_then(|at| Some((at, self.shared.segments.get(at.segment)?)));
        Ok(segment.is_some_and(|(at, s)| at.end().is_some_and(|end| end <= s.len())))
    }

    /// Gives up segments until `more` bytes fit within the bound.
    fn keep_bounds(&mut self, more: u64) -> Result<(), WriteError> {
        let excess = self.index_excess();
        while self.shared.segments.cost().0 + excess + more > self.max_cost {
            if !self.evict_one()? {
                break;
            }
        }
        Ok(())
    }

    /// Bytes of disk that the index has beyond what [`INDEX_BYTES_PER_RECORD`] grants it: entries of
    /// segments given up, that RocksDB has not yet cleared away. It is made to, when there are any.
    fn index_excess(&self) -> u64 {
        let measure = || {
            let used = self.dir.index_bytes();
            let granted = self.shared.segments.index_cost() + INDEX_FIXED_BYTES;
            used.saturating_sub(granted)
        };
        let mut excess = measure();
        if excess > 0 {
            let _ = self.with_index(|index| {
                index.compact();
                Ok(())
            });
            excess = measure();
        }
        self.shared.index_excess.store(excess, Relaxed);
        excess
    }

    /// Gives up segments until the filesystem has its reserve.
    fn keep_free(&mut self) -> Result<(), WriteError> {
        let (free, total) = self.dir.room()?;
        let reserve = self.min_free.unwrap_or(MIN_FREE_BYTES.min(total / 20));
        let missing = reserve.saturating_sub(free);
        // Filesystems free space late: count what was given up instead of asking again.
        let mut given_up = 0;
        while given_up < missing {
            let before = self.shared.segments.cost().0;
            if !self.evict_one()? {
                return Err(WriteError::NoRoom { free, reserve });
            }
            given_up += before.saturating_sub(self.shared.segments.cost().0);
        }
        Ok(())
    }

    /// Gives up segments until at most `bytes` of disk are used. The active one is closed first: an
    /// empty cache should be empty.
    fn trim(&mut self, bytes: u64) -> Result<(), WriteError> {
        self.seal();
        let most = bytes.saturating_sub(INDEX_FIXED_BYTES);
        while self.shared.segments.cost().0 > most {
            if !self.evict_one()? {
                break;
            }
        }
        self.index_excess();
        Ok(())
    }

    /// Deletes the least useful segment but the active one; false when there is none.
    fn evict_one(&mut self) -> Result<bool, WriteError> {
        let keep = self.active.as_ref().map(|a| a.segment.number);
        let Some(number) = self.shared.segments.victim(keep) else {
            return Ok(false);
        };
        self.shared.segments.delete(number)?;
        self.shared.counters.evicted_segments.fetch_add(1, Relaxed);
        // What stays in the index points nowhere and reads as a miss.
        self.with_index(|index| index.purge(number))?;
        Ok(true)
    }

    /// Runs `f` on the index, if there is one.
    fn with_index<T: Default>(
        &self,
        f: impl FnOnce(&Index) -> Result<T, IndexError>,
    ) -> Result<T, IndexError> {
        match &*self.shared.index.read() {
            Some(index) => f(index),
            None => Ok(T::default()),
        }
    }

    /// RocksDB stops writing for good after some errors (a flush that found the disk full). Where
    /// the disk has room again, only opening it anew helps.
    fn close_stuck_index(&mut self, why: &IndexError) {
        let has_room = self
            .dir
            .room()
            .is_ok_and(|(free, _)| free > QUEUE_BYTES as u64);
        if has_room && self.rested {
            tracing::debug!(error = %why, "closing the cache's index, to open it anew");
            drop(self.shared.index.write().take());
            self.reconciled = false;
        }
    }

    /// Opens the index if it is closed, and makes it and the segments agree if they may not.
    fn have_index(&mut self) -> Result<(), WriteError> {
        if self.shared.index.read().is_none() {
            let index = Index::open(&self.dir.index())?;
            *self.shared.index.write() = Some(index);
            self.reconciled = false;
        }
        if !self.reconciled {
            self.reconcile()?;
            self.reconciled = true;
        }
        Ok(())
    }

    /// Builds the index from the segments alone.
    fn rebuild(&mut self) {
        self.shared.counters.index_rebuilds.fetch_add(1, Relaxed);
        // Closed before it is moved: RocksDB goes on by path.
        drop(self.shared.index.write().take());
        self.reconciled = false;
        let rebuilt = self
            .dir
            .move_index_aside()
            .map_err(WriteError::from)
            .and_then(|()| self.have_index());
        self.shared.rebuild_asked.store(false, Relaxed);
        if let Err(e) = rebuilt {
            self.take_a_rest(&e);
        }
    }

    /// Makes index and segments agree after a crash or a rebuild: entries of segments that are
    /// gone go, records of segments without a seal are read and noted.
    fn reconcile(&mut self) -> Result<(), WriteError> {
        let mut from = 0;
        while let Some(number) = self.with_index(|index| index.next_segment(from))? {
            if self.shared.segments.get(number).is_none() {
                self.with_index(|index| index.purge(number))?;
            }
            let Some(next) = number.checked_add(1) else {
                break;
            };
            from = next;
        }
        let active = self.active.as_ref().map(|a| a.segment.number);
        let mut unsealed = Vec::new();
        for segment in self.shared.segments.all() {
            match self.with_index(|index| index.sealed(segment.number))? {
                Some((len, records)) => segment.set(len.min(segment.len()), records),
                None => unsealed.push(segment),
            }
        }
        let newest = unsealed.last().map(|s| s.number);
        for segment in unsealed {
            if self.shared.stopping.load(Relaxed) {
                return Ok(());
            }
            self.adopt(&segment, active, newest)?;
        }
        Ok(())
    }

    /// Notes the records of a segment without a seal. The newest such segment is appended to, the
    /// others are sealed.
    fn adopt(
        &mut self,
        segment: &Arc<Segment>,
        active: Option<u64>,
        newest: Option<u64>,
    ) -> Result<(), WriteError> {
        let number = segment.number;
        let mut failed = Ok(());
        let scanned = self.shared.segments.scan(number, |id, at| {
            if failed.is_ok() {
                failed = self.note_record(&id, at);
            }
        });
        failed?;
        let (len, records) = match scanned {
            Ok(found) => found,
            Err(e) => {
                tracing::warn!(segment = number, error = %e, "a cache segment cannot be read, dropping it");
                (0, 0)
            }
        };
        if active == Some(number) {
            return Ok(());
        }
        if records == 0 {
            self.shared.segments.delete(number)?;
            return Ok(());
        }
        segment.set(len, records);
        let file = self.shared.segments.file(number)?;
        // Cuts off a torn record. If that fails, the next record overwrites it.
        let _ = file.set_len(len);
        if self.active.is_none() && newest == Some(number) && segment.cost() < self.segment_bytes {
            self.active = Some(Active {
                segment: Arc::clone(segment),
                file,
            });
        } else {
            self.with_index(|index| index.seal(number, len, records))?;
        }
        Ok(())
    }

    /// Notes a scanned record, unless the chunk has a later copy.
    fn note_record(&self, id: &ChunkId, at: Location) -> Result<(), IndexError> {
        self.with_index(|index| match index.get(id)? {
            Some(known) if known == at => Ok(()),
            Some(known) if known > at && self.shared.segments.get(known.segment).is_some() => {
                Ok(())
            }
            _ => index.put(id, at),
        })
    }
}

/// Whether giving up a segment may help.
fn is_full(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
