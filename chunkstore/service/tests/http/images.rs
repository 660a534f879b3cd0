//! Manifests, profiles and references.

use lazyimg_convergent::{ChunkId, Digest, KeyId};
use reqwest::Method;
use serde_json::{Value, json};

use crate::world::{PATIENCE, World, chunk, key, manifest, refused};

const IMAGE: Digest = Digest([3; 32]);

fn path(image: Digest, key: KeyId) -> String {
    format!("/v1/images/{image}/manifests/{key}")
}

async fn put_image(w: &World, image: Digest, n: u8) -> Vec<u8> {
    let bytes = chunk(n, 2000);
    let id = ChunkId::of(&bytes);
    w.put("", &format!("/v1/chunks/{id}"), bytes.clone()).await;
    let manifest = manifest(image, &[bytes]);
    let done = w.put("", &path(image, key()), manifest.clone()).await;
    assert_eq!(done.status(), 201, "{}", done.text().await.unwrap());
    manifest
}

#[tokio::test]
async fn a_manifest_is_taken_when_all_its_chunks_are_there_and_comes_back() {
    let w = World::start().await;
    let chunks = [chunk(1, 1000), chunk(2, 1000), chunk(3, 1000)];
    let manifest = manifest(IMAGE, &chunks);
    let path = path(IMAGE, key());
    w.put_chunk("", &chunks[1]).await;
    let early = w.put("", &path, manifest.clone()).await;
    assert_eq!(early.status(), 409);
    let said: Value = serde_json::from_slice(&early.bytes().await.unwrap()).unwrap();
    assert_eq!(said["error"], "missing");
    let missing = [0, 2].map(|n: usize| ChunkId::of(&chunks[n]).to_string());
    assert_eq!(said["chunks"], json!(missing));
    assert_eq!(
        refused(w.get("", &path).await).await,
        (404, "not_found".into())
    );
    for n in [0, 2] {
        w.put_chunk("", &chunks[n]).await;
    }
    assert_eq!(w.put("", &path, manifest.clone()).await.status(), 201);
    assert_eq!(w.put("", &path, manifest.clone()).await.status(), 200);
    let head = w.ask(Method::HEAD, &path).send().await.unwrap();
    assert_eq!(head.headers()["content-length"], manifest.len().to_string());
    assert!(w.get("", &path).await.bytes().await.unwrap() == manifest);
    let list = w.get("", &format!("/v1/images/{IMAGE}/manifests")).await;
    let list: Value = serde_json::from_slice(&list.bytes().await.unwrap()).unwrap();
    assert_eq!(list[0]["key"], key().to_string());
    assert_eq!(list[0]["bytes"], manifest.len());
    let delete = async || w.ask(Method::DELETE, &path).send().await.unwrap();
    assert_eq!(delete().await.status(), 204);
    assert_eq!(refused(delete().await).await.0, 404);
    assert_eq!(w.get("", &path).await.status(), 404);
}

#[tokio::test]
async fn one_brings_a_manifest_for_the_others_though_its_chunks_are_not_there() {
    let w = World::start().await;
    let manifest = manifest(IMAGE, &[chunk(1, 1000)]);
    let path = path(IMAGE, key());
    let ask = async |ms: u64| {
        let asked = w.ask(Method::GET, &path).header("lazyimg-wait-ms", ms);
        asked.send().await.unwrap()
    };
    for whose in ["yours", "coming"] {
        let answer = ask(0).await;
        assert_eq!(answer.headers()["lazyimg-lease"], whose);
        assert_eq!(refused(answer).await, (404, "not_found".into()));
    }
    let put = async |value: &str| {
        let asked = w.ask(Method::PUT, &path).header("lazyimg-cached", value);
        asked.body(manifest.clone()).send().await.unwrap()
    };
    assert_eq!(refused(put("yes").await).await.0, 400);
    let both = async { tokio::join!(ask(25_000), put("1")) };
    let (waited, done) = tokio::time::timeout(PATIENCE, both).await.unwrap();
    assert_eq!(done.status(), 200);
    assert!(waited.bytes().await.unwrap() == manifest);
    let head = w.ask(Method::HEAD, &path).send().await.unwrap();
    assert_eq!(head.status(), 404, "it is not live");
    assert_eq!(w.get("", "/v1/images").await.text().await.unwrap(), "[]");
}

#[tokio::test]
async fn what_is_no_manifest_of_this_image_and_key_is_refused() {
    let w = World::start().await;
    let manifest = put_image(&w, IMAGE, 1).await;
    for (path, body) in [
        (path(Digest([4; 32]), key()), manifest.clone()),
        (path(IMAGE, KeyId([9; 8])), manifest),
        (path(IMAGE, key()), b"no manifest".to_vec()),
        (format!("/v1/images/{IMAGE}/manifests/xyz"), vec![1]),
    ] {
        let done = w.put("", &path, body).await;
        assert_eq!(refused(done).await, (400, "bad_request".into()), "{path}");
    }
}

#[tokio::test]
async fn live_images_are_listed_from_any_place_on() {
    let w = World::start().await;
    let images = [3, 1, 2].map(|n| Digest([n; 32]));
    for (n, image) in images.into_iter().enumerate() {
        put_image(&w, image, n as u8).await;
    }
    let list = async |after: &str| -> Value {
        let got = w.get("", &format!("/v1/images{after}")).await;
        serde_json::from_slice(&got.bytes().await.unwrap()).unwrap()
    };
    let sorted = [1, 2, 3].map(|n| Digest([n; 32]).to_string());
    assert_eq!(list("").await, json!(sorted));
    let after = format!("?after={}", sorted[1]);
    assert_eq!(list(&after).await, json!([sorted[2]]));
}

#[tokio::test]
async fn profiles_lie_beside_live_images() {
    let w = World::start().await;
    let path = format!("/v1/images/{IMAGE}/profiles/default");
    assert_eq!(
        refused(w.put("", &path, "p").await).await.0,
        404,
        "not live yet"
    );
    put_image(&w, IMAGE, 1).await;
    assert_eq!(w.put("", &path, "sealed").await.status(), 200);
    assert_eq!(w.get("", &path).await.text().await.unwrap(), "sealed");
    let long = w.put("", &path, vec![0; (1 << 20) + 1]).await;
    assert_eq!(refused(long).await, (413, "too_large".into()));
    let odd = format!("/v1/images/{IMAGE}/profiles/..%2Fx");
    assert_eq!(refused(w.put("", &odd, "p").await).await.0, 400);
    let gone = w.ask(Method::DELETE, &path).send().await.unwrap();
    assert_eq!(gone.status(), 204);
    assert_eq!(w.get("", &path).await.status(), 404);
}

const REF: &str = "/v1/refs/registry.example%3A5000%2Fapp%3Av1";

fn says(image: Digest) -> String {
    json!({"image": image}).to_string()
}

#[tokio::test]
async fn references_change_only_when_their_condition_holds() {
    let w = World::start().await;
    let put = async |header: Option<(&str, &str)>, image| {
        let mut asked = w.ask(Method::PUT, REF).body(says(image));
        if let Some((name, value)) = header {
            asked = asked.header(name, value);
        }
        asked.send().await.unwrap()
    };
    assert_eq!(w.get("", REF).await.status(), 404);
    let absent = Some(("if-none-match", "*"));
    let any = Some(("if-match", "*"));
    assert_eq!(put(any, IMAGE).await.status(), 412);
    let first = put(absent, IMAGE).await;
    assert_eq!(first.status(), 200);
    let etag = first.headers()["etag"].to_str().unwrap().to_owned();
    assert_eq!(
        refused(put(absent, IMAGE).await).await,
        (412, "precondition".into())
    );
    let got = w.get("", REF).await;
    assert_eq!(got.headers()["etag"], etag);
    let said: Value = serde_json::from_slice(&got.bytes().await.unwrap()).unwrap();
    assert_eq!(said["image"], IMAGE.to_string());
    assert!(said["at"].as_u64().unwrap() > 0);
    let known = w.ask(Method::GET, REF).header("if-none-match", &etag);
    assert_eq!(known.send().await.unwrap().status(), 304);
    let other = Digest([8; 32]);
    assert_eq!(put(Some(("if-match", &etag)), other).await.status(), 200);
    assert_eq!(
        put(Some(("if-match", &etag)), IMAGE).await.status(),
        412,
        "it is another now"
    );
    assert_eq!(put(any, IMAGE).await.status(), 200);
    assert_eq!(
        refused(put(Some(("if-match", "\"a\", \"b\"")), IMAGE).await)
            .await
            .0,
        400
    );
    for body in ["", "{}", "{\"image\": \"x\"}", "{\"image\": 3}"] {
        let done = w.put("", REF, body).await;
        assert_eq!(refused(done).await, (400, "bad_request".into()), "{body}");
    }
    let long = w
        .put(
            "",
            REF,
            format!("{{\"image\": \"{}\"}}", "x".repeat(70_000)),
        )
        .await;
    assert_eq!(refused(long).await.0, 413);
    let long = format!("/v1/refs/{}", "x".repeat(1025));
    assert_eq!(refused(w.put("", &long, says(IMAGE)).await).await.0, 413);
    let stale = w.ask(Method::DELETE, REF).header("if-match", &etag);
    let gone = async || w.ask(Method::DELETE, REF).send().await.unwrap().status();
    // The image is what it was at first: its ETag may be the same again, or not.
    let stale = stale.send().await.unwrap().status();
    assert!(stale == 412 || stale == 204, "{stale}");
    assert_eq!(gone().await, if stale == 204 { 404 } else { 204 });
    assert_eq!(w.get("", REF).await.status(), 404);
}

#[tokio::test]
async fn one_converts_what_a_reference_lacks_and_the_others_wait_for_it() {
    let w = World::start().await;
    let ask = async |ms: u64| {
        let asked = w.ask(Method::GET, REF).header("lazyimg-wait-ms", ms);
        asked.send().await.unwrap()
    };
    let first = ask(20_000).await;
    assert_eq!(
        (first.status().as_u16(), &first.headers()["lazyimg-lease"]),
        (404, &"yours".parse().unwrap())
    );
    let second = ask(0).await;
    assert_eq!(
        (second.status().as_u16(), &second.headers()["lazyimg-lease"]),
        (404, &"coming".parse().unwrap())
    );
    let both = async { tokio::join!(ask(25_000), w.put("", REF, says(IMAGE))) };
    let (waited, put) = tokio::time::timeout(PATIENCE, both).await.unwrap();
    assert_eq!(
        (waited.status().as_u16(), put.status().as_u16()),
        (200, 200)
    );
}
