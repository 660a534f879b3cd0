//! Many chunks in one request, and who brings those that are missing.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use lazyimg_chunkstore::wire::{
    FRAME_HEAD, FRAMES_TYPE, FrameHead, FrameKind, MAX_BATCH, write_ids,
};
use lazyimg_convergent::ChunkId;
use reqwest::{Method, Response};

use crate::world::{PATIENCE, Setup, World, chunk, refused, until};

type Frame = (FrameKind, Bytes);

/// All frames of an answer; it must end with the end frame and nothing after it.
async fn frames(response: Response) -> Vec<Frame> {
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], FRAMES_TYPE);
    let mut rest = response.bytes().await.unwrap();
    let mut frames = Vec::new();
    while !rest.is_empty() {
        let head = rest.split_to(FRAME_HEAD);
        let head = FrameHead::parse(head[..].try_into().unwrap()).unwrap();
        frames.push((head.kind, rest.split_to(head.len as usize)));
    }
    assert_eq!(frames.pop(), Some((FrameKind::End, Bytes::new())));
    assert!(frames.iter().all(|(kind, _)| *kind != FrameKind::End));
    frames
}

async fn get(w: &World, ids: &[ChunkId], wait_ms: Option<u64>) -> Response {
    let mut asked = w.ask(Method::POST, "/v1/chunks/get").body(write_ids(ids));
    if let Some(ms) = wait_ms {
        asked = asked.header("lazyimg-wait-ms", ms);
    }
    asked.send().await.unwrap()
}

fn kinds(frames: &[Frame]) -> Vec<FrameKind> {
    frames.iter().map(|(kind, _)| *kind).collect()
}

#[tokio::test]
async fn chunks_come_in_the_order_asked_with_gaps_where_they_are_missing() {
    let w = World::start().await;
    let mut ids = Vec::new();
    let mut want = Vec::new();
    for n in 0..40 {
        let bytes = chunk(n, 1000 + 20_000 * usize::from(n));
        match n % 5 {
            3 => {
                ids.push(ChunkId::of(&bytes));
                want.push((FrameKind::Missing, Bytes::new()));
            }
            _ => {
                ids.push(w.put_chunk("", &bytes).await);
                want.push((FrameKind::Chunk, bytes.into()));
            }
        }
    }
    ids.reverse();
    want.reverse();
    // The same one twice.
    ids.push(ids[0]);
    want.push(want[0].clone());
    assert!(frames(get(&w, &ids, None).await).await == want);
    let has = w.post("", "/v1/chunks/has", write_ids(&ids)).await;
    let flags: Vec<u8> = has.bytes().await.unwrap().to_vec();
    let expected = want
        .iter()
        .map(|(kind, _)| u8::from(*kind == FrameKind::Chunk));
    assert_eq!(flags, expected.collect::<Vec<_>>());
}

#[tokio::test]
async fn little_memory_makes_it_slower_and_nothing_else() {
    let mut setup = Setup::new();
    // One chunk of the longest kind at a time, for several requests at once.
    setup.limits.max_memory = 1 << 20;
    let w = setup.start().await;
    let mut ids = Vec::new();
    for n in 0..30 {
        ids.push(w.put_chunk("", &chunk(n, 300_000)).await);
    }
    let all = futures_util::future::join_all((0..4).map(|_| async {
        let frames = frames(get(&w, &ids, None).await).await;
        assert!(
            frames
                .iter()
                .all(|(kind, bytes)| *kind == FrameKind::Chunk && bytes.len() == 300_000)
        );
        frames.len()
    }));
    assert_eq!(tokio::time::timeout(PATIENCE, all).await.unwrap(), [30; 4]);
    until("all memory is given back", async || {
        w.metric("", "lazyimg_store_body_memory_bytes").await == 0.0
    })
    .await;
}

#[tokio::test]
async fn lists_of_ids_are_bounded() {
    let w = World::start().await;
    for body in [vec![], vec![0; 31], vec![0; 33]] {
        for path in ["/v1/chunks/get", "/v1/chunks/has"] {
            assert_eq!(refused(w.post("", path, body.clone()).await).await.0, 400);
        }
    }
    let long = vec![0; 32 * (MAX_BATCH + 1)];
    assert_eq!(
        refused(w.post("", "/v1/chunks/get", long).await).await.0,
        413
    );
    for wait in ["x", "-1", "30001"] {
        let asked = w.ask(Method::POST, "/v1/chunks/get").body(vec![0; 32]);
        let asked = asked.header("lazyimg-wait-ms", wait);
        assert_eq!(refused(asked.send().await.unwrap()).await.0, 400, "{wait}");
    }
}

#[tokio::test]
async fn the_first_who_misses_a_chunk_brings_it_and_the_others_get_it_when_it_came() {
    let w = World::start().await;
    let bytes = chunk(1, 5000);
    let ids = [ChunkId::of(&bytes)];
    let first = frames(get(&w, &ids, Some(20_000)).await).await;
    assert_eq!(kinds(&first), [FrameKind::Yours]);
    // Who does not wait is told that somebody is at it, or just that it is missing.
    let at_once = frames(get(&w, &ids, Some(0)).await).await;
    assert_eq!(kinds(&at_once), [FrameKind::Coming]);
    let plain = frames(get(&w, &ids, None).await).await;
    assert_eq!(kinds(&plain), [FrameKind::Missing]);
    let waiting = async { frames(get(&w, &ids, Some(20_000)).await).await };
    let bringing = async {
        // Both orders are right: that it is waited for, and that it comes before.
        tokio::time::sleep(Duration::from_millis(200)).await;
        w.put_chunk("", &bytes).await;
    };
    let (got, others, ()) = tokio::join!(
        waiting,
        async { frames(get(&w, &ids, Some(20_000)).await).await },
        bringing
    );
    let want = [(FrameKind::Chunk, Bytes::from(bytes.clone()))];
    assert!(got == want && others == want);
    assert_eq!(
        w.metric("", "lazyimg_store_leases_granted_total").await,
        1.0
    );
}

#[tokio::test]
async fn a_lease_that_is_not_used_goes_to_one_who_waits() {
    let w = World::start().await;
    let ids = [ChunkId::of(b"nobody brings it")];
    let first = frames(get(&w, &ids, Some(0)).await).await;
    assert_eq!(kinds(&first), [FrameKind::Yours]);
    let two = tokio::join!(
        async { kinds(&frames(get(&w, &ids, Some(15_000)).await).await) },
        async { kinds(&frames(get(&w, &ids, Some(15_000)).await).await) },
    );
    let of = |kind| [&two.0, &two.1].iter().filter(|k| ***k == [kind]).count();
    assert!(of(FrameKind::Yours) >= 1, "{two:?}");
    assert_eq!(of(FrameKind::Yours) + of(FrameKind::Coming), 2, "{two:?}");
}

#[tokio::test]
async fn frames_arrive_while_later_ones_are_waited_for() {
    let w = World::start().await;
    let (there, missing) = (chunk(1, 5000), chunk(2, 5000));
    let ids = [w.put_chunk("", &there).await, ChunkId::of(&missing)];
    let leased = frames(get(&w, &ids[1..], Some(0)).await).await;
    assert_eq!(kinds(&leased), [FrameKind::Yours]);
    let mut stream = get(&w, &ids, Some(25_000)).await.bytes_stream();
    let mut came = BytesMut::new();
    while came.len() < FRAME_HEAD + there.len() {
        came.extend_from_slice(&stream.next().await.unwrap().unwrap());
    }
    assert!(came[FRAME_HEAD..] == there, "and nothing after it yet");
    w.put_chunk("", &missing).await;
    while let Some(piece) = stream.next().await {
        came.extend_from_slice(&piece.unwrap());
    }
    assert_eq!(came.len(), 3 * FRAME_HEAD + there.len() + missing.len());
}
