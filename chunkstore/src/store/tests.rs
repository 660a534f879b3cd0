use std::slice::from_ref;
use std::time::Instant;

use super::*;
use crate::CacheOptions;
use crate::testing::{Fault, FaultyTier, TestChunk, flipped, test_chunk};

struct Bench {
    store: Store,
    stats: Arc<MountStats>,
    image: ImageStore,
    _dir: tempfile::TempDir,
}

fn bench(tiers: &[Arc<FaultyTier>], hot_bytes: usize, deadline: Duration) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let cache = HostCache::open(dir.path(), CacheOptions::new(64 << 20)).unwrap();
    let options = StoreOptions {
        hot_bytes,
        fetch_deadline: deadline,
        ..StoreOptions::default()
    };
    let store = Store::new(Some(cache), options, Handle::current());
    let stats = Arc::new(MountStats::new());
    let image = store.image(all(tiers), stats.clone());
    Bench {
        store,
        stats,
        image,
        _dir: dir,
    }
}

fn all(tiers: &[Arc<FaultyTier>]) -> Vec<Arc<dyn Tier>> {
    tiers.iter().map(|t| t.clone() as Arc<dyn Tier>).collect()
}

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(300);

fn chunks(n: u64) -> Vec<TestChunk> {
    (0..n).map(|seed| test_chunk(seed, 20_000)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_comes_from_the_tier_once_then_from_the_cache_then_from_memory() {
    let chunks = chunks(1);
    let tier = FaultyTier::new("registry", &chunks, Fault::None);
    let b = bench(from_ref(&tier), 0, LONG);
    let c = &chunks[0];
    assert!(b.image.try_read_local(&c.spec).is_none());
    assert_eq!(b.image.read(&c.spec).await.unwrap(), c.plain);
    assert_eq!(b.image.read(&c.spec).await.unwrap(), c.plain);
    assert_eq!(b.image.try_read_local(&c.spec).unwrap(), c.plain);
    b.store.flush();
    assert_eq!(b.image.try_read_local(&c.spec).unwrap(), c.plain);
    assert!(b.image.is_cached(c.spec.id()));
    let s = b.stats.snapshot();
    assert_eq!(
        (s.reads, s.cache.chunks, s.tiers[0].delivered.chunks),
        (4, 3, 1)
    );
    assert_eq!(s.bytes_read, 4 * 20_000);
    assert_eq!(s.fetched_bytes(), c.stored.len() as u64);

    let hot = bench(&[tier], 1 << 20, LONG);
    hot.image.read(&c.spec).await.unwrap();
    assert_eq!(hot.image.try_read_local(&c.spec).unwrap(), c.plain);
    assert_eq!(hot.stats.snapshot().hot.chunks, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_readers_of_three_mounts_cost_one_fetch() {
    let chunks = chunks(1);
    let tier = FaultyTier::new("registry", &chunks, Fault::None);
    tier.set_delay(Duration::from_millis(100));
    let b = bench(from_ref(&tier), 0, LONG);
    let mounts: Vec<_> = (0..3)
        .map(|_| b.store.image(all(from_ref(&tier)), Arc::default()))
        .collect();
    let readers: Vec<_> = (0..64)
        .map(|n| {
            let (mount, spec) = (mounts[n % 3].clone(), chunks[0].spec.clone());
            tokio::spawn(async move { mount.read(&spec).await })
        })
        .collect();
    for reader in readers {
        assert_eq!(reader.await.unwrap().unwrap(), chunks[0].plain);
    }
    assert_eq!(tier.asked().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_chunks_cost_one_request_and_only_for_those_not_here() {
    let chunks = chunks(30);
    let tier = FaultyTier::new("registry", &chunks, Fault::Backwards);
    let b = bench(from_ref(&tier), 0, LONG);
    b.image.read(&chunks[3].spec).await.unwrap();
    let mut specs: Vec<_> = chunks.iter().map(|c| c.spec.clone()).collect();
    specs.push(chunks[5].spec.clone());
    let plain = b.image.read_many(&specs).await;
    for (n, plain) in plain.into_iter().enumerate() {
        let chunk = chunks.get(n).unwrap_or(&chunks[5]);
        assert_eq!(plain.unwrap(), chunk.plain);
    }
    assert_eq!(tier.requests(), 2);
    assert_eq!(tier.asked().len(), 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lying_tier_is_found_out_and_the_next_one_asked() {
    for fault in [Fault::WrongBytes, Fault::ShortBytes] {
        let chunks = chunks(5);
        let liar = FaultyTier::new("zone", &chunks, fault);
        let good = FaultyTier::new("registry", &chunks, Fault::None);
        let b = bench(&[liar.clone(), good.clone()], 0, LONG);
        let specs: Vec<_> = chunks.iter().map(|c| c.spec.clone()).collect();
        for (chunk, plain) in chunks.iter().zip(b.image.read_many(&specs).await) {
            assert_eq!(plain.unwrap(), chunk.plain);
        }
        let s = b.stats.snapshot();
        assert_eq!((s.tiers[0].corrupt, s.tiers[0].delivered.chunks), (5, 0));
        assert_eq!(s.tiers[1].delivered.chunks, 5);
        assert_eq!((liar.requests(), good.requests()), (1, 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_names_every_tier_and_its_cause_and_is_not_remembered() {
    let chunks = chunks(1);
    let near = FaultyTier::new("zone", &[], Fault::None);
    let far = FaultyTier::new("registry", &chunks, Fault::Fails(1));
    let b = bench(&[near, far], 0, LONG);
    let error = b.image.read(&chunks[0].spec).await.unwrap_err().to_string();
    assert!(error.contains("zone: not there"), "{error}");
    assert!(
        error.contains("registry: unavailable: told to fail"),
        "{error}"
    );
    assert_eq!(
        b.image.read(&chunks[0].spec).await.unwrap(),
        chunks[0].plain
    );
    assert_eq!(b.stats.snapshot().errors, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tier_that_hangs_leaves_time_for_the_next() {
    let chunks = chunks(1);
    let hung = FaultyTier::new("zone", &chunks, Fault::Hang);
    let good = FaultyTier::new("registry", &chunks, Fault::None);
    // It would fail if the first took all the time.
    let b = bench(&[hung, good], 0, SHORT * 4);
    assert_eq!(
        b.image.read(&chunks[0].spec).await.unwrap(),
        chunks[0].plain
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tier_that_hangs_leaves_a_reader_of_little_patience_time_for_the_next() {
    let chunks = chunks(1);
    let hung = FaultyTier::new("store", &chunks, Fault::Hang);
    let good = FaultyTier::new("registry", &chunks, Fault::None);
    // A share of the fetch's time alone would be longer than this reader waits.
    let b = bench(&[hung, good], 0, LONG * 10);
    let read = b.image.read_within(&chunks[0].spec, Duration::from_secs(4));
    assert_eq!(read.await.unwrap(), chunks[0].plain);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_ends_in_time_when_nothing_answers_and_works_when_the_cause_is_gone() {
    let chunks = chunks(2);
    let tier = FaultyTier::new("registry", &chunks, Fault::Hang);
    let b = bench(from_ref(&tier), 0, SHORT);
    let begun = Instant::now();
    let error = b.image.read(&chunks[0].spec).await.unwrap_err();
    assert!(begun.elapsed() < LONG);
    assert!(error.to_string().contains("registry: no answer"), "{error}");

    // A reader with less patience than the fetch still learns whom it waited for.
    let (image, spec) = (b.image.clone(), chunks[1].spec.clone());
    let impatient =
        tokio::task::spawn_blocking(move || image.read_blocking(&spec, Duration::from_millis(50)));
    let error = impatient.await.unwrap().unwrap_err();
    assert!(matches!(error, ReadError::TimedOut { .. }));
    assert!(error.to_string().contains("registry: no answer"), "{error}");

    tier.set_fault(Fault::None);
    tokio::time::sleep(SHORT).await;
    for chunk in &chunks {
        assert_eq!(b.image.read(&chunk.spec).await.unwrap(), chunk.plain);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_with_more_patience_than_the_store_is_waited_for() {
    let chunks = chunks(4);
    let tier = FaultyTier::new("registry", &chunks, Fault::None);
    tier.set_delay(SHORT * 3);
    let b = bench(from_ref(&tier), 0, SHORT);
    assert!(b.image.read(&chunks[0].spec).await.is_err());
    let patient = b.image.read_within(&chunks[0].spec, LONG).await;
    assert_eq!(patient.unwrap(), chunks[0].plain);
    let many = b
        .image
        .read_many_within(&[chunks[1].spec.clone()], LONG)
        .await;
    assert_eq!(*many[0].as_ref().unwrap(), chunks[1].plain);
    let (image, spec) = (b.image.clone(), chunks[2].spec.clone());
    let blocking = tokio::task::spawn_blocking(move || image.read_blocking(&spec, LONG));
    assert_eq!(blocking.await.unwrap().unwrap(), chunks[2].plain);

    // Half of the time twice is as good as all of it once, and the error tells the half.
    let half = SHORT * 2;
    let requests = tier.requests();
    match b.image.read_within(&chunks[3].spec, half).await {
        Err(ReadError::TimedOut { waited, .. }) => {
            assert!((half..half * 2).contains(&waited), "{waited:?}")
        }
        other => panic!("{other:?}"),
    }
    let again = b.image.read_within(&chunks[3].spec, half).await;
    assert_eq!(again.unwrap(), chunks[3].plain);
    assert_eq!(tier.requests(), requests + 1, "one fetch for both");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_patience_ends() {
    let patience = Patience::of_reader(Duration::MAX, &StoreOptions::default());
    assert_eq!(patience.fetch, MAX_FETCH);
    let chunks = chunks(1);
    let tier = FaultyTier::new("registry", &chunks, Fault::None);
    let b = bench(from_ref(&tier), 0, SHORT);
    let read = b.image.read_within(&chunks[0].spec, Duration::MAX).await;
    assert_eq!(read.unwrap(), chunks[0].plain);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_cancelled_strands_nobody() {
    let chunks = chunks(1);
    let tier = FaultyTier::new("registry", &chunks, Fault::None);
    tier.set_delay(Duration::from_millis(100));
    let b = bench(from_ref(&tier), 0, LONG);
    let (image, spec) = (b.image.clone(), chunks[0].spec.clone());
    let leader = tokio::spawn(async move { image.read(&spec).await });
    while tier.requests() == 0 {
        tokio::task::yield_now().await;
    }
    let (image, spec) = (b.image.clone(), chunks[0].spec.clone());
    let follower = tokio::spawn(async move { image.read(&spec).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    leader.abort();
    assert_eq!(follower.await.unwrap().unwrap(), chunks[0].plain);
    assert_eq!(tier.requests(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tier_that_panics_or_sends_nothing_fails_the_read_at_once() {
    let chunks = chunks(1);
    for fault in [Fault::Panics, Fault::Silent] {
        let tier = FaultyTier::new("registry", &chunks, fault);
        let b = bench(&[tier], 0, LONG);
        let read = b.image.read(&chunks[0].spec);
        let outcome = tokio::time::timeout(Duration::from_secs(5), read).await;
        assert!(outcome.unwrap().is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_images_dead_tier_does_not_fail_another_image() {
    let chunks = chunks(1);
    let dead = FaultyTier::new("registry", &[], Fault::None);
    dead.set_delay(Duration::from_millis(50));
    let good = FaultyTier::new("registry", &chunks, Fault::None);
    let b = bench(&[dead], 0, LONG);
    let other = b.store.image(all(&[good]), Arc::default());
    let (bad, fine) = tokio::join!(b.image.read(&chunks[0].spec), async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        other.read(&chunks[0].spec).await
    });
    assert!(bad.is_err());
    assert_eq!(fine.unwrap(), chunks[0].plain);
}

#[tokio::test(flavor = "multi_thread")]
async fn waiters_of_a_failed_fetch_fail_with_its_cause() {
    let chunks = chunks(1);
    let tier = FaultyTier::new("registry", &[], Fault::None);
    tier.set_delay(Duration::from_millis(50));
    let b = bench(from_ref(&tier), 0, LONG);
    let specs: Vec<_> = (0..10).map(|_| chunks[0].spec.clone()).collect();
    for outcome in b.image.read_many(&specs).await {
        assert!(outcome.unwrap_err().to_string().contains("not there"));
    }
    assert_eq!(tier.requests(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn prefetch_fills_the_cache_in_few_requests_and_passes_over_what_is_there() {
    let chunks = chunks(200);
    let tier = FaultyTier::new("registry", &chunks, Fault::None);
    let b = bench(from_ref(&tier), 0, LONG);
    b.image.read(&chunks[7].spec).await.unwrap();
    let specs: Vec<_> = chunks.iter().map(|c| c.spec.clone()).collect();
    assert_eq!(b.image.prefetch(specs.clone()), 200);
    wait_until(|| b.stats.snapshot().prefetched.chunks == 199).await;
    b.store.flush();
    assert!(chunks.iter().all(|c| b.image.is_cached(c.spec.id())));
    assert!(tier.requests() <= 6, "{} requests", tier.requests());
    assert_eq!(tier.asked().len(), 200);
    assert_eq!(b.image.prefetch(specs), 200);
    wait_until(|| b.image.prefetch_pending() == 0).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(tier.asked().len(), 200, "nothing twice");
}

async fn wait_until(mut ready: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !ready() {
        assert!(begun.elapsed() < LONG, "waited in vain");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_overtakes_prefetch_and_joins_what_is_in_flight() {
    let chunks: Vec<_> = (0..60).map(|n| test_chunk(n, 500_000)).collect();
    let tier = FaultyTier::new("registry", &chunks, Fault::None);
    tier.set_delay(Duration::from_millis(100));
    let b = bench(from_ref(&tier), 0, LONG);
    b.image
        .prefetch(chunks.iter().map(|c| c.spec.clone()).collect());
    wait_until(|| tier.requests() == 2).await;
    let (first, last) = tokio::join!(
        b.image.read(&chunks[0].spec),
        b.image.read(&chunks[59].spec)
    );
    assert_eq!(first.unwrap(), chunks[0].plain);
    assert_eq!(last.unwrap(), chunks[59].plain);
    assert_eq!(b.stats.snapshot().joined, 1);
    wait_until(|| b.stats.snapshot().prefetched.chunks == 59).await;
    assert_eq!(tier.asked().len(), 60, "no chunk twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_prefetch_does_not_fail_the_reader_who_joined_it() {
    let chunks = chunks(1);
    let tier = FaultyTier::new("registry", &chunks, Fault::Fails(1));
    tier.set_delay(Duration::from_millis(50));
    let b = bench(from_ref(&tier), 0, LONG);
    b.image.prefetch(vec![chunks[0].spec.clone()]);
    wait_until(|| tier.requests() == 1).await;
    assert_eq!(
        b.image.read(&chunks[0].spec).await.unwrap(),
        chunks[0].plain
    );
    assert_eq!(b.stats.snapshot().prefetch_failed, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn prefetch_ends_with_its_mount() {
    let chunks: Vec<_> = (0..60).map(|n| test_chunk(n, 500_000)).collect();
    let tier = FaultyTier::new("registry", &chunks, Fault::None);
    tier.set_delay(Duration::from_millis(30));
    let b = bench(from_ref(&tier), 0, LONG);
    b.image
        .prefetch(chunks.iter().map(|c| c.spec.clone()).collect());
    wait_until(|| tier.requests() == 2).await;
    drop(b.image);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(tier.requests() <= 4, "{} requests", tier.requests());
}

/// Puts a bad copy of `chunk` where the cache would have a good one.
fn poison(store: &Store, chunk: &TestChunk) {
    let cache = store.cache().unwrap();
    assert!(cache.put(chunk.spec.id(), flipped(&chunk.stored)));
    cache.flush();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_cached_copy_is_dropped_and_healed_from_the_tier() {
    let chunks = chunks(1);
    let tier = FaultyTier::new("registry", &chunks, Fault::None);
    let b = bench(from_ref(&tier), 0, LONG);
    poison(&b.store, &chunks[0]);
    assert_eq!(
        b.image.read(&chunks[0].spec).await.unwrap(),
        chunks[0].plain
    );
    b.store.flush();
    assert_eq!(
        b.image.try_read_local(&chunks[0].spec).unwrap(),
        chunks[0].plain
    );
    let s = b.stats.snapshot();
    assert_eq!((s.bad_local_copies, s.healed, tier.requests()), (1, 1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_cached_copy_without_a_tier_is_an_error_and_never_wrong_bytes() {
    let chunks = chunks(1);
    let b = bench(&[], 0, LONG);
    poison(&b.store, &chunks[0]);
    assert!(b.image.read(&chunks[0].spec).await.is_err());
    assert!(b.image.try_read_local(&chunks[0].spec).is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_key_reads_nothing_and_empties_nothing() {
    let chunks = chunks(2);
    let tier = FaultyTier::new("registry", &chunks, Fault::None);
    let b = bench(from_ref(&tier), 1 << 20, LONG);
    b.image.read(&chunks[0].spec).await.unwrap();
    b.store.flush();
    let mut forged = chunks[0].spec.clone();
    forged.key = chunks[1].spec.key.clone();
    let mut longer = chunks[0].spec.clone();
    longer.plain_len += 1;
    for spec in [forged, longer] {
        assert!(b.image.try_read_local(&spec).is_none());
        let error = b.image.read(&spec).await.unwrap_err();
        assert!(matches!(error, ReadError::Undecryptable { .. }), "{error}");
    }
    assert!(b.image.is_cached(chunks[0].spec.id()));
    assert_eq!(tier.requests(), 1, "no tier can help, so none is asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn lengths_beyond_the_format_are_refused_before_anything_is_asked() {
    let chunks = chunks(1);
    let tier = FaultyTier::new("registry", &chunks, Fault::None);
    let b = bench(from_ref(&tier), 0, LONG);
    for (plain_len, stored_len) in [(0, 10), (u32::MAX, 10), (10, 0), (10, u32::MAX)] {
        let mut spec = chunks[0].spec.clone();
        spec.plain_len = plain_len;
        spec.chunk.stored_len = stored_len;
        assert!(matches!(
            b.image.read(&spec).await,
            Err(ReadError::BadSpec { .. })
        ));
    }
    assert_eq!(tier.requests(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_tells_good_from_bad_and_heals_the_cache() {
    let chunks = chunks(4);
    let tier = FaultyTier::new("registry", &chunks[..3], Fault::None);
    let b = bench(from_ref(&tier), 0, LONG);
    b.image.read(&chunks[0].spec).await.unwrap();
    poison(&b.store, &chunks[1]);
    let mut specs: Vec<_> = chunks.iter().map(|c| c.spec.clone()).collect();
    let outcomes = b.image.verify(&specs, VerifyScope::CacheFirst).await;
    let at_tier = |healed| Verified {
        copy: CopyPlace::Tier("registry".to_owned()),
        healed,
    };
    assert_eq!(outcomes[0].as_ref().unwrap().copy, CopyPlace::Cache);
    assert_eq!(*outcomes[1].as_ref().unwrap(), at_tier(true));
    assert_eq!(*outcomes[2].as_ref().unwrap(), at_tier(false));
    assert!(
        outcomes[3]
            .as_ref()
            .unwrap_err()
            .to_string()
            .contains("not there")
    );
    b.store.flush();
    assert!(b.image.is_cached(chunks[1].spec.id()), "healed");
    assert!(
        !b.image.is_cached(chunks[2].spec.id()),
        "verify keeps nothing else"
    );

    specs[2].key = specs[0].key.clone();
    tier.set_fault(Fault::WrongBytes);
    let outcomes = b.image.verify(&specs, VerifyScope::Tiers).await;
    assert!(outcomes.iter().all(Result::is_err));
    tier.set_fault(Fault::None);
    let outcomes = b.image.verify(&specs, VerifyScope::Tiers).await;
    assert!(matches!(outcomes[2], Err(ReadError::Undecryptable { .. })));
    assert_eq!(*outcomes[0].as_ref().unwrap(), at_tier(false));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_cache_everything_still_works() {
    let chunks = chunks(3);
    let tier = FaultyTier::new("registry", &chunks, Fault::None);
    let store = Store::new(None, StoreOptions::default(), Handle::current());
    let image = store.image(all(from_ref(&tier)), Arc::default());
    for chunk in &chunks {
        assert_eq!(image.read(&chunk.spec).await.unwrap(), chunk.plain);
        assert_eq!(image.read(&chunk.spec).await.unwrap(), chunk.plain);
    }
    assert_eq!(tier.requests(), 3, "the second read is hot");
    assert_eq!(image.prefetch(vec![chunks[0].spec.clone()]), 0);
}

#[test]
fn a_blocking_read_returns_in_time_even_if_the_runtime_is_stuck() {
    let chunks = chunks(1);
    // Nobody drives this runtime.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let tier = FaultyTier::new("registry", &chunks, Fault::None);
    let store = Store::new(None, StoreOptions::default(), runtime.handle().clone());
    let image = store.image(all(&[tier]), Arc::default());
    let begun = Instant::now();
    let error = image.read_blocking(&chunks[0].spec, Duration::from_millis(100));
    assert!(matches!(error, Err(ReadError::TimedOut { .. })));
    assert!(begun.elapsed() < LONG);
}

#[test]
fn blocking_threads_share_one_fetch_and_one_decode() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let chunks = chunks(1);
    let tier = FaultyTier::new("registry", &chunks, Fault::None);
    tier.set_delay(Duration::from_millis(50));
    let store = Store::new(None, StoreOptions::default(), runtime.handle().clone());
    let image = store.image(all(from_ref(&tier)), Arc::default());
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let plain = image.read_blocking(&chunks[0].spec, LONG).unwrap();
                assert_eq!(plain, chunks[0].plain);
            });
        }
    });
    assert_eq!(tier.requests(), 1);
    let many = image.read_many_blocking(&[chunks[0].spec.clone()], LONG);
    assert_eq!(*many[0].as_ref().unwrap(), chunks[0].plain);
}
