//! A fast engine in front of a durable one: chunks that are asked for again and again come from memory.
//!
//! The hot engine is trusted with nothing. It may be down, slow, full or wrong: it is given little time,
//! is left alone for a while after it has failed, and what it gives is checked against its id. Documents,
//! lists and lengths always come from the durable engine.

use std::collections::HashSet;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_convergent::ChunkId;
use parking_lot::{Mutex, RwLock};
use tokio::sync::Semaphore;

use super::{Engine, EngineError, RootId, When};

/// Failures in a row after which the hot engine is left alone.
const FAILURES: u32 = 5;
/// Chunks on their way into the hot engine at once; more are not put there.
const MAX_FILLS: usize = 16;
/// For putting one chunk there, and for deleting a root there.
const FILL_TIMEOUT: Duration = Duration::from_secs(5);
const REMOVE_TIMEOUT: Duration = Duration::from_secs(60);

/// How patient to be with the hot engine.
#[derive(Debug, Clone, Copy)]
pub struct HotOptions {
    /// For one read; then the durable engine is asked.
    pub deadline: Duration,
    /// How long it is left alone after some failures in a row.
    pub rest: Duration,
}

impl Default for HotOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_millis(50),
            rest: Duration::from_secs(5),
        }
    }
}

/// What the hot engine was good for, counted since the start.
#[derive(Debug, Default)]
pub struct HotCounters {
    /// Chunks that came from it.
    pub hits: AtomicU64,
    /// Chunks that it did not have.
    pub misses: AtomicU64,
    /// Reads that failed or took too long.
    pub failures: AtomicU64,
    /// Reads that did not ask it, since it had failed before.
    pub skipped: AtomicU64,
    /// Copies that were not what their id says.
    pub wrong: AtomicU64,
    /// Chunks put into it.
    pub fills: AtomicU64,
}

/// Leaves something alone for a while that keeps failing.
#[derive(Debug, Default)]
struct Breaker {
    state: Mutex<BreakerState>,
}

#[derive(Debug, Default)]
struct BreakerState {
    failures: u32,
    rests_until: Option<Instant>,
}

impl Breaker {
    /// Whether to try. After a rest, one in each rest's time tries until it works again.
    fn allows(&self, rest: Duration) -> bool {
        let mut state = self.state.lock();
        match state.rests_until {
            None => true,
            Some(until) if Instant::now() < until => false,
            Some(_) => {
                state.rests_until = Some(Instant::now() + rest);
                true
            }
        }
    }

    fn worked(&self) {
        *self.state.lock() = BreakerState::default();
    }

    fn failed(&self, rest: Duration) {
        let mut state = self.state.lock();
        state.failures = state.failures.saturating_add(1);
        if state.failures == FAILURES {
            tracing::warn!("the hot engine keeps failing; it is left alone for a while");
        }
        if state.failures >= FAILURES {
            state.rests_until = Some(Instant::now() + rest);
        }
    }
}

/// The hot engine, and all that it needs in the background.
struct Hot {
    engine: Arc<dyn Engine>,
    options: HotOptions,
    breaker: Breaker,
    counters: Arc<HotCounters>,
    fills: Arc<Semaphore>,
    /// Roots that were deleted: what the hot engine still has of them is not there any more. Roots
    /// never come back, and a store has few.
    gone: RwLock<HashSet<RootId>>,
}

impl Hot {
    /// The result of `f`, if the hot engine is well and gives it in time.
    async fn ask<T>(
        &self,
        limit: Duration,
        f: impl Future<Output = Result<T, EngineError>>,
    ) -> Option<T> {
        let why = match tokio::time::timeout(limit, f).await {
            Ok(Ok(done)) => {
                self.breaker.worked();
                return Some(done);
            }
            // It works, but takes nothing for now: reads go on.
            Ok(Err(EngineError::Full(why))) => {
                tracing::debug!(why, "the hot engine is full");
                return None;
            }
            Ok(Err(e)) => e.to_string(),
            Err(_) => format!("no answer within {limit:?}"),
        };
        tracing::debug!(why, "the hot engine failed");
        self.breaker.failed(self.options.rest);
        None
    }

    /// A chunk that is what its id says.
    async fn get(&self, root: RootId, id: &ChunkId) -> Option<Bytes> {
        if self.gone.read().contains(&root) {
            return None;
        }
        if !self.breaker.allows(self.options.rest) {
            self.counters.skipped.fetch_add(1, Relaxed);
            return None;
        }
        let asked = self.ask(self.options.deadline, self.engine.get_chunk(root, id));
        let counter = match asked.await {
            Some(Some(bytes)) if ChunkId::of(&bytes) == *id => {
                self.counters.hits.fetch_add(1, Relaxed);
                return Some(bytes);
            }
            Some(Some(_)) => &self.counters.wrong,
            Some(None) => &self.counters.misses,
            None => &self.counters.failures,
        };
        counter.fetch_add(1, Relaxed);
        None
    }

    /// Puts a chunk there in the background, if it is right and not too much is on its way.
    fn fill(self: &Arc<Self>, root: RootId, id: ChunkId, bytes: Bytes) {
        if self.gone.read().contains(&root) || !self.breaker.allows(self.options.rest) {
            return;
        }
        let Ok(permit) = Arc::clone(&self.fills).try_acquire_owned() else {
            return;
        };
        let hot = Arc::clone(self);
        tokio::spawn(async move {
            let _permit = permit;
            if ChunkId::of(&bytes) != id {
                return;
            }
            // In the place of a wrong copy too.
            let put = hot.engine.replace_chunk(root, &id, bytes);
            if hot.ask(FILL_TIMEOUT, put).await.is_some() {
                hot.counters.fills.fetch_add(1, Relaxed);
            }
        });
    }
}

/// A hot engine in front of a durable one.
pub struct HotEngine {
    name: String,
    hot: Arc<Hot>,
    durable: Arc<dyn Engine>,
}

impl HotEngine {
    /// Puts `hot` in front of `durable`.
    pub fn new(hot: Arc<dyn Engine>, durable: Arc<dyn Engine>, options: HotOptions) -> Self {
        Self {
            name: format!("{}+{}", hot.name(), durable.name()),
            hot: Arc::new(Hot {
                engine: hot,
                options,
                breaker: Breaker::default(),
                counters: Arc::default(),
                fills: Arc::new(Semaphore::new(MAX_FILLS)),
                gone: RwLock::default(),
            }),
            durable,
        }
    }

    /// What the hot engine was good for.
    pub fn counters(&self) -> Arc<HotCounters> {
        Arc::clone(&self.hot.counters)
    }
}

#[async_trait]
impl Engine for HotEngine {
    fn name(&self) -> &str {
        &self.name
    }

    async fn put_chunk(
        &self,
        root: RootId,
        id: &ChunkId,
        bytes: Bytes,
    ) -> Result<bool, EngineError> {
        let new = self.durable.put_chunk(root, id, bytes.clone()).await?;
        self.hot.fill(root, *id, bytes);
        Ok(new)
    }

    async fn replace_chunk(
        &self,
        root: RootId,
        id: &ChunkId,
        bytes: Bytes,
    ) -> Result<(), EngineError> {
        self.durable.replace_chunk(root, id, bytes.clone()).await?;
        self.hot.fill(root, *id, bytes);
        Ok(())
    }

    async fn get_chunk(&self, root: RootId, id: &ChunkId) -> Result<Option<Bytes>, EngineError> {
        if let Some(bytes) = self.hot.get(root, id).await {
            return Ok(Some(bytes));
        }
        let found = self.durable.get_chunk(root, id).await?;
        if let Some(bytes) = &found {
            self.hot.fill(root, *id, bytes.clone());
        }
        Ok(found)
    }

    async fn get_kept_chunk(
        &self,
        root: RootId,
        id: &ChunkId,
    ) -> Result<Option<Bytes>, EngineError> {
        self.durable.get_kept_chunk(root, id).await
    }

    async fn stat_chunks(
        &self,
        root: RootId,
        ids: &[ChunkId],
    ) -> Result<Vec<Option<u32>>, EngineError> {
        self.durable.stat_chunks(root, ids).await
    }

    async fn list_chunks(
        &self,
        root: RootId,
        after: Option<&ChunkId>,
        limit: usize,
    ) -> Result<Vec<(ChunkId, u32)>, EngineError> {
        self.durable.list_chunks(root, after, limit).await
    }

    async fn remove_chunks(&self, root: RootId) -> Result<(), EngineError> {
        self.hot.gone.write().insert(root);
        self.durable.remove_chunks(root).await?;
        let hot = Arc::clone(&self.hot);
        // What it does not delete it forgets in time.
        tokio::spawn(async move {
            if hot.breaker.allows(hot.options.rest) {
                let removed = hot.engine.remove_chunks(root);
                hot.ask(REMOVE_TIMEOUT, removed).await;
            }
        });
        Ok(())
    }

    async fn put_doc(&self, name: &str, bytes: Bytes, when: When) -> Result<bool, EngineError> {
        self.durable.put_doc(name, bytes, when).await
    }

    async fn put_docs(&self, docs: Vec<(String, Bytes)>) -> Result<(), EngineError> {
        self.durable.put_docs(docs).await
    }

    async fn get_doc(&self, name: &str) -> Result<Option<Bytes>, EngineError> {
        self.durable.get_doc(name).await
    }

    async fn has_docs(&self, names: &[String]) -> Result<Vec<bool>, EngineError> {
        self.durable.has_docs(names).await
    }

    async fn delete_doc(&self, name: &str) -> Result<(), EngineError> {
        self.durable.delete_doc(name).await
    }

    async fn list_docs(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<String>, EngineError> {
        self.durable.list_docs(prefix, after, limit).await
    }

    async fn remove_docs(&self, prefix: &str) -> Result<(), EngineError> {
        self.durable.remove_docs(prefix).await
    }

    async fn check(&self) -> Result<(), EngineError> {
        self.durable.check().await
    }

    async fn used_bytes(&self) -> Result<Option<u64>, EngineError> {
        self.durable.used_bytes().await
    }

    async fn close(&self) {
        self.hot.engine.close().await;
        self.durable.close().await;
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::{Call, MemoryEngine};
    use super::*;

    const ROOT: RootId = RootId::FIRST;

    fn both(rest: Duration) -> (Arc<MemoryEngine>, Arc<MemoryEngine>, HotEngine) {
        let (hot, durable) = (Arc::new(MemoryEngine::new()), Arc::new(MemoryEngine::new()));
        let options = HotOptions {
            deadline: Duration::from_secs(30),
            rest,
        };
        let engine = HotEngine::new(hot.clone(), durable.clone(), options);
        (hot, durable, engine)
    }

    async fn until(what: &str, condition: impl Fn() -> bool) {
        let end = Instant::now() + Duration::from_secs(30);
        while !condition() {
            assert!(Instant::now() < end, "{what}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn has(engine: &MemoryEngine, id: ChunkId) -> bool {
        engine.contents().1.contains(&(ROOT, id))
    }

    #[tokio::test]
    async fn chunks_come_into_the_hot_engine_on_put_and_on_read_and_are_read_from_there() {
        let (hot, durable, engine) = both(Duration::from_secs(60));
        let (a, b) = (Bytes::from("a chunk"), Bytes::from("another"));
        let (id_a, id_b) = (ChunkId::of(&a), ChunkId::of(&b));
        engine.put_chunk(ROOT, &id_a, a.clone()).await.unwrap();
        durable.put_chunk(ROOT, &id_b, b.clone()).await.unwrap();
        engine.get_chunk(ROOT, &id_b).await.unwrap();
        until("both are hot", || has(&hot, id_a) && has(&hot, id_b)).await;
        durable.fail_with(|call, _| {
            (call == Call::ReadChunk).then(|| EngineError::Unavailable("gone".into()))
        });
        assert_eq!(engine.get_chunk(ROOT, &id_a).await.unwrap(), Some(a));
        assert_eq!(engine.get_chunk(ROOT, &id_b).await.unwrap(), Some(b));
        assert_eq!(engine.counters().hits.load(Relaxed), 2);
    }

    #[tokio::test]
    async fn a_wrong_copy_in_the_hot_engine_is_not_given_out_and_replaced() {
        let (hot, _durable, engine) = both(Duration::from_secs(60));
        let bytes = Bytes::from("a chunk");
        let id = ChunkId::of(&bytes);
        engine.put_chunk(ROOT, &id, bytes.clone()).await.unwrap();
        until("it is hot", || has(&hot, id)).await;
        for wrong in ["a chunK", "a ch", "a chunk and more"] {
            let fills = engine.counters().fills.load(Relaxed);
            assert!(hot.damage_chunk(ROOT, &id, Bytes::from(wrong)));
            assert_eq!(
                engine.get_chunk(ROOT, &id).await.unwrap(),
                Some(bytes.clone())
            );
            until("it is mended", || {
                engine.counters().fills.load(Relaxed) > fills
            })
            .await;
        }
        assert_eq!(engine.counters().wrong.load(Relaxed), 3);
        assert_eq!(hot.get_chunk(ROOT, &id).await.unwrap(), Some(bytes));
    }

    #[tokio::test]
    async fn a_hot_engine_that_fails_is_left_alone_and_tried_again_after_a_rest() {
        let (hot, _durable, engine) = both(Duration::from_millis(200));
        let bytes = Bytes::from("a chunk");
        let id = ChunkId::of(&bytes);
        hot.fail_with(|_, _| Some(EngineError::Unavailable("down".into())));
        engine.put_chunk(ROOT, &id, bytes.clone()).await.unwrap();
        for _ in 0..50 {
            assert_eq!(
                engine.get_chunk(ROOT, &id).await.unwrap(),
                Some(bytes.clone())
            );
        }
        until("it is left alone", || {
            engine.counters().skipped.load(Relaxed) > 0
        })
        .await;
        hot.heal();
        let end = Instant::now() + Duration::from_secs(30);
        while engine.counters().hits.load(Relaxed) == 0 {
            assert!(Instant::now() < end, "it is asked again");
            assert_eq!(
                engine.get_chunk(ROOT, &id).await.unwrap(),
                Some(bytes.clone())
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn a_full_hot_engine_fails_nothing_and_goes_on_being_read() {
        let (hot, durable, engine) = both(Duration::from_secs(600));
        let (a, b) = (Bytes::from("a chunk"), Bytes::from("another"));
        let (id_a, id_b) = (ChunkId::of(&a), ChunkId::of(&b));
        hot.put_chunk(ROOT, &id_a, a.clone()).await.unwrap();
        hot.fail_with(|call, _| {
            (call == Call::WriteChunk).then(|| EngineError::Full("maxmemory".into()))
        });
        durable.put_chunk(ROOT, &id_a, a.clone()).await.unwrap();
        for _ in 0..20 {
            engine.replace_chunk(ROOT, &id_b, b.clone()).await.unwrap();
        }
        until("all fills were tried", || {
            engine.hot.fills.available_permits() == MAX_FILLS
        })
        .await;
        assert_eq!(engine.get_chunk(ROOT, &id_a).await.unwrap(), Some(a));
        assert_eq!(engine.counters().hits.load(Relaxed), 1);
    }

    #[tokio::test]
    async fn a_deleted_root_is_gone_though_the_hot_engine_still_has_it() {
        let (hot, _durable, engine) = both(Duration::from_secs(60));
        let bytes = Bytes::from("a chunk");
        let id = ChunkId::of(&bytes);
        engine.put_chunk(ROOT, &id, bytes.clone()).await.unwrap();
        until("it is hot", || has(&hot, id)).await;
        hot.fail_with(|call, _| {
            (call == Call::WriteChunk).then(|| EngineError::Unavailable("stuck".into()))
        });
        engine.remove_chunks(ROOT).await.unwrap();
        assert_eq!(engine.get_chunk(ROOT, &id).await.unwrap(), None);
        assert!(has(&hot, id));
    }

    #[tokio::test]
    async fn damage_in_the_durable_engine_does_not_spread() {
        let (hot, durable, engine) = both(Duration::from_secs(60));
        let bytes = Bytes::from("a chunk");
        let id = ChunkId::of(&bytes);
        durable
            .put_chunk(ROOT, &id, Bytes::from("wrong"))
            .await
            .unwrap();
        assert_eq!(
            engine.get_chunk(ROOT, &id).await.unwrap(),
            Some(Bytes::from("wrong"))
        );
        until("the fill has ended", || {
            engine.hot.fills.available_permits() == MAX_FILLS
        })
        .await;
        assert!(!has(&hot, id));
    }
}
