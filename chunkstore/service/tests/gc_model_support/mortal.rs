//! An engine that dies with its process or is held up, and the clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_convergent::ChunkId;
use lazyimg_store::catalog::Clock;
use lazyimg_store::engine::memory::MemoryEngine;
use lazyimg_store::engine::{Engine, EngineError, RootId, When};

/// The engine as one process sees it: it dies with the process.
pub struct Mortal {
    pub engine: Arc<MemoryEngine>,
    /// Calls until death; negative: none is planned. Zero: dead.
    pub calls_left: AtomicI64,
    pub last_is_done: bool,
    /// Calls until one is held up until the gate opens; negative: none is.
    pub calls_to_gate: AtomicI64,
    pub gate: tokio::sync::Semaphore,
    /// Decides how often each call lets the other process go first.
    pub dice: Arc<AtomicU64>,
}

impl Mortal {
    async fn step(&self) -> Step {
        let dice = self.dice.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::SeqCst);
        let mixed = (dice ^ (dice >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        for _ in 0..(mixed >> 60) {
            tokio::task::yield_now().await;
        }
        if self.calls_to_gate.fetch_sub(1, Ordering::SeqCst) == 0 {
            let _opened = self.gate.acquire().await.unwrap();
        }
        match self.calls_left.load(Ordering::SeqCst) {
            0 => Step::Dead,
            1 => {
                self.calls_left.store(0, Ordering::SeqCst);
                Step::Last
            }
            left if left > 0 => {
                self.calls_left.store(left - 1, Ordering::SeqCst);
                Step::Go
            }
            _ => Step::Go,
        }
    }
}

enum Step {
    Go,
    Last,
    Dead,
}

macro_rules! call {
    ($self:ident . $method:ident ( $($arg:expr),* )) => {{
        let dead = || Err(EngineError::Unavailable("the process died".to_owned()));
        match $self.step().await {
            Step::Go => $self.engine.$method($($arg),*).await,
            Step::Last => {
                if $self.last_is_done {
                    let _nobody_hears = $self.engine.$method($($arg),*).await;
                }
                dead()
            }
            Step::Dead => dead(),
        }
    }};
}

type Done<T> = Result<T, EngineError>;

#[async_trait]
impl Engine for Mortal {
    fn name(&self) -> &str {
        "mortal"
    }
    async fn put_chunk(&self, root: RootId, id: &ChunkId, bytes: Bytes) -> Done<bool> {
        call!(self.put_chunk(root, id, bytes))
    }
    async fn replace_chunk(&self, root: RootId, id: &ChunkId, bytes: Bytes) -> Done<()> {
        call!(self.replace_chunk(root, id, bytes))
    }
    async fn get_chunk(&self, root: RootId, id: &ChunkId) -> Done<Option<Bytes>> {
        call!(self.get_chunk(root, id))
    }
    async fn stat_chunks(&self, root: RootId, ids: &[ChunkId]) -> Done<Vec<Option<u32>>> {
        call!(self.stat_chunks(root, ids))
    }
    async fn list_chunks(
        &self,
        root: RootId,
        after: Option<&ChunkId>,
        limit: usize,
    ) -> Done<Vec<(ChunkId, u32)>> {
        call!(self.list_chunks(root, after, limit))
    }
    async fn remove_chunks(&self, root: RootId) -> Done<()> {
        call!(self.remove_chunks(root))
    }
    async fn put_doc(&self, name: &str, bytes: Bytes, when: When) -> Done<bool> {
        call!(self.put_doc(name, bytes, when))
    }
    async fn put_docs(&self, docs: Vec<(String, Bytes)>) -> Done<()> {
        // Not atomic: each is a step.
        for (name, bytes) in docs {
            self.put_doc(&name, bytes, When::Always).await?;
        }
        Ok(())
    }
    async fn get_doc(&self, name: &str) -> Done<Option<Bytes>> {
        call!(self.get_doc(name))
    }
    async fn has_docs(&self, names: &[String]) -> Done<Vec<bool>> {
        call!(self.has_docs(names))
    }
    async fn delete_doc(&self, name: &str) -> Done<()> {
        call!(self.delete_doc(name))
    }
    async fn list_docs(&self, prefix: &str, after: Option<&str>, n: usize) -> Done<Vec<String>> {
        call!(self.list_docs(prefix, after, n))
    }
    async fn remove_docs(&self, prefix: &str) -> Done<()> {
        // Not atomic either.
        for name in self.engine.list_docs(prefix, None, usize::MAX).await? {
            self.delete_doc(&name).await?;
        }
        Ok(())
    }
    async fn check(&self) -> Done<()> {
        call!(self.check())
    }
    async fn used_bytes(&self) -> Done<Option<u64>> {
        call!(self.used_bytes())
    }
    async fn close(&self) {}
}

/// Wall time that goes with tokio's, which the test moves.
pub struct TestClock(pub tokio::time::Instant);

impl Clock for TestClock {
    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) + self.0.elapsed()
    }
}
