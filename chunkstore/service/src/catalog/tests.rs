//! What one instance promises, case by case. The interplay of several, with deaths: `tests/gc_model.rs`.

mod collection;
mod quotas;
mod trouble;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use lazyimg_convergent::{ChunkId, ChunkKey, Digest, KeyId, TenantKey};
use lazyimg_image::manifest::{BLOCK, Entry, Header, Manifest, Pack, Stored};
use parking_lot::Mutex;

use super::*;
use crate::engine::memory::{Call, MemoryEngine};
use crate::engine::{EngineError, RootId};

struct Hands(Mutex<SystemTime>);

impl Clock for Hands {
    fn now(&self) -> SystemTime {
        *self.0.lock()
    }
}

struct Store {
    engine: Arc<MemoryEngine>,
    hands: Arc<Hands>,
    catalog: Catalog,
}

impl Store {
    async fn new() -> Self {
        let engine = Arc::new(MemoryEngine::new());
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let hands = Arc::new(Hands(Mutex::new(start)));
        let catalog = open(&engine, &hands).await;
        Self {
            engine,
            hands,
            catalog,
        }
    }

    /// As if the process had been killed.
    async fn reopen(&mut self) {
        self.catalog = open(&self.engine, &self.hands).await;
    }

    fn pass(&self, seconds: u64) {
        *self.hands.0.lock() += Duration::from_secs(seconds);
    }

    async fn put(&self, tenant: &TenantName, bytes: &Bytes) -> Put {
        let id = ChunkId::of(bytes);
        let put = self
            .catalog
            .put_chunk(tenant, None, &id, bytes.clone(), false);
        put.await.unwrap()
    }

    /// A live image of these chunks.
    async fn image(&self, tenant: &TenantName, chunks: &[Bytes]) {
        for chunk in chunks {
            self.put(tenant, chunk).await;
        }
        let bytes = manifest(chunks);
        let put = self
            .catalog
            .put_manifest(tenant, None, &IMAGE, key(), bytes);
        assert_eq!(put.await.unwrap(), ManifestPut::Created);
    }

    async fn gc(&self, options: GcOptions) -> Vec<GcRoot> {
        self.catalog.gc(options).await.unwrap().roots
    }

    async fn used(&self, tenant: &TenantName) -> u64 {
        let stats = self.catalog.stats().await.unwrap();
        let of = stats.tenants.iter().find(|t| t.tenant == *tenant);
        of.map_or(0, |t| t.bytes)
    }
}

async fn open(engine: &Arc<MemoryEngine>, hands: &Arc<Hands>) -> Catalog {
    let options = CatalogOptions {
        clock: hands.clone(),
        ..CatalogOptions::exclusive("one")
    };
    Catalog::open(engine.clone(), options).await.unwrap()
}

const IMAGE: Digest = Digest([9; 32]);
const NO_GRACE: GcOptions = GcOptions {
    dry_run: false,
    grace_seconds: Some(0),
    unused_seconds: None,
};

fn tenant(name: &str) -> TenantName {
    name.parse().unwrap()
}

fn chunk(n: u8) -> Bytes {
    Bytes::from(vec![n; 100])
}

fn key() -> KeyId {
    TenantKey::from_bytes([5; 32]).id()
}

fn manifest(chunks: &[Bytes]) -> Bytes {
    let entry = |chunk: &Bytes| Entry {
        blocks: 1,
        stored: Some(Stored {
            id: ChunkId::of(chunk),
            len: chunk.len() as u32,
            pack: 0,
            offset: 0,
        }),
    };
    let mut manifest = Manifest {
        header: Header {
            meta_len: BLOCK,
            data_len: BLOCK * (chunks.len() as u64 - 1),
            image: IMAGE,
            has_xattrs: false,
            files: 1,
            file_bytes: 1,
            salt_id: [0; 16],
            epoch: 1,
            domain: "default".to_owned(),
        },
        meta: chunks[..1].iter().map(entry).collect(),
        data: chunks[1..].iter().map(entry).collect(),
        packs: vec![Pack {
            digest: Digest([7; 32]),
            len: 10_000,
        }],
        sealed_keys: Vec::new(),
    };
    let keys = vec![ChunkKey::from_bytes([1; 32]); chunks.len()];
    manifest.seal_keys(&TenantKey::from_bytes([5; 32]), keys.iter());
    manifest.to_bytes().into()
}

#[tokio::test]
async fn knowing_an_id_does_not_let_a_stranger_read() {
    let store = Store::new().await;
    let (owner, stranger) = (tenant("owner"), tenant("stranger"));
    let id = ChunkId::of(&chunk(1));
    assert_eq!(store.put(&owner, &chunk(1)).await, Put::New);
    let catalog = &store.catalog;
    assert_eq!(catalog.get_chunk(&stranger, &id).await.unwrap(), None);
    assert_eq!(catalog.stat_chunk(&stranger, &id).await.unwrap(), None);
    assert_eq!(catalog.has_chunks(&stranger, &[id]).await.unwrap(), [false]);
    let put = catalog.put_manifest(&stranger, None, &IMAGE, key(), manifest(&[chunk(1)]));
    assert_eq!(put.await.unwrap(), ManifestPut::Missing(vec![id]));
    // Who brings it may read it; it lies there once.
    assert_eq!(store.put(&stranger, &chunk(1)).await, Put::New);
    assert_eq!(store.put(&stranger, &chunk(1)).await, Put::Known);
    assert_eq!(
        catalog.get_chunk(&stranger, &id).await.unwrap(),
        Some(chunk(1))
    );
    assert_eq!(store.engine.contents().1.len(), 1);
}

#[tokio::test]
async fn a_manifest_that_is_not_what_the_request_says_is_refused() {
    let store = Store::new().await;
    let t = tenant("t");
    store.put(&t, &chunk(1)).await;
    let put = |image, key, bytes| store.catalog.put_manifest(&t, None, image, key, bytes);
    let good = manifest(&[chunk(1)]);
    let other = Digest([1; 32]);
    let refused = [
        put(&other, key(), good.clone()).await,
        put(&IMAGE, KeyId([0; 8]), good.clone()).await,
        put(&IMAGE, key(), good.slice(..good.len() - 1)).await,
        put(&IMAGE, key(), Bytes::new()).await,
    ];
    for result in refused {
        assert!(
            matches!(result, Err(CatalogError::BadManifest(_))),
            "{result:?}"
        );
    }
    let long = Bytes::from(vec![0; MAX_MANIFEST + 1]);
    let result = put(&IMAGE, key(), long).await;
    assert!(
        matches!(result, Err(CatalogError::TooLarge { .. })),
        "{result:?}"
    );
    assert_eq!(store.catalog.list_images(&t, None, 10).await.unwrap(), []);
}

#[tokio::test]
async fn a_quota_holds_and_rotation_and_collection_do_not_count_twice() {
    let mut store = Store::new().await;
    let t = tenant("t");
    let len = manifest(&[chunk(1), chunk(2)]).len() as u64;
    store.image(&t, &[chunk(1), chunk(2)]).await;
    let used = 200 + len;
    assert_eq!(store.used(&t).await, used);
    let put = |n: u8, quota: u64| {
        let bytes = chunk(n);
        let (catalog, t) = (&store.catalog, &t);
        async move {
            let id = ChunkId::of(&bytes);
            catalog.put_chunk(t, Some(quota), &id, bytes, false).await
        }
    };
    let refused = put(3, used + 99).await;
    assert!(
        matches!(refused, Err(CatalogError::Quota { wanted: 100, .. })),
        "{refused:?}"
    );
    // What it has put before needs no room.
    assert_eq!(put(1, 0).await.unwrap(), Put::Known);

    store.catalog.rotate().await.unwrap();
    assert_eq!(put(1, 0).await.unwrap(), Put::Known);
    assert_eq!(store.used(&t).await, used);
    store.pass(10);
    assert_eq!(store.gc(NO_GRACE).await[0].manifests_moved, 1);
    assert_eq!(store.used(&t).await, used);
    store.catalog.flush_usage().await.unwrap();
    store.reopen().await;
    assert_eq!(store.used(&t).await, used);
    store
        .catalog
        .delete_manifest(&t, &IMAGE, key())
        .await
        .unwrap();
    assert_eq!(store.used(&t).await, 200);
}

#[tokio::test]
async fn what_lives_moves_and_the_rest_goes_with_its_root() {
    let store = Store::new().await;
    let t = tenant("t");
    store.image(&t, &[chunk(1), chunk(2)]).await;
    store.put(&t, &chunk(3)).await;
    let profile = Bytes::from_static(b"sealed");
    let catalog = &store.catalog;
    catalog
        .put_profile(&t, None, &IMAGE, "start", profile.clone())
        .await
        .unwrap();
    let next = catalog.rotate().await.unwrap();

    let dry = GcOptions {
        dry_run: true,
        ..NO_GRACE
    };
    assert_eq!(store.gc(dry).await[0].wait_seconds, 5);
    store.pass(6);
    assert_eq!(store.gc(dry).await[0].manifests_moved, 1);
    assert_eq!(store.gc(NO_GRACE).await[0].chunks_copied, 2);
    store.pass(6);
    // With grace it stays.
    let kept = store.gc(GcOptions::default()).await;
    assert!(kept[0].wait_seconds > 6 * 24 * 3600, "{kept:?}");
    assert_eq!(store.gc(NO_GRACE).await[0].after, Some(RootState::Deleting));
    store.pass(6);
    assert_eq!(store.gc(NO_GRACE).await[0].after, None);

    let (docs, chunks) = store.engine.contents();
    assert_eq!(chunks.len(), 2);
    let of_first = |doc: &&String| doc.contains(&RootId::FIRST.to_string());
    assert_eq!(docs.iter().find(of_first), None);
    let listed = catalog.list_manifests(&t, &IMAGE).await.unwrap();
    assert_eq!(listed.iter().map(|m| m.root).collect::<Vec<_>>(), [next]);
    let found = catalog.get_profile(&t, &IMAGE, "start").await.unwrap();
    assert_eq!(found, Some(profile));
    let id = ChunkId::of(&chunk(3));
    assert_eq!(catalog.get_chunk(&t, &id).await.unwrap(), None);
}

#[tokio::test]
async fn a_read_from_an_expired_root_stops_its_deletion_until_somebody_acknowledges() {
    let store = Store::new().await;
    let t = tenant("t");
    store.put(&t, &chunk(3)).await;
    let catalog = &store.catalog;
    catalog.rotate().await.unwrap();
    let refused = catalog.acknowledge(RootId::FIRST, false).await;
    assert!(
        matches!(refused, Err(CatalogError::Conflict { .. })),
        "{refused:?}"
    );
    store.pass(6);
    assert_eq!(store.gc(NO_GRACE).await[0].after, Some(RootState::Expired));
    let id = ChunkId::of(&chunk(3));
    assert_eq!(catalog.has_chunks(&t, &[id]).await.unwrap(), [false]);
    assert_eq!(catalog.get_chunk(&t, &id).await.unwrap(), Some(chunk(3)));
    let alarm = catalog.roots().await.unwrap()[0].alarm.clone().unwrap();
    assert_eq!((alarm.tenant.as_str(), alarm.chunk), ("t", id.hex()));
    for _ in 0..4 {
        store.pass(100);
        let line = &store.gc(NO_GRACE).await[0];
        assert!(
            line.alarm && line.after == Some(RootState::Expired),
            "{line:?}"
        );
    }
    catalog.acknowledge(RootId::FIRST, false).await.unwrap();
    assert!(
        store.gc(NO_GRACE).await[0].wait_seconds > 0,
        "the time begins anew"
    );
    store.pass(6);
    assert_eq!(store.gc(NO_GRACE).await[0].after, Some(RootState::Deleting));
    assert_eq!(catalog.get_chunk(&t, &id).await.unwrap(), None);
}

#[tokio::test]
async fn an_alarm_that_comes_while_deletion_is_decided_stops_it() {
    let store = Store::new().await;
    let t = tenant("t");
    let id = ChunkId::of(&chunk(3));
    store.put(&t, &chunk(3)).await;
    let catalog = &store.catalog;
    catalog.rotate().await.unwrap();
    store.pass(6);
    store.gc(NO_GRACE).await;
    catalog.get_chunk(&t, &id).await.unwrap().unwrap();
    // Another instance looked for an alarm just before.
    catalog
        .mark(RootId::FIRST, names::Mark::Deleting)
        .await
        .unwrap();
    store.pass(6);
    assert!(store.gc(NO_GRACE).await[0].alarm);
    assert_eq!(store.engine.contents().1, [(RootId::FIRST, id)]);
    assert_eq!(catalog.get_chunk(&t, &id).await.unwrap(), None);
    catalog.acknowledge(RootId::FIRST, false).await.unwrap();
    assert_eq!(store.gc(NO_GRACE).await[0].after, None);
    assert_eq!(store.engine.contents().1, []);
}

#[tokio::test]
async fn an_image_with_a_damaged_chunk_keeps_its_root_until_the_chunk_is_put_again() {
    let store = Store::new().await;
    let t = tenant("t");
    store.image(&t, &[chunk(1), chunk(2)]).await;
    let id = ChunkId::of(&chunk(2));
    assert!(
        store
            .engine
            .damage_chunk(RootId::FIRST, &id, Bytes::from_static(b"rot"))
    );
    store.catalog.rotate().await.unwrap();
    store.pass(6);
    let line = &store.gc(NO_GRACE).await[0];
    assert_eq!(
        (line.after, line.stuck[0].chunks),
        (Some(RootState::Retired), 1)
    );
    store.put(&t, &chunk(2)).await;
    assert_eq!(store.gc(NO_GRACE).await[0].after, Some(RootState::Expired));
    assert_eq!(
        store.catalog.get_chunk(&t, &id).await.unwrap(),
        Some(chunk(2))
    );
}

#[tokio::test]
async fn a_bad_copy_is_replaced_by_a_put_that_says_repair() {
    let store = Store::new().await;
    let t = tenant("t");
    let (id, catalog) = (ChunkId::of(&chunk(1)), &store.catalog);
    store.put(&t, &chunk(1)).await;
    let put = || catalog.put_chunk(&t, None, &id, chunk(1), true);
    assert_eq!(put().await.unwrap(), Put::Known);
    store
        .engine
        .damage_chunk(RootId::FIRST, &id, Bytes::from_static(b"rot"));
    assert_eq!(put().await.unwrap(), Put::Repaired);
    assert_eq!(catalog.get_chunk(&t, &id).await.unwrap(), Some(chunk(1)));
}

#[tokio::test]
async fn images_that_nobody_asks_for_are_dropped_only_if_one_says_so() {
    let store = Store::new().await;
    let t = tenant("t");
    store.image(&t, &[chunk(1)]).await;
    let day = 24 * 3600;
    store.pass(10 * day);
    store
        .catalog
        .get_manifest(&t, &IMAGE, key())
        .await
        .unwrap()
        .unwrap();
    store.catalog.rotate().await.unwrap();
    store.pass(4 * day);
    let unused = |days: u64| GcOptions {
        unused_seconds: Some(days * day),
        ..NO_GRACE
    };
    assert_eq!(store.gc(unused(5)).await[0].manifests_moved, 1);
    store.catalog.rotate().await.unwrap();
    store.pass(4 * day);
    assert_eq!(
        store.gc(unused(5)).await.last().unwrap().manifests_dropped,
        1
    );
    assert_eq!(
        store.catalog.get_manifest(&t, &IMAGE, key()).await.unwrap(),
        None
    );
}

#[tokio::test]
async fn references_change_only_under_their_condition() {
    let store = Store::new().await;
    let (t, other) = (tenant("t"), tenant("other"));
    let catalog = &store.catalog;
    let put = |condition| {
        let t = &t;
        async move { catalog.put_ref(t, "host/app:1", &IMAGE, &condition).await }
    };
    let first = put(Condition::Absent).await.unwrap();
    assert!(matches!(
        put(Condition::Absent).await,
        Err(CatalogError::Precondition)
    ));
    store.pass(1);
    let second = put(Condition::Match(first.etag.clone())).await.unwrap();
    let stale = put(Condition::Match(first.etag)).await;
    assert!(
        matches!(stale, Err(CatalogError::Precondition)),
        "{stale:?}"
    );
    assert_eq!(
        catalog.get_ref(&t, "host/app:1").await.unwrap(),
        Some(second)
    );
    assert_eq!(catalog.get_ref(&other, "host/app:1").await.unwrap(), None);
    let long = "x".repeat(MAX_REFERENCE + 1);
    assert!(matches!(
        catalog.get_ref(&t, &long).await,
        Err(CatalogError::TooLarge { .. })
    ));
    assert!(
        catalog
            .delete_ref(&t, "host/app:1", &Condition::Always)
            .await
            .unwrap()
    );
    assert!(
        !catalog
            .delete_ref(&t, "host/app:1", &Condition::Always)
            .await
            .unwrap()
    );
}

#[tokio::test]
async fn profiles_are_of_live_images_few_and_go_with_them() {
    let store = Store::new().await;
    let t = tenant("t");
    let catalog = &store.catalog;
    let put = |name: String| {
        let t = &t;
        async move {
            catalog
                .put_profile(t, None, &IMAGE, &name, Bytes::from_static(b"p"))
                .await
        }
    };
    assert!(matches!(
        put("a".into()).await,
        Err(CatalogError::NotLive(_))
    ));
    store.image(&t, &[chunk(1)]).await;
    for n in 0..MAX_PROFILES {
        put(format!("p{n}")).await.unwrap();
    }
    put("p0".into()).await.unwrap();
    assert!(matches!(
        put("more".into()).await,
        Err(CatalogError::TooMany { .. })
    ));
    assert!(matches!(
        put("../x".into()).await,
        Err(CatalogError::BadName { .. })
    ));
    assert!(catalog.delete_profile(&t, &IMAGE, "p1").await.unwrap());
    assert!(!catalog.delete_profile(&t, &IMAGE, "p1").await.unwrap());
    assert!(catalog.delete_manifest(&t, &IMAGE, key()).await.unwrap());
    assert_eq!(catalog.get_profile(&t, &IMAGE, "p0").await.unwrap(), None);
}

#[tokio::test]
async fn a_read_of_an_expired_root_is_not_answered_when_the_alarm_cannot_be_kept() {
    let store = Store::new().await;
    let t = tenant("t");
    store.put(&t, &chunk(3)).await;
    store.catalog.rotate().await.unwrap();
    store.pass(6);
    store.gc(NO_GRACE).await;
    store.engine.fail_with(|call, name| {
        let alarm = call == Call::WriteDoc && name.ends_with("/alarm");
        alarm.then(|| EngineError::Unavailable("read only".to_owned()))
    });
    let read = store.catalog.get_chunk(&t, &ChunkId::of(&chunk(3))).await;
    assert!(matches!(read, Err(CatalogError::Engine(_))), "{read:?}");
}

#[tokio::test]
async fn roots_do_not_pile_up() {
    let store = Store::new().await;
    for _ in 1..MAX_ROOTS {
        store.catalog.rotate().await.unwrap();
    }
    let refused = store.catalog.rotate().await;
    assert!(
        matches!(refused, Err(CatalogError::TooMany { .. })),
        "{refused:?}"
    );
}

#[tokio::test]
async fn what_is_no_store_and_what_cannot_be_right_is_not_opened() {
    let engine = Arc::new(MemoryEngine::new());
    let options = CatalogOptions {
        settle: Duration::from_secs(5),
        ..CatalogOptions::shared("one")
    };
    let opened = Catalog::open(engine.clone(), options).await;
    assert!(matches!(opened, Err(CatalogError::Setup(_))));
    let opened = Catalog::open(engine.clone(), CatalogOptions::shared("a/b")).await;
    assert!(matches!(opened, Err(CatalogError::BadName { .. })));
    let other = Bytes::from_static(b"lazyimg store 2");
    engine
        .put_doc(names::FORMAT, other, When::Always)
        .await
        .unwrap();
    let opened = Catalog::open(engine, CatalogOptions::shared("one")).await;
    assert!(matches!(opened, Err(CatalogError::Setup(_))));
}
