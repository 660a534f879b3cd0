//! Stores that are away, slow, busy, or broken: what the client does about it.

use lazyimg_convergent::{ChunkId, Digest};

use super::*;

const SOON: Duration = Duration::from_millis(300);

async fn until(mut ready: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !ready() {
        assert!(begun.elapsed() < LONG, "waited in vain");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Takes all tokens for retries at an instance.
fn without_retries(guards: &Guards, fake: &Fake) {
    let guard = guards.of(&fake.url);
    while guard.may_retry() {}
}

/// Two stores, the first of which is asked first for documents of this image.
async fn ranked_for(image: &Digest) -> (Arc<Fake>, Arc<Fake>) {
    let (a, b) = (Fake::start(&[]).await, Fake::start(&[]).await);
    let key = ChunkId::of(image.to_string().as_bytes());
    let rank = client(&[&a, &b]).rank_of(&key).await.unwrap();
    if rank[0] == a.url { (a, b) } else { (b, a) }
}

fn key() -> lazyimg_convergent::KeyId {
    lazyimg_convergent::TenantKey::from_bytes([7; 32]).id()
}

#[tokio::test(flavor = "multi_thread")]
async fn while_an_instance_that_hangs_is_tried_again_no_reader_waits_for_it() {
    let chunks = chunks(60);
    let (a, b) = (Fake::start(&chunks).await, Fake::start(&chunks).await);
    let mut settings = settings(&[&a, &b]);
    settings.stall_timeout = LONG * 4;
    let guards = Guards::default();
    let client = StoreClient::new(settings, &guards).unwrap();
    a.set(Mode::Down);
    while guards.of(&a.url).is_closed() {
        assert_all_come(&chunks, get(&client, &chunks, Effort::Brief).await);
    }
    a.set(Mode::Hang);
    let asked = a.asked("POST");
    let begun = Instant::now();
    while a.asked("POST") == asked {
        assert!(begun.elapsed() < LONG, "it was never tried again");
        let got = get(&client, &chunks, Effort::Brief);
        let got = tokio::time::timeout(LONG, got).await;
        assert_all_come(&chunks, got.expect("a reader waited for it"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_alone_that_is_away_for_seconds_is_waited_for() {
    let chunks = chunks(3);
    let fake = Fake::start(&chunks).await;
    fake.set(Mode::Down);
    let options = StoreTierOptions {
        tier_behind: false,
        // For those who can go on to another tier.
        deadline: SOON,
        ..StoreTierOptions::default()
    };
    let client = client(&[&fake]);
    let known = client.clone();
    let b = bench(client, options, None);
    let healing = Arc::clone(&fake);
    tokio::spawn(async move {
        until(|| known.health().origins[0].openings >= 1).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        healing.set(Mode::Good);
    });
    read_all(&b.image, &chunks).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn patience_ends_with_the_cause() {
    let chunks = chunks(1);
    let fake = Fake::start(&chunks).await;
    let client = client(&[&fake]);
    for mode in [Mode::Down, Mode::Busy(1), Mode::CutOff] {
        fake.set(mode);
        let got = get(&client, &chunks, Effort::Patient(SOON)).await;
        assert!(
            matches!(&got[0], Got::Failed(e) if e.is_passing()),
            "{mode:?}"
        );
    }
    // What is no store will not become one.
    let other = Fake::start(&chunks).await;
    other.set(Mode::WebPage);
    let client = super::client(&[&other]);
    let got = get(&client, &chunks, Effort::Patient(LONG * 60)).await;
    assert!(matches!(&got[0], Got::Failed(e) if matches!(**e, StoreError::Protocol { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_trickles_or_is_cut_off_comes_from_the_next_instance() {
    let image = Digest([9; 32]);
    let document = vec![b' '; 50_000];
    for mode in [Mode::Trickle, Mode::TrickleDown, Mode::CutOff, Mode::Hang] {
        let (first, second) = ranked_for(&image).await;
        first.set(mode);
        for fake in [&first, &second] {
            fake.document.lock().clone_from(&document);
        }
        let mut settings = settings(&[&first, &second]);
        settings.document_timeout = Duration::from_secs(2);
        let client = StoreClient::new(settings, &Guards::default()).unwrap();
        let key = key();
        let got = tokio::time::timeout(LONG, client.get_manifest(&image, &key)).await;
        let got = got.unwrap_or_else(|_| panic!("{mode:?} held it up"));
        assert_eq!(got.unwrap().unwrap(), document, "{mode:?}");
        assert!(first.asked("GET") >= 1, "{mode:?}");
        // Its guard is told of the body, too.
        while mode == Mode::CutOff && client.health().origins.iter().all(|o| o.openings == 0) {
            let got = client.get_manifest(&image, &key).await;
            assert_eq!(got.unwrap().unwrap(), document);
            assert!(first.asked("GET") < 50);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_asked_again_pays_for_it_not_who_failed() {
    let chunks = chunks(60);
    let (a, b) = (Fake::start(&chunks).await, Fake::start(&chunks).await);
    a.set(Mode::Down);
    let guards = Guards::default();
    let client = StoreClient::new(settings(&[&a, &b]), &guards).unwrap();
    without_retries(&guards, &a);
    assert_all_come(&chunks, get(&client, &chunks, Effort::Brief).await);
    let guards = Guards::default();
    let client = StoreClient::new(settings(&[&a, &b]), &guards).unwrap();
    without_retries(&guards, &b);
    let got = get(&client, &chunks, Effort::Brief).await;
    for (chunk, got) in chunks.iter().zip(got) {
        let rank = client.rank_of(chunk.spec.id()).await.unwrap();
        match got {
            Got::Chunk(bytes) => assert_eq!(bytes, chunk.stored),
            Got::Failed(_) => assert_eq!(rank[0], a.url),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_with_too_much_to_do_is_asked_again_when_it_said_and_not_left_alone() {
    let chunks = chunks(10);
    let fake = Fake::start(&chunks).await;
    fake.busy_first.store(1, Relaxed);
    let registry = FaultyTier::new("registry", &chunks, Fault::None);
    let store = client(&[&fake]);
    let b = bench(
        store.clone(),
        StoreTierOptions::default(),
        Some(registry.clone()),
    );
    read_all(&b.image, &chunks).await;
    assert_eq!(registry.asked(), [], "the store had time a second later");
    // Too long for who can go elsewhere.
    fake.set(Mode::Busy(60));
    for chunk in &chunks {
        assert_eq!(b.image.read(&chunk.spec).await.unwrap(), chunk.plain);
    }
    assert_eq!(registry.asked().len(), chunks.len());
    assert_eq!(fake.asked("POST"), 2 + chunks.len(), "each asked it first");
    assert_eq!(store.health().origins[0].openings, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_put_with_patience_outlasts_an_outage() {
    let chunks = chunks(16);
    let fake = Fake::start(&[]).await;
    fake.set(Mode::Down);
    let mut settings = settings(&[&fake]);
    settings.patience = LONG;
    let client = StoreClient::new(settings, &Guards::default()).unwrap();
    let (healing, known) = (Arc::clone(&fake), client.clone());
    tokio::spawn(async move {
        until(|| known.health().origins[0].openings >= 1).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        healing.set(Mode::Good);
    });
    let puts = chunks
        .iter()
        .map(|chunk| client.put(chunk.spec.id(), chunk.stored.clone(), false));
    for put in futures_util::future::join_all(puts).await {
        assert_eq!(put.unwrap(), PutOutcome::Put);
    }
    let health = client.health();
    assert!(health.sent < 200, "it was left alone meanwhile: {health:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_put_at_once_has_time_for_a_thin_link() {
    let chunks: Vec<_> = (0..8).map(|seed| test_chunk(seed, 256 << 10)).collect();
    let fake = Fake::start(&[]).await;
    // Two seconds would do for one of them, sixteen for all.
    *fake.put_takes.lock() = Duration::from_secs(3);
    let mut settings = settings(&[&fake]);
    settings.document_timeout = SOON;
    let client = StoreClient::new(settings, &Guards::default()).unwrap();
    let puts = chunks
        .iter()
        .map(|chunk| client.put(chunk.spec.id(), chunk.stored.clone(), false));
    for put in futures_util::future::join_all(puts).await {
        assert_eq!(put.unwrap(), PutOutcome::Put);
    }
    assert_eq!(fake.asked("PUT"), 8, "none was sent twice");
}
