//! Collection of garbage that meets damage, alarms without end, and who asks too much.

use super::*;

const DAMAGED: &str = "a flipped bit";

fn next(root: RootId) -> RootId {
    root.next().unwrap()
}

#[tokio::test]
async fn the_last_good_copy_of_a_chunk_outlives_its_root() {
    let store = Store::new().await;
    let t = tenant("t");
    store.image(&t, &[chunk(1), chunk(2), chunk(3)]).await;
    let active = store.catalog.rotate().await.unwrap();
    let rot = [
        Bytes::from(vec![9; 100]),
        Bytes::from_static(b"another length"),
    ];
    for (n, rot) in [1, 2].into_iter().zip(rot) {
        store.put(&t, &chunk(n)).await;
        let id = ChunkId::of(&chunk(n));
        assert!(store.engine.damage_chunk(active, &id, rot));
    }
    store.put(&t, &chunk(3)).await;
    store.pass(6);
    let line = &store.gc(NO_GRACE).await[0];
    assert_eq!(
        (line.manifests_moved, line.chunks_copied),
        (1, 2),
        "{line:?}"
    );
    for _ in 0..2 {
        store.pass(6);
        store.gc(NO_GRACE).await;
    }
    assert_eq!(store.catalog.roots().await.unwrap().len(), 1);
    for n in 1..=3 {
        let id = ChunkId::of(&chunk(n));
        let found = store.catalog.get_chunk(&t, &id).await.unwrap();
        assert_eq!(found, Some(chunk(n)));
    }
}

#[tokio::test]
async fn an_image_without_a_good_copy_of_a_chunk_anywhere_stays_where_it_is() {
    let store = Store::new().await;
    let t = tenant("t");
    store.image(&t, &[chunk(1)]).await;
    let active = store.catalog.rotate().await.unwrap();
    store.put(&t, &chunk(1)).await;
    let id = ChunkId::of(&chunk(1));
    for root in [RootId::FIRST, active] {
        let rot = Bytes::from(vec![9; 100]);
        assert!(store.engine.damage_chunk(root, &id, rot));
    }
    store.pass(6);
    let line = &store.gc(NO_GRACE).await[0];
    assert_eq!((line.manifests_moved, line.stuck.len()), (0, 1), "{line:?}");
    assert_eq!(line.after, Some(RootState::Retired));
}

#[tokio::test]
async fn a_damaged_manifest_keeps_its_root_and_nothing_else() {
    let store = Store::new().await;
    let (bad, good) = (tenant("bad"), tenant("good"));
    store.image(&bad, &[chunk(1)]).await;
    store.image(&good, &[chunk(1)]).await;
    store.catalog.rotate().await.unwrap();
    store.put(&good, &chunk(2)).await;
    store.catalog.rotate().await.unwrap();
    store.pass(6);
    store.engine.fail_with(|call, name| {
        let hit = call == Call::ReadDoc && name.contains("/manifests/bad/") && name.len() > 150;
        hit.then(|| EngineError::Damaged(DAMAGED.to_owned()))
    });
    let lines = store.gc(NO_GRACE).await;
    assert_eq!(
        (lines[0].manifests_moved, lines[0].stuck.len()),
        (1, 1),
        "{lines:?}"
    );
    assert_eq!(lines[0].stuck[0].tenant, bad);
    assert_eq!(lines[0].after, Some(RootState::Retired));
    assert_eq!(lines[1].after, Some(RootState::Expired));
    store.engine.heal();
    assert_eq!(store.gc(NO_GRACE).await[0].after, Some(RootState::Expired));
}

#[tokio::test]
async fn a_root_that_can_not_be_collected_does_not_keep_the_others() {
    let store = Store::new().await;
    store.catalog.rotate().await.unwrap();
    store.catalog.rotate().await.unwrap();
    store.pass(6);
    let mark = names::mark(RootId::FIRST, names::Mark::Retired);
    let nonsense = Bytes::from_static(b"{");
    let put = store.engine.put_doc(&mark, nonsense, When::Always);
    put.await.unwrap();
    let lines = store.gc(NO_GRACE).await;
    let error = lines[0].error.as_deref().unwrap_or_default();
    assert!(error.contains(&mark), "{lines:?}");
    assert_eq!(lines[0].after, Some(RootState::Retired));
    assert_eq!(
        (lines[1].root, &lines[1].error),
        (next(RootId::FIRST), &None)
    );
    assert_eq!(lines[1].after, Some(RootState::Expired));
}

#[tokio::test]
async fn alarms_that_are_to_be_ignored_are_noted_and_stop_nothing() {
    let store = Store::new().await;
    let t = tenant("t");
    let id = ChunkId::of(&chunk(3));
    store.put(&t, &chunk(3)).await;
    let catalog = &store.catalog;
    catalog.rotate().await.unwrap();
    let early = catalog.acknowledge(RootId::FIRST, true).await;
    assert!(
        matches!(early, Err(CatalogError::Conflict { .. })),
        "{early:?}"
    );
    store.pass(6);
    store.gc(NO_GRACE).await;
    // As often as it is only acknowledged, the tenant reads again, and the root stays.
    for _ in 0..3 {
        assert!(catalog.get_chunk(&t, &id).await.unwrap().is_some());
        store.pass(6);
        assert!(store.gc(NO_GRACE).await[0].alarm);
        catalog.acknowledge(RootId::FIRST, false).await.unwrap();
    }
    catalog.acknowledge(RootId::FIRST, true).await.unwrap();
    assert!(catalog.get_chunk(&t, &id).await.unwrap().is_some());
    let info = &catalog.roots().await.unwrap()[0];
    assert!(info.alarm.is_some() && info.alarms_ignored.is_some());
    let line = &store.gc(NO_GRACE).await[0];
    assert!(line.wait_seconds > 0, "the grace time is kept: {line:?}");
    store.pass(6);
    assert_eq!(store.gc(NO_GRACE).await[0].after, Some(RootState::Deleting));
    store.pass(6);
    assert_eq!(store.gc(NO_GRACE).await[0].after, None);
    let (docs, chunks) = store.engine.contents();
    assert_eq!(chunks, []);
    let of_first = |doc: &&String| doc.contains(&RootId::FIRST.to_string());
    assert_eq!(docs.iter().find(of_first), None);
}

#[tokio::test]
async fn repairing_what_another_tenant_put_tells_nothing_of_it() {
    let store = Store::new().await;
    let (owner, stranger) = (tenant("owner"), tenant("stranger"));
    let id = ChunkId::of(&chunk(1));
    store.put(&owner, &chunk(1)).await;
    let rot = Bytes::from_static(b"rot");
    store.engine.damage_chunk(RootId::FIRST, &id, rot);
    let put = |tenant| store.catalog.put_chunk(tenant, None, &id, chunk(1), true);
    assert_eq!(put(&stranger).await.unwrap(), Put::New);
    assert_eq!(put(&owner).await.unwrap(), Put::Known);
    let found = store.catalog.get_chunk(&owner, &id).await.unwrap();
    assert_eq!(found, Some(chunk(1)));
}

#[tokio::test]
async fn a_manifest_of_invented_chunks_costs_no_more_than_its_answer_lists() {
    let store = Store::new().await;
    let t = tenant("t");
    let invented = |n: u32| Bytes::from(n.to_be_bytes().repeat(25));
    let chunks: Vec<Bytes> = (0..40_000).map(invented).collect();
    let bytes = manifest(&chunks);
    let before = store.engine.calls();
    let put = store.catalog.put_manifest(&t, None, &IMAGE, key(), bytes);
    let ManifestPut::Missing(missing) = put.await.unwrap() else {
        panic!("nobody has them");
    };
    assert!((MAX_MISSING..MAX_MISSING + 2000).contains(&missing.len()));
    assert_eq!(missing[0], ChunkId::of(&chunks[0]));
    let calls = store.engine.calls() - before;
    assert!(calls < 40, "{calls} calls");
}
