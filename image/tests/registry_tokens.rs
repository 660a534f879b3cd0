//! Tokens from a token service: got, kept, renewed, and from which credentials.

#![allow(clippy::unwrap_used)] // Helpers outside of test functions.

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use common::proxy::{Action, Proxy, Seen};
use common::*;
use lazyimg_convergent::Digest;
use lazyimg_image::source::{Repository, SourceError};
use parking_lot::Mutex;
use serde_json::json;

/// A token service and a registry that accepts its tokens for `lifetime`.
struct Tokens {
    proxy: Proxy,
    issued: Arc<AtomicUsize>,
}

impl Tokens {
    async fn start(registry: &RegistryServer, lifetime: Duration, expires_in: u64) -> Self {
        let issued = Arc::new(AtomicUsize::new(0));
        let address = Arc::new(Mutex::new(String::new()));
        let valid: Arc<Mutex<HashMap<String, (tokio::time::Instant, String)>>> = Arc::default();
        let (count, own) = (issued.clone(), address.clone());
        let proxy = Proxy::start(&registry.address, move |seen| {
            if seen.target.starts_with("/token") {
                return issue(seen, &count, &valid, lifetime, expires_in);
            }
            let action = if seen.method == "GET" || seen.method == "HEAD" {
                "pull"
            } else {
                "push"
            };
            let token = seen
                .header("authorization")
                .and_then(|a| a.strip_prefix("Bearer "));
            let good = token.and_then(|t| valid.lock().get(t).cloned());
            match good {
                Some((until, scope))
                    if until > tokio::time::Instant::now() && scope.contains(action) =>
                {
                    Action::Forward
                }
                _ => {
                    let scope = if action == "pull" {
                        "repository:a:pull"
                    } else {
                        "repository:a:pull,push"
                    };
                    let challenge = format!(
                        "Bearer realm=\"http://{}/token\",service=\"test\",scope=\"{scope}\"",
                        own.lock()
                    );
                    Action::Answer(401, vec![format!("WWW-Authenticate: {challenge}")], vec![])
                }
            }
        })
        .await;
        *address.lock() = proxy.address.clone();
        Self { proxy, issued }
    }

    fn repository(&self, options: &lazyimg_image::source::SourceOptions) -> Repository {
        repository(&format!("{}/a:v1", self.proxy.address), options)
    }

    fn issued(&self) -> usize {
        self.issued.load(Ordering::Relaxed)
    }
}

fn issue(
    seen: &Seen,
    count: &AtomicUsize,
    valid: &Mutex<HashMap<String, (tokio::time::Instant, String)>>,
    lifetime: Duration,
    expires_in: u64,
) -> Action {
    let form = String::from_utf8_lossy(&seen.body).into_owned();
    let by_password = seen.header("authorization") == Some(&basic(PASSWORD));
    let by_refresh = seen.method == "POST"
        && form.contains("grant_type=refresh_token")
        && form.contains("refresh_token=re%2Bfresh");
    let anonymous = seen.method == "GET" && seen.header("authorization").is_none();
    let scope = if by_refresh {
        form
    } else {
        seen.target.clone()
    }
    .replace("%3A", ":")
    .replace("%2C", ",");
    if !(by_password || by_refresh || anonymous && !scope.contains("push")) {
        return Action::Answer(
            401,
            vec![],
            br#"{"details":"incorrect username or password"}"#.to_vec(),
        );
    }
    let number = count.fetch_add(1, Ordering::Relaxed);
    let token = format!("secret-token-{number}");
    valid.lock().insert(
        token.clone(),
        (tokio::time::Instant::now() + lifetime, scope),
    );
    Action::Answer(
        200,
        vec![],
        json!({"access_token": token, "expires_in": expires_in})
            .to_string()
            .into_bytes(),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_runs_out_in_the_middle_is_renewed_once_for_all_readers() {
    let registry = RegistryServer::start();
    let image = push_fake_image(
        &repository(&registry.reference("a:v1"), &options()),
        "v1",
        &[noise(1, 100_000)],
        "amd64",
    )
    .await;
    // It says an hour and means a second.
    let tokens = Tokens::start(&registry, Duration::from_secs(1), 3600).await;
    let repository = Arc::new(tokens.repository(&options()));
    repository.resolve(v1()).await.unwrap();
    assert_eq!(tokens.issued(), 1);
    for expected in [1, 2] {
        let readers = (0..20).map(|i| {
            let (repository, layer) = (repository.clone(), image.layers[0]);
            tokio::spawn(async move { repository.blob_range(&layer, i * 1000, 1000).await })
        });
        for reader in readers.collect::<Vec<_>>() {
            assert_eq!(reader.await.unwrap().unwrap().len(), 1000);
        }
        assert_eq!(tokens.issued(), expected);
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_whose_end_is_known_is_renewed_without_a_refusal() {
    let registry = RegistryServer::start();
    let image = push_fake_image(
        &repository(&registry.reference("a:v1"), &options()),
        "v1",
        &[noise(1, 1000)],
        "amd64",
    )
    .await;
    let tokens = Tokens::start(&registry, Duration::from_secs(2), 2).await;
    let repository = tokens.repository(&options());
    repository
        .blob_range(&image.layers[0], 0, 10)
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(2100)).await;
    tokens.proxy.forget();
    repository
        .blob_range(&image.layers[0], 0, 10)
        .await
        .unwrap();
    let log = tokens.proxy.log();
    assert_eq!(log.len(), 2, "token and range, no 401: {log:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pushing_asks_for_a_token_that_may_push() {
    let registry = RegistryServer::start();
    let tokens = Tokens::start(&registry, Duration::from_secs(60), 60).await;
    let refused = tokens
        .repository(&options())
        .push_blob_bytes(&Digest::of(b"x"), "x".into())
        .await
        .unwrap_err();
    assert!(
        unauthorized(&refused).contains("docker login"),
        "{}",
        chain(&refused)
    );
    let (_dir, options) = docker_config(&auths(&tokens.proxy.address, PASSWORD));
    let repository = tokens.repository(&options);
    let image = push_fake_image(&repository, "v1", &[noise(1, 1000)], "amd64").await;
    let blob = noise(2, 100_000);
    let pieces = futures_util::stream::iter([Ok(blob.clone())]);
    repository
        .push_blob(&Digest::of(&blob), blob.len() as u64, pieces)
        .await
        .unwrap();
    assert_eq!(repository.resolve(v1()).await.unwrap().digest, image.digest);
    let scopes: Vec<_> = tokens
        .proxy
        .log()
        .into_iter()
        .filter(|l| l.contains("/token"))
        .collect();
    assert!(
        scopes.iter().all(|s| s.contains("service=test")),
        "{scopes:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_token_is_changed_for_access_tokens() {
    let registry = RegistryServer::start();
    let tokens = Tokens::start(&registry, Duration::from_secs(60), 60).await;
    let (_dir, options) =
        docker_config(&json!({"auths": {&tokens.proxy.address: {"identitytoken": "re+fresh"}}}));
    push_fake_image(
        &tokens.repository(&options),
        "v1",
        &[noise(1, 1000)],
        "amd64",
    )
    .await;
    let (_dir, options) =
        docker_config(&json!({"auths": {&tokens.proxy.address: {"identitytoken": "outdated"}}}));
    let error = tokens
        .repository(&options)
        .resolve_digest(v1())
        .await
        .unwrap_err();
    let text = unauthorized(&error);
    assert!(
        text.contains("log in again") && !text.contains("outdated"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_service_in_trouble_is_asked_again() {
    let registry = RegistryServer::start();
    push_fake_image(
        &repository(&registry.reference("a:v1"), &options()),
        "v1",
        &[noise(1, 1000)],
        "amd64",
    )
    .await;
    let address = Arc::new(Mutex::new(String::new()));
    let (own, failures) = (address.clone(), AtomicUsize::new(0));
    let proxy = Proxy::start(&registry.address, move |seen| {
        match seen.header("authorization") {
            _ if seen.target.starts_with("/token") => {
                match failures.fetch_add(1, Ordering::Relaxed) {
                    0 => Action::Answer(503, vec![], vec![]),
                    1 => Action::Answer(429, vec!["Retry-After: 0".into()], vec![]),
                    2 => Action::Close,
                    _ => Action::Answer(200, vec![], br#"{"token":"t"}"#.to_vec()),
                }
            }
            Some("Bearer t") => Action::Forward,
            _ => Action::Answer(
                401,
                vec![format!(
                    "WWW-Authenticate: Bearer realm=\"http://{}/token\"",
                    own.lock()
                )],
                vec![],
            ),
        }
    })
    .await;
    *address.lock() = proxy.address.clone();
    repository(&format!("{}/a:v1", proxy.address), &options())
        .resolve_digest(v1())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_registry_accepts_the_tokens_of_a_real_token_service() {
    let keys = tempfile::tempdir().unwrap();
    let (key, certificate) = (keys.path().join("key.pem"), keys.path().join("cert.pem"));
    let (key_text, certificate_text) = (
        key.to_str().unwrap().to_owned(),
        certificate.to_str().unwrap().to_owned(),
    );
    run(
        "openssl",
        &[
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=issuer",
            "-keyout",
            &key_text,
            "-out",
            &certificate_text,
        ],
    );
    let der = keys.path().join("cert.der");
    run(
        "openssl",
        &[
            "x509",
            "-in",
            &certificate_text,
            "-outform",
            "DER",
            "-out",
            der.to_str().unwrap(),
        ],
    );
    let header = json!({"typ": "JWT", "alg": "RS256", "x5c": [STANDARD.encode(std::fs::read(der).unwrap())]}).to_string();
    let dir = keys.path().to_owned();
    let service = Proxy::start("127.0.0.1:1", move |seen| {
        if seen.header("authorization") != Some(&basic(PASSWORD)) {
            return Action::Answer(401, vec![], vec![]);
        }
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let actions: &[&str] = if seen.target.contains("push") { &["pull", "push"] } else { &["pull"] };
        let claims = json!({"iss": "issuer", "sub": USER, "aud": "test", "exp": now + 300, "nbf": now - 10, "iat": now,
            "jti": "1", "access": [{"type": "repository", "name": "a", "actions": actions}]});
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(&header), URL_SAFE_NO_PAD.encode(claims.to_string()));
        let (input, output) = (dir.join("in"), dir.join("out"));
        std::fs::write(&input, &signed).unwrap();
        run("openssl", &["dgst", "-sha256", "-sign", &key_text, "-out", output.to_str().unwrap(), input.to_str().unwrap()]);
        let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(std::fs::read(output).unwrap()));
        Action::Answer(200, vec![], json!({"token": token, "expires_in": 300}).to_string().into_bytes())
    })
    .await;
    let realm = format!("http://{}/token", service.address);
    let registry = RegistryServer::start_with(|_| {
        format!(
            "auth:\n  token:\n    realm: {realm}\n    service: test\n    issuer: issuer\n    rootcertbundle: {certificate_text}\n"
        )
    });
    let (_dir, options) = docker_config(&auths(&registry.address, PASSWORD));
    let repository = repository(&registry.reference("a:v1"), &options);
    let image = push_fake_image(&repository, "v1", &[noise(1, 1000)], "amd64").await;
    assert_eq!(repository.resolve(v1()).await.unwrap().digest, image.digest);
    assert_eq!(repository.referrers(&image.digest, "").await.unwrap(), []);
    let other = common::repository(&registry.reference("b:v1"), &options);
    assert!(matches!(
        other.resolve(v1()).await.unwrap_err(),
        SourceError::Unauthorized { .. }
    ));
    assert!(matches!(
        common::repository(&registry.reference("a:v1"), &common::options())
            .resolve(v1())
            .await
            .unwrap_err(),
        SourceError::Unauthorized { .. }
    ));
}
