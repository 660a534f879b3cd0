//! A registry, or something between, that misbehaves: right bytes or a clear error, in bounded time.

#![allow(clippy::unwrap_used)] // Helpers outside of test functions.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::proxy::{Action, Proxy, Seen};
use common::*;
use futures_util::TryStreamExt as _;
use lazyimg_convergent::Digest;
use lazyimg_image::source::{Repository, SourceError, SourceOptions};
use serde_json::json;

/// What a proxy does with a request.
type Answer = Box<dyn Fn(&Seen) -> Action + Send + Sync>;

/// A registry with one blob, behind a proxy that misbehaves on blobs alone.
struct Setup {
    _registry: RegistryServer,
    proxy: Proxy,
    repository: Repository,
    blob: Bytes,
    digest: Digest,
}

impl Setup {
    async fn new(script: impl Fn(&Seen, usize) -> Action + Send + Sync + 'static) -> Self {
        Self::with(options(), 1_000_000, script).await
    }

    /// The script gets the number of blob requests before it.
    async fn with(
        options: SourceOptions,
        len: usize,
        script: impl Fn(&Seen, usize) -> Action + Send + Sync + 'static,
    ) -> Self {
        let registry = RegistryServer::start();
        let blob = noise(7, len);
        let digest = Digest::of(&blob);
        let direct = repository(&registry.reference("a:v1"), &options);
        direct.push_blob_bytes(&digest, blob.clone()).await.unwrap();
        push_fake_image(&direct, "v1", std::slice::from_ref(&blob), "amd64").await;
        let number = AtomicUsize::new(0);
        let proxy = Proxy::start(&registry.address, move |seen| {
            match seen.target.contains("/blobs/") {
                true => script(seen, number.fetch_add(1, Ordering::Relaxed)),
                false => Action::Forward,
            }
        })
        .await;
        let repository = repository(&format!("{}/a:v1", proxy.address), &options);
        Self {
            _registry: registry,
            proxy,
            repository,
            blob,
            digest,
        }
    }

    async fn range(&self, offset: u64, len: u64) -> Result<Bytes, SourceError> {
        let range = self
            .repository
            .blob_range(&self.digest, offset, len)
            .await?;
        assert_eq!(range, self.blob[offset as usize..(offset + len) as usize]);
        Ok(range)
    }

    async fn stream(&self) -> Result<(), SourceError> {
        let pieces: Vec<Bytes> = self
            .repository
            .blob_stream(&self.digest, self.blob.len() as u64)
            .await?
            .try_collect()
            .await?;
        assert_eq!(pieces.concat(), self.blob);
        Ok(())
    }
}

/// Options whose deadlines a test can wait for.
fn hasty() -> SourceOptions {
    let mut options = options();
    options.timeouts.response = Duration::from_millis(300);
    options.timeouts.connect = Duration::from_millis(300);
    options.timeouts.idle = Duration::from_millis(300);
    options.timeouts.stall_window = Duration::from_millis(500);
    options.retry.attempts = 2;
    options
}

fn ranges(setup: &Setup) -> Vec<String> {
    setup
        .proxy
        .seen()
        .iter()
        .filter_map(|s| s.header("range").map(str::to_owned))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_that_pass_are_survived() {
    let setup = Setup::new(|_, number| match number % 4 {
        0 => Action::Answer(503, vec![], b"busy".to_vec()),
        1 => Action::Close,
        2 => Action::Answer(429, vec!["Retry-After: 0".into()], vec![]),
        _ => Action::Forward,
    })
    .await;
    setup.range(1000, 5000).await.unwrap();
    setup.stream().await.unwrap();
    assert!(setup.repository.blob_exists(&setup.digest).await.unwrap());
    assert_eq!(
        setup
            .repository
            .blob(&setup.digest, 2_000_000)
            .await
            .unwrap(),
        setup.blob
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_that_stay_are_told_with_their_cause_and_soon() {
    for (status, word) in [
        (500, "oh no"),
        (502, "oh no"),
        (504, "oh no"),
        (418, "oh no"),
    ] {
        let setup = Setup::new(move |_, _| Action::Answer(status, vec![], b"oh no".to_vec())).await;
        let begun = Instant::now();
        let error = setup.range(0, 10).await.unwrap_err();
        assert!(
            chain(&error).contains(word) && chain(&error).contains(&status.to_string()),
            "{}",
            chain(&error)
        );
        assert_eq!(error.is_retryable(), status != 418);
        assert_eq!(setup.proxy.seen().len(), if status == 418 { 1 } else { 5 });
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_with_retries_of_its_own_gets_one_attempt() {
    let setup = Setup::new(|_, _| Action::Answer(503, vec![], vec![])).await;
    let error = setup
        .repository
        .blob_range_once(&setup.digest, 0, 10)
        .await
        .unwrap_err();
    assert!(
        error.is_retryable() && error.to_string().contains("1 attempt "),
        "{}",
        chain(&error)
    );
    assert_eq!(setup.proxy.seen().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_requests_is_an_error_of_its_own_with_the_time_to_wait() {
    let setup =
        Setup::new(|_, _| Action::Answer(429, vec!["Retry-After: 3600".into()], vec![])).await;
    let error = setup.range(0, 10).await.unwrap_err();
    assert!(
        matches!(&error, SourceError::RateLimited { retry_after: Some(d), attempts: 1, .. } if d.as_secs() == 3600),
        "{error:?}"
    );
    assert!(error.to_string().contains("3600 s"), "{error}");
    let setup = Setup::new(|_, number| match number {
        0 => Action::Answer(429, vec!["Retry-After: 1".into()], vec![]),
        _ => Action::Forward,
    })
    .await;
    let begun = Instant::now();
    setup.range(0, 10).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_breaks_off_goes_on_where_it_broke() {
    let setup = Setup::new(|_, number| {
        if number < 3 {
            Action::Truncate(100_000)
        } else {
            Action::Forward
        }
    })
    .await;
    setup.range(10, 500_000).await.unwrap();
    let ranges = ranges(&setup);
    assert_eq!(ranges[0], "bytes=10-500009");
    assert_eq!(ranges[3], "bytes=300010-500009", "{ranges:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_off_again_and_again_goes_on_as_long_as_it_moves() {
    // Ten pieces of which each is progress: more failures than there are attempts.
    let setup = Setup::new(|_, _| Action::Truncate(100_000)).await;
    setup.stream().await.unwrap();
    assert_eq!(ranges(&setup).last().unwrap(), "bytes=900000-");
    // Without progress it ends.
    let setup = Setup::new(|_, number| {
        if number == 0 {
            Action::Truncate(500_000)
        } else {
            Action::Truncate(10)
        }
    })
    .await;
    let error = setup.stream().await.unwrap_err();
    assert!(error.is_retryable(), "{}", chain(&error));
    assert!(setup.proxy.seen().len() <= 8, "{:?}", setup.proxy.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ignores_ranges_still_gives_the_right_bytes() {
    let setup = Setup::new(|_, number| {
        if number == 0 {
            Action::Truncate(300_000)
        } else {
            Action::ForwardWithoutRange
        }
    })
    .await;
    setup.stream().await.unwrap();
    for (offset, len) in [(0, 10), (999_990, 10), (500_000, 65_537), (0, 1_000_000)] {
        setup.range(offset, len).await.unwrap();
    }
    assert!(
        setup
            .repository
            .blob_range(&setup.digest, 999_990, 11)
            .await
            .is_err()
    );
    let far = setup
        .repository
        .blob_range(&setup.digest, 1 << 30, 10)
        .await
        .unwrap_err();
    assert!(
        matches!(far, SourceError::RangesUnsupported { .. }),
        "{far}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_is_not_the_one_asked_for_is_refused() {
    for header in [
        "bytes 0-9/1000000",
        "bytes 100-209/1000000",
        "bytes garbage",
        "",
    ] {
        let setup = Setup::new(move |_, _| {
            Action::Answer(
                206,
                vec![format!("Content-Range: {header}")],
                vec![b'x'; 10],
            )
        })
        .await;
        let error = setup
            .repository
            .blob_range(&setup.digest, 100, 10)
            .await
            .unwrap_err();
        assert!(
            matches!(error, SourceError::Malformed { .. }),
            "{header}: {error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_seen_in_blobs_and_manifests() {
    let setup = Setup::new(|_, _| Action::Change(|body| body[10] ^= 1)).await;
    let error = setup
        .repository
        .blob(&setup.digest, 2_000_000)
        .await
        .unwrap_err();
    assert!(
        matches!(error, SourceError::DigestMismatch { .. }),
        "{error}"
    );
    let registry = RegistryServer::start();
    let direct = repository(&registry.reference("a:v1"), &options());
    let image = push_fake_image(&direct, "v1", &[noise(1, 10)], "amd64").await;
    let proxy = Proxy::start(&registry.address, |_| {
        Action::Change(|body| {
            let at = body.windows(3).position(|w| w == b"tar").unwrap();
            body[at] = b'T';
        })
    })
    .await;
    let repository = repository(&format!("{}/a", proxy.address), &options());
    for reference in [v1(), image.digest.into()] {
        let error = repository.manifest(reference, 1 << 20).await.unwrap_err();
        assert!(
            matches!(error, SourceError::DigestMismatch { .. }),
            "{error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_and_drips_end_in_bounded_time() {
    for action in [
        || Action::Silence,
        || Action::Drip(Duration::from_millis(5)),
    ] {
        let setup = Setup::with(hasty(), 1_000_000, move |_, _| action()).await;
        let begun = Instant::now();
        let error = setup.range(0, 100_000).await.unwrap_err();
        assert!(
            matches!(&error, SourceError::Unreachable { attempts: 2, .. }),
            "{}",
            chain(&error)
        );
        assert!(chain(&error).contains("took longer"), "{}", chain(&error));
        let error = setup.stream().await.unwrap_err();
        assert!(chain(&error).contains("took longer"), "{}", chain(&error));
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "{:?}",
            begun.elapsed()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_is_not_taken_for_a_slow_registry() {
    let setup = Setup::with(hasty(), 20_000_000, |_, _| Action::Forward).await;
    let mut stream = setup
        .repository
        .blob_stream(&setup.digest, 20_000_000)
        .await
        .unwrap();
    let (mut total, mut pauses) = (0, 0);
    while let Some(piece) = stream.try_next().await.unwrap() {
        total += piece.len();
        if total / 4_000_000 > pauses {
            pauses += 1;
            tokio::time::sleep(Duration::from_millis(700)).await;
        }
    }
    assert_eq!((total, pauses), (20_000_000, 5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_producer_is_not_taken_for_a_slow_registry_and_a_registry_that_takes_nothing_is() {
    let registry = RegistryServer::start();
    let repository = repository(&registry.reference("a:v1"), &hasty());
    let blob = noise(3, 40_000);
    let pieces: Vec<Bytes> = blob.chunks(10_000).map(Bytes::copy_from_slice).collect();
    let slow = futures_util::stream::unfold(pieces.into_iter(), |mut pieces| async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        pieces.next().map(|piece| (Ok(piece), pieces))
    });
    repository
        .push_blob(&Digest::of(&blob), 40_000, slow)
        .await
        .unwrap();

    // A listener that says where to upload and then reads no more.
    let deaf = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = deaf.local_addr().unwrap();
    let proxy = Proxy::start("127.0.0.1:1", move |_| {
        Action::Answer(202, vec![format!("Location: http://{address}/s")], vec![])
    })
    .await;
    let repository = common::repository(&format!("{}/a", proxy.address), &hasty());
    let endless = futures_util::stream::iter((0..100).map(|_| Ok(Bytes::from(vec![0; 1 << 20]))));
    let begun = Instant::now();
    let error = repository
        .push_blob(&Digest::of(b"x"), 100 << 20, endless)
        .await
        .unwrap_err();
    assert!(
        matches!(error, SourceError::TimedOut { .. }),
        "{}",
        chain(&error)
    );
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_meets_trouble_is_begun_again() {
    let registry = RegistryServer::start();
    let number = AtomicUsize::new(0);
    let proxy = Proxy::start(&registry.address, move |seen| {
        match (seen.method.as_str(), number.fetch_add(1, Ordering::Relaxed)) {
            ("POST", 0) => Action::Answer(502, vec![], vec![]),
            ("PUT", 2) => Action::Close,
            // Another instance of the registry, which does not know the session.
            ("PUT", 4) => Action::Answer(404, vec![], vec![]),
            _ => Action::Forward,
        }
    })
    .await;
    let repository = repository(&format!("{}/a", proxy.address), &options());
    let blob = noise(1, 300_000);
    repository
        .push_blob_bytes(&Digest::of(&blob), blob.clone())
        .await
        .unwrap();
    assert_eq!(
        repository.blob(&Digest::of(&blob), 1 << 20).await.unwrap(),
        blob
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_without_end_or_sense_are_refused() {
    let endless = {
        let mut raw =
            b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.oci.image.manifest.v1+json\r\n\r\n"
                .to_vec();
        raw.resize(raw.len() + (5 << 20), b' ');
        raw
    };
    let schema_1 = json!({"schemaVersion": 1, "name": "a", "tag": "v1", "fsLayers": []})
        .to_string()
        .into_bytes();
    let itself = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [{"mediaType": OCI_INDEX, "size": 1,
        "digest": Digest::of(b"x"), "platform": {"os": "linux", "architecture": "amd64"}}]});
    let cases: Vec<(&str, Answer)> = vec![
        (
            "larger than the limit",
            Box::new(move |_| Action::Raw(endless.clone())),
        ),
        (
            "schema 1",
            Box::new(move |_| {
                Action::Answer(
                    200,
                    vec![
                        "Content-Type: application/vnd.docker.distribution.manifest.v1+prettyjws"
                            .into(),
                    ],
                    schema_1.clone(),
                )
            }),
        ),
        (
            "not a manifest",
            Box::new(|_| {
                Action::Answer(
                    200,
                    vec!["Content-Type: text/html".into()],
                    b"<html>log in to the hotel's network</html>".to_vec(),
                )
            }),
        ),
        (
            "neither",
            Box::new(|_| Action::Answer(200, vec![], b"{}".to_vec())),
        ),
        (
            "corrupt",
            Box::new(move |_| Action::Answer(200, vec![], itself.to_string().into_bytes())),
        ),
        (
            "more than 5 times",
            Box::new(|seen| {
                Action::Answer(302, vec![format!("Location: {}x", seen.target)], vec![])
            }),
        ),
        (
            "scheme ftp",
            Box::new(|_| Action::Answer(302, vec!["Location: ftp://h/x".into()], vec![])),
        ),
        (
            "names no target",
            Box::new(|_| Action::Answer(302, vec![], vec![])),
        ),
        (
            "without saying how",
            Box::new(|_| Action::Answer(401, vec![], vec![])),
        ),
        (
            "denied",
            Box::new(|_| {
                Action::Answer(
                    403,
                    vec![],
                    br#"{"errors":[{"code":"DENIED","message":"denied"}]}"#.to_vec(),
                )
            }),
        ),
    ];
    for (reason, script) in cases {
        let proxy = Proxy::start("127.0.0.1:1", script).await;
        let repository = repository(&format!("{}/a", proxy.address), &options());
        let error = repository.resolve(v1()).await.unwrap_err();
        assert!(
            chain(&error).contains(reason),
            "{reason}: {}",
            chain(&error)
        );
        assert!(!error.is_retryable(), "{reason}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_listening_is_told_after_a_few_attempts() {
    let free = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let repository = repository(&format!("{free}/a"), &options());
    let begun = Instant::now();
    let error = repository.manifest(v1(), 1000).await.unwrap_err();
    assert!(
        matches!(error, SourceError::Unreachable { attempts: 5, .. }),
        "{}",
        chain(&error)
    );
    assert!(chain(&error).contains("refused"), "{}", chain(&error));
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_was_away_is_used_again_when_it_is_back() {
    let setup = Setup::new(|_, number| {
        if number < 5 {
            Action::Close
        } else {
            Action::Forward
        }
    })
    .await;
    assert!(setup.range(0, 10).await.is_err());
    setup.range(0, 10).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn strange_answers_where_the_referrers_api_would_be_do_not_hide_the_fallback_tag() {
    let registry = RegistryServer::start();
    for (status, body) in [
        (404, "page not found"),
        (405, ""),
        (501, ""),
        (200, "<html>welcome</html>"),
        (400, "bad request"),
    ] {
        let proxy = Proxy::start(&registry.address, move |seen| {
            match seen.target.contains("/referrers/") {
                true => Action::Answer(status, vec!["Content-Type: text/html".into()], body.into()),
                false => Action::Forward,
            }
        })
        .await;
        let name = format!("a{status}");
        let direct = repository(&registry.reference(&name), &options());
        let image = push_fake_image(&direct, "v1", &[noise(1, 10)], "amd64").await;
        let artifact = push_artifact(&direct, &image.digest, "a/t", "x").await;
        direct.add_referrer(&image.digest, &artifact).await.unwrap();
        let repository = repository(&format!("{}/{name}", proxy.address), &options());
        assert_eq!(
            repository.referrers(&image.digest, "a/t").await.unwrap(),
            [artifact],
            "{status}"
        );
    }
}
