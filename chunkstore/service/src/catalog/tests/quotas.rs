//! What counts, once, whatever happens on the way.

use futures_util::future::join_all;

use super::*;

fn quota_is_used<T: fmt::Debug>(result: &Result<T, CatalogError>) -> bool {
    matches!(result, Err(CatalogError::Quota { .. }))
}

fn numbered(n: u32) -> Bytes {
    Bytes::copy_from_slice(&n.to_be_bytes())
}

#[tokio::test]
async fn a_cached_manifest_counts_with_the_length_that_it_has_now() {
    let store = Store::new().await;
    let t = tenant("t");
    let (short, long) = (manifest(&[chunk(1)]), manifest(&[chunk(1), chunk(2)]));
    let quota = long.len() as u64;
    let put = |bytes: &Bytes, quota: u64| {
        let (catalog, t, bytes) = (&store.catalog, &t, bytes.clone());
        async move {
            let put = catalog.put_cached_manifest(t, Some(quota), &IMAGE, key(), bytes);
            put.await
        }
    };
    put(&short, quota).await.unwrap();
    assert_eq!(store.used(&t).await, short.len() as u64);
    assert!(quota_is_used(&put(&long, quota - 1).await));
    put(&long, quota).await.unwrap();
    assert_eq!(store.used(&t).await, quota);
    let found = store.catalog.get_cached_manifest(&t, &IMAGE, key());
    assert_eq!(found.await.unwrap(), Some(long));
    let (docs, _) = store.engine.contents();
    assert_eq!(docs.iter().filter(|d| d.contains("/cached/")).count(), 1);
    put(&short, quota).await.unwrap();
    assert_eq!(store.used(&t).await, short.len() as u64);
}

#[tokio::test(start_paused = true)]
async fn an_image_that_is_deleted_many_times_at_once_is_given_back_once() {
    let store = Store::new().await;
    let t = tenant("t");
    store.image(&t, &[chunk(1), chunk(2)]).await;
    store.engine.slow_down(Duration::from_millis(10));
    let deletes = (0..8).map(|_| store.catalog.delete_manifest(&t, &IMAGE, key()));
    let deleted = join_all(deletes).await;
    assert_eq!(deleted.iter().filter(|d| matches!(d, Ok(true))).count(), 1);
    assert_eq!(store.used(&t).await, 200);
}

#[tokio::test(start_paused = true)]
async fn an_image_that_is_put_many_times_at_once_counts_once() {
    let store = Store::new().await;
    let t = tenant("t");
    let bytes = manifest(&[chunk(1), chunk(2)]);
    for n in [1, 2] {
        store.put(&t, &chunk(n)).await;
    }
    // The chunks have to come along.
    store.catalog.rotate().await.unwrap();
    store.engine.slow_down(Duration::from_millis(10));
    let quota = Some(200 + bytes.len() as u64);
    let puts = (0..8).map(|_| {
        let put = store
            .catalog
            .put_manifest(&t, quota, &IMAGE, key(), bytes.clone());
        async move { put.await.unwrap() }
    });
    join_all(puts).await;
    assert_eq!(store.used(&t).await, 200 + bytes.len() as u64);
    store
        .catalog
        .delete_manifest(&t, &IMAGE, key())
        .await
        .unwrap();
    assert_eq!(store.used(&t).await, 200);
}

#[tokio::test(start_paused = true)]
async fn what_was_written_is_counted_though_its_client_went_away() {
    let store = Store::new().await;
    let t = tenant("t");
    let id = ChunkId::of(&chunk(1));
    store.engine.slow_down(Duration::from_millis(10));
    let catalog = &store.catalog;
    // Gone at every moment of the request.
    for ms in (5..100).step_by(10) {
        let put = catalog.put_chunk(&t, None, &id, chunk(1), false);
        let _gone = tokio::time::timeout(Duration::from_millis(ms), put).await;
    }
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(catalog.get_chunk(&t, &id).await.unwrap(), Some(chunk(1)));
    assert_eq!(store.used(&t).await, 100);

    let bytes = manifest(&[chunk(1)]);
    for ms in (5..200).step_by(10) {
        let put = catalog.put_manifest(&t, None, &IMAGE, key(), bytes.clone());
        let _gone = tokio::time::timeout(Duration::from_millis(ms), put).await;
        tokio::time::sleep(Duration::from_secs(10)).await;
        let live = catalog.stat_manifest(&t, &IMAGE, key()).await.unwrap();
        assert_eq!(
            store.used(&t).await,
            100 + live.unwrap_or(0),
            "after {ms} ms"
        );
    }
    assert_eq!(store.used(&t).await, 100 + bytes.len() as u64);
}

#[tokio::test]
async fn what_nobody_named_counts_until_its_root_is_gone() {
    let store = Store::new().await;
    let t = tenant("t");
    store.put(&t, &chunk(1)).await;
    store.put(&t, &chunk(2)).await;
    store.catalog.rotate().await.unwrap();
    store.pass(6);
    assert_eq!(store.gc(NO_GRACE).await[0].after, Some(RootState::Expired));
    assert_eq!(store.used(&t).await, 200);
    let put = |n: u8| {
        let bytes = chunk(n);
        let (catalog, t) = (&store.catalog, &t);
        async move {
            let id = ChunkId::of(&bytes);
            catalog.put_chunk(t, Some(200), &id, bytes, false).await
        }
    };
    assert!(quota_is_used(&put(3).await));
    // It must be put again, and takes no more room for that.
    assert_eq!(put(1).await.unwrap(), Put::New);
    assert_eq!(store.used(&t).await, 200);
    for _ in 0..2 {
        store.pass(6);
        store.gc(NO_GRACE).await;
    }
    assert_eq!(store.used(&t).await, 100);
    assert_eq!(put(3).await.unwrap(), Put::New);
}

#[tokio::test]
async fn a_pass_of_collection_counts_what_a_crash_has_left_uncounted() {
    let mut store = Store::new().await;
    let (t, other) = (tenant("t"), tenant("other"));
    let long = manifest(&[chunk(1), chunk(2)]).len() as u64;
    store.image(&t, &[chunk(1), chunk(2)]).await;
    let catalog = &store.catalog;
    let profile = Bytes::from_static(b"sealed");
    // A name like those that say how long a manifest is.
    let name = format!("{:016x}-{:016x}-{:08x}-{:016x}", 1, 2, 3, 4);
    let put = catalog.put_profile(&t, None, &IMAGE, &name, profile);
    put.await.unwrap();
    let cached = catalog.put_cached_manifest(&other, None, &IMAGE, key(), manifest(&[chunk(9)]));
    cached.await.unwrap();
    let short = manifest(&[chunk(9)]).len() as u64;
    catalog.rotate().await.unwrap();
    // Some lies in both roots, and counts once.
    store.put(&t, &chunk(1)).await;
    for n in 0..2100 {
        store.put(&t, &numbered(n)).await;
    }
    for n in [5, 1000, 2000] {
        store.put(&other, &numbered(n)).await;
    }
    let want = (200 + long + 6 + 2100 * 4, short + 3 * 4);
    let used = async |store: &Store| (store.used(&t).await, store.used(&other).await);
    assert_eq!(used(&store).await, want);
    store.reopen().await;
    assert_eq!(used(&store).await, (0, 0));
    store.gc(GcOptions::default()).await;
    assert_eq!(used(&store).await, want);
    // A sum that is nonsense is made good for when it is time for the next count.
    store.catalog.flush_usage().await.unwrap();
    store.reopen().await;
    let sum = names::usage(RootId::FIRST, &t, "one");
    let nonsense = Bytes::from_static(b"-100000");
    let put = store.engine.put_doc(&sum, nonsense, When::Always);
    put.await.unwrap();
    assert_eq!(store.used(&t).await, 0);
    store.pass(7 * 3600);
    store.gc(GcOptions::default()).await;
    // Profiles count where they are: the old root has them too until it goes.
    assert_eq!(used(&store).await, (want.0 + 6, want.1));
    // And what comes afterwards is counted on top.
    store.put(&t, &chunk(3)).await;
    store.catalog.flush_usage().await.unwrap();
    store.reopen().await;
    assert_eq!(used(&store).await, (want.0 + 106, want.1));
}

#[tokio::test]
async fn profiles_need_room_and_give_it_back() {
    let store = Store::new().await;
    let t = tenant("t");
    store.image(&t, &[chunk(1)]).await;
    let before = store.used(&t).await;
    let put = |name: &'static str, len: usize| {
        let (catalog, t) = (&store.catalog, &t);
        let quota = Some(before + 1000);
        async move {
            let bytes = Bytes::from(vec![0; len]);
            catalog.put_profile(t, quota, &IMAGE, name, bytes).await
        }
    };
    put("a", 600).await.unwrap();
    assert!(quota_is_used(&put("b", 401).await));
    put("a", 500).await.unwrap();
    put("b", 500).await.unwrap();
    assert_eq!(store.used(&t).await, before + 1000);
    let catalog = &store.catalog;
    assert!(catalog.delete_profile(&t, &IMAGE, "a").await.unwrap());
    assert_eq!(store.used(&t).await, before + 500);
    catalog.delete_manifest(&t, &IMAGE, key()).await.unwrap();
    assert_eq!(store.used(&t).await, 100);
}

#[tokio::test]
async fn a_tenant_has_only_so_many_references() {
    let store = Store::new().await;
    let (t, catalog) = (tenant("t"), &store.catalog);
    let put = |name: String| {
        let t = &t;
        async move { catalog.put_ref(t, &name, &IMAGE, &Condition::Always).await }
    };
    for n in 0..MAX_REFERENCES {
        put(format!("host/app:{n}")).await.unwrap();
    }
    let refused = put("host/app:new".to_owned()).await;
    assert!(
        matches!(refused, Err(CatalogError::TooMany { .. })),
        "{refused:?}"
    );
    put("host/app:7".to_owned()).await.unwrap();
    let always = Condition::Always;
    assert!(catalog.delete_ref(&t, "host/app:7", &always).await.unwrap());
    put("host/app:new".to_owned()).await.unwrap();
}
