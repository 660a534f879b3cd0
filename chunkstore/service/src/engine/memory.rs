//! An engine in memory, for tests: it forgets everything when it is dropped, and fails when told to.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_convergent::ChunkId;
use parking_lot::Mutex;

use super::{Engine, EngineError, RootId, When, check_chunk_put, check_doc_name, check_doc_put};

/// What a call of [`MemoryEngine`] is about, for [`MemoryEngine::fail_with`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// Reads a chunk, its length, or a list of chunks.
    ReadChunk,
    /// Puts, replaces or removes chunks.
    WriteChunk,
    /// Reads a document or a list of documents.
    ReadDoc,
    /// Puts or removes documents.
    WriteDoc,
    /// [`Engine::check`].
    Check,
}

/// Decides whether a call fails, and how; it gets the document's name or the chunk's hex digits.
pub type Fault = Box<dyn Fn(Call, &str) -> Option<EngineError> + Send + Sync>;

/// Chunks and documents in maps.
#[derive(Default)]
pub struct MemoryEngine {
    held: Mutex<Held>,
    fault: Mutex<Option<Fault>>,
    slowness: Mutex<Duration>,
    calls: AtomicU64,
}

#[derive(Default)]
struct Held {
    chunks: BTreeMap<(RootId, ChunkId), Bytes>,
    docs: BTreeMap<String, Bytes>,
}

impl MemoryEngine {
    /// One that holds nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on, what `fault` says goes wrong. A call that fails changes nothing.
    pub fn fail_with(
        &self,
        fault: impl Fn(Call, &str) -> Option<EngineError> + Send + Sync + 'static,
    ) {
        *self.fault.lock() = Some(Box::new(fault));
    }

    /// From now on, nothing goes wrong.
    pub fn heal(&self) {
        *self.fault.lock() = None;
    }

    /// From now on, every call takes that long.
    pub fn slow_down(&self, by: Duration) {
        *self.slowness.lock() = by;
    }

    /// How many calls there were.
    pub fn calls(&self) -> u64 {
        self.calls.load(Relaxed)
    }

    /// Puts wrong bytes in the place of a chunk that is there; whether it was.
    pub fn damage_chunk(&self, root: RootId, id: &ChunkId, wrong: Bytes) -> bool {
        match self.held.lock().chunks.get_mut(&(root, *id)) {
            Some(bytes) => {
                *bytes = wrong;
                true
            }
            None => false,
        }
    }

    /// Everything that lies there: names of documents, and chunks with their roots.
    pub fn contents(&self) -> (Vec<String>, Vec<(RootId, ChunkId)>) {
        let held = self.held.lock();
        let docs = held.docs.keys().cloned().collect();
        (docs, held.chunks.keys().copied().collect())
    }

    async fn begin(&self) {
        self.calls.fetch_add(1, Relaxed);
        let slowness = *self.slowness.lock();
        if !slowness.is_zero() {
            tokio::time::sleep(slowness).await;
        }
    }

    fn may(&self, call: Call, what: &str) -> Result<(), EngineError> {
        match &*self.fault.lock() {
            Some(fault) => fault(call, what).map_or(Ok(()), Err),
            None => Ok(()),
        }
    }
}

/// The length of a chunk, which the format bounds.
fn len_of(bytes: &Bytes) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

#[async_trait]
impl Engine for MemoryEngine {
    fn name(&self) -> &str {
        "memory"
    }

    async fn put_chunk(
        &self,
        root: RootId,
        id: &ChunkId,
        bytes: Bytes,
    ) -> Result<bool, EngineError> {
        self.begin().await;
        check_chunk_put(id, &bytes)?;
        self.may(Call::WriteChunk, &id.hex())?;
        let mut held = self.held.lock();
        if held.chunks.contains_key(&(root, *id)) {
            return Ok(false);
        }
        held.chunks.insert((root, *id), bytes);
        Ok(true)
    }

    async fn replace_chunk(
        &self,
        root: RootId,
        id: &ChunkId,
        bytes: Bytes,
    ) -> Result<(), EngineError> {
        self.begin().await;
        check_chunk_put(id, &bytes)?;
        self.may(Call::WriteChunk, &id.hex())?;
        self.held.lock().chunks.insert((root, *id), bytes);
        Ok(())
    }

    async fn get_chunk(&self, root: RootId, id: &ChunkId) -> Result<Option<Bytes>, EngineError> {
        self.begin().await;
        self.may(Call::ReadChunk, &id.hex())?;
        Ok(self.held.lock().chunks.get(&(root, *id)).cloned())
    }

    async fn stat_chunks(
        &self,
        root: RootId,
        ids: &[ChunkId],
    ) -> Result<Vec<Option<u32>>, EngineError> {
        self.begin().await;
        for id in ids {
            self.may(Call::ReadChunk, &id.hex())?;
        }
        let held = self.held.lock();
        let len = |id: &ChunkId| held.chunks.get(&(root, *id)).map(len_of);
        Ok(ids.iter().map(len).collect())
    }

    async fn list_chunks(
        &self,
        root: RootId,
        after: Option<&ChunkId>,
        limit: usize,
    ) -> Result<Vec<(ChunkId, u32)>, EngineError> {
        self.begin().await;
        self.may(Call::ReadChunk, "")?;
        let from = match after {
            Some(id) => Bound::Excluded((root, *id)),
            None => Bound::Included((root, ChunkId([0; 32]))),
        };
        let held = self.held.lock();
        let to = Bound::Included((root, ChunkId([0xff; 32])));
        let listed = held.chunks.range((from, to)).take(limit);
        Ok(listed
            .map(|((_, id), bytes)| (*id, len_of(bytes)))
            .collect())
    }

    async fn remove_chunks(&self, root: RootId) -> Result<(), EngineError> {
        self.begin().await;
        self.may(Call::WriteChunk, "")?;
        self.held.lock().chunks.retain(|(of, _), _| *of != root);
        Ok(())
    }

    async fn put_doc(&self, name: &str, bytes: Bytes, when: When) -> Result<bool, EngineError> {
        self.begin().await;
        check_doc_put(name, &bytes)?;
        self.may(Call::WriteDoc, name)?;
        let mut held = self.held.lock();
        if when == When::Absent && held.docs.contains_key(name) {
            return Ok(false);
        }
        held.docs.insert(name.to_owned(), bytes);
        Ok(true)
    }

    async fn put_docs(&self, docs: Vec<(String, Bytes)>) -> Result<(), EngineError> {
        for (name, bytes) in docs {
            self.put_doc(&name, bytes, When::Always).await?;
        }
        Ok(())
    }

    async fn get_doc(&self, name: &str) -> Result<Option<Bytes>, EngineError> {
        self.begin().await;
        check_doc_name(name)?;
        self.may(Call::ReadDoc, name)?;
        Ok(self.held.lock().docs.get(name).cloned())
    }

    async fn has_docs(&self, names: &[String]) -> Result<Vec<bool>, EngineError> {
        self.begin().await;
        for name in names {
            check_doc_name(name)?;
            self.may(Call::ReadDoc, name)?;
        }
        let held = self.held.lock();
        Ok(names.iter().map(|n| held.docs.contains_key(n)).collect())
    }

    async fn delete_doc(&self, name: &str) -> Result<(), EngineError> {
        self.begin().await;
        check_doc_name(name)?;
        self.may(Call::WriteDoc, name)?;
        self.held.lock().docs.remove(name);
        Ok(())
    }

    async fn list_docs(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<String>, EngineError> {
        self.begin().await;
        self.may(Call::ReadDoc, prefix)?;
        let from = match after {
            Some(name) if name >= prefix => Bound::Excluded(name),
            _ => Bound::Included(prefix),
        };
        let held = self.held.lock();
        let listed = held.docs.range::<str, _>((from, Bound::Unbounded));
        Ok(listed
            .map(|(name, _)| name)
            .take_while(|name| name.starts_with(prefix))
            .take(limit)
            .cloned()
            .collect())
    }

    async fn remove_docs(&self, prefix: &str) -> Result<(), EngineError> {
        self.begin().await;
        self.may(Call::WriteDoc, prefix)?;
        self.held
            .lock()
            .docs
            .retain(|name, _| !name.starts_with(prefix));
        Ok(())
    }

    async fn check(&self) -> Result<(), EngineError> {
        self.begin().await;
        self.may(Call::Check, "")
    }

    async fn used_bytes(&self) -> Result<Option<u64>, EngineError> {
        self.begin().await;
        let held = self.held.lock();
        let all = held.chunks.values().chain(held.docs.values());
        Ok(Some(all.map(|bytes| bytes.len() as u64).sum()))
    }

    async fn close(&self) {}
}
