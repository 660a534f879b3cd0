//! Who may do what.

use std::fs;
use std::sync::Arc;

use lazyimg_chunkstore::wire::write_ids;
use lazyimg_convergent::{ChunkId, Digest};
use reqwest::Method;
use serde_json::json;

use crate::world::{
    ADMIN, ALPHA, BETA, OBSERVER, READER, Setup, World, chunk, key, manifest, refused, until,
    write_secret,
};

#[tokio::test]
async fn without_a_token_that_is_known_nothing_is_told() {
    let w = Setup::with_tenants().start().await;
    let id = w.put_chunk(ALPHA, &chunk(1, 100)).await;
    for (method, path) in [
        (Method::GET, format!("/v1/chunks/{id}")),
        (Method::PUT, format!("/v1/chunks/{id}")),
        (Method::POST, "/v1/chunks/has".to_owned()),
        (Method::GET, "/v1/images".to_owned()),
        (Method::GET, "/v1/admin/stats".to_owned()),
        (Method::GET, "/metrics".to_owned()),
    ] {
        let none = w.ask(method.clone(), &path).send().await.unwrap();
        assert_eq!(none.headers()["www-authenticate"], "Bearer");
        assert_eq!(refused(none).await, (401, "unauthorized".into()), "{path}");
        let wrong = w.ask(method, &path).bearer_auth("alpha-token-of-a-tesT");
        assert_eq!(refused(wrong.send().await.unwrap()).await.0, 401, "{path}");
    }
    for path in ["/healthz", "/readyz"] {
        let probe = w.ask(Method::GET, path).send().await.unwrap();
        assert_eq!(probe.status(), 200);
    }
    // They say what all tenants together do.
    for token in [ALPHA, READER] {
        let told = refused(w.get(token, "/metrics").await).await;
        assert_eq!(told, (403, "forbidden".into()));
    }
    for token in [OBSERVER, ADMIN] {
        assert_eq!(w.get(token, "/metrics").await.status(), 200);
    }
    assert_eq!(w.get(OBSERVER, "/v1/admin/roots").await.status(), 403);
}

#[tokio::test]
async fn a_token_does_what_its_rights_say() {
    let w = Setup::with_tenants().start().await;
    let bytes = chunk(1, 100);
    let path = format!("/v1/chunks/{}", ChunkId::of(&bytes));
    let forbidden = (403, "forbidden".to_owned());
    assert_eq!(
        refused(w.put(READER, &path, bytes.clone()).await).await,
        forbidden
    );
    assert_eq!(refused(w.put(ADMIN, &path, bytes).await).await, forbidden);
    assert_eq!(refused(w.get(ADMIN, &path).await).await, forbidden);
    assert_eq!(w.get(READER, &path).await.status(), 404);
    for path in ["/v1/admin/stats", "/v1/admin/roots"] {
        assert_eq!(refused(w.get(ALPHA, path).await).await, forbidden);
        assert_eq!(w.get(ADMIN, path).await.status(), 200);
    }
    for path in [
        "/v1/admin/roots/rotate",
        "/v1/admin/gc",
        "/v1/admin/roots/r00000001/acknowledge",
    ] {
        assert_eq!(refused(w.post(ALPHA, path, "").await).await, forbidden);
    }
    // Who can't bring a chunk gets no lease on it.
    let asked = w.ask(Method::POST, "/v1/chunks/get").bearer_auth(READER);
    let asked = asked.header("lazyimg-wait-ms", "0").body(vec![7; 32]);
    let frames = asked.send().await.unwrap().bytes().await.unwrap();
    assert_eq!((frames[0], frames.len()), (1, 16), "missing, and the end");
}

#[tokio::test]
async fn one_tenants_chunk_is_not_there_for_another_until_that_one_has_put_it() {
    let w = Setup::with_tenants().start().await;
    let bytes = chunk(1, 100);
    let id = w.put_chunk(ALPHA, &bytes).await;
    let path = format!("/v1/chunks/{id}");
    let manifest = manifest(Digest([1; 32]), std::slice::from_ref(&bytes));
    let image = format!("/v1/images/{}/manifests/{}", Digest([1; 32]), key());
    assert_eq!(w.put(ALPHA, &image, manifest.clone()).await.status(), 201);
    let reference = "/v1/refs/app";
    let says = json!({"image": Digest([1; 32])}).to_string();
    assert_eq!(w.put(ALPHA, reference, says).await.status(), 200);
    for method in [Method::GET, Method::HEAD] {
        for (name, value) in [("x", "x"), ("if-none-match", "*")] {
            let asked = w
                .ask(method.clone(), &path)
                .bearer_auth(BETA)
                .header(name, value);
            assert_eq!(asked.send().await.unwrap().status(), 404);
        }
    }
    let has = w.post(BETA, "/v1/chunks/has", write_ids(&[id])).await;
    assert_eq!(has.bytes().await.unwrap()[..], [0]);
    let many = w.post(BETA, "/v1/chunks/get", write_ids(&[id])).await;
    assert_eq!(many.bytes().await.unwrap()[0], 1, "missing");
    for path in [&image, reference] {
        assert_eq!(
            refused(w.get(BETA, path).await).await,
            (404, "not_found".into())
        );
    }
    assert_eq!(w.get(BETA, "/v1/images").await.text().await.unwrap(), "[]");
    assert_eq!(
        refused(w.put(BETA, &image, manifest).await).await,
        (409, "missing".into())
    );
    assert_eq!(
        w.put(BETA, &path, bytes.clone()).await.status(),
        201,
        "new to this tenant"
    );
    assert!(w.get(BETA, &path).await.bytes().await.unwrap() == bytes);
}

#[tokio::test]
async fn a_quota_ends_putting_and_nothing_else() {
    let w = Setup::with_tenants().start().await;
    let first = w.put_chunk(BETA, &chunk(1, 900)).await;
    let second = chunk(2, 200);
    let path = format!("/v1/chunks/{}", ChunkId::of(&second));
    let done = w.put(BETA, &path, second.clone()).await;
    assert_eq!(refused(done).await, (403, "quota".into()));
    assert_eq!(w.get(BETA, &path).await.status(), 404);
    assert_eq!(
        w.get(BETA, &format!("/v1/chunks/{first}")).await.status(),
        200
    );
    assert_eq!(
        w.put(ALPHA, &path, second).await.status(),
        201,
        "it is beta's own"
    );
    let stats = w.get(ADMIN, "/v1/admin/stats").await.bytes().await.unwrap();
    let stats: serde_json::Value = serde_json::from_slice(&stats).unwrap();
    let beta = stats["tenants"]
        .as_array()
        .unwrap()
        .iter()
        .find(|t| t["tenant"] == "beta");
    assert_eq!(beta.unwrap()["quota"], 1000);
    assert!(beta.unwrap()["bytes"].as_u64().unwrap() >= 900);
}

#[tokio::test]
async fn a_token_is_rotated_while_the_store_serves() {
    let setup = Setup::with_tenants();
    let both = setup
        .tenants
        .clone()
        .unwrap()
        .replace(r#"["alpha"]"#, r#"["alpha", "alpha-2"]"#);
    let only = both.replace(r#"["alpha", "alpha-2"]"#, r#"["alpha-2"]"#);
    let w = setup.start().await;
    let new = "another-alpha-token";
    let status = async |token| w.get(token, "/v1/images").await.status().as_u16();
    let replace = |text: &str| {
        let path = w.dir.path().join("tenants.toml");
        fs::write(path.with_extension("new"), text).unwrap();
        fs::rename(path.with_extension("new"), path).unwrap();
    };
    assert_eq!((status(ALPHA).await, status(new).await), (200, 401));
    write_secret(&w.dir.path().join("alpha-2"), new);
    // Found without being told.
    replace(&both);
    until("the new token is known", async || status(new).await == 200).await;
    assert_eq!(status(ALPHA).await, 200, "both work");
    // Told: what SIGHUP does.
    replace(&only);
    w.handle.reload().await;
    assert_eq!((status(ALPHA).await, status(new).await), (401, 200));
    replace("tenants = 3");
    w.handle.reload().await;
    assert_eq!(status(new).await, 200, "a broken file changes nothing");
    until("it is counted", async || {
        w.metric(OBSERVER, "lazyimg_store_reloads_failed_total")
            .await
            >= 1.0
    })
    .await;
}

#[tokio::test]
async fn a_web_page_can_not_use_a_store_without_tenants() {
    let w = World::start().await;
    for path in ["/v1/admin/roots/rotate", "/v1/chunks/has"] {
        let asked = w
            .ask(Method::POST, path)
            .header("origin", "http://evil.example");
        assert_eq!(
            refused(asked.send().await.unwrap()).await,
            (403, "forbidden".into())
        );
    }
}

#[tokio::test]
async fn the_store_does_not_listen_to_the_world_without_tenants() {
    use lazyimg_store::catalog::{Catalog, CatalogOptions};
    use lazyimg_store::engine::{Engine, config::EngineSettings};
    use lazyimg_store::server::{ServeError, Server, ServerOptions};
    for listen in ["0.0.0.0:0", "[::]:0"] {
        let setup = Setup::new();
        let settings = EngineSettings::embedded(setup.path("data"));
        let engine: Arc<dyn Engine> = settings.open().await.unwrap().engine;
        let options = CatalogOptions::exclusive("test");
        let parts = lazyimg_store::http::Parts {
            catalog: Arc::new(Catalog::open(Arc::clone(&engine), options).await.unwrap()),
            engine,
            tenants: Arc::new(lazyimg_store::tenants::Tenants::local()),
            audit: setup.audit,
            limits: setup.limits,
            hot: None,
        };
        let error = Server::bind(parts, ServerOptions::at(listen))
            .await
            .unwrap_err();
        assert!(matches!(error, ServeError::NotLoopback { .. }), "{error}");
        assert!(error.to_string().contains("--tenants"), "{error}");
    }
}
