//! Engines that are slow, down, or hide damage.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;
use tokio::time::Instant;

use super::*;
use crate::engine::hot::{HotEngine, HotOptions};

#[tokio::test(start_paused = true)]
async fn in_an_outage_requests_fail_together_and_not_one_after_the_other() {
    let engine = Arc::new(MemoryEngine::new());
    let catalog = Catalog::open(engine.clone(), CatalogOptions::shared("one"));
    let catalog = catalog.await.unwrap();
    tokio::time::advance(Duration::from_secs(60)).await;
    let lists = Arc::new(AtomicUsize::new(0));
    let counted = lists.clone();
    engine.slow_down(Duration::from_secs(80));
    engine.fail_with(move |_, _| {
        counted.fetch_add(1, Ordering::SeqCst);
        Some(EngineError::Unavailable("no route".to_owned()))
    });
    let (t, id) = (tenant("t"), ChunkId::of(&chunk(1)));
    let begun = Instant::now();
    let results = join_all((0..20).map(|_| catalog.get_chunk(&t, &id))).await;
    for result in results {
        let text = result.unwrap_err().to_string();
        assert!(text.contains("no route"), "{text}");
    }
    assert!(
        begun.elapsed() < Duration::from_secs(81),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(lists.load(Ordering::SeqCst), 1);
    // Who comes later tries anew.
    engine.heal();
    assert_eq!(catalog.get_chunk(&t, &id).await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn what_is_absent_is_absent_however_slow_the_engine_is() {
    for options in [
        CatalogOptions::exclusive("one"),
        CatalogOptions::shared("one"),
    ] {
        let engine = Arc::new(MemoryEngine::new());
        let slow = options.settle * 2;
        let catalog = Catalog::open(engine.clone(), options).await.unwrap();
        engine.slow_down(slow);
        let t = tenant("t");
        let patience = slow * 100;
        let all = async {
            let found = catalog.get_chunk(&t, &ChunkId::of(&chunk(1))).await;
            assert_eq!(found.unwrap(), None);
            let found = catalog.get_manifest(&t, &IMAGE, key()).await;
            assert_eq!(found.unwrap(), None);
            let found = catalog.get_cached_manifest(&t, &IMAGE, key()).await;
            assert_eq!(found.unwrap(), None);
            let found = catalog.get_profile(&t, &IMAGE, "start").await;
            assert_eq!(found.unwrap(), None);
            let found = catalog.list_images(&t, None, 10).await;
            assert_eq!(found.unwrap(), []);
        };
        let done = tokio::time::timeout(patience, all).await;
        assert!(done.is_ok(), "it never ends");
    }
}

#[tokio::test(start_paused = true)]
async fn changes_of_different_references_do_not_wait_for_each_other() {
    let store = Store::new().await;
    let (t, catalog) = (tenant("t"), &store.catalog);
    let mut etags = Vec::new();
    for name in ["a", "b", "c", "d"] {
        let put = catalog.put_ref(&t, name, &IMAGE, &Condition::Always);
        etags.push((name, put.await.unwrap().etag));
    }
    store.engine.slow_down(Duration::from_secs(1));
    store.pass(1);
    let change = |name: &'static str, etag: String| {
        let t = &t;
        async move {
            let condition = Condition::Match(etag);
            catalog.put_ref(t, name, &IMAGE, &condition).await.unwrap();
        }
    };
    let begun = Instant::now();
    let (name, etag) = etags.pop().unwrap();
    change(name, etag).await;
    let one = begun.elapsed();
    let begun = Instant::now();
    join_all(etags.into_iter().map(|(name, etag)| change(name, etag))).await;
    assert_eq!(begun.elapsed(), one);
}

#[tokio::test]
async fn a_repair_looks_at_the_copy_that_is_kept_and_not_at_a_faster_one() {
    let (hot, durable) = (Arc::new(MemoryEngine::new()), Arc::new(MemoryEngine::new()));
    let options = HotOptions {
        deadline: Duration::from_secs(30),
        ..HotOptions::default()
    };
    let engine = Arc::new(HotEngine::new(hot.clone(), durable.clone(), options));
    let catalog = Catalog::open(engine, CatalogOptions::exclusive("one"));
    let catalog = catalog.await.unwrap();
    let (t, id) = (tenant("t"), ChunkId::of(&chunk(1)));
    let put = |repair| catalog.put_chunk(&t, None, &id, chunk(1), repair);
    assert_eq!(put(false).await.unwrap(), Put::New);
    let begun = std::time::Instant::now();
    while hot.get_chunk(RootId::FIRST, &id).await.unwrap().is_none() {
        assert!(begun.elapsed() < Duration::from_secs(30));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let rot = Bytes::from(vec![9; 100]);
    assert!(durable.damage_chunk(RootId::FIRST, &id, rot));
    assert_eq!(put(true).await.unwrap(), Put::Repaired);
    let kept = durable.get_chunk(RootId::FIRST, &id).await.unwrap();
    assert_eq!(kept, Some(chunk(1)));
}
