//! How reads flow through tiers: together, past what is missing, and past other mounts.

use std::sync::atomic::AtomicUsize;

use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

use super::*;
use crate::testing::{Fault, FaultyTier, TestChunk, test_chunk};
use crate::{CacheOptions, ChunkRef, Delivery, FetchError};

const LONG: Duration = Duration::from_secs(30);

fn chunks(n: u64) -> Vec<TestChunk> {
    (0..n).map(|seed| test_chunk(seed, 2_000)).collect()
}

fn specs(chunks: &[TestChunk]) -> Vec<ChunkSpec> {
    chunks.iter().map(|c| c.spec.clone()).collect()
}

/// A tier that notes what it is asked and offered. What it has not got it says at once; the rest, or
/// the failure it is told to have, comes when its gate is open.
struct Gated {
    origin: Option<&'static str>,
    chunks: Vec<TestChunk>,
    gate: watch::Sender<bool>,
    fails: bool,
    requests: AtomicUsize,
    offered: Mutex<Vec<(ChunkId, Offer)>>,
}

impl Gated {
    fn new(chunks: &[TestChunk], open: bool) -> Self {
        Self {
            origin: None,
            chunks: chunks.to_vec(),
            gate: watch::channel(open).0,
            fails: false,
            requests: AtomicUsize::new(0),
            offered: Mutex::default(),
        }
    }

    fn requests(&self) -> usize {
        self.requests.load(Relaxed)
    }
}

#[async_trait::async_trait]
impl Tier for Gated {
    fn name(&self) -> &str {
        "gated"
    }

    async fn fetch(&self, chunks: &[ChunkRef], sink: mpsc::Sender<Delivery>) {
        self.requests.fetch_add(1, Relaxed);
        let find = |id: &ChunkId| self.chunks.iter().find(|c| c.spec.id() == id);
        for (index, chunk) in chunks.iter().enumerate() {
            if find(&chunk.id).is_none() && !self.fails {
                let error = FetchError::NotFound("x".to_owned());
                let _ = sink.send((index, Err(error))).await;
            }
        }
        let _ = self.gate.subscribe().wait_for(|open| *open).await;
        for (index, chunk) in chunks.iter().enumerate() {
            let result = match find(&chunk.id) {
                _ if self.fails => Err(FetchError::unavailable("told to fail")),
                Some(found) => Ok(found.stored.clone()),
                None => continue,
            };
            let _ = sink.send((index, result)).await;
        }
    }

    fn offer(&self, id: &ChunkId, _bytes: &Bytes, why: Offer) {
        self.offered.lock().push((*id, why));
    }

    fn origin(&self) -> Option<&str> {
        self.origin
    }
}

fn store() -> Store {
    Store::new(None, StoreOptions::default(), Handle::current())
}

fn image_of(store: &Store, tiers: Vec<Arc<dyn Tier>>) -> ImageStore {
    store.image(tiers, Arc::default())
}

async fn until(mut ready: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !ready() {
        assert!(begun.elapsed() < LONG, "waited in vain");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

// In one thread: all reads are begun before the window can end.
#[tokio::test]
async fn a_lone_read_goes_at_once_and_those_that_come_meanwhile_go_together() {
    let chunks = chunks(41);
    let tier = Arc::new(Gated::new(&chunks, false));
    let image = image_of(&store(), vec![tier.clone()]);
    let (first, spec) = (image.clone(), chunks[0].spec.clone());
    let first = tokio::spawn(async move { first.read(&spec).await });
    until(|| tier.requests() == 1).await;
    let others = join_all(chunks[1..].iter().map(|c| image.read(&c.spec)));
    let opened = async {
        // 16, 16, and what is left when the window ends.
        until(|| tier.requests() == 4).await;
        tier.gate.send_replace(true);
    };
    let (others, ()) = tokio::join!(others, opened);
    assert_eq!(first.await.unwrap().unwrap(), chunks[0].plain);
    for (chunk, plain) in chunks[1..].iter().zip(others) {
        assert_eq!(plain.unwrap(), chunk.plain);
    }
    assert_eq!(tier.requests(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_a_fetch_goes_when_that_dies() {
    let chunks = chunks(6);
    let tier = FaultyTier::new("registry", &chunks, Fault::Panics);
    let image = image_of(&store(), vec![tier.clone()]);
    let read = join_all(chunks.iter().map(|c| image.read(&c.spec)));
    let outcomes = tokio::time::timeout(LONG, read).await.unwrap();
    assert!(outcomes.iter().all(Result::is_err));
    tier.set_fault(Fault::None);
    for chunk in &chunks {
        assert_eq!(image.read(&chunk.spec).await.unwrap(), chunk.plain);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_tier_brings_what_is_missing_while_the_first_still_delivers() {
    let chunks = chunks(10);
    let near = Arc::new(Gated::new(&chunks[5..], false));
    let far = FaultyTier::new("registry", &chunks, Fault::None);
    let image = image_of(&store(), vec![near.clone(), far.clone()]);
    let all = specs(&chunks);
    let reading = image.read_many(&all);
    let opened = async {
        until(|| far.asked().len() == 5).await;
        near.gate.send_replace(true);
    };
    let (plain, ()) = tokio::join!(reading, opened);
    for (chunk, plain) in chunks.iter().zip(plain) {
        assert_eq!(plain.unwrap(), chunk.plain);
    }
    assert_eq!((near.requests(), far.asked().len()), (1, 5));
}

#[tokio::test(flavor = "multi_thread")]
async fn nearer_tiers_are_offered_what_they_lacked_or_had_wrong() {
    let chunks = chunks(3);
    let mut rotten = chunks[1].clone();
    rotten.stored = crate::testing::flipped(&rotten.stored);
    let near = Arc::new(Gated::new(&[chunks[0].clone(), rotten], true));
    let far = FaultyTier::new("registry", &chunks, Fault::None);
    let image = image_of(&store(), vec![near.clone(), far.clone()]);
    let id = |n: usize| *chunks[n].spec.id();
    for plain in image.read_many(&specs(&chunks)).await {
        plain.unwrap();
    }
    let mut offered = std::mem::take(&mut *near.offered.lock());
    offered.sort_by_key(|(_, why)| *why == Offer::WasWrong);
    assert_eq!(offered, [(id(2), Offer::Missing), (id(1), Offer::WasWrong)]);

    let found = image.verify(&specs(&chunks), VerifyScope::Tiers).await;
    assert!(found.iter().all(Result::is_ok));
    assert_eq!(
        *near.offered.lock(),
        [(id(1), Offer::WasWrong)],
        "verify repairs and keeps nothing"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_along_with_an_image_is_the_last_tiers_and_offered_to_the_first() {
    let chunks = chunks(2);
    let dir = tempfile::tempdir().unwrap();
    let cache = HostCache::open(dir.path(), CacheOptions::new(64 << 20)).unwrap();
    let store = Store::new(Some(cache), StoreOptions::default(), Handle::current());
    let near = Arc::new(Gated::new(&[], true));
    let far = FaultyTier::new("registry", &[], Fault::None);
    let image = image_of(&store, vec![near.clone(), far]);
    let wrong = (*chunks[1].spec.id(), chunks[0].stored.clone());
    image.accept(vec![
        (*chunks[0].spec.id(), chunks[0].stored.clone()),
        wrong,
    ]);
    let offered = [(*chunks[0].spec.id(), Offer::Unasked)];
    assert_eq!(*near.offered.lock(), offered);
    let tiers = image.stats().snapshot().tiers;
    assert_eq!(
        (tiers[0].delivered.chunks, tiers[1].delivered.chunks),
        (0, 1)
    );
    assert_eq!(image.read(&chunks[0].spec).await.unwrap(), chunks[0].plain);
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_of_one_dead_registry_share_its_failure() {
    let chunks = chunks(1);
    let mut tier = Gated::new(&chunks, false);
    tier.fails = true;
    tier.origin = Some("registry.test");
    let tier = Arc::new(tier);
    let store = store();
    let readers: Vec<_> = (0..30)
        .map(|_| {
            let image = image_of(&store, vec![tier.clone()]);
            let spec = chunks[0].spec.clone();
            tokio::spawn(async move {
                let outcome = image.read(&spec).await;
                (outcome, image)
            })
        })
        .collect();
    // All but the leader have joined its flight.
    until(|| store.host.flights.waiters(chunks[0].spec.id()) == 30).await;
    tier.gate.send_replace(true);
    for reader in readers {
        let (outcome, _image) = reader.await.unwrap();
        assert!(outcome.unwrap_err().to_string().contains("told to fail"));
    }
    assert_eq!(tier.requests(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn when_reads_are_slow_new_mounts_wait_or_are_refused_and_reads_go_on() {
    let chunks = chunks(3);
    let tier = Arc::new(Gated::new(&chunks, false));
    let options = StoreOptions {
        admission: AdmissionOptions {
            busy: 3,
            slow: Duration::from_millis(20),
        },
        ..StoreOptions::default()
    };
    let store = Store::new(None, options, Handle::current());
    assert_eq!(
        store.admit(Duration::ZERO).await.unwrap().waited,
        Duration::ZERO
    );
    // Three mounts, so that their reads are three fetches.
    let readers: Vec<_> = chunks
        .iter()
        .map(|chunk| {
            let (image, spec) = (image_of(&store, vec![tier.clone()]), chunk.spec.clone());
            tokio::spawn(async move { image.read(&spec).await })
        })
        .collect();
    until(|| store.overload().is_some()).await;
    let refused = store.admit(Duration::from_millis(60)).await.unwrap_err();
    assert_eq!(refused.under_way, 3);
    let waiting: Vec<_> = (0..3)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.admit(LONG).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(waiting.iter().all(|w| !w.is_finished()));
    tier.gate.send_replace(true);
    for (chunk, reader) in chunks.iter().zip(readers) {
        assert_eq!(reader.await.unwrap().unwrap(), chunk.plain);
    }
    for admitted in waiting {
        assert!(admitted.await.unwrap().unwrap().waited > Duration::ZERO);
    }
}
