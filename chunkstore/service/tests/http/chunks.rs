//! One chunk.

use lazyimg_convergent::{ChunkId, MAX_STORED_LEN};
use reqwest::Method;

use crate::world::{World, chunk, refused};

#[tokio::test]
async fn a_chunk_comes_back_as_it_was_put_with_its_name() {
    let w = World::start().await;
    for (n, len) in [(1, 1), (2, 5_000), (3, 512 << 10), (4, MAX_STORED_LEN)] {
        let bytes = chunk(n, len);
        let id = w.put_chunk("", &bytes).await;
        for name in [id.to_string(), format!("sha256:{id}")] {
            let path = format!("/v1/chunks/{name}");
            let got = w.get("", &path).await;
            assert_eq!(got.status(), 200);
            let headers = got.headers().clone();
            assert_eq!(headers["etag"], format!("\"{id}\""));
            assert_eq!(
                headers["cache-control"],
                "private, immutable, max-age=31536000"
            );
            assert_eq!(headers["content-length"], len.to_string());
            assert!(got.bytes().await.unwrap() == bytes);
            let head = w.ask(Method::HEAD, &path).send().await.unwrap();
            assert_eq!(head.status(), 200);
            assert_eq!(head.headers()["content-length"], len.to_string());
        }
    }
    assert!(w.stop().await);
}

#[tokio::test]
async fn putting_again_is_fine_and_says_so() {
    let w = World::start().await;
    let bytes = chunk(1, 70_000);
    let id = w.put_chunk("", &bytes).await;
    let path = format!("/v1/chunks/{id}");
    assert_eq!(w.put("", &path, bytes.clone()).await.status(), 200);
    let repair = w.ask(Method::PUT, &path).header("lazyimg-repair", "1");
    assert_eq!(repair.body(bytes).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_body_that_is_not_what_the_id_says_is_refused_and_not_kept() {
    let w = World::start().await;
    for len in [10, 200_000] {
        let (bytes, other) = (chunk(1, len), chunk(2, len));
        let path = format!("/v1/chunks/{}", ChunkId::of(&bytes));
        let done = w.put("", &path, other).await;
        assert_eq!(refused(done).await, (400, "bad_request".into()));
        assert_eq!(w.get("", &path).await.status(), 404);
    }
    let empty = format!("/v1/chunks/{}", ChunkId::of(b""));
    assert_eq!(refused(w.put("", &empty, "").await).await.0, 400);
}

#[tokio::test]
async fn what_is_too_long_is_refused_with_or_without_its_length() {
    let w = World::start().await;
    let bytes = chunk(1, MAX_STORED_LEN + 1);
    let path = format!("/v1/chunks/{}", ChunkId::of(&bytes));
    let told = w.put("", &path, bytes.clone()).await;
    assert_eq!(refused(told).await, (413, "too_large".into()));
    let pieces: Vec<Result<Vec<u8>, std::io::Error>> = bytes
        .chunks(100_000)
        .map(|piece| Ok(piece.to_vec()))
        .collect();
    let untold = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
    let untold = w.put("", &path, untold).await;
    assert_eq!(refused(untold).await, (413, "too_large".into()));
}

#[tokio::test]
async fn a_body_in_pieces_is_put_together() {
    let w = World::start().await;
    let bytes = chunk(9, 300_000);
    let id = ChunkId::of(&bytes);
    let pieces: Vec<Result<Vec<u8>, std::io::Error>> = bytes
        .chunks(7_001)
        .map(|piece| Ok(piece.to_vec()))
        .collect();
    let body = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
    let path = format!("/v1/chunks/{id}");
    assert_eq!(w.put("", &path, body).await.status(), 201);
    assert!(w.get("", &path).await.bytes().await.unwrap() == bytes);
}

#[tokio::test]
async fn who_has_the_chunk_is_told_so_without_it() {
    let w = World::start().await;
    let id = w.put_chunk("", &chunk(1, 1000)).await;
    let path = format!("/v1/chunks/{id}");
    for (tag, status) in [
        (format!("\"{id}\""), 304),
        (format!("W/\"{id}\""), 304),
        (format!("\"x\", \"{id}\""), 304),
        ("*".to_owned(), 304),
        ("\"x\"".to_owned(), 200),
    ] {
        for method in [Method::GET, Method::HEAD] {
            let asked = w.ask(method, &path).header("if-none-match", &tag);
            let answer = asked.send().await.unwrap();
            assert_eq!(answer.status(), status, "{tag}");
            assert_eq!(answer.headers()["etag"], format!("\"{id}\""));
        }
    }
    let missing = format!("/v1/chunks/{}", ChunkId::of(b"not there"));
    let asked = w.ask(Method::GET, &missing).header("if-none-match", "*");
    assert_eq!(asked.send().await.unwrap().status(), 404);
}

#[tokio::test]
async fn what_is_not_of_the_protocol_is_refused_in_its_words() {
    let w = World::start().await;
    let id = ChunkId::of(b"x").to_string();
    for (method, path, want) in [
        (
            Method::GET,
            "/v1/chunks/abc".to_owned(),
            (400, "bad_request"),
        ),
        (
            Method::GET,
            format!("/v1/chunks/{}", id.to_uppercase()),
            (400, "bad_request"),
        ),
        (Method::GET, format!("/v1/chunks/{id}"), (404, "not_found")),
        (
            Method::DELETE,
            format!("/v1/chunks/{id}"),
            (405, "bad_request"),
        ),
        (
            Method::GET,
            "/v1/chunks/has".to_owned(),
            (405, "bad_request"),
        ),
        (Method::GET, "/v2/chunks".to_owned(), (404, "not_found")),
        (Method::GET, "/".to_owned(), (404, "not_found")),
        (
            Method::GET,
            "/v1/images/sha256:0/manifests".to_owned(),
            (400, "bad_request"),
        ),
        (
            Method::GET,
            "/v1/images?after=x".to_owned(),
            (400, "bad_request"),
        ),
        (
            Method::POST,
            "/v1/admin/roots/r1/acknowledge".to_owned(),
            (400, "bad_request"),
        ),
    ] {
        let (status, code) = refused(w.ask(method.clone(), &path).send().await.unwrap()).await;
        assert_eq!((status, code.as_str()), want, "{method} {path}");
    }
    let odd = w.ask(Method::PUT, &format!("/v1/chunks/{id}"));
    let odd = odd.header("lazyimg-repair", "yes").body("x");
    assert_eq!(refused(odd.send().await.unwrap()).await.0, 400);
    let long = w
        .ask(Method::GET, "/healthz")
        .header("x", "y".repeat(40_000));
    assert_eq!(
        refused(long.send().await.unwrap()).await,
        (413, "too_large".into())
    );
}

#[tokio::test]
async fn the_clients_request_id_comes_back() {
    let w = World::start().await;
    let own = "0123456789abcdef";
    let asked = w
        .ask(Method::GET, "/healthz")
        .header("lazyimg-request-id", own);
    assert_eq!(
        asked.send().await.unwrap().headers()["lazyimg-request-id"],
        own
    );
    let asked = w
        .ask(Method::GET, "/healthz")
        .header("lazyimg-request-id", "<script>");
    let given = asked.send().await.unwrap().headers()["lazyimg-request-id"].clone();
    assert_eq!(given.len(), 16);
}
