//! The client of the store against the real server, in one process: what hosts rely on.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lazyimg_chunkstore::remote::{
    Effort, Got, Http2, PutOutcome, RefAnswer, RefCondition, StoreClient, StoreErrorCode,
    StoreSettings, StoreTier, StoreTierOptions,
};
use lazyimg_chunkstore::testing::{Fault, FaultyTier, TestChunk, flipped, test_chunk};
use lazyimg_chunkstore::{
    BreakerState, Guards, ImageStore, MountStats, Store, StoreOptions, Tier, VerifyScope,
};
use lazyimg_convergent::Digest;
use lazyimg_store::audit::Audit;
use lazyimg_store::catalog::{Catalog, CatalogOptions};
use lazyimg_store::engine::memory::MemoryEngine;
use lazyimg_store::engine::{Engine, RootId};
use lazyimg_store::http::{Limits, Parts};
use lazyimg_store::server::{Handle, Server, ServerOptions};
use lazyimg_store::tenants::Tenants;
use lazyimg_store::tls::Tls;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

const LONG: Duration = Duration::from_secs(30);

/// An instance that runs.
struct Instance {
    url: String,
    listen: String,
    handle: Handle,
    running: JoinHandle<bool>,
}

impl Instance {
    async fn start(engine: &Arc<MemoryEngine>, tenants: Tenants, listen: &str) -> Self {
        Self::with(engine, tenants, ServerOptions::at(listen)).await
    }

    async fn with(engine: &Arc<MemoryEngine>, tenants: Tenants, options: ServerOptions) -> Self {
        let engine: Arc<dyn Engine> = Arc::clone(engine) as _;
        let name = format!("test-{}", options.listen.rsplit(':').next().unwrap());
        let scheme = options.tls.as_ref().map_or("http", |_| "https");
        let catalog = Catalog::open(Arc::clone(&engine), CatalogOptions::shared(name))
            .await
            .unwrap();
        let parts = Parts {
            catalog: Arc::new(catalog),
            engine,
            tenants: Arc::new(tenants),
            audit: Audit::to_log(),
            limits: Limits::default(),
            hot: None,
        };
        let server = Server::bind(parts, options).await.unwrap();
        let listen = server.addr().to_string();
        Self {
            url: format!("{scheme}://{listen}"),
            listen,
            handle: server.handle(),
            running: tokio::spawn(server.run()),
        }
    }

    async fn local(engine: &Arc<MemoryEngine>) -> Self {
        Self::start(engine, Tenants::local(), "127.0.0.1:0").await
    }

    async fn kill(self) -> String {
        self.handle.abort();
        self.running.await.unwrap();
        self.listen
    }
}

fn engine() -> Arc<MemoryEngine> {
    Arc::new(MemoryEngine::new())
}

fn client(instances: &[&Instance]) -> StoreClient {
    let urls = instances.iter().map(|i| i.url.clone()).collect();
    StoreClient::new(StoreSettings::new(urls), &Guards::default()).unwrap()
}

fn chunks(n: u64) -> Vec<TestChunk> {
    (0..n).map(|seed| test_chunk(seed, 20_000)).collect()
}

async fn put_all(client: &StoreClient, chunks: &[TestChunk]) {
    for chunk in chunks {
        let put = client.put(chunk.spec.id(), chunk.stored.clone(), false);
        assert_eq!(put.await.unwrap(), PutOutcome::Put);
    }
}

async fn get(client: &StoreClient, chunks: &[TestChunk], wait: Option<Duration>) -> Vec<Got> {
    let ids: Vec<_> = chunks.iter().map(|c| *c.spec.id()).collect();
    let (sink, mut inbox) = mpsc::channel(1_000);
    client.get_many(&ids, wait, Effort::Brief, &sink).await;
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

struct Host {
    image: ImageStore,
    stats: Arc<MountStats>,
    tier: Arc<StoreTier>,
}

/// A host without a cache that reads an image through the store, then from a registry.
fn host(client: StoreClient, registry: &Arc<FaultyTier>) -> Host {
    host_with(client, registry, StoreTierOptions::default())
}

fn host_with(client: StoreClient, registry: &Arc<FaultyTier>, options: StoreTierOptions) -> Host {
    let runtime = tokio::runtime::Handle::current();
    let tier = Arc::new(StoreTier::new(client, options, &runtime));
    let tiers: Vec<Arc<dyn Tier>> = vec![tier.clone(), registry.clone()];
    let stats = Arc::new(MountStats::new());
    let options = StoreOptions {
        hot_bytes: 0,
        ..StoreOptions::default()
    };
    let image = Store::new(None, options, runtime).image(tiers, stats.clone());
    Host { image, stats, tier }
}

async fn read_all(image: &ImageStore, chunks: &[TestChunk]) {
    let specs: Vec<_> = chunks.iter().map(|c| c.spec.clone()).collect();
    for (chunk, plain) in chunks.iter().zip(image.read_many(&specs).await) {
        assert_eq!(plain.unwrap(), chunk.plain);
    }
}

async fn until(mut ready: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !ready() {
        assert!(begun.elapsed() < LONG, "waited in vain");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_come_back_over_http_1_and_http_2() {
    let chunks = chunks(150);
    let instance = Instance::local(&engine()).await;
    put_all(&client(&[&instance]), &chunks[..140]).await;
    for http2 in [Http2::Never, Http2::Always] {
        let mut settings = StoreSettings::new(vec![instance.url.clone()]);
        settings.http2 = http2;
        let client = StoreClient::new(settings, &Guards::default()).unwrap();
        assert_all_come(&chunks[..140], get(&client, &chunks[..140], None).await);
        let missing = get(&client, &chunks[140..], None).await;
        assert!(missing.iter().all(|got| matches!(got, Got::Missing)));
        let ids: Vec<_> = chunks.iter().map(|c| *c.spec.id()).collect();
        let has = client.has(&ids).await.unwrap();
        assert!(has[..140].iter().all(|has| *has) && has[140..].iter().all(|has| !*has));
        let again = client.put(&ids[0], chunks[0].stored.clone(), false).await;
        assert_eq!(again.unwrap(), PutOutcome::Had);
        let wrong = client.put(&ids[0], chunks[1].stored.clone(), false).await;
        assert_eq!(wrong.unwrap_err().code(), Some(StoreErrorCode::BadRequest));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_asker_is_told_to_bring_a_chunk_and_another_gets_it_when_it_came() {
    let chunks = chunks(1);
    let instance = Instance::local(&engine()).await;
    let client = client(&[&instance]);
    let first = get(&client, &chunks, Some(LONG)).await;
    assert!(matches!(first[0], Got::Yours));
    let soon = get(&client, &chunks, Some(Duration::from_millis(20))).await;
    assert!(matches!(soon[0], Got::Coming));
    let (waiting, put) = tokio::join!(get(&client, &chunks, Some(Duration::from_secs(9))), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        put_all(&client, &chunks).await;
    });
    let () = put;
    assert_all_come(&chunks, waiting);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_would_not_bring_a_chunk_does_not_hold_up_others_who_would() {
    let chunks = chunks(4);
    let instance = Instance::local(&engine()).await;
    let registry = FaultyTier::new("registry", &chunks, Fault::None);
    let other = client(&[&instance]);
    let now = Some(Duration::ZERO);
    // One that verifies brings nothing.
    let looks = host(client(&[&instance]), &registry);
    let specs: Vec<_> = chunks[..2].iter().map(|c| c.spec.clone()).collect();
    for outcome in looks.image.verify(&specs, VerifyScope::Tiers).await {
        outcome.unwrap();
    }
    for got in get(&other, &chunks[..2], now).await {
        assert!(matches!(got, Got::Yours), "{got:?}");
    }
    // One whose queue is nearly full brings what there is room for.
    let options = StoreTierOptions {
        write_back_bytes: 30_000,
        ..StoreTierOptions::default()
    };
    let full = host_with(client(&[&instance]), &registry, options);
    let refs: Vec<_> = chunks[2..].iter().map(|c| c.spec.chunk).collect();
    let (sink, mut inbox) = mpsc::channel(10);
    full.tier.fetch(&refs, sink).await;
    let mut told = Vec::new();
    while let Some((index, delivery)) = inbox.recv().await {
        assert!(delivery.is_err());
        told.push(index);
    }
    told.sort_unstable();
    assert_eq!(told, [0, 1], "each once");
    let got = get(&other, &chunks[2..], now).await;
    assert!(matches!(got[..], [Got::Coming, Got::Yours]), "{got:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_one_of_two_instances_killed_all_chunks_still_come() {
    let chunks = chunks(80);
    let engine = engine();
    let (a, b) = (
        Instance::local(&engine).await,
        Instance::local(&engine).await,
    );
    let client = client(&[&a, &b]);
    put_all(&client, &chunks).await;
    assert_all_come(&chunks, get(&client, &chunks, None).await);
    let mut firsts = Vec::new();
    for chunk in &chunks {
        firsts.push(client.rank_of(chunk.spec.id()).await.unwrap().remove(0));
    }
    assert!(firsts.contains(&a.url) && firsts.contains(&b.url));
    a.kill().await;
    for _ in 0..10 {
        assert_all_come(&chunks, get(&client, &chunks, None).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_host_asks_the_registry_for_nothing_that_the_first_has_read() {
    let chunks = chunks(30);
    let instance = Instance::local(&engine()).await;
    let registry = FaultyTier::new("registry", &chunks, Fault::None);
    let first = host(client(&[&instance]), &registry);
    read_all(&first.image, &chunks).await;
    tokio::time::timeout(LONG, first.tier.settle())
        .await
        .unwrap();
    assert_eq!(registry.asked().len(), 30);
    let second = host(client(&[&instance]), &registry);
    read_all(&second.image, &chunks).await;
    assert_eq!(registry.asked().len(), 30);
    assert_eq!(second.stats.snapshot().tiers[0].delivered.chunks, 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_byte_in_the_store_is_found_and_healed_from_the_registry() {
    let chunks = chunks(5);
    let engine = engine();
    let instance = Instance::local(&engine).await;
    put_all(&client(&[&instance]), &chunks).await;
    let id = chunks[2].spec.id();
    assert!(engine.damage_chunk(RootId::FIRST, id, flipped(&chunks[2].stored)));
    let registry = FaultyTier::new("registry", &chunks, Fault::None);
    let host = host(client(&[&instance]), &registry);
    read_all(&host.image, &chunks).await;
    tokio::time::timeout(LONG, host.tier.settle())
        .await
        .unwrap();
    assert_eq!(registry.asked(), [*id]);
    read_all(&host.image, &chunks).await;
    assert_eq!(
        registry.asked(),
        [*id],
        "the store's own copy is right again"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn references_change_only_under_their_condition() {
    let instance = Instance::local(&engine()).await;
    let client = client(&[&instance]);
    let name = "registry.test/a b/c:1.0/ü";
    assert_eq!(
        client.get_ref(name, None).await.unwrap(),
        RefAnswer::Missing
    );
    let wait = Some(Duration::from_millis(10));
    assert_eq!(client.get_ref(name, wait).await.unwrap(), RefAnswer::Yours);
    assert_eq!(client.get_ref(name, wait).await.unwrap(), RefAnswer::Coming);
    let (one, two) = (Digest([1; 32]), Digest([2; 32]));
    client
        .put_ref(name, &one, &RefCondition::IsNew)
        .await
        .unwrap();
    let again = client.put_ref(name, &two, &RefCondition::IsNew).await;
    assert_eq!(
        again.unwrap_err().code(),
        Some(StoreErrorCode::Precondition)
    );
    let RefAnswer::Found(record) = client.get_ref(name, None).await.unwrap() else {
        panic!("it was put");
    };
    assert_eq!(record.image, one);
    let is = RefCondition::Is(record.etag.unwrap());
    client.put_ref(name, &two, &is).await.unwrap();
    let stale = client.put_ref(name, &one, &is).await;
    assert_eq!(
        stale.unwrap_err().code(),
        Some(StoreErrorCode::Precondition)
    );
    assert!(client.delete_ref(name).await.unwrap());
    assert!(!client.delete_ref(name).await.unwrap());
}

fn write_secret(path: &Path, text: &str) {
    let new = path.with_extension("new");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    std::fs::rename(new, path).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_rotated_without_a_restart_of_either_side() {
    let chunks = chunks(2);
    let dir = tempfile::tempdir().unwrap();
    let (theirs, ours) = (dir.path().join("acme.token"), dir.path().join("our.token"));
    for path in [&theirs, &ours] {
        write_secret(path, "0123456789abcdef-the-first\n");
    }
    let tenants = dir.path().join("tenants.toml");
    write_secret(
        &tenants,
        "[tenants.acme]\ntoken-files = [\"acme.token\"]\nrights = [\"read\", \"write\"]\n",
    );
    let tenants = Tenants::load(&tenants).unwrap();
    let instance = Instance::start(&engine(), tenants, "127.0.0.1:0").await;
    let mut settings = StoreSettings::new(vec![instance.url.clone()]);
    settings.token_file = Some(ours.clone());
    let client = StoreClient::new(settings, &Guards::default()).unwrap();
    put_all(&client, &chunks[..1]).await;
    write_secret(&theirs, "0123456789abcdef-the-second\n");
    instance.handle.reload().await;
    let refused = client
        .put(chunks[1].spec.id(), chunks[1].stored.clone(), false)
        .await;
    assert_eq!(
        refused.unwrap_err().code(),
        Some(StoreErrorCode::Unauthorized)
    );
    write_secret(&ours, "0123456789abcdef-the-second\n");
    put_all(&client, &chunks[1..]).await;
    assert_all_come(&chunks, get(&client, &chunks, None).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_dies_is_left_alone_and_used_again_when_it_is_back() {
    let chunks = chunks(40);
    let engine = engine();
    let instance = Instance::local(&engine).await;
    let registry = FaultyTier::new("registry", &chunks, Fault::None);
    let host = host(client(&[&instance]), &registry);
    put_all(host.tier.client(), &chunks).await;
    let breaker = || host.tier.health().origins[0].breaker;
    let listen = instance.kill().await;
    for chunk in &chunks {
        let plain = host.image.read(&chunk.spec).await;
        assert_eq!(plain.unwrap(), chunk.plain, "the registry has it");
    }
    assert!(host.tier.health().origins[0].openings >= 1);
    let sent = host.tier.health().sent;
    assert!(sent < 40 + 40, "{sent}: not even one for each read");
    let _back = Instance::start(&engine, Tenants::local(), &listen).await;
    let begun = Instant::now();
    while breaker() != BreakerState::Closed {
        assert!(begun.elapsed() < LONG, "it never closed");
        host.image.read(&chunks[0].spec).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let asked = registry.asked().len();
    read_all(&host.image, &chunks).await;
    until(|| registry.asked().len() == asked).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_put_with_patience_outlasts_a_store_that_starts_anew() {
    let chunks = chunks(20);
    let engine = engine();
    let instance = Instance::local(&engine).await;
    let mut settings = StoreSettings::new(vec![instance.url.clone()]);
    settings.patience = LONG;
    let client = StoreClient::new(settings, &Guards::default()).unwrap();
    put_all(&client, &chunks[..1]).await;
    let listen = instance.kill().await;
    let puts = {
        let (client, chunks) = (client.clone(), self::chunks(20));
        tokio::spawn(async move { put_all(&client, &chunks[1..]).await })
    };
    until(|| client.health().origins[0].openings >= 1).await;
    let _back = Instance::start(&engine, Tenants::local(), &listen).await;
    puts.await.unwrap();
    assert_all_come(&chunks, get(&client, &chunks, None).await);
}

/// A certificate for 127.0.0.1 with its key, in files of this name; gives the certificate's.
fn certificate(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let files = (
        dir.join(format!("{name}.pem")),
        dir.join(format!("{name}.key")),
    );
    write_secret(&files.0, &made.cert.pem());
    write_secret(&files.1, &made.signing_key.serialize_pem());
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn who_trusts_the_wrong_authority_harms_nobody_else_and_is_helped_by_a_new_file() {
    let chunks = chunks(5);
    let dir = tempfile::tempdir().unwrap();
    let (right, key) = certificate(dir.path(), "right");
    let (wrong, _) = certificate(dir.path(), "wrong");
    let mut options = ServerOptions::at("127.0.0.1:0");
    options.tls = Some(Tls::load(&right, &key).unwrap());
    let instance = Instance::with(&engine(), Tenants::local(), options).await;
    // One process, as a daemon with two mounts.
    let guards = Guards::default();
    let trusting = |ca: &Path| {
        let mut settings = StoreSettings::new(vec![instance.url.clone()]);
        settings.ca_file = Some(ca.to_owned());
        StoreClient::new(settings, &guards).unwrap()
    };
    let (good, bad) = (trusting(&right), trusting(&wrong));
    put_all(&good, &chunks).await;
    for _ in 0..10 {
        let got = get(&bad, &chunks, None).await;
        assert!(got.iter().all(|got| matches!(got, Got::Failed(_))));
    }
    assert!(bad.health().origins[0].openings >= 1);
    assert_eq!(good.health().origins[0].openings, 0);
    assert_all_come(&chunks, get(&good, &chunks, None).await);
    // A file that can be used needs no restart, and one that cannot changes nothing.
    let pem = std::fs::read_to_string(&right).unwrap();
    write_secret(&wrong, &pem);
    write_secret(&right, "nothing");
    let begun = Instant::now();
    while matches!(get(&bad, &chunks, None).await[0], Got::Failed(_)) {
        assert!(begun.elapsed() < LONG, "the file was never read again");
        assert_all_come(&chunks, get(&good, &chunks, None).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_all_come(&chunks, get(&bad, &chunks, None).await);
    assert_all_come(&chunks, get(&good, &chunks, None).await);
}
