//! Every engine against the same promises, with real servers behind: Redis, and Garage for S3.
#![allow(clippy::unwrap_used)]

mod engines_support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use engines_support::servers::{self, Garage, Redis};
use engines_support::{chunk, conformance, root};
use lazyimg_store::engine::config::{EngineSettings, Opened, RedisSettings, S3Settings};
use lazyimg_store::engine::embedded::{EmbeddedEngine, EmbeddedOptions};
use lazyimg_store::engine::hot::{HotEngine, HotOptions};
use lazyimg_store::engine::memory::MemoryEngine;
use lazyimg_store::engine::{Engine, EngineError};

/// An embedded engine whose segments are small, so that there are several.
fn embedded(dir: &Path) -> Arc<dyn Engine> {
    let options = EmbeddedOptions {
        segment_bytes: Some(2 << 20),
        ..EmbeddedOptions::new(dir)
    };
    Arc::new(EmbeddedEngine::open(&options).unwrap())
}

async fn s3(settings: S3Settings) -> Arc<dyn Engine> {
    Arc::new(settings.open().await.unwrap())
}

fn hot(redis: &RedisSettings, durable: Arc<dyn Engine>) -> Arc<dyn Engine> {
    let options = HotOptions {
        deadline: Duration::from_secs(5),
        ..HotOptions::default()
    };
    Arc::new(HotEngine::new(
        Arc::new(redis.open().unwrap()),
        durable,
        options,
    ))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_engine_keeps_the_promises() {
    conformance::all(true, |_| async {
        Arc::new(MemoryEngine::new()) as Arc<dyn Engine>
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_engine_keeps_the_promises() {
    let dir = tempfile::tempdir().unwrap();
    conformance::all(true, |name| {
        let engine = embedded(&dir.path().join(name));
        async move { engine }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_redis_engine_keeps_the_promises() {
    let redis = Redis::start(256, "maxmemory-policy noeviction");
    conformance::all(true, |name| {
        let engine: Arc<dyn Engine> = Arc::new(servers::redis(&redis, name).open().unwrap());
        async move { engine }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_s3_engine_keeps_the_promises() {
    let garage = Garage::start();
    // Garage has no conditional writes: several can believe to have been the first.
    conformance::all(false, |name| s3(servers::s3(&garage, name))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hot_redis_before_the_embedded_engine_keeps_the_promises() {
    let redis = Redis::start(32, "maxmemory-policy allkeys-lru");
    let dir = tempfile::tempdir().unwrap();
    conformance::all(true, |name| {
        let engine = hot(
            &servers::redis(&redis, name),
            embedded(&dir.path().join(name)),
        );
        async move { engine }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hot_redis_before_s3_keeps_the_promises() {
    let redis = Redis::start(32, "maxmemory-policy allkeys-lru");
    let garage = Garage::start();
    conformance::all(false, |name| {
        let (redis, garage) = (servers::redis(&redis, name), servers::s3(&garage, name));
        async move { hot(&redis, s3(garage).await) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_s3_holds_is_there_for_the_next_process() {
    let garage = Garage::start();
    let first = s3(servers::s3(&garage, "again")).await;
    let (id, bytes) = chunk(1, 600_000);
    first.put_chunk(root(1), &id, bytes.clone()).await.unwrap();
    first.close().await;
    let second = s3(servers::s3(&garage, "again")).await;
    assert_eq!(second.get_chunk(root(1), &id).await.unwrap(), Some(bytes));
    let other = s3(servers::s3(&garage, "another")).await;
    assert_eq!(other.get_chunk(root(1), &id).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_settings_that_do_not_work_are_named() {
    let garage = Garage::start();
    let mut wrong_secret = servers::s3(&garage, "x");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wrong");
    std::fs::write(&path, "0".repeat(64)).unwrap();
    wrong_secret.secret_access_key_file = Some(path);
    let mut no_bucket = servers::s3(&garage, "x");
    no_bucket.bucket = "nothing".to_owned();
    for (settings, word) in [(wrong_secret, "credentials"), (no_bucket, "bucket")] {
        let Err(e) = settings.open().await else {
            panic!("opened {settings:?}");
        };
        assert!(matches!(e, EngineError::Setup(_)), "{e}");
        assert!(e.to_string().contains(word), "{e}");
        assert!(!e.to_string().contains(&"0".repeat(64)), "{e}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_redis_says_so_and_keeps_what_it_has() {
    let redis = Redis::start(8, "maxmemory-policy noeviction");
    let engine = servers::redis(&redis, "full").open().unwrap();
    let mut kept = Vec::new();
    let full = loop {
        let (id, bytes) = chunk(kept.len() as u64, 300_000);
        match engine.put_chunk(root(1), &id, bytes).await {
            Ok(_) => kept.push(id),
            Err(e) => break e,
        }
        assert!(kept.len() < 100, "8 MB hold 30 MB");
    };
    assert!(matches!(full, EngineError::Full(_)), "{full}");
    assert!(kept.len() > 3);
    for (n, id) in kept.iter().enumerate() {
        let (_, bytes) = chunk(n as u64, 300_000);
        assert_eq!(engine.get_chunk(root(1), id).await.unwrap(), Some(bytes));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_asks_for_its_password_and_takes_the_one_in_the_file() {
    let redis = Redis::start(32, "requirepass sesame");
    let mut settings = servers::redis(&redis, "secret");
    let refused = settings.open().unwrap().check().await;
    assert!(matches!(refused, Err(EngineError::Setup(_))), "{refused:?}");
    settings.password_file = Some(redis.file("wrong", "simsalabim\n"));
    let refused = settings.open().unwrap().check().await;
    assert!(matches!(refused, Err(EngineError::Setup(_))), "{refused:?}");
    settings.password_file = Some(redis.file("password", "sesame\n"));
    settings.open().unwrap().check().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_in_redis_expire() {
    let redis = Redis::start(32, "");
    let engine = servers::redis(&redis, "ttl").open().unwrap();
    let (id, bytes) = chunk(1, 1000);
    engine.put_chunk(root(1), &id, bytes).await.unwrap();
    let key = format!("ttl:roots/r00000001/chunks/{}", id.hex());
    let answer = redis.command(&format!("TTL {key}"));
    let seconds: i64 = answer.trim().trim_start_matches(':').parse().unwrap();
    assert!((1..=3600).contains(&seconds), "{answer}");
    // What has expired is neither listed nor there.
    redis.command(&format!("DEL {key}"));
    assert_eq!(engine.list_chunks(root(1), None, 10).await.unwrap(), []);
    assert_eq!(engine.get_chunk(root(1), &id).await.unwrap(), None);
}

async fn with_hot(redis: &Redis, dir: &Path) -> Opened {
    let settings = EngineSettings {
        hot: Some(servers::redis(redis, "hot")),
        ..EngineSettings::embedded(dir)
    };
    settings.open().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hot_redis_that_hangs_or_dies_fails_no_request() {
    let mut redis = Redis::start(32, "maxmemory-policy allkeys-lru");
    let dir = tempfile::tempdir().unwrap();
    let Opened { engine, hot } = with_hot(&redis, dir.path()).await;
    let hot = hot.unwrap();
    let (id, bytes) = chunk(1, 100_000);
    assert!(engine.put_chunk(root(1), &id, bytes.clone()).await.unwrap());
    let hits = async |more: &str| {
        let before = hot.hits.load(Relaxed);
        let end = Instant::now() + Duration::from_secs(60);
        while hot.hits.load(Relaxed) == before {
            assert!(Instant::now() < end, "the hot tier is not used {more}");
            let got = engine.get_chunk(root(1), &id).await.unwrap();
            assert_eq!(got, Some(bytes.clone()));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    hits("at first").await;
    redis.freeze(true);
    for n in 0..100 {
        assert_eq!(
            engine.get_chunk(root(1), &id).await.unwrap(),
            Some(bytes.clone())
        );
        let (id, bytes) = chunk(100 + n, 1000);
        assert!(engine.put_chunk(root(1), &id, bytes).await.unwrap());
    }
    assert!(hot.failures.load(Relaxed) > 0 && hot.skipped.load(Relaxed) > 0);
    redis.freeze(false);
    hits("after it hung").await;
    redis.kill();
    for n in 0..100 {
        assert_eq!(
            engine.get_chunk(root(1), &id).await.unwrap(),
            Some(bytes.clone())
        );
        let (id, bytes) = chunk(200 + n, 1000);
        assert!(engine.put_chunk(root(1), &id, bytes).await.unwrap());
    }
    engine.check().await.unwrap();
    engine.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hot_redis_that_is_full_fails_no_request() {
    let redis = Redis::start(8, "maxmemory-policy noeviction");
    let dir = tempfile::tempdir().unwrap();
    let Opened { engine, hot } = with_hot(&redis, dir.path()).await;
    for n in 0..60 {
        let (id, bytes) = chunk(n, 300_000);
        assert!(engine.put_chunk(root(1), &id, bytes).await.unwrap());
    }
    for n in 0..60 {
        let (id, bytes) = chunk(n, 300_000);
        assert_eq!(engine.get_chunk(root(1), &id).await.unwrap(), Some(bytes));
    }
    assert!(hot.unwrap().fills.load(Relaxed) < 60);
    engine.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_in_redis_that_somebody_has_changed_is_not_given_out() {
    let redis = Redis::start(32, "");
    let dir = tempfile::tempdir().unwrap();
    let Opened { engine, hot } = with_hot(&redis, dir.path()).await;
    let hot = hot.unwrap();
    let (id, bytes) = chunk(1, 5000);
    engine.put_chunk(root(1), &id, bytes.clone()).await.unwrap();
    let key = format!("hot:roots/r00000001/chunks/{}", id.hex());
    engines_support::wait_for("the chunk is in Redis", || {
        redis.command(&format!("EXISTS {key}")).starts_with(":1")
    });
    for change in [
        format!("SETRANGE {key} 7 xyz"),
        format!("APPEND {key} x"),
        format!("SET {key} x"),
    ] {
        let (wrong, fills) = (hot.wrong.load(Relaxed), hot.fills.load(Relaxed));
        redis.command(&change);
        let end = Instant::now() + Duration::from_secs(60);
        while hot.wrong.load(Relaxed) == wrong {
            assert!(Instant::now() < end, "Redis was never asked");
            assert_eq!(
                engine.get_chunk(root(1), &id).await.unwrap(),
                Some(bytes.clone())
            );
        }
        engines_support::wait_for("it is mended", || hot.fills.load(Relaxed) > fills);
    }
    engine.close().await;
}

#[tokio::test]
async fn servers_that_are_not_there_are_unavailable() {
    let dir = tempfile::tempdir().unwrap();
    let mut redis = Redis::start(8, "");
    let settings = servers::redis(&redis, "x");
    redis.kill();
    let down = settings.open().unwrap().check().await;
    assert!(matches!(down, Err(EngineError::Unavailable(_))), "{down:?}");
    let secret = dir.path().join("secret");
    std::fs::write(&secret, "x").unwrap();
    // Nobody listens on port 1.
    let settings = S3Settings {
        endpoint: Some("http://127.0.0.1:1".to_owned()),
        bucket: "b".to_owned(),
        region: "r".to_owned(),
        prefix: String::new(),
        access_key_id_file: Some(secret.clone()),
        secret_access_key_file: Some(secret),
        virtual_host_style: false,
    };
    let Err(e) = settings.open().await else {
        panic!("opened nothing");
    };
    assert!(matches!(e, EngineError::Unavailable(_)), "{e}");
}
