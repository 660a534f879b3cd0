//! An engine in trouble, and bounds that are reached.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_chunkstore::wire::write_ids;
use lazyimg_convergent::ChunkId;
use lazyimg_store::engine::config::EngineSettings;
use lazyimg_store::engine::{Engine, EngineError, RootId, When};
use reqwest::Method;
use tokio::sync::Notify;

use crate::world::{Setup, World, chunk, refused, until};

/// An engine with a switch for trouble.
struct Troubled {
    inner: Arc<dyn Engine>,
    /// 0 none, 1 unavailable, 2 full, 3 damaged, 4 reads wait for `go`.
    trouble: AtomicU8,
    go: Notify,
}

impl Troubled {
    fn check(&self) -> Result<(), EngineError> {
        let why = || "redis.internal:6379 says no".to_owned();
        match self.trouble.load(Ordering::SeqCst) {
            1 => Err(EngineError::Unavailable(why())),
            2 => Err(EngineError::Full(why())),
            3 => Err(EngineError::Damaged(why())),
            _ => Ok(()),
        }
    }

    fn set(&self, trouble: u8) {
        self.trouble.store(trouble, Ordering::SeqCst);
    }
}

type R<T> = Result<T, EngineError>;

#[async_trait]
impl Engine for Troubled {
    fn name(&self) -> &str {
        "troubled"
    }
    async fn put_chunk(&self, root: RootId, id: &ChunkId, bytes: Bytes) -> R<bool> {
        self.check()?;
        self.inner.put_chunk(root, id, bytes).await
    }
    async fn replace_chunk(&self, root: RootId, id: &ChunkId, bytes: Bytes) -> R<()> {
        self.check()?;
        self.inner.replace_chunk(root, id, bytes).await
    }
    async fn get_chunk(&self, root: RootId, id: &ChunkId) -> R<Option<Bytes>> {
        if self.trouble.load(Ordering::SeqCst) == 4 {
            self.go.notified().await;
        }
        self.check()?;
        self.inner.get_chunk(root, id).await
    }
    async fn stat_chunks(&self, root: RootId, ids: &[ChunkId]) -> R<Vec<Option<u32>>> {
        self.check()?;
        self.inner.stat_chunks(root, ids).await
    }
    async fn list_chunks(
        &self,
        root: RootId,
        after: Option<&ChunkId>,
        limit: usize,
    ) -> R<Vec<(ChunkId, u32)>> {
        self.inner.list_chunks(root, after, limit).await
    }
    async fn remove_chunks(&self, root: RootId) -> R<()> {
        self.inner.remove_chunks(root).await
    }
    async fn put_doc(&self, name: &str, bytes: Bytes, when: When) -> R<bool> {
        self.inner.put_doc(name, bytes, when).await
    }
    async fn put_docs(&self, docs: Vec<(String, Bytes)>) -> R<()> {
        self.inner.put_docs(docs).await
    }
    async fn get_doc(&self, name: &str) -> R<Option<Bytes>> {
        self.inner.get_doc(name).await
    }
    async fn has_docs(&self, names: &[String]) -> R<Vec<bool>> {
        self.inner.has_docs(names).await
    }
    async fn delete_doc(&self, name: &str) -> R<()> {
        self.inner.delete_doc(name).await
    }
    async fn list_docs(&self, prefix: &str, after: Option<&str>, limit: usize) -> R<Vec<String>> {
        self.inner.list_docs(prefix, after, limit).await
    }
    async fn remove_docs(&self, prefix: &str) -> R<()> {
        self.inner.remove_docs(prefix).await
    }
    async fn check(&self) -> R<()> {
        Troubled::check(self)
    }
    async fn used_bytes(&self) -> R<Option<u64>> {
        self.inner.used_bytes().await
    }
    async fn close(&self) {
        self.inner.close().await;
    }
}

async fn troubled(mut setup: Setup) -> (World, Arc<Troubled>) {
    let settings = EngineSettings::embedded(setup.path("data"));
    let engine = Arc::new(Troubled {
        inner: settings.open().await.unwrap().engine,
        trouble: AtomicU8::new(0),
        go: Notify::new(),
    });
    setup.engine = Some(Arc::clone(&engine) as Arc<dyn Engine>);
    (setup.start().await, engine)
}

#[tokio::test]
async fn trouble_of_the_engine_is_told_as_such_and_passes() {
    let (w, engine) = troubled(Setup::new()).await;
    let id = w.put_chunk("", &chunk(1, 1000)).await;
    let get = format!("/v1/chunks/{id}");
    let other = chunk(2, 1000);
    let put = format!("/v1/chunks/{}", ChunkId::of(&other));
    for (trouble, want) in [
        (1, (503, "unavailable")),
        (2, (507, "full")),
        (3, (503, "unavailable")),
    ] {
        engine.set(trouble);
        let done = w.put("", &put, other.clone()).await;
        assert_eq!(done.headers().contains_key("retry-after"), want.0 == 503);
        let text = done.text().await.unwrap();
        assert!(!text.contains("redis.internal"), "{text}");
        assert!(text.contains(want.1), "{text}");
    }
    engine.set(1);
    let (status, code) = refused(w.get("", &get).await).await;
    assert_eq!((status, code.as_str()), (503, "unavailable"));
    let many = w.post("", "/v1/chunks/get", write_ids(&[id])).await;
    let frames = many.bytes().await.unwrap();
    assert_eq!(
        (frames[0], frames[8], frames.len()),
        (4, 255, 16),
        "failed, and the end"
    );
    until("it is not ready", async || {
        w.get("", "/readyz").await.status() == 503
    })
    .await;
    assert_eq!(w.get("", "/healthz").await.status(), 200);
    assert!(
        w.metric(
            "",
            "lazyimg_store_engine_errors_total{kind=\"unavailable\"}"
        )
        .await
            >= 2.0
    );
    engine.set(0);
    until("it is ready", async || {
        w.get("", "/readyz").await.status() == 200
    })
    .await;
    assert_eq!(w.get("", &get).await.status(), 200);
    assert_eq!(w.put("", &put, other).await.status(), 201);
}

#[tokio::test]
async fn too_many_requests_are_told_to_come_again_and_probes_are_not() {
    let mut setup = Setup::new();
    setup.limits.max_requests = 2;
    let (w, engine) = troubled(setup).await;
    let id = w.put_chunk("", &chunk(1, 1000)).await;
    engine.set(4);
    let path = format!("/v1/chunks/{id}");
    let slow = [w.ask(Method::GET, &path), w.ask(Method::GET, &path)];
    let slow = slow.map(|asked| tokio::spawn(asked.send()));
    until("two are under way", async || {
        w.metric("", "lazyimg_store_requests_under_way").await >= 3.0
    })
    .await;
    let third = w.get("", &path).await;
    assert_eq!(third.headers()["retry-after"], "1");
    assert_eq!(refused(third).await, (429, "busy".into()));
    assert_eq!(w.get("", "/readyz").await.status(), 200);
    engine.set(0);
    engine.go.notify_waiters();
    for asked in slow {
        assert_eq!(asked.await.unwrap().unwrap().status(), 200);
    }
    until("there is room again", async || {
        w.get("", &path).await.status() == 200
    })
    .await;
}

#[tokio::test]
async fn a_store_that_ends_finishes_what_is_under_way() {
    let (w, engine) = troubled(Setup::new()).await;
    let bytes = chunk(1, 700_000);
    let id = w.put_chunk("", &bytes).await;
    engine.set(4);
    let path = format!("/v1/chunks/{id}");
    let slow = tokio::spawn(w.ask(Method::GET, &path).send());
    until("it is under way", async || {
        w.metric("", "lazyimg_store_requests_under_way").await >= 2.0
    })
    .await;
    w.handle.drain();
    until("nobody else is let in", async || {
        let new = reqwest::Client::new();
        new.get(format!("{}/readyz", w.base)).send().await.is_err()
    })
    .await;
    assert!(!w.running.is_finished());
    engine.set(0);
    engine.go.notify_waiters();
    let got = slow.await.unwrap().unwrap();
    assert_eq!(got.status(), 200);
    assert!(got.bytes().await.unwrap() == bytes);
    assert!(w.stop().await, "nobody was cut off");
}

#[tokio::test]
async fn what_does_not_finish_in_time_is_cut_off_and_told() {
    let mut setup = Setup::new();
    setup.options.drain = std::time::Duration::from_millis(100);
    let (w, engine) = troubled(setup).await;
    let id = w.put_chunk("", &chunk(1, 1000)).await;
    engine.set(4);
    let slow = tokio::spawn(w.ask(Method::GET, &format!("/v1/chunks/{id}")).send());
    until("it is under way", async || {
        w.metric("", "lazyimg_store_requests_under_way").await >= 2.0
    })
    .await;
    assert!(!w.stop().await, "somebody was cut off");
    assert!(slow.await.unwrap().is_err());
}
