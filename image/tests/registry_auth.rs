//! Passwords, tokens, helpers, and to whom none of them is shown.

#![allow(clippy::unwrap_used)] // Helpers outside of test functions.

mod common;

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use common::proxy::{Action, Proxy};
use common::*;
use lazyimg_convergent::Digest;
use parking_lot::Mutex;
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_password_from_the_docker_configuration_opens_a_registry_without_a_round_trip_more() {
    let registry = RegistryServer::with_password();
    let proxy = Proxy::start(&registry.address, |_| Action::Forward).await;
    let (_dir, options) = docker_config(&auths(&proxy.address, PASSWORD));
    let repository = repository(&format!("{}/a:v1", proxy.address), &options);
    let image = push_fake_image(&repository, "v1", &[noise(1, 1000)], "amd64").await;
    assert_eq!(repository.resolve(v1()).await.unwrap().digest, image.digest);
    proxy.forget();
    let fresh = common::repository(&format!("{}/a:v1", proxy.address), &options);
    fresh.resolve_digest(v1()).await.unwrap();
    assert_eq!(proxy.log(), ["GET /v2/a/manifests/v1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_or_wrong_password_is_told_with_the_way_out_and_never_shown() {
    let registry = RegistryServer::with_password();
    let reference = registry.reference("a:v1");
    let error = repository(&reference, &options())
        .manifest(v1(), 1000)
        .await
        .unwrap_err();
    let text = unauthorized(&error);
    assert!(
        text.contains("docker login") && text.contains("/nonexistent/lazyimg-tests/config.json"),
        "{text}"
    );
    let (_dir, wrong) = docker_config(&auths(&registry.address, "wrong-password"));
    let repository = repository(&reference, &wrong);
    for error in [
        repository.manifest(v1(), 1000).await.unwrap_err(),
        repository
            .push_blob_bytes(&Digest::of(b"x"), "x".into())
            .await
            .unwrap_err(),
        repository.blob_exists(&Digest::of(b"x")).await.unwrap_err(),
    ] {
        let text = unauthorized(&error);
        assert!(text.contains("user alice"), "{text}");
        assert!(
            !text.contains("wrong-password") && !text.contains(&STANDARD.encode("wrong-password")),
            "{text}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_changes_while_mounted_is_looked_up_again() {
    let registry = RegistryServer::start();
    let image = push_fake_image(
        &repository(&registry.reference("a:v1"), &options()),
        "v1",
        &[noise(1, 1000)],
        "amd64",
    )
    .await;
    let expected = Arc::new(Mutex::new(basic("one")));
    let accepted = expected.clone();
    let proxy = Proxy::start(&registry.address, move |seen| {
        if seen.header("authorization") == Some(&accepted.lock()) {
            Action::Forward
        } else {
            Action::Answer(
                401,
                vec!["WWW-Authenticate: Basic realm=\"x\"".into()],
                vec![],
            )
        }
    })
    .await;
    let (dir, options) = docker_config(&auths(&proxy.address, "one"));
    let repository = repository(&format!("{}/a:v1", proxy.address), &options);
    repository
        .blob_range(&image.layers[0], 0, 10)
        .await
        .unwrap();
    *expected.lock() = basic("two");
    assert!(
        repository
            .blob_range(&image.layers[0], 0, 10)
            .await
            .is_err()
    );
    std::fs::write(
        dir.path().join("config.json"),
        auths(&proxy.address, "two").to_string(),
    )
    .unwrap();
    repository
        .blob_range(&image.layers[0], 0, 10)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_forbids_unasked_passwords_is_asked_anonymously_first() {
    let registry = RegistryServer::start();
    push_fake_image(
        &repository(&registry.reference("a:v1"), &options()),
        "v1",
        &[noise(1, 1000)],
        "amd64",
    )
    .await;
    let realm = Arc::new(Mutex::new(String::new()));
    let service = realm.clone();
    let proxy = Proxy::start(&registry.address, move |seen| {
        match seen.header("authorization") {
            _ if seen.target.starts_with("/token") => {
                Action::Answer(200, vec![], br#"{"token":"t"}"#.to_vec())
            }
            None => Action::Answer(
                401,
                vec![format!(
                    "WWW-Authenticate: Bearer realm=\"{}\"",
                    service.lock()
                )],
                vec![],
            ),
            Some("Bearer t") => Action::Forward,
            Some(_) => Action::Answer(403, vec![], vec![]),
        }
    })
    .await;
    *realm.lock() = format!("http://{}/token", proxy.address);
    let (_dir, options) = docker_config(&auths(&proxy.address, PASSWORD));
    repository(&format!("{}/a:v1", proxy.address), &options)
        .resolve_digest(v1())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_to_another_host_takes_no_authorization_along() {
    let registry = RegistryServer::with_password();
    let (_dir, direct) = docker_config(&auths(&registry.address, PASSWORD));
    let blob = noise(5, 50_000);
    let digest = Digest::of(&blob);
    repository(&registry.reference("a:v1"), &direct)
        .push_blob_bytes(&digest, blob.clone())
        .await
        .unwrap();
    let content = blob.clone();
    // The blob store: another port of this host, and another host altogether.
    for host in ["127.0.0.1", "127.0.0.2"] {
        let content = content.clone();
        let store = Proxy::start_on(host, "127.0.0.1:1", move |seen| {
            match seen.header("range") {
                Some("bytes=100-199") => Action::Answer(
                    206,
                    vec!["Content-Range: bytes 100-199/50000".into()],
                    content[100..200].to_vec(),
                ),
                _ => Action::Answer(200, vec![], content.to_vec()),
            }
        })
        .await;
        let target = format!("http://{}/object?signature=s3cr3t", store.address);
        let proxy = Proxy::start(&registry.address, move |seen| {
            if seen.target.contains("/blobs/sha256") {
                Action::Answer(307, vec![format!("Location: {target}")], vec![])
            } else {
                Action::Forward
            }
        })
        .await;
        let (_dir, options) = docker_config(&auths(&proxy.address, PASSWORD));
        let repository = repository(&format!("{}/a:v1", proxy.address), &options);
        assert_eq!(repository.blob(&digest, 100_000).await.unwrap(), blob);
        assert_eq!(
            repository.blob_range(&digest, 100, 100).await.unwrap(),
            blob[100..200]
        );
        assert!(repository.blob_exists(&digest).await.unwrap());
        let seen = store.seen();
        assert_eq!(seen.len(), 2, "HEAD is answered by the redirect alone");
        assert!(
            seen.iter().all(|s| s.header("authorization").is_none()),
            "{seen:?}"
        );
        assert!(
            proxy
                .seen()
                .iter()
                .all(|s| s.header("authorization").is_some())
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_s_target_cannot_ask_for_the_registry_s_password() {
    let thief = Proxy::start_on("127.0.0.3", "127.0.0.1:1", |_| {
        Action::Answer(200, vec![], br#"{"token":"t"}"#.to_vec())
    })
    .await;
    let challenge = format!(
        "WWW-Authenticate: Bearer realm=\"http://{}/token\"",
        thief.address
    );
    let store = Proxy::start_on("127.0.0.2", "127.0.0.1:1", move |_| {
        Action::Answer(401, vec![challenge.clone()], vec![])
    })
    .await;
    let target = format!("Location: http://{}/object?signature=s3cr3t", store.address);
    let proxy = Proxy::start("127.0.0.1:1", move |_| {
        Action::Answer(302, vec![target.clone()], vec![])
    })
    .await;
    let (_dir, options) = docker_config(&auths(&proxy.address, PASSWORD));
    let repository = repository(&format!("{}/a:v1", proxy.address), &options);
    let error = repository.blob(&Digest::of(b"x"), 100).await.unwrap_err();
    assert!(!chain(&error).contains("s3cr3t"), "{}", chain(&error));
    assert!(
        store
            .seen()
            .iter()
            .all(|s| s.header("authorization").is_none())
    );
    assert_eq!(thief.log(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_session_on_another_host_gets_no_authorization() {
    let other = Proxy::start_on("127.0.0.2", "127.0.0.1:1", |_| {
        Action::Answer(201, vec![], vec![])
    })
    .await;
    let location = format!("Location: http://{}/session?state=x", other.address);
    let proxy = Proxy::start("127.0.0.1:1", move |_| {
        Action::Answer(202, vec![location.clone()], vec![])
    })
    .await;
    let (_dir, options) = docker_config(&auths(&proxy.address, PASSWORD));
    let repository = repository(&format!("{}/a:v1", proxy.address), &options);
    repository
        .push_blob_bytes(&Digest::of(b"x"), "x".into())
        .await
        .unwrap();
    let seen = other.seen();
    assert!(
        seen[0]
            .target
            .starts_with("/session?state=x&digest=sha256%3A"),
        "{seen:?}"
    );
    assert_eq!(
        (seen[0].header("authorization"), seen[0].body.as_slice()),
        (None, b"x".as_slice())
    );
    assert!(proxy.seen()[0].header("authorization").is_some());
}

#[test]
fn a_credential_helper_is_asked_when_credentials_are_needed() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let script = format!(
        "#!/bin/sh\nread host\necho \"$1 $host\" >> {}\ncase $host in *:*) printf '{{\"ServerURL\":\"%s\",\"Username\":\"{USER}\",\"Secret\":\"{PASSWORD}\"}}' \"$host\";;\n\
         *) echo 'credentials not found in native keychain'; exit 1;; esac\n",
        log.display()
    );
    let helper = |name: &str, script: &str| {
        let path = dir.path().join(format!("docker-credential-{name}"));
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    helper("good", &script);
    helper("slow", "#!/bin/sh\nexec sleep 1000\n");
    helper("loud", "#!/bin/sh\nexec yes s3cr3t\n");
    helper(
        "broken",
        "#!/bin/sh\necho s3cr3t\necho 'no agent running' >&2\nexit 7\n",
    );
    let path = format!(
        "{}:{}",
        dir.path().display(),
        std::env::var("PATH").unwrap()
    );
    let name = "a_credential_helper_is_asked_when_credentials_are_needed";
    let log_text = log.display().to_string();
    if !in_child(name, &[("PATH", &path), ("HELPER_LOG", &log_text)], &[]) {
        return;
    }
    let log = std::path::PathBuf::from(std::env::var("HELPER_LOG").unwrap());
    let asked = || std::fs::read_to_string(&log).unwrap_or_default();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let open = RegistryServer::start();
        let closed = RegistryServer::with_password();
        for config in [
            json!({"credsStore": "good"}),
            json!({"credHelpers": {&closed.address: "good", &open.address: "good"}}),
        ] {
            let (_dir, options) = docker_config(&config);
            let public = repository(&open.reference("a:v1"), &options);
            push_fake_image(&public, "v1", &[noise(1, 10)], "amd64").await;
            assert_eq!(asked(), "", "an open registry needs no credentials");
            let private = repository(&closed.reference("a:v1"), &options);
            push_fake_image(&private, "v1", &[noise(1, 10)], "amd64").await;
            assert_eq!(
                asked(),
                format!("get {}\n", closed.address),
                "once, not for each request"
            );
            std::fs::remove_file(&log).unwrap();
        }
        for (helper, reason) in [
            ("broken", "no agent running"),
            ("loud", "more than"),
            ("missing", "could not be started"),
        ] {
            let (_dir, options) = docker_config(&json!({"credHelpers": {&closed.address: helper}}));
            let error = repository(&closed.reference("a:v1"), &options)
                .manifest(v1(), 1000)
                .await
                .unwrap_err();
            let text = format!("{} {error:?}", chain(&error));
            assert!(
                text.contains(reason) && text.contains(&format!("docker-credential-{helper}")),
                "{text}"
            );
            assert!(!text.contains("s3cr3t"), "{text}");
        }
        let (_dir, options) = docker_config(&json!({"credHelpers": {&closed.address: "slow"}}));
        let mut options = options;
        options.timeouts.helper = Duration::from_millis(500);
        let repository = repository(&closed.reference("a:v1"), &options);
        let late =
            tokio::time::timeout(Duration::from_secs(20), repository.manifest(v1(), 1000)).await;
        let error = late
            .expect("a helper that hangs ends in bounded time")
            .unwrap_err();
        assert!(chain(&error).contains("longer than"), "{}", chain(&error));
    });
}
