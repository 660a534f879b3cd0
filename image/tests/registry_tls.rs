//! Registries over TLS. Loopback is plain HTTP by rule, so these run in a network namespace of their
//! own, where another address leads back to this machine. Needs root.

#![allow(clippy::unwrap_used)] // Helpers outside of test functions.

mod common;

use std::path::Path;

use common::*;
use lazyimg_image::source::{SourceError, SourceOptions};

/// Reserved for documentation (RFC 5737): nowhere but in the namespace.
const ADDRESS: &str = "192.0.2.1";

const NAMESPACE: &[&str] = &[
    "unshare",
    "-n",
    "sh",
    "-c",
    "ip link set lo up && ip addr add 192.0.2.1/32 dev lo && exec \"$@\"",
    "sh",
];

/// A CA and a certificate for [`ADDRESS`] in a directory.
fn certificates(dir: &Path) {
    let path = |name: &str| dir.join(name).display().to_string();
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
            "/CN=test CA",
            "-keyout",
            &path("ca.key"),
            "-out",
            &path("ca.pem"),
        ],
    );
    run(
        "openssl",
        &[
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            "/CN=registry",
            "-keyout",
            &path("tls.key"),
            "-out",
            &path("tls.csr"),
        ],
    );
    std::fs::write(
        dir.join("ext"),
        format!(
            "subjectAltName=IP:{ADDRESS}\nextendedKeyUsage=serverAuth\nbasicConstraints=CA:FALSE\n"
        ),
    )
    .unwrap();
    run(
        "openssl",
        &[
            "x509",
            "-req",
            "-in",
            &path("tls.csr"),
            "-CA",
            &path("ca.pem"),
            "-CAkey",
            &path("ca.key"),
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            &path("ext"),
            "-out",
            &path("tls.pem"),
        ],
    );
}

fn tls_registry(dir: &Path) -> (RegistryServer, String) {
    let http = format!(
        "  tls:\n    certificate: {0}/tls.pem\n    key: {0}/tls.key\n",
        dir.display()
    );
    let registry = RegistryServer::start_at(ADDRESS, &http, |_| String::new());
    let reference = registry.reference("a:v1");
    (registry, reference)
}

#[test]
fn a_registry_with_a_ca_of_its_own_is_trusted_through_ssl_cert_file() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let ca = dir.path().join("ca.pem").display().to_string();
    let here = dir.path().display().to_string();
    let name = "a_registry_with_a_ca_of_its_own_is_trusted_through_ssl_cert_file";
    if !in_child(
        name,
        &[("SSL_CERT_FILE", &ca), ("TEST_DIR", &here)],
        NAMESPACE,
    ) {
        return;
    }
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let (_registry, reference) = tls_registry(Path::new(&std::env::var("TEST_DIR").unwrap()));
        let repository = repository(&reference, &options());
        let image = push_fake_image(&repository, "v1", &[noise(1, 100_000)], "amd64").await;
        assert_eq!(repository.resolve(v1()).await.unwrap().digest, image.digest);
        assert_eq!(
            repository
                .blob_range(&image.layers[0], 5, 10)
                .await
                .unwrap(),
            noise(1, 100_000)[5..15]
        );
    });
}

#[test]
fn an_unknown_certificate_and_a_plain_registry_are_refused_at_once_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let here = dir.path().display().to_string();
    let name = "an_unknown_certificate_and_a_plain_registry_are_refused_at_once_with_the_way_out";
    if !in_child(name, &[("TEST_DIR", &here)], NAMESPACE) {
        return;
    }
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let (_registry, reference) = tls_registry(Path::new(&std::env::var("TEST_DIR").unwrap()));
        let error = repository(&reference, &options())
            .resolve(v1())
            .await
            .unwrap_err();
        assert!(
            matches!(&error, SourceError::Unreachable { attempts: 1, .. }),
            "{}",
            chain(&error)
        );
        assert!(chain(&error).contains("SSL_CERT_FILE"), "{}", chain(&error));

        let plain = RegistryServer::start_at(ADDRESS, "", |_| String::new());
        let error = repository(&plain.reference("a:v1"), &options())
            .resolve(v1())
            .await
            .unwrap_err();
        assert!(chain(&error).contains("--plain-http"), "{}", chain(&error));
        let allowed = SourceOptions {
            plain_http: true,
            ..options()
        };
        let image = push_fake_image(
            &repository(&plain.reference("a:v1"), &allowed),
            "v1",
            &[noise(1, 10)],
            "amd64",
        )
        .await;
        assert_eq!(
            repository(&plain.reference("a:v1"), &allowed)
                .resolve(v1())
                .await
                .unwrap()
                .digest,
            image.digest
        );
    });
}
