//! The client against a small store in memory that has the faults it is told to have. Against the
//! real one: `chunkstore/service/tests/client.rs`.

mod fake;
mod trouble;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::*;
use crate::guard::{BreakerState, Guards};
use crate::testing::{Fault, FaultyTier, TestChunk, test_chunk};
use crate::{ImageStore, MountStats, Store, StoreOptions, Tier};
use fake::{Fake, Mode};

const LONG: Duration = Duration::from_secs(30);

fn settings(fakes: &[&Arc<Fake>]) -> StoreSettings {
    StoreSettings::new(fakes.iter().map(|fake| fake.url.clone()).collect())
}

fn client(fakes: &[&Arc<Fake>]) -> StoreClient {
    StoreClient::new(settings(fakes), &Guards::default()).unwrap()
}

fn chunks(n: u64) -> Vec<TestChunk> {
    (0..n).map(|seed| test_chunk(seed, 20_000)).collect()
}

async fn get(client: &StoreClient, chunks: &[TestChunk], effort: Effort) -> Vec<Got> {
    let ids: Vec<_> = chunks.iter().map(|c| *c.spec.id()).collect();
    let (sink, mut inbox) = mpsc::channel(1_000);
    client.get_many(&ids, None, effort, &sink).await;
    drop(sink);
    let mut out: Vec<Option<Got>> = ids.iter().map(|_| None).collect();
    while let Some((index, got)) = inbox.recv().await {
        assert!(out[index].replace(got).is_none(), "said twice");
    }
    out.into_iter().map(Option::unwrap).collect()
}

fn assert_all_come(chunks: &[TestChunk], got: Vec<Got>) {
    for (chunk, got) in chunks.iter().zip(got) {
        match got {
            Got::Chunk(bytes) => assert_eq!(bytes, chunk.stored),
            other => panic!("{other:?}"),
        }
    }
}

struct Bench {
    image: ImageStore,
    stats: Arc<MountStats>,
    tier: Arc<StoreTier>,
}

/// An image behind a store and, where there is one, a registry.
fn bench(
    client: StoreClient,
    options: StoreTierOptions,
    registry: Option<Arc<FaultyTier>>,
) -> Bench {
    let tier = Arc::new(StoreTier::new(client, options, &Handle::current()));
    let mut tiers: Vec<Arc<dyn Tier>> = vec![tier.clone()];
    tiers.extend(registry.map(|r| r as Arc<dyn Tier>));
    let stats = Arc::new(MountStats::new());
    let options = StoreOptions {
        hot_bytes: 0,
        fetch_deadline: LONG,
        ..StoreOptions::default()
    };
    let image = Store::new(None, options, Handle::current()).image(tiers, stats.clone());
    Bench { image, stats, tier }
}

async fn read_all(image: &ImageStore, chunks: &[TestChunk]) {
    let specs: Vec<_> = chunks.iter().map(|c| c.spec.clone()).collect();
    for (chunk, plain) in chunks.iter().zip(image.read_many(&specs).await) {
        assert_eq!(plain.unwrap(), chunk.plain);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_are_put_found_and_got_in_few_requests() {
    let chunks = chunks(100);
    let fake = Fake::start(&chunks[..98]).await;
    let client = client(&[&fake]);
    assert_all_come(
        &chunks[..98],
        get(&client, &chunks[..98], Effort::Brief).await,
    );
    assert_eq!(fake.asked("POST /v1/chunks/get"), 2);
    let last = &chunks[99];
    let put = client.put(last.spec.id(), last.stored.clone(), false);
    assert_eq!(put.await.unwrap(), PutOutcome::Put);
    let ids: Vec<_> = chunks.iter().map(|c| *c.spec.id()).collect();
    let has = client.has(&ids).await.unwrap();
    assert_eq!(has.iter().filter(|has| !**has).count(), 1);
    assert!(!has[98]);
    assert!(matches!(
        get(&client, &chunks[98..], Effort::Brief).await[0],
        Got::Missing
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_of_a_dead_instance_come_from_the_next_in_rank() {
    let chunks = chunks(60);
    let (a, b) = (Fake::start(&chunks).await, Fake::start(&chunks).await);
    let client = client(&[&a, &b]);
    assert_all_come(&chunks, get(&client, &chunks, Effort::Brief).await);
    assert!(
        a.asked("POST") > 0 && b.asked("POST") > 0,
        "both have a share"
    );
    for mode in [Mode::Down, Mode::CutOff, Mode::WebPage] {
        a.set(mode);
        assert_all_come(&chunks, get(&client, &chunks, Effort::Brief).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_is_back_gets_its_share_again_while_the_others_answer() {
    let chunks = chunks(60);
    let (a, b) = (Fake::start(&chunks).await, Fake::start(&chunks).await);
    let client = client(&[&a, &b]);
    let breaker = || {
        let origins = client.health().origins;
        origins
            .into_iter()
            .find(|o| o.origin == a.url)
            .unwrap()
            .breaker
    };
    for (mode, wanted) in [
        (Mode::Down, BreakerState::Open),
        (Mode::Good, BreakerState::Closed),
    ] {
        a.set(mode);
        let begun = Instant::now();
        while breaker() != wanted {
            assert!(begun.elapsed() < LONG, "{mode:?}: {:?}", client.health());
            assert_all_come(&chunks, get(&client, &chunks, Effort::Brief).await);
        }
    }
    let before = a.asked("POST");
    assert_all_come(&chunks, get(&client, &chunks, Effort::Brief).await);
    assert!(a.asked("POST") > before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_hangs_is_answered_by_a_hedge_to_the_other_instance() {
    let chunks = chunks(4);
    let (a, b) = (Fake::start(&chunks).await, Fake::start(&chunks).await);
    let mut settings = settings(&[&a, &b]);
    settings.stall_timeout = LONG * 2;
    let client = StoreClient::new(settings, &Guards::default()).unwrap();
    for _ in 0..60 {
        assert_all_come(&chunks, get(&client, &chunks, Effort::Brief).await);
    }
    let rank = client.rank_of(chunks[0].spec.id()).await.unwrap();
    let first = [&a, &b].into_iter().find(|f| f.url == rank[0]).unwrap();
    first.hang_first.store(1, Relaxed);
    assert_all_come(
        &chunks[..1],
        get(&client, &chunks[..1], Effort::Brief).await,
    );
    let health = client.health();
    assert!(health.hedges_won >= 1, "{health:?}");
    assert!(health.hedges * 20 <= health.sent, "{health:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registry_brings_what_the_store_lacks_and_the_store_gets_it() {
    let chunks = chunks(20);
    let fake = Fake::start(&chunks[..5]).await;
    let registry = FaultyTier::new("registry", &chunks, Fault::None);
    let b = bench(
        client(&[&fake]),
        StoreTierOptions::default(),
        Some(registry.clone()),
    );
    read_all(&b.image, &chunks).await;
    assert_eq!(registry.asked().len(), 15, "only what was missing");
    tokio::time::timeout(LONG, b.tier.settle()).await.unwrap();
    assert_eq!(fake.chunks.lock().len(), 20);
    let s = b.stats.snapshot();
    assert_eq!(s.tiers[0].errors.not_found, 15);
    assert_eq!(s.tiers[0].health.write_back.put.chunks, 15);
    assert_eq!(s.tiers[0].latency.count, 5);
    read_all(&b.image, &chunks).await;
    assert_eq!(registry.asked().len(), 15);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_byte_of_the_store_is_counted_replaced_and_never_read() {
    let chunks = chunks(6);
    let fake = Fake::start(&chunks).await;
    fake.set(Mode::Wrong);
    let registry = FaultyTier::new("registry", &chunks, Fault::None);
    let b = bench(
        client(&[&fake]),
        StoreTierOptions::default(),
        Some(registry),
    );
    read_all(&b.image, &chunks).await;
    tokio::time::timeout(LONG, b.tier.settle()).await.unwrap();
    let s = b.stats.snapshot();
    assert_eq!(
        (s.tiers[0].corrupt, s.tiers[0].health.write_back.repaired),
        (6, 6)
    );
    assert!(
        fake.asked
            .lock()
            .iter()
            .filter(|(line, _)| line.starts_with("PUT"))
            .all(|(_, repair)| *repair)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_takes_nothing_is_not_offered_more_and_readers_do_not_notice() {
    let chunks = chunks(30);
    let fake = Fake::start(&[]).await;
    fake.set(Mode::ReadOnly);
    let registry = FaultyTier::new("registry", &chunks, Fault::None);
    let b = bench(
        client(&[&fake]),
        StoreTierOptions::default(),
        Some(registry),
    );
    read_all(&b.image, &chunks[..10]).await;
    tokio::time::timeout(LONG, b.tier.settle()).await.unwrap();
    let puts = fake.asked("PUT");
    assert!(puts <= 4, "{puts}");
    read_all(&b.image, &chunks[10..]).await;
    assert_eq!(fake.asked("PUT"), puts);
    let health = b.tier.health().write_back;
    assert_eq!(health.failed + health.dropped, 30);
    assert!(health.resting.unwrap().contains("told to say so"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_in_trouble_is_left_alone_and_found_again_without_a_restart() {
    let chunks = chunks(40);
    let fake = Fake::start(&chunks).await;
    let registry = FaultyTier::new("registry", &chunks, Fault::None);
    let options = StoreTierOptions {
        write_back: false,
        ..StoreTierOptions::default()
    };
    let b = bench(client(&[&fake]), options, Some(registry.clone()));
    fake.set(Mode::Down);
    for chunk in &chunks {
        assert_eq!(b.image.read(&chunk.spec).await.unwrap(), chunk.plain);
    }
    assert_eq!(registry.asked().len(), 40);
    let asked = fake.asked("POST");
    assert!(asked < 40, "the breaker opened: {asked}");
    assert!(b.tier.health().origins[0].openings >= 1);
    fake.set(Mode::Good);
    let begun = Instant::now();
    while b.tier.health().origins[0].breaker != BreakerState::Closed {
        assert!(begun.elapsed() < LONG, "it never closed");
        b.image.read(&chunks[0].spec).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let asked = registry.asked().len();
    read_all(&b.image, &chunks).await;
    assert_eq!(registry.asked().len(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_hangs_leaves_time_for_the_registry() {
    let chunks = chunks(3);
    let fake = Fake::start(&chunks).await;
    fake.set(Mode::Hang);
    let registry = FaultyTier::new("registry", &chunks, Fault::None);
    let mut settings = settings(&[&fake]);
    settings.stall_timeout = Duration::from_millis(100);
    let client = StoreClient::new(settings, &Guards::default()).unwrap();
    let b = bench(client, StoreTierOptions::default(), Some(registry));
    read_all(&b.image, &chunks).await;
    assert_eq!(b.stats.snapshot().tiers[0].errors.timed_out, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_without_a_tier_behind_it_is_asked_until_it_answers() {
    let chunks = chunks(3);
    let fake = Fake::start(&chunks).await;
    fake.set(Mode::Down);
    let options = StoreTierOptions {
        tier_behind: false,
        ..StoreTierOptions::default()
    };
    let b = bench(client(&[&fake]), options, None);
    let healing = Arc::clone(&fake);
    tokio::spawn(async move {
        while healing.asked("POST") < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        healing.set(Mode::Good);
    });
    read_all(&b.image, &chunks).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_read_again_when_the_store_no_longer_takes_it() {
    let chunks = chunks(1);
    let fake = Fake::start(&chunks).await;
    *fake.token.lock() = Some("the-first-one".to_owned());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    std::fs::write(&path, "the-first-one\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&path, mode).unwrap();
    let mut settings = settings(&[&fake]);
    settings.token_file = Some(path.clone());
    let client = StoreClient::new(settings, &Guards::default()).unwrap();
    assert_all_come(&chunks, get(&client, &chunks, Effort::Brief).await);
    std::fs::write(&path, "the-second-token\n").unwrap();
    *fake.token.lock() = Some("the-second-token".to_owned());
    assert_all_come(&chunks, get(&client, &chunks, Effort::Brief).await);
    *fake.token.lock() = Some("another".to_owned());
    match &get(&client, &chunks, Effort::Brief).await[0] {
        Got::Failed(error) => {
            assert_eq!(error.code(), Some(StoreErrorCode::Unauthorized));
            assert!(!format!("{error} {error:?}").contains("the-second"));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(client.health().origins[0].breaker, BreakerState::Closed);
}
