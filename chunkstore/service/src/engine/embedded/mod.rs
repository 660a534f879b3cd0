//! The default engine: everything in one directory of the store's own disk.
//!
//! Chunks lie in append-only [`segments`], their places in an [`index`] that can be built anew from
//! them; documents lie in RocksDB with a synced log ([`docs`]). One thread each writes chunks
//! ([`writer`]) and documents: what has queued up shares one sync. `docs/store-engine.md` has the bytes
//! and what happens after a crash.

mod dir;
mod docs;
mod index;
mod pool;
mod ready;
pub mod record;
#[cfg(test)]
mod record_tests;
mod recover;
mod rocks;
mod segments;
mod wal;
mod writer;

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::JoinHandle;

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_convergent::ChunkId;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Semaphore, mpsc, oneshot};

use self::dir::DataDir;
use self::docs::{Ask, Docs};
use self::index::Index;
use self::ready::Ready;
use self::segments::{Found, Segments};
use self::writer::Removal;
use super::{Engine, EngineError, FilePart, RootId, When, check_doc_name, check_doc_put};

/// Reads under way at once; each may hold a thread and a chunk.
const MAX_READS: usize = 64;
/// A segment is full at this many bytes, unless it is set.
const SEGMENT_BYTES: u64 = 256 << 20;
/// What a segment may be set to, in bytes.
const SEGMENT_RANGE: std::ops::RangeInclusive<u64> = 4 << 10..=4 << 30;

/// What an [`EmbeddedEngine`] is opened with.
#[derive(Debug, Clone)]
pub struct EmbeddedOptions {
    /// The data directory; made if it is not there.
    pub dir: PathBuf,
    /// Bytes of its filesystem that stay free; `None` for a twentieth, from 24 MiB to 1 GiB.
    pub min_free_bytes: Option<u64>,
    /// At how many bytes a segment file is full; `None` for 256 MiB.
    pub segment_bytes: Option<u64>,
}

impl EmbeddedOptions {
    /// The usual ones.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            min_free_bytes: None,
            segment_bytes: None,
        }
    }
}

/// What the engine and its threads share.
struct Shared {
    index: RwLock<Option<Index>>,
    docs: RwLock<Option<Docs>>,
    segments: Segments,
    ready: Ready,
    closed: AtomicBool,
    dir: DataDir,
}

impl Shared {
    fn is_closed(&self) -> bool {
        self.closed.load(SeqCst)
    }

    /// Closes the databases: RocksDB must be closed before the process ends.
    fn close(&self) {
        self.closed.store(true, SeqCst);
        drop(self.index.write().take());
        drop(self.docs.write().take());
        self.dir.unlock();
    }

    fn with_index<T>(
        &self,
        f: impl FnOnce(&Index) -> Result<T, rocksdb::Error>,
    ) -> Result<T, EngineError> {
        let index = self.index.read();
        let index = index.as_ref().ok_or_else(closed)?;
        f(index).map_err(|e| self.index_error(&e))
    }

    fn with_docs<T>(
        &self,
        f: impl FnOnce(&Docs) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        f(self.docs.read().as_ref().ok_or_else(closed)?)
    }

    /// What an error of the index means. A damaged one is built anew at the next start.
    fn index_error(&self, e: &rocksdb::Error) -> EngineError {
        let error = rocks::error("index", e);
        if let EngineError::Damaged(text) = error {
            if let Err(e) = File::create(self.dir.rebuild_mark()) {
                tracing::warn!(error = %e, "cannot note that the index is damaged");
            }
            return EngineError::Damaged(format!(
                "{text}; start the store anew: it builds the index from the segments"
            ));
        }
        error
    }

    fn get_chunk(&self, root: u32, id: &ChunkId) -> Result<Option<Bytes>, EngineError> {
        let mut looked = None;
        loop {
            let before = self.ready.before();
            let Some(at) = self.with_index(|index| index.get(root, id))? else {
                return Ok(None);
            };
            let why = match self.segments.read(root, id, at) {
                Found::Chunk(bytes) => {
                    self.ready.intact(before, root, id, at);
                    return Ok(Some(bytes));
                }
                Found::Gone => format!("segment {} is missing", at.segment),
                Found::Bad(why) => why,
                Found::Trouble(why) => return Err(EngineError::Unavailable(why)),
            };
            // The root may have been deleted, or the chunk replaced, since the index was asked.
            if looked == Some(at) {
                return Err(EngineError::Damaged(format!(
                    "chunk {} of root {root}: {why}",
                    id.hex()
                )));
            }
            looked = Some(at);
        }
    }
}

fn closed() -> EngineError {
    EngineError::Unavailable("the data directory is closed".to_owned())
}

/// The same error for one more asker.
fn again(e: &EngineError) -> EngineError {
    match e {
        EngineError::Full(text) => EngineError::Full(text.clone()),
        EngineError::Unavailable(text) => EngineError::Unavailable(text.clone()),
        EngineError::Damaged(text) => EngineError::Damaged(text.clone()),
        EngineError::Setup(text) => EngineError::Setup(text.clone()),
    }
}

/// Opens the index; one that is damaged is put aside and an empty one is made.
fn open_index(dir: &DataDir) -> Result<Index, EngineError> {
    let why = if dir.rebuild_mark().exists() {
        "it was found damaged".to_owned()
    } else {
        match Index::open(&dir.index()) {
            Ok(Some(index)) => return Ok(index),
            Ok(None) => "it is of another version".to_owned(),
            Err(e) if rocks::is_disk_trouble(&e) => return Err(rocks::error("index", &e)),
            Err(e) => e.to_string(),
        }
    };
    tracing::warn!(dir = %dir.path().display(), why, "building the index anew from the segments");
    let failed = |e: std::io::Error| {
        EngineError::Unavailable(format!(
            "cannot put the damaged index {} aside: {e}",
            dir.index().display()
        ))
    };
    dir.move_index_aside().map_err(failed)?;
    match std::fs::remove_file(dir.rebuild_mark()) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    match Index::open(&dir.index()) {
        Ok(Some(index)) => Ok(index),
        Ok(None) => Err(EngineError::Damaged(
            "a new index is of another version".into(),
        )),
        Err(e) => Err(rocks::error("index", &e)),
    }
}

fn open_docs(dir: &DataDir) -> Result<Docs, EngineError> {
    Docs::open(&dir.docs()).map_err(|e| match rocks::error("documents", &e) {
        EngineError::Damaged(text) => EngineError::Damaged(format!(
            "{text}; nothing was changed: restore {} from a backup",
            dir.docs().display()
        )),
        other => other,
    })
}

/// The threads, and how they are reached.
struct Running {
    chunks: mpsc::Sender<writer::Job>,
    docs: mpsc::Sender<docs::Job>,
    threads: Vec<JoinHandle<()>>,
}

/// An engine in a directory.
pub struct EmbeddedEngine {
    shared: Arc<Shared>,
    running: Mutex<Option<Running>>,
    reads: Arc<Semaphore>,
}

impl EmbeddedEngine {
    /// Opens or makes a data directory, and mends what a crash has left. Blocks, for as long as it
    /// takes to read what the index does not know.
    pub fn open(options: &EmbeddedOptions) -> Result<Self, EngineError> {
        let segment_bytes = options.segment_bytes.unwrap_or(SEGMENT_BYTES);
        if !SEGMENT_RANGE.contains(&segment_bytes) {
            return Err(EngineError::Setup(format!(
                "segments of {segment_bytes} bytes: choose from {} to {}",
                SEGMENT_RANGE.start(),
                SEGMENT_RANGE.end()
            )));
        }
        let dir = DataDir::open(&options.dir, options.min_free_bytes)?;
        let docs = open_docs(&dir)?;
        let segments = Segments::new(dir.segments());
        let index = open_index(&dir)?;
        let done = recover::reconcile(&segments, &index)?;
        if done != recover::Recovered::default() {
            tracing::info!(?done, dir = %dir.path().display(), "mended the data directory");
        }
        let shared = Arc::new(Shared {
            index: RwLock::new(Some(index)),
            docs: RwLock::new(Some(docs)),
            segments,
            ready: Ready::default(),
            closed: AtomicBool::new(false),
            dir,
        });
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(run)
                .map_err(|e| EngineError::Unavailable(format!("cannot start a thread: {e}")))
        };
        let (chunks, jobs) = mpsc::channel(writer::QUEUE);
        let chunk_writer = writer::Writer::new(Arc::clone(&shared), segment_bytes);
        let first = spawn("store-chunks", Box::new(move || chunk_writer.run(jobs)))?;
        let (docs, jobs) = mpsc::channel(docs::QUEUE);
        let doc_writer = docs::Writer::new(Arc::clone(&shared));
        let second = spawn("store-docs", Box::new(move || doc_writer.run(jobs)))?;
        Ok(Self {
            shared,
            running: Mutex::new(Some(Running {
                chunks,
                docs,
                threads: vec![first, second],
            })),
            reads: Arc::new(Semaphore::new(MAX_READS)),
        })
    }

    /// Runs `f` where blocking is allowed, with a bound on how many do so.
    async fn read<T: Send + 'static>(
        &self,
        f: impl FnOnce(&Shared) -> Result<T, EngineError> + Send + 'static,
    ) -> Result<T, EngineError> {
        // Given back by the thread, not by the asker: one who goes away leaves the read under way.
        let permit = Arc::clone(&self.reads).acquire_owned().await;
        let permit = permit.map_err(|_| closed())?;
        let shared = Arc::clone(&self.shared);
        let job = tokio::task::spawn_blocking(move || {
            let result = f(&shared);
            drop(permit);
            result
        });
        job.await
            .map_err(|e| EngineError::Unavailable(format!("a read was broken off: {e}")))?
    }

    async fn put(
        &self,
        root: RootId,
        id: &ChunkId,
        bytes: Bytes,
        replace: bool,
    ) -> Result<bool, EngineError> {
        super::check_chunk_put(id, &bytes)?;
        let (reply, answer) = oneshot::channel();
        let job = writer::Job::Put(writer::Put {
            root: root.0.get(),
            id: *id,
            bytes,
            replace,
            reply,
        });
        self.chunks()?.send(job).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }

    async fn remove(&self, root: u32, step: Removal) -> Result<(), EngineError> {
        let (reply, answer) = oneshot::channel();
        let job = writer::Job::Remove { root, step, reply };
        self.chunks()?.send(job).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }

    fn chunks(&self) -> Result<mpsc::Sender<writer::Job>, EngineError> {
        let running = self.running.lock();
        Ok(running.as_ref().ok_or_else(closed)?.chunks.clone())
    }

    async fn ask(&self, ask: Ask) -> Result<bool, EngineError> {
        let docs = {
            let running = self.running.lock();
            running.as_ref().ok_or_else(closed)?.docs.clone()
        };
        let (reply, answer) = oneshot::channel();
        docs.send(docs::Job { ask, reply })
            .await
            .map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }
}

/// Lets the threads finish what is queued, and closes.
fn end(shared: &Shared, running: Option<Running>) {
    if let Some(Running {
        chunks,
        docs,
        threads,
    }) = running
    {
        drop((chunks, docs));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the store's engine has panicked");
            }
        }
    }
    shared.close();
}

impl Drop for EmbeddedEngine {
    fn drop(&mut self) {
        end(&self.shared, self.running.get_mut().take());
    }
}

#[async_trait]
impl Engine for EmbeddedEngine {
    fn name(&self) -> &str {
        "embedded"
    }

    async fn put_chunk(
        &self,
        root: RootId,
        id: &ChunkId,
        bytes: Bytes,
    ) -> Result<bool, EngineError> {
        self.put(root, id, bytes, false).await
    }

    async fn replace_chunk(
        &self,
        root: RootId,
        id: &ChunkId,
        bytes: Bytes,
    ) -> Result<(), EngineError> {
        self.put(root, id, bytes, true).await.map(|_| ())
    }

    async fn get_chunk(&self, root: RootId, id: &ChunkId) -> Result<Option<Bytes>, EngineError> {
        let id = *id;
        self.read(move |shared| shared.get_chunk(root.0.get(), &id))
            .await
    }

    fn ready_chunk(&self, root: RootId, id: &ChunkId) -> Option<FilePart> {
        let (ready, root) = (&self.shared.ready, root.0.get());
        let at = ready.place(root, id)?;
        let file = self.shared.segments.open_file(root, at.segment)?;
        ready.part(root, id, file, at)
    }

    async fn stat_chunks(
        &self,
        root: RootId,
        ids: &[ChunkId],
    ) -> Result<Vec<Option<u32>>, EngineError> {
        let ids = ids.to_vec();
        self.read(move |shared| {
            shared.with_index(|index| {
                let len = |id| Ok(index.get(root.0.get(), id)?.map(|at| at.len));
                ids.iter().map(len).collect()
            })
        })
        .await
    }

    async fn list_chunks(
        &self,
        root: RootId,
        after: Option<&ChunkId>,
        limit: usize,
    ) -> Result<Vec<(ChunkId, u32)>, EngineError> {
        let after = after.copied();
        self.read(move |shared| {
            shared.with_index(|index| index.list(root.0.get(), after.as_ref(), limit))
        })
        .await
    }

    async fn remove_chunks(&self, root: RootId) -> Result<(), EngineError> {
        let root = root.0.get();
        self.remove(root, Removal::TakeAway).await?;
        let cleared = self.read(move |shared| {
            shared.segments.clear_removed(root).map_err(|e| {
                EngineError::Unavailable(format!("cannot delete the segments of root {root}: {e}"))
            })
        });
        cleared.await?;
        self.remove(root, Removal::Forget).await
    }

    async fn put_doc(&self, name: &str, bytes: Bytes, when: When) -> Result<bool, EngineError> {
        check_doc_put(name, &bytes)?;
        self.ask(Ask::Put(name.to_owned(), bytes, when)).await
    }

    async fn put_docs(&self, docs: Vec<(String, Bytes)>) -> Result<(), EngineError> {
        for (name, bytes) in &docs {
            check_doc_put(name, bytes)?;
        }
        self.ask(Ask::PutAll(docs)).await.map(|_| ())
    }

    async fn get_doc(&self, name: &str) -> Result<Option<Bytes>, EngineError> {
        check_doc_name(name)?;
        let name = name.to_owned();
        self.read(move |shared| shared.with_docs(|docs| docs.get(&name)))
            .await
    }

    async fn has_docs(&self, names: &[String]) -> Result<Vec<bool>, EngineError> {
        names.iter().try_for_each(|name| check_doc_name(name))?;
        let names = names.to_vec();
        self.read(move |shared| {
            shared.with_docs(|docs| names.iter().map(|name| docs.has(name)).collect())
        })
        .await
    }

    async fn delete_doc(&self, name: &str) -> Result<(), EngineError> {
        check_doc_name(name)?;
        self.ask(Ask::Delete(name.to_owned())).await.map(|_| ())
    }

    async fn list_docs(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<String>, EngineError> {
        let (prefix, after) = (prefix.to_owned(), after.map(str::to_owned));
        self.read(move |shared| {
            shared.with_docs(|docs| docs.list(&prefix, after.as_deref(), limit))
        })
        .await
    }

    async fn remove_docs(&self, prefix: &str) -> Result<(), EngineError> {
        self.ask(Ask::RemovePrefix(prefix.to_owned()))
            .await
            .map(|_| ())
    }

    async fn check(&self) -> Result<(), EngineError> {
        {
            let running = self.running.lock();
            let running = running.as_ref().ok_or_else(closed)?;
            if running.chunks.is_closed() || running.docs.is_closed() {
                return Err(EngineError::Unavailable(
                    "a writing thread has ended; start the store anew".to_owned(),
                ));
            }
        }
        self.read(|shared| shared.dir.need_room(record::MAX_RECORD as u64))
            .await
    }

    async fn used_bytes(&self) -> Result<Option<u64>, EngineError> {
        self.read(|shared| {
            let used = shared.dir.used();
            used.map(Some)
                .map_err(|e| EngineError::Unavailable(format!("cannot measure the data: {e}")))
        })
        .await
    }

    async fn close(&self) {
        let running = self.running.lock().take();
        let shared = Arc::clone(&self.shared);
        let ended = tokio::task::spawn_blocking(move || end(&shared, running)).await;
        if let Err(e) = ended {
            tracing::error!(error = %e, "the store's engine did not end well");
        }
    }
}
