//! What every engine promises, as functions that run against any of them.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use lazyimg_convergent::{ChunkId, MAX_STORED_LEN};
use lazyimg_store::engine::{Engine, EngineError, MAX_DOC_NAME, When};

use super::{bytes, chunk, root};

/// Runs all of it; `make` gives an engine that holds nothing, for each of the functions. `atomic`:
/// whether of several that write at once only where nothing is, exactly one is told that it did.
pub async fn all<F, Fut>(atomic: bool, make: F)
where
    F: Fn(&'static str) -> Fut,
    Fut: Future<Output = Arc<dyn Engine>>,
{
    chunks_are_given_back_as_they_were_put(&*make("chunks").await).await;
    a_second_put_changes_nothing_and_replacing_does(&*make("replace").await).await;
    lengths_come_in_the_order_asked(&*make("stat").await).await;
    chunks_are_listed_in_order_and_page_by_page(&*make("list").await).await;
    a_root_is_deleted_as_a_whole_and_alone(&*make("remove").await).await;
    documents_are_given_back_as_they_were_put(&*make("docs").await).await;
    names_that_no_document_may_have_are_refused(&*make("names").await).await;
    several_documents_are_put_and_looked_for_at_once(&*make("several").await).await;
    documents_are_listed_by_prefix_in_order(&*make("listdocs").await).await;
    documents_are_removed_by_prefix(&*make("removedocs").await).await;
    writers_at_the_same_time_agree(make("race").await, atomic).await;
    it_says_that_it_is_well(&*make("check").await).await;
}

fn is_setup(result: Result<impl Sized, EngineError>) -> bool {
    matches!(result, Err(EngineError::Setup(_)))
}

async fn chunks_are_given_back_as_they_were_put(engine: &dyn Engine) {
    for (seed, len) in [
        (1, 1),
        (2, 100),
        (3, 4096),
        (4, 512 << 10),
        (5, MAX_STORED_LEN),
    ] {
        let (id, bytes) = chunk(seed, len);
        assert_eq!(engine.get_chunk(root(1), &id).await.unwrap(), None);
        assert!(engine.put_chunk(root(1), &id, bytes.clone()).await.unwrap());
        assert!(engine.get_chunk(root(1), &id).await.unwrap() == Some(bytes));
        assert_eq!(engine.get_chunk(root(2), &id).await.unwrap(), None);
    }
    let (id, _) = chunk(1, 1);
    let too_long = bytes(9, MAX_STORED_LEN + 1);
    for wrong in [Bytes::new(), too_long] {
        assert!(is_setup(
            engine.put_chunk(root(1), &id, wrong.clone()).await
        ));
        assert!(is_setup(engine.replace_chunk(root(1), &id, wrong).await));
    }
}

async fn a_second_put_changes_nothing_and_replacing_does(engine: &dyn Engine) {
    let (id, right) = chunk(1, 7000);
    let (wrong, other) = (bytes(2, 7001), bytes(3, 6999));
    let get = async || engine.get_chunk(root(1), &id).await.unwrap();
    assert!(engine.put_chunk(root(1), &id, wrong.clone()).await.unwrap());
    assert!(!engine.put_chunk(root(1), &id, other).await.unwrap());
    assert!(get().await == Some(wrong.clone()));
    engine
        .replace_chunk(root(1), &id, right.clone())
        .await
        .unwrap();
    assert!(get().await == Some(right.clone()));
    assert!(!engine.put_chunk(root(1), &id, wrong).await.unwrap());
    assert!(get().await == Some(right));
    let lengths = engine.stat_chunks(root(1), &[id]).await.unwrap();
    assert_eq!(lengths, [Some(7000)]);
    // Also where nothing was.
    let (id, bytes) = chunk(3, 10);
    engine
        .replace_chunk(root(1), &id, bytes.clone())
        .await
        .unwrap();
    assert_eq!(engine.get_chunk(root(1), &id).await.unwrap(), Some(bytes));
}

async fn lengths_come_in_the_order_asked(engine: &dyn Engine) {
    let mut ids = Vec::new();
    let mut lengths = Vec::new();
    for n in 0..60 {
        let (id, bytes) = chunk(n, 100 + n as usize);
        let there = n % 3 != 0;
        if there {
            engine.put_chunk(root(1), &id, bytes).await.unwrap();
        }
        ids.push(id);
        lengths.push(there.then_some(100 + n as u32));
    }
    ids.push(ids[1]);
    lengths.push(lengths[1]);
    assert_eq!(engine.stat_chunks(root(1), &ids).await.unwrap(), lengths);
    assert_eq!(engine.stat_chunks(root(1), &[]).await.unwrap(), []);
    assert_eq!(
        engine.stat_chunks(root(2), &ids[..2]).await.unwrap(),
        [None, None]
    );
}

async fn chunks_are_listed_in_order_and_page_by_page(engine: &dyn Engine) {
    let mut expected = BTreeSet::new();
    for n in 0..40 {
        let (id, bytes) = chunk(n, 10 + n as usize);
        engine.put_chunk(root(2), &id, bytes.clone()).await.unwrap();
        expected.insert((id, 10 + n as u32));
        // Neighbours that must not be listed.
        let (other, bytes) = chunk(1000 + n, 10);
        let aside = root(if n % 2 == 0 { 1 } else { 3 });
        engine.put_chunk(aside, &other, bytes).await.unwrap();
    }
    for limit in [1, 7, 39, 40, 41, 5000] {
        let mut found: Vec<(ChunkId, u32)> = Vec::new();
        loop {
            let after = found.last().map(|(id, _)| *id);
            let page = engine
                .list_chunks(root(2), after.as_ref(), limit)
                .await
                .unwrap();
            assert!(page.len() <= limit);
            let was_last = page.len() < limit;
            found.extend(page);
            if was_last {
                break;
            }
        }
        assert!(found.iter().eq(&expected), "pages of {limit}");
    }
    assert_eq!(engine.list_chunks(root(9), None, 10).await.unwrap(), []);
    assert_eq!(engine.list_chunks(root(2), None, 0).await.unwrap(), []);
    let last = ChunkId([0xff; 32]);
    assert_eq!(
        engine.list_chunks(root(2), Some(&last), 10).await.unwrap(),
        []
    );
}

async fn a_root_is_deleted_as_a_whole_and_alone(engine: &dyn Engine) {
    let chunks: Vec<_> = (0..50).map(|n| chunk(n, 2000)).collect();
    for (id, bytes) in &chunks {
        for n in [1, 2, 12] {
            engine.put_chunk(root(n), id, bytes.clone()).await.unwrap();
        }
    }
    let name = "roots/r00000001/state";
    engine
        .put_doc(name, Bytes::from("a document stays"), When::Always)
        .await
        .unwrap();
    let ids: Vec<ChunkId> = chunks.iter().map(|(id, _)| *id).collect();
    engine.remove_chunks(root(1)).await.unwrap();
    engine.remove_chunks(root(1)).await.unwrap();
    engine.remove_chunks(root(77)).await.unwrap();
    for (id, bytes) in &chunks {
        assert_eq!(engine.get_chunk(root(1), id).await.unwrap(), None);
        assert_eq!(
            engine.get_chunk(root(2), id).await.unwrap().as_ref(),
            Some(bytes)
        );
        assert_eq!(
            engine.get_chunk(root(12), id).await.unwrap().as_ref(),
            Some(bytes)
        );
    }
    let lengths = engine.stat_chunks(root(1), &ids).await.unwrap();
    assert!(lengths.iter().all(Option::is_none));
    assert_eq!(engine.list_chunks(root(1), None, 10).await.unwrap(), []);
    assert!(engine.get_doc(name).await.unwrap().is_some());
    // Roots do not come back, but a put that was under way may come late.
    let (id, bytes) = &chunks[0];
    assert!(engine.put_chunk(root(1), id, bytes.clone()).await.unwrap());
    assert_eq!(
        engine.get_chunk(root(1), id).await.unwrap().as_ref(),
        Some(bytes)
    );
}

async fn documents_are_given_back_as_they_were_put(engine: &dyn Engine) {
    let name = "roots/r00000001/images/acme/0f3a/manifests/aa.b_c-d";
    assert_eq!(engine.get_doc(name).await.unwrap(), None);
    // Across every length at which an engine may keep them differently, back and forth.
    for (n, len) in [10, 1024, 1025, 0, 5 << 20, 3, 40_000, 41_000, 1, 2 << 20]
        .into_iter()
        .enumerate()
    {
        let content = bytes(n as u64, len);
        assert!(
            engine
                .put_doc(name, content.clone(), When::Always)
                .await
                .unwrap()
        );
        assert_eq!(
            engine.get_doc(name).await.unwrap(),
            Some(content.clone()),
            "{len}"
        );
        assert!(
            !engine
                .put_doc(name, bytes(99, 5), When::Absent)
                .await
                .unwrap()
        );
        assert_eq!(engine.get_doc(name).await.unwrap(), Some(content), "{len}");
    }
    engine.delete_doc(name).await.unwrap();
    engine.delete_doc(name).await.unwrap();
    assert_eq!(engine.get_doc(name).await.unwrap(), None);
    assert!(
        engine
            .put_doc(name, bytes(7, 2000), When::Absent)
            .await
            .unwrap()
    );
    assert_eq!(engine.get_doc(name).await.unwrap(), Some(bytes(7, 2000)));
}

async fn names_that_no_document_may_have_are_refused(engine: &dyn Engine) {
    let long = "x".repeat(MAX_DOC_NAME);
    assert!(
        engine
            .put_doc(&long, bytes(1, 1), When::Always)
            .await
            .unwrap()
    );
    assert!(engine.get_doc(&long).await.unwrap().is_some());
    let too_long = "x".repeat(MAX_DOC_NAME + 1);
    for name in [
        "", "/a", "a/", "a//b", "a/../b", ".", "A", "a b", "ä", "a\0", "a*", &too_long,
    ] {
        assert!(
            is_setup(engine.put_doc(name, bytes(1, 1), When::Always).await),
            "{name:?}"
        );
        assert!(is_setup(engine.get_doc(name).await), "{name:?}");
        assert!(is_setup(engine.delete_doc(name).await), "{name:?}");
        assert!(
            is_setup(engine.has_docs(&[name.to_owned()]).await),
            "{name:?}"
        );
        let several = vec![
            ("fine".to_owned(), bytes(1, 1)),
            (name.to_owned(), bytes(1, 1)),
        ];
        assert!(is_setup(engine.put_docs(several).await), "{name:?}");
    }
}

async fn several_documents_are_put_and_looked_for_at_once(engine: &dyn Engine) {
    let names: Vec<String> = (0..300).map(|n| format!("grants/t/{n:04}")).collect();
    let put = names
        .iter()
        .step_by(2)
        .map(|n| (n.clone(), Bytes::from(n.clone())))
        .collect();
    engine.put_docs(put).await.unwrap();
    engine.put_docs(Vec::new()).await.unwrap();
    let has = engine.has_docs(&names).await.unwrap();
    assert!(has.iter().enumerate().all(|(n, has)| *has == (n % 2 == 0)));
    assert_eq!(engine.has_docs(&[]).await.unwrap(), [] as [bool; 0]);
    assert_eq!(
        engine.get_doc(&names[4]).await.unwrap(),
        Some(Bytes::from(names[4].clone()))
    );
}

async fn list(engine: &dyn Engine, prefix: &str, limit: usize) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    loop {
        let after = found.last().cloned();
        let page = engine
            .list_docs(prefix, after.as_deref(), limit)
            .await
            .unwrap();
        assert!(page.len() <= limit);
        let was_last = page.len() < limit;
        found.extend(page);
        if was_last {
            return found;
        }
    }
}

async fn documents_are_listed_by_prefix_in_order(engine: &dyn Engine) {
    let names: BTreeSet<&str> = [
        "a",
        "a-b",
        "a.b",
        "a/b",
        "a/b/c",
        "a/b-c",
        "a/b0",
        "a0",
        "a_b",
        "aa",
        "b/1",
        "b/10",
        "b/2",
        "b/2/x",
        "roots/r00000001/grants/t/1",
        "roots/r00000001/images/t/2",
        "roots/r00000010/state",
    ]
    .into();
    // Short and long ones, which engines may keep differently.
    for (n, name) in names.iter().enumerate() {
        engine
            .put_doc(name, bytes(n as u64, n % 3 * 3000), When::Always)
            .await
            .unwrap();
    }
    for prefix in [
        "",
        "a",
        "a/",
        "a/b",
        "a/b/",
        "b/",
        "b/1",
        "roots/r0000000",
        "roots/r00000001/",
        "x",
        "a/b/c",
    ] {
        let expected: Vec<&str> = names
            .iter()
            .filter(|n| n.starts_with(prefix))
            .copied()
            .collect();
        for limit in [1, 2, 3, 100] {
            assert_eq!(
                list(engine, prefix, limit).await,
                expected,
                "{prefix:?} by {limit}"
            );
        }
    }
    // From a name that is not there, before the prefix, and behind it.
    let after = |after: &'static str| engine.list_docs("b/", Some(after), 10);
    assert_eq!(after("b/15").await.unwrap(), ["b/2", "b/2/x"]);
    assert_eq!(after("a").await.unwrap(), ["b/1", "b/10", "b/2", "b/2/x"]);
    assert_eq!(after("c").await.unwrap(), [] as [&str; 0]);
    assert_eq!(
        engine.list_docs("a", None, 0).await.unwrap(),
        [] as [&str; 0]
    );
}

async fn documents_are_removed_by_prefix(engine: &dyn Engine) {
    let name = |n: usize| format!("roots/r00000001/grants/t/{n:05}");
    let docs = (0..1100)
        .map(|n| (name(n), bytes(n as u64, n % 5 * 500)))
        .collect();
    engine.put_docs(docs).await.unwrap();
    let stay = [
        "roots/r00000001/state",
        "roots/r00000001/grants-not",
        "roots/r00000011/grants/t/1",
    ];
    for name in stay {
        engine
            .put_doc(name, bytes(1, 10), When::Always)
            .await
            .unwrap();
    }
    engine.remove_docs("roots/r00000001/grants/").await.unwrap();
    engine.remove_docs("roots/r00000001/grants/").await.unwrap();
    assert_eq!(
        list(engine, "roots/", 100).await,
        [stay[1], stay[0], stay[2]]
    );
    assert_eq!(engine.get_doc(&name(3)).await.unwrap(), None);
    assert!(
        engine
            .put_doc(&name(3), bytes(3, 4000), When::Absent)
            .await
            .unwrap()
    );
    assert_eq!(
        engine.get_doc(&name(3)).await.unwrap(),
        Some(bytes(3, 4000))
    );
    engine.remove_docs("").await.unwrap();
    assert_eq!(list(engine, "", 100).await, [] as [&str; 0]);
}

async fn writers_at_the_same_time_agree(engine: Arc<dyn Engine>, atomic: bool) {
    let same = chunk(7, 50_000);
    let mut tasks = Vec::new();
    for n in 0..24u64 {
        let (engine, same) = (Arc::clone(&engine), same.clone());
        tasks.push(tokio::spawn(async move {
            let first = engine
                .put_doc("one", bytes(n, 100), When::Absent)
                .await
                .unwrap();
            let new = engine
                .put_chunk(root(1), &same.0, same.1.clone())
                .await
                .unwrap();
            for k in 0..4 {
                let (id, content) = chunk(1000 + n * 4 + k, 30_000);
                assert!(
                    engine
                        .put_chunk(root(1), &id, content.clone())
                        .await
                        .unwrap()
                );
                let name = format!("of/{n}/{k}");
                assert!(
                    engine
                        .put_doc(&name, content.slice(..99), When::Absent)
                        .await
                        .unwrap()
                );
                assert_eq!(engine.get_chunk(root(1), &id).await.unwrap(), Some(content));
            }
            (first, new)
        }));
    }
    let (mut first, mut new) = (0, 0);
    for task in tasks {
        let (f, n) = task.await.unwrap();
        first += usize::from(f);
        new += usize::from(n);
    }
    if atomic {
        assert_eq!((first, new), (1, 1));
    }
    assert!(first >= 1 && new >= 1);
    let kept = engine.get_doc("one").await.unwrap().unwrap();
    assert!((0..24).any(|n| kept == bytes(n, 100)));
    assert_eq!(
        engine.list_chunks(root(1), None, 1000).await.unwrap().len(),
        24 * 4 + 1
    );
    assert_eq!(
        engine.list_docs("of/", None, 1000).await.unwrap().len(),
        24 * 4
    );
    assert_eq!(
        engine.get_chunk(root(1), &same.0).await.unwrap(),
        Some(same.1)
    );
}

async fn it_says_that_it_is_well(engine: &dyn Engine) {
    engine.check().await.unwrap();
    let put = engine.put_doc("a", bytes(1, 10), When::Always).await;
    assert!(put.unwrap());
    assert!(!engine.name().is_empty());
    if let Some(used) = engine.used_bytes().await.unwrap() {
        assert!(used > 0);
    }
}
