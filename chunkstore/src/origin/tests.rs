use std::sync::atomic::AtomicUsize;

use super::*;
use crate::guard::{BreakerState, Guards};
use crate::testing::{MemoryBlobs, TestChunk, pack, test_chunk};

fn quick() -> OriginOptions {
    OriginOptions {
        attempt_timeout: Duration::from_millis(100),
        ..OriginOptions::default()
    }
}

fn blobs_of(chunks: &mut [TestChunk]) -> MemoryBlobs {
    let (digest, bytes) = pack(chunks);
    MemoryBlobs {
        blobs: [(digest, bytes)].into(),
        ..MemoryBlobs::default()
    }
}

/// Fetches all; results in the order of `chunks`.
async fn fetch(
    origin: &PackOrigin,
    chunks: &[TestChunk],
) -> Vec<Option<Result<Bytes, FetchError>>> {
    let refs: Vec<_> = chunks.iter().map(|c| c.spec.chunk).collect();
    let (sink, mut deliveries) = mpsc::channel(100);
    origin.fetch(&refs, sink).await;
    let mut out: Vec<_> = chunks.iter().map(|_| None).collect();
    while let Some((index, result)) = deliveries.recv().await {
        assert!(out[index].replace(result).is_none(), "delivered twice");
    }
    out
}

fn assert_all_right(chunks: &[TestChunk], results: Vec<Option<Result<Bytes, FetchError>>>) {
    for (chunk, result) in chunks.iter().zip(results) {
        assert_eq!(result.unwrap().unwrap(), chunk.stored);
    }
}

#[tokio::test]
async fn neighbours_cost_one_request() {
    let mut chunks: Vec<_> = (0..7).map(|n| test_chunk(n, 100_000)).collect();
    let blobs = Arc::new(blobs_of(&mut chunks));
    let origin = PackOrigin::new("registry", blobs.clone(), quick());
    assert_all_right(&chunks, fetch(&origin, &chunks).await);
    assert_eq!(blobs.requests.lock().len(), 1);
}

#[tokio::test]
async fn a_chunk_does_not_keep_the_run_in_memory_that_it_came_in() {
    let mut chunks: Vec<_> = (0..7).map(|n| test_chunk(n, 100_000)).collect();
    let blobs = Arc::new(blobs_of(&mut chunks));
    let origin = PackOrigin::new("registry", blobs.clone(), quick());
    let results = fetch(&origin, &chunks).await;
    assert_eq!(blobs.requests.lock().len(), 1, "one run");
    for result in &results {
        let Some(Ok(bytes)) = result else {
            panic!("{result:?}");
        };
        assert!(bytes.is_unique(), "it shares its memory");
    }
}

#[tokio::test]
async fn requests_under_way_stay_bounded() {
    let mut chunks: Vec<_> = (0..80).map(|n| test_chunk(n, 70_000)).collect();
    let mut blobs = blobs_of(&mut chunks);
    blobs.delay = Duration::from_millis(5);
    let blobs = Arc::new(blobs);
    let options = OriginOptions {
        concurrency: 5,
        concurrency_per_fetch: 3,
        ..quick()
    };
    let origin = PackOrigin::new("registry", blobs.clone(), options);
    // Every second chunk: the gaps are too wide to join.
    let far: Vec<_> = chunks.iter().step_by(2).cloned().collect();
    assert_all_right(&far, fetch(&origin, &far).await);
    assert_eq!(blobs.under_way.lock().1, 3, "one fetch");
    let both = tokio::join!(fetch(&origin, &far), fetch(&origin, &far));
    assert_all_right(&far, both.0);
    assert_all_right(&far, both.1);
    assert_eq!(blobs.under_way.lock().1, 5, "all fetches");
}

#[tokio::test]
async fn a_passing_fault_is_tried_again() {
    for fault in 0..3 {
        let mut chunks = [test_chunk(1, 1000)];
        let mut blobs = blobs_of(&mut chunks);
        let twice = AtomicUsize::new(2);
        match fault {
            0 => blobs.fail_first = twice,
            1 => blobs.short_first = twice,
            _ => blobs.hang_first = twice,
        }
        let blobs = Arc::new(blobs);
        let mut options = quick();
        options.attempt_timeout = Duration::from_millis(50);
        let origin = PackOrigin::new("registry", blobs.clone(), options);
        // A hang costs a second more: what the slowest link needs for its 128 KiB.
        assert_all_right(&chunks, fetch(&origin, &chunks).await);
        assert_eq!(blobs.requests.lock().len(), 3);
    }
}

#[tokio::test]
async fn a_lasting_fault_ends_after_a_few_attempts_with_its_cause() {
    let mut chunks = [test_chunk(1, 1000)];
    let mut blobs = blobs_of(&mut chunks);
    blobs.fail_first = AtomicUsize::new(100);
    let blobs = Arc::new(blobs);
    let origin = PackOrigin::new("registry", blobs.clone(), quick());
    let error = fetch(&origin, &chunks)
        .await
        .remove(0)
        .unwrap()
        .unwrap_err();
    assert!(error.to_string().contains("4 attempts"), "{error}");
    assert!(error.to_string().contains("told to fail"), "{error}");
    assert_eq!(blobs.requests.lock().len(), 4);
}

#[tokio::test]
async fn what_is_not_there_is_not_asked_for_again() {
    let mut chunks = [test_chunk(1, 1000)];
    pack(&mut chunks);
    let blobs = Arc::new(MemoryBlobs::default());
    let origin = PackOrigin::new("registry", blobs.clone(), quick());
    let error = fetch(&origin, &chunks)
        .await
        .remove(0)
        .unwrap()
        .unwrap_err();
    assert!(error.to_string().contains("not there"), "{error}");
    assert_eq!(blobs.requests.lock().len(), 1);
}

/// A guard whose breaker never opens.
fn unbreakable() -> Guards {
    Guards::new(BreakerOptions {
        failures: u32::MAX,
        rate_requests: u32::MAX,
        ..BreakerOptions::default()
    })
}

#[tokio::test]
async fn when_everything_fails_the_retry_budget_of_the_registry_bounds_the_load() {
    let guards = unbreakable();
    let images = 5;
    let mut all = Vec::new();
    for image in 0..images {
        let mut chunks: Vec<_> = (0..20)
            .map(|n| test_chunk(image * 100 + n, 70_000))
            .collect();
        let mut blobs = blobs_of(&mut chunks);
        blobs.fail_first = AtomicUsize::new(10_000);
        let blobs = Arc::new(blobs);
        let origin =
            PackOrigin::new("registry", blobs.clone(), quick()).guarded(guards.of("registry.test"));
        all.push((origin, blobs, chunks));
    }
    let begun = Instant::now();
    let fetches = all.iter().map(|(origin, _, chunks)| async move {
        let far: Vec<_> = chunks.iter().step_by(2).cloned().collect();
        let failed = fetch(origin, &far).await;
        assert!(failed.into_iter().all(|r| r.unwrap().is_err()));
    });
    futures_util::future::join_all(fetches).await;
    let requests: usize = all
        .iter()
        .map(|(_, blobs, _)| blobs.requests.lock().len())
        .sum();
    let first_tries = 10 * images as usize;
    // A full budget is 20 retries, and a second earns half of one.
    let retries = 20 + begun.elapsed().as_secs() as usize / 2 + 1;
    assert!(
        (first_tries..=first_tries + retries).contains(&requests),
        "{requests} requests for {first_tries} runs"
    );
    let told: u64 = all.iter().map(|(origin, ..)| origin.health().retries).sum();
    assert_eq!(requests, first_tries + told as usize);
}

#[tokio::test]
async fn a_dead_registry_is_left_alone_and_used_again_when_it_is_back() {
    let mut chunks: Vec<_> = (0..40).map(|n| test_chunk(n, 70_000)).collect();
    let mut blobs = blobs_of(&mut chunks);
    blobs.fail_first = AtomicUsize::new(1_000_000);
    let blobs = Arc::new(blobs);
    let guards = Guards::default();
    let options = OriginOptions {
        breaker_wait: Duration::ZERO,
        ..quick()
    };
    let origin =
        PackOrigin::new("registry", blobs.clone(), options).guarded(guards.of("registry.test"));
    let far: Vec<_> = chunks.iter().step_by(2).cloned().collect();
    let failed = fetch(&origin, &far).await;
    assert!(failed.into_iter().all(|r| r.unwrap().is_err()));
    assert_eq!(origin.health().origins[0].openings, 1);
    assert!(
        blobs.requests.lock().len() < 20,
        "not even one for each run"
    );

    // Another image of that registry, whose reader has time: it hears of the probe that works.
    blobs.fail_first.store(0, Relaxed);
    let patient = OriginOptions {
        breaker_wait: Duration::from_secs(30),
        ..quick()
    };
    let other =
        PackOrigin::new("registry", blobs.clone(), patient).guarded(guards.of("registry.test"));
    assert_all_right(&far, fetch(&other, &far).await);
    assert_eq!(other.health().origins[0].breaker, BreakerState::Closed);
}

#[tokio::test]
async fn a_short_request_that_hangs_is_answered_by_its_hedge() {
    let mut chunks: Vec<_> = (0..120).map(|n| test_chunk(n, 70_000)).collect();
    let blobs = Arc::new(blobs_of(&mut chunks));
    let mut options = quick();
    options.attempt_timeout = Duration::from_secs(60);
    options.hedge_floor = Duration::from_millis(1);
    let origin = PackOrigin::new("registry", blobs.clone(), options);
    let far: Vec<_> = chunks.iter().step_by(2).cloned().collect();
    assert_all_right(&far, fetch(&origin, &far).await);
    blobs.hang_first.store(1, Relaxed);
    assert_all_right(&far[..1], fetch(&origin, &far[..1]).await);
    let health = origin.health();
    assert!(health.hedges_won >= 1, "{health:?}");
    assert!(health.hedges * 20 <= health.sent, "{health:?}");
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_the_requests() {
    let mut chunks: Vec<_> = (0..10).map(|n| test_chunk(n, 70_000)).collect();
    let mut blobs = blobs_of(&mut chunks);
    blobs.delay = Duration::from_secs(60);
    let blobs = Arc::new(blobs);
    let mut options = quick();
    options.attempt_timeout = Duration::from_secs(60);
    let origin = PackOrigin::new("registry", blobs, options);
    let refs: Vec<_> = chunks.iter().map(|c| c.spec.chunk).collect();
    let (sink, deliveries) = mpsc::channel(1);
    drop(deliveries);
    tokio::time::timeout(Duration::from_secs(5), origin.fetch(&refs, sink))
        .await
        .expect("it returned at once");
}
