//! The documents: RocksDB with a synced write-ahead log, and the one thread that writes to it.
//!
//! Two column families: `names` has every name, with the content of short documents; `content` has the
//! content of the others, in blob files, so that listing names reads no content.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use rocksdb::{
    ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, DBRecoveryMode, Direction,
    IteratorMode, ReadOptions, WriteBatch, WriteOptions,
};
use tokio::sync::{mpsc, oneshot};

use super::{Shared, again, rocks, wal};
use crate::engine::{EngineError, When};

/// Requests that wait for the writer; more make their askers wait.
pub const QUEUE: usize = 128;
/// Requests and bytes of one batch.
const BATCH_BYTES: usize = 32 << 20;
/// Longer content lies apart from its name.
const INLINE_BYTES: usize = 1 << 10;
/// Disk that a document takes beside its content, in bytes.
const OVERHEAD_BYTES: u64 = 1 << 10;

const BLOCK_CACHE_BYTES: usize = 64 << 20;
const WRITE_BUFFER_BYTES: usize = 8 << 20;
const MAX_OPEN_FILES: i32 = 256;
const MAX_WAL_BYTES: u64 = 64 << 20;

/// Column families. RocksDB wants one of this name.
const NAMES: &str = "default";
const CONTENT: &str = "content";

/// First byte of a value in `names`: the content follows, or is in `content`.
const HERE: u8 = 1;
const APART: u8 = 2;

/// The open documents.
pub struct Docs {
    db: DB,
    synced: WriteOptions,
}

impl Docs {
    /// Opens or makes the documents in `dir`. What was acknowledged is there, or this fails.
    pub fn open(dir: &Path) -> Result<Self, rocksdb::Error> {
        match Self::open_with(dir, DBRecoveryMode::TolerateCorruptedTailRecords) {
            Err(e) if !rocks::is_disk_trouble(&e) && wal::is_torn(dir).unwrap_or(false) => {
                tracing::warn!(
                    dir = %dir.display(), error = %e,
                    "the last write to the documents was torn; it was not acknowledged, and is dropped"
                );
                Self::open_with(dir, DBRecoveryMode::PointInTime)
            }
            done => done,
        }
    }

    fn open_with(dir: &Path, recovery: DBRecoveryMode) -> Result<Self, rocksdb::Error> {
        let mut options = rocks::options(BLOCK_CACHE_BYTES, WRITE_BUFFER_BYTES, MAX_OPEN_FILES);
        options.create_missing_column_families(true);
        options.set_max_total_wal_size(MAX_WAL_BYTES);
        options.set_wal_recovery_mode(recovery);
        // Most content is sealed or small.
        options.set_compression_type(DBCompressionType::None);
        let names = options.clone();
        let mut content = options.clone();
        content.set_enable_blob_files(true);
        content.set_min_blob_size(INLINE_BYTES as u64);
        content.set_enable_blob_gc(true);
        let families = [
            ColumnFamilyDescriptor::new(NAMES, names),
            ColumnFamilyDescriptor::new(CONTENT, content),
        ];
        let db = DB::open_cf_descriptors(&options, dir, families)?;
        let mut synced = WriteOptions::default();
        synced.set_sync(true);
        Ok(Self { db, synced })
    }

    fn content(&self) -> Result<&ColumnFamily, EngineError> {
        self.db.cf_handle(CONTENT).ok_or_else(|| {
            EngineError::Damaged("the documents have no column family `content`".to_owned())
        })
    }

    /// A document.
    pub fn get(&self, name: &str) -> Result<Option<Bytes>, EngineError> {
        let error = |e: rocksdb::Error| rocks::error("documents", &e);
        // A document that is replaced between the two looks is read once more.
        for _ in 0..8 {
            let Some(value) = self.db.get_pinned(name).map_err(error)? else {
                return Ok(None);
            };
            match value.split_first() {
                Some((&HERE, content)) => return Ok(Some(Bytes::copy_from_slice(content))),
                Some((&APART, _)) => {
                    if let Some(content) = self.db.get_cf(self.content()?, name).map_err(error)? {
                        return Ok(Some(content.into()));
                    }
                }
                _ => break,
            }
        }
        Err(EngineError::Damaged(format!(
            "the document {name} has no content"
        )))
    }

    /// Whether a document is there.
    pub fn has(&self, name: &str) -> Result<bool, EngineError> {
        let found = self.db.get_pinned(name);
        Ok(found.map_err(|e| rocks::error("documents", &e))?.is_some())
    }

    /// Names that begin with `prefix`, from the one after `after` on.
    pub fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<String>, EngineError> {
        let mut start = prefix.as_bytes().to_vec();
        if let Some(after) = after
            && after >= prefix
        {
            start = after.as_bytes().to_vec();
            start.push(0);
        }
        let mut read = ReadOptions::default();
        read.set_iterate_upper_bound(end_of(prefix));
        let names = self
            .db
            .iterator_opt(IteratorMode::From(&start, Direction::Forward), read);
        names
            .take(limit)
            .map(|item| {
                let (name, _) = item.map_err(|e| rocks::error("documents", &e))?;
                String::from_utf8(name.into_vec())
                    .map_err(|_| EngineError::Damaged("a document's name is no text".to_owned()))
            })
            .collect()
    }

    /// Adds a document to a batch. `large`: names whose content the batch puts apart.
    fn put(
        &self,
        batch: &mut WriteBatch,
        large: &mut HashSet<String>,
        name: &str,
        bytes: &Bytes,
    ) -> Result<(), EngineError> {
        if bytes.len() > INLINE_BYTES {
            batch.put(name, [APART]);
            batch.put_cf(self.content()?, name, bytes);
            large.insert(name.to_owned());
            return Ok(());
        }
        let mut value = Vec::with_capacity(1 + bytes.len());
        value.push(HERE);
        value.extend_from_slice(bytes);
        batch.put(name, value);
        self.forget_content(batch, large, name)
    }

    fn delete(
        &self,
        batch: &mut WriteBatch,
        large: &mut HashSet<String>,
        name: &str,
    ) -> Result<(), EngineError> {
        batch.delete(name);
        self.forget_content(batch, large, name)
    }

    /// Deletes content that lies apart. Most documents are short and new, and leave no trace here.
    fn forget_content(
        &self,
        batch: &mut WriteBatch,
        large: &mut HashSet<String>,
        name: &str,
    ) -> Result<(), EngineError> {
        let before = self
            .db
            .get_pinned(name)
            .map_err(|e| rocks::error("documents", &e))?;
        if large.remove(name) || before.is_some_and(|value| value.first() == Some(&APART)) {
            batch.delete_cf(self.content()?, name);
        }
        Ok(())
    }
}

/// The first key behind all names that begin with `prefix`: names are ASCII.
fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    end.push(0xff);
    end
}

/// What the thread is asked to do, and where the answer goes.
pub struct Job {
    /// What.
    pub ask: Ask,
    /// Whether something was put that was not there, where that was asked.
    pub reply: oneshot::Sender<Result<bool, EngineError>>,
}

/// What the thread is asked to do.
pub enum Ask {
    /// Keep a document.
    Put(String, Bytes, When),
    /// Keep several.
    PutAll(Vec<(String, Bytes)>),
    /// Delete one.
    Delete(String),
    /// Delete all whose names begin so.
    RemovePrefix(String),
}

impl Ask {
    /// Bytes of disk that it takes; deleting always fits into the reserve.
    fn room(&self) -> u64 {
        let one = |name: &String, bytes: &Bytes| (name.len() + bytes.len()) as u64 + OVERHEAD_BYTES;
        match self {
            // Once in the log, once in a file.
            Self::Put(name, bytes, _) => one(name, bytes) * 2,
            Self::PutAll(docs) => docs.iter().map(|(n, b)| one(n, b) * 2).sum(),
            Self::Delete(_) | Self::RemovePrefix(_) => 0,
        }
    }
}

/// The thread's state.
pub struct Writer {
    shared: Arc<Shared>,
    /// RocksDB did not take something; after some errors it stops for good.
    stuck: bool,
}

impl Writer {
    /// A thread's state; the documents are open.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            stuck: false,
        }
    }

    /// Works until every sender is gone.
    pub fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(job) = jobs.blocking_recv() {
            let mut bytes = job.ask.room();
            let mut batch = vec![job];
            while batch.len() < QUEUE && bytes < BATCH_BYTES as u64 {
                let Ok(job) = jobs.try_recv() else { break };
                bytes += job.ask.room();
                batch.push(job);
            }
            self.commit(batch);
        }
    }

    fn commit(&mut self, batch: Vec<Job>) {
        let mut room = 0;
        let mut taken = Vec::with_capacity(batch.len());
        for job in batch {
            let more = room + job.ask.room();
            match self.shared.dir.need_room(more) {
                Err(e) if job.ask.room() > 0 => {
                    let _ = job.reply.send(Err(e));
                }
                _ => {
                    room = more;
                    taken.push(job);
                }
            }
        }
        match self.try_commit(&taken) {
            Ok(new) => {
                for (job, new) in taken.into_iter().zip(new) {
                    let _ = job.reply.send(Ok(new));
                }
            }
            Err(e) => {
                tracing::warn!(error = %e, requests = taken.len(), "documents could not be written");
                for job in taken {
                    let _ = job.reply.send(Err(again(&e)));
                }
            }
        }
    }

    fn try_commit(&mut self, jobs: &[Job]) -> Result<Vec<bool>, EngineError> {
        self.mend()?;
        let docs = self.shared.docs.read();
        let docs = docs.as_ref().ok_or_else(super::closed)?;
        let mut batch = WriteBatch::default();
        // What the batch has done so far: to single documents since the last prefix went, and prefixes.
        let mut changed: HashMap<&str, bool> = HashMap::new();
        let mut removed: Vec<&str> = Vec::new();
        let mut large = HashSet::new();
        let mut new = Vec::with_capacity(jobs.len());
        for job in jobs {
            let mut is_new = true;
            match &job.ask {
                Ask::Put(name, bytes, when) => {
                    if *when == When::Absent {
                        is_new = match changed.get(name.as_str()) {
                            Some(there) => !there,
                            None if removed.iter().any(|p| name.starts_with(p)) => true,
                            None => !docs.has(name)?,
                        };
                    }
                    if is_new {
                        docs.put(&mut batch, &mut large, name, bytes)?;
                        changed.insert(name, true);
                    }
                }
                Ask::PutAll(all) => {
                    for (name, bytes) in all {
                        docs.put(&mut batch, &mut large, name, bytes)?;
                        changed.insert(name, true);
                    }
                }
                Ask::Delete(name) => {
                    docs.delete(&mut batch, &mut large, name)?;
                    changed.insert(name, false);
                }
                Ask::RemovePrefix(prefix) => {
                    let (from, to) = (prefix.as_bytes().to_vec(), end_of(prefix));
                    batch.delete_range(from.clone(), to.clone());
                    batch.delete_range_cf(docs.content()?, from, to);
                    changed.retain(|name, _| !name.starts_with(prefix.as_str()));
                    removed.push(prefix);
                }
            }
            new.push(is_new);
        }
        if !batch.is_empty()
            && let Err(e) = docs.db.write_opt(batch, &docs.synced)
        {
            self.stuck = true;
            return Err(rocks::error("documents", &e));
        }
        Ok(new)
    }

    /// Opens the documents anew after something was not taken.
    fn mend(&mut self) -> Result<(), EngineError> {
        if !self.stuck {
            return Ok(());
        }
        self.shared.dir.need_room(0)?;
        let mut slot = self.shared.docs.write();
        if self.shared.is_closed() {
            return Err(super::closed());
        }
        // Closed before it is opened.
        drop(slot.take());
        *slot = Some(super::open_docs(&self.shared.dir)?);
        self.stuck = false;
        tracing::info!("opened the documents anew");
        Ok(())
    }
}
