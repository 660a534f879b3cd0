//! The one thread that writes chunks: what is queued is appended, synced once, noted in the index, and
//! then acknowledged together.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use lazyimg_convergent::ChunkId;
use tokio::sync::{mpsc, oneshot};

use super::index::{Entries, Index};
use super::record::{RECORD_HEADER, SEGMENT_HEADER, SegmentId};
use super::recover;
use super::segments;
use super::{Shared, again};
use crate::engine::EngineError;

/// Chunks that wait for the writer; more make their askers wait.
pub const QUEUE: usize = 128;
/// Bytes of one batch. More waits for the next one.
const BATCH_BYTES: usize = 32 << 20;
/// Disk that a chunk takes in the index, in bytes, twice over for compactions.
const INDEX_BYTES: u64 = 256;
/// Roots whose newest segment is kept at hand.
const MAX_ACTIVE: usize = 16;

/// What the thread is asked to do.
pub enum Job {
    /// Keep a chunk.
    Put(Put),
    /// Delete all chunks of a root: one step of it.
    Remove {
        /// Its number.
        root: u32,
        /// Which.
        step: Removal,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<(), EngineError>>,
    },
}

/// How a root is deleted. Between the steps its files are unlinked, which may take long: chunks are
/// written meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// Take its files away, at once and for good.
    TakeAway,
    /// Forget what the index has of it.
    Forget,
}

/// A chunk to keep.
pub struct Put {
    /// The number of its root.
    pub root: u32,
    /// Its id.
    pub id: ChunkId,
    /// The chunk.
    pub bytes: Bytes,
    /// Whether a copy that is there gives way.
    pub replace: bool,
    /// Where the answer goes: whether it is new.
    pub reply: oneshot::Sender<Result<bool, EngineError>>,
}

/// The segment of a root that is appended to.
struct Active {
    id: SegmentId,
    file: Arc<File>,
    /// Bytes that were acknowledged.
    committed: u64,
    /// Bytes that were written.
    len: u64,
}

/// Why a batch was not written.
enum Failure {
    /// Nothing of it can be trusted from here on.
    Write(EngineError),
    /// The kernel may have forgotten what it could not write: the segment takes no more.
    Sync(EngineError),
    /// The segments have it, the index does not.
    Index(EngineError),
}

/// The thread's state.
pub struct Writer {
    shared: Arc<Shared>,
    segment_bytes: u64,
    active: HashMap<u32, Active>,
    /// The highest segment number of each root since the store was opened. None is used twice:
    /// a reader that still holds a place in a deleted segment finds nothing there, not something else.
    highest: HashMap<u32, u32>,
    /// The index missed something, or does not work.
    index_stuck: bool,
}

impl Writer {
    /// A thread's state; the index is open and agrees with the segments.
    pub fn new(shared: Arc<Shared>, segment_bytes: u64) -> Self {
        Self {
            shared,
            segment_bytes,
            active: HashMap::new(),
            highest: HashMap::new(),
            index_stuck: false,
        }
    }

    /// Works until every sender is gone.
    pub fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        let mut next = jobs.blocking_recv();
        while let Some(job) = next.take() {
            let mut batch = Vec::new();
            let mut bytes = 0;
            let mut taken = Some(job);
            while let Some(Job::Put(put)) = taken {
                bytes += put.bytes.len();
                batch.push(put);
                taken = None;
                if batch.len() >= QUEUE || bytes >= BATCH_BYTES {
                    break;
                }
                taken = jobs.try_recv().ok();
            }
            if !batch.is_empty() {
                self.commit(batch);
            }
            if let Some(Job::Remove { root, step, reply }) = taken {
                // Nobody may be waiting any more.
                let _ = reply.send(match step {
                    Removal::TakeAway => self.take_away(root),
                    Removal::Forget => self.forget(root),
                });
            }
            next = jobs.blocking_recv();
        }
        if let Some(index) = &*self.shared.index.read()
            && let Err(e) = index.flush()
        {
            tracing::warn!(error = %e, "the index could not be flushed; the next start reads the newest segments");
        }
    }

    /// Writes a batch and answers everybody in it.
    fn commit(&mut self, batch: Vec<Put>) {
        match self.try_commit(&batch) {
            Ok(new) => {
                for (put, new) in batch.into_iter().zip(new) {
                    let _ = put.reply.send(Ok(new));
                }
            }
            Err(e) => {
                tracing::warn!(error = %e, chunks = batch.len(), "chunks could not be written");
                for put in batch {
                    let _ = put.reply.send(Err(again(&e)));
                }
            }
        }
    }

    fn try_commit(&mut self, batch: &[Put]) -> Result<Vec<bool>, EngineError> {
        self.mend_index()?;
        let shared = Arc::clone(&self.shared);
        let index = shared.index.read();
        let index = index.as_ref().ok_or_else(super::closed)?;
        let mut seen = HashSet::new();
        let mut new = Vec::with_capacity(batch.len());
        let mut room = 0;
        for put in batch {
            let there = !seen.insert((put.root, put.id))
                || index
                    .get(put.root, &put.id)
                    .map_err(|e| self.shared.index_error(&e))?
                    .is_some();
            new.push(put.replace || !there);
            if put.replace || !there {
                room += (RECORD_HEADER + put.bytes.len()) as u64 + INDEX_BYTES;
            }
        }
        if room == 0 {
            return Ok(new);
        }
        shared.dir.need_room(room)?;
        let wanted = batch.iter().zip(&new).filter(|(_, new)| **new);
        let written = self.write(index, wanted.map(|(put, _)| put));
        match written {
            Ok(()) => Ok(new),
            Err(failure) => Err(self.undo(failure)),
        }
    }

    /// Appends, syncs, notes.
    fn write<'a>(
        &mut self,
        index: &Index,
        puts: impl Iterator<Item = &'a Put>,
    ) -> Result<(), Failure> {
        let mut entries = Entries::default();
        let mut touched: BTreeSet<u32> = BTreeSet::new();
        let mut replaced = Vec::new();
        let mut rolled = false;
        for put in puts {
            let size = (RECORD_HEADER + put.bytes.len()) as u64;
            if let Some(full) = self.active.get(&put.root)
                && full.len + size > self.segment_bytes
                && full.len > SEGMENT_HEADER
            {
                sync(full)?;
                entries.tail(full.id, full.len);
                self.active.remove(&put.root);
                touched.remove(&put.root);
                rolled = true;
            }
            let active = self.active(index, put.root)?;
            let at = segments::append(&active.file, active.id, active.len, &put.id, &put.bytes)
                .map_err(|e| Failure::Write(disk_error("append to", active.id, &e)))?;
            active.len += size;
            entries.put(put.root, &put.id, at);
            if put.replace {
                replaced.push((put.root, put.id));
            }
            touched.insert(put.root);
        }
        for root in &touched {
            if let Some(active) = self.active.get(root) {
                sync(active)?;
                entries.tail(active.id, active.len);
            }
        }
        index
            .write(entries)
            .map_err(|e| Failure::Index(self.shared.index_error(&e)))?;
        for (root, id) in replaced {
            self.shared.ready.replaced(root, &id);
        }
        for root in touched {
            if let Some(active) = self.active.get_mut(&root) {
                active.committed = active.len;
            }
        }
        if rolled {
            // Bounds what the next start has to read. Should it fail, the next write tells.
            if let Err(e) = index.flush() {
                tracing::warn!(error = %e, "the index could not be flushed");
                self.index_stuck = true;
            }
        }
        if self.active.len() > MAX_ACTIVE {
            self.active.clear();
        }
        Ok(())
    }

    /// The segment to append to, made if need be.
    fn active(&mut self, index: &Index, root: u32) -> Result<&mut Active, Failure> {
        if !self.active.contains_key(&root) {
            let active = self.begin(index, root)?;
            let highest = self.highest.entry(root).or_default();
            *highest = active.id.number.max(*highest);
            self.active.insert(root, active);
        }
        self.active
            .get_mut(&root)
            .ok_or_else(|| Failure::Write(super::closed()))
    }

    fn begin(&self, index: &Index, root: u32) -> Result<Active, Failure> {
        let segments = &self.shared.segments;
        let listed = segments.list(root).map_err(|e| {
            Failure::Write(EngineError::Unavailable(format!(
                "cannot list root {root}: {e}"
            )))
        })?;
        let known = self.highest.get(&root).copied().unwrap_or_default();
        if let Some(&id) = listed.last()
            && id.number >= known
        {
            // One that ends where the index says, and has room, goes on.
            let file = segments
                .file(id)
                .map_err(|e| Failure::Write(disk_error("open", id, &e)))?;
            let len = file
                .metadata()
                .map_err(|e| Failure::Write(disk_error("stat", id, &e)))?
                .len();
            let tail = index
                .tail(id)
                .map_err(|e| Failure::Index(self.shared.index_error(&e)))?;
            if len < self.segment_bytes && tail == Some(len) {
                return Ok(Active {
                    id,
                    file,
                    committed: len,
                    len,
                });
            }
        }
        let last = listed.last().map_or(0, |id| id.number).max(known);
        let number = last.checked_add(1).ok_or_else(|| {
            Failure::Write(EngineError::Full(format!(
                "root {root} has no segment numbers left"
            )))
        })?;
        let id = SegmentId { root, number };
        let file = segments
            .create(id)
            .map_err(|e| Failure::Write(disk_error("make", id, &e)))?;
        Ok(Active {
            id,
            file,
            committed: SEGMENT_HEADER,
            len: SEGMENT_HEADER,
        })
    }

    /// Takes back what a batch has written, so that segments end where the index says.
    fn undo(&mut self, failure: Failure) -> EngineError {
        let (e, forget) = match failure {
            Failure::Write(e) => (e, false),
            Failure::Sync(e) => (e, true),
            Failure::Index(e) => {
                self.index_stuck = true;
                (e, true)
            }
        };
        for (_, active) in self.active.drain() {
            if active.len == active.committed {
                continue;
            }
            // If this fails, the segment is longer than the index says, and takes no more.
            if let Err(e) = active.file.set_len(active.committed) {
                tracing::warn!(segment = ?active.id, error = %e, "cannot cut off a failed write");
            }
            if forget {
                let highest = self.highest.entry(active.id.root).or_default();
                *highest = active.id.number.saturating_add(1).max(*highest);
            }
        }
        e
    }

    /// Opens an index anew that did not take something: RocksDB stops for good after some errors, a
    /// full disk among them.
    fn mend_index(&mut self) -> Result<(), EngineError> {
        if !self.index_stuck && self.shared.index.read().is_some() {
            return Ok(());
        }
        // Its files need room too.
        self.shared.dir.need_room(0)?;
        let mut slot = self.shared.index.write();
        if self.shared.is_closed() {
            return Err(super::closed());
        }
        // Closed before it is opened.
        drop(slot.take());
        self.active.clear();
        let index = super::open_index(&self.shared.dir)?;
        let done = recover::reconcile(&self.shared.segments, &index)?;
        tracing::info!(?done, "opened the index anew");
        *slot = Some(index);
        self.index_stuck = false;
        Ok(())
    }

    fn take_away(&mut self, root: u32) -> Result<(), EngineError> {
        drop(self.active.remove(&root));
        for id in self.shared.segments.list(root).unwrap_or_default() {
            let highest = self.highest.entry(root).or_default();
            *highest = id.number.max(*highest);
        }
        let failed = |e: io::Error| {
            EngineError::Unavailable(format!("cannot delete the segments of root {root}: {e}"))
        };
        // From here on the root is gone, whatever happens: see recover.rs. Its files go first, since
        // the index may need their room to forget them.
        self.shared.segments.remove_root(root).map_err(failed)?;
        self.shared.ready.removed(root);
        Ok(())
    }

    fn forget(&mut self, root: u32) -> Result<(), EngineError> {
        self.mend_index()?;
        let purged = match &*self.shared.index.read() {
            Some(index) => index.purge(root),
            None => return Err(super::closed()),
        };
        purged.map_err(|e| {
            self.index_stuck = true;
            self.shared.index_error(&e)
        })
    }
}

fn sync(active: &Active) -> Result<(), Failure> {
    active
        .file
        .sync_data()
        .map_err(|e| Failure::Sync(disk_error("sync", active.id, &e)))
}

fn disk_error(doing: &str, id: SegmentId, e: &io::Error) -> EngineError {
    let text = format!(
        "cannot {doing} segment {} of root {}: {e}",
        id.number, id.root
    );
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => EngineError::Full(text),
        _ => EngineError::Unavailable(text),
    }
}
