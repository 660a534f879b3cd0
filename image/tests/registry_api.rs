//! The API of a registry, against a real docker-registry.

#![allow(clippy::unwrap_used)] // Helpers outside of test functions.

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::proxy::{Action, Proxy};
use common::*;
use futures_util::{StreamExt as _, TryStreamExt as _};
use lazyimg_convergent::Digest;
use lazyimg_image::reference::ManifestRef;
use lazyimg_image::source::{SourceError, SourceOptions, referrers_tag};
use serde_json::json;

fn tag(tag: &str) -> ManifestRef {
    ManifestRef::Tag(tag.into())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_comes_back_whole_in_part_and_as_a_stream() {
    let registry = RegistryServer::start();
    let repository = repository(&registry.reference("a/b/c:v1"), &options());
    let blob = noise(1, 3_000_001);
    let digest = Digest::of(&blob);
    assert!(!repository.blob_exists(&digest).await.unwrap());
    repository
        .push_blob_bytes(&digest, blob.clone())
        .await
        .unwrap();
    assert!(repository.blob_exists(&digest).await.unwrap());
    assert_eq!(repository.blob(&digest, 4_000_000).await.unwrap(), blob);
    for (offset, len) in [
        (0, 1),
        (0, 3_000_001),
        (2_999_999, 2),
        (1_000_000, 500_000),
        (17, 0),
    ] {
        let range = repository.blob_range(&digest, offset, len).await.unwrap();
        assert_eq!(
            range,
            blob[offset as usize..(offset + len) as usize],
            "{offset}+{len}"
        );
    }
    let streamed: Vec<Bytes> = repository
        .blob_stream(&digest, 3_000_001)
        .await
        .unwrap()
        .try_collect()
        .await
        .unwrap();
    assert_eq!(streamed.concat(), blob);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_beyond_the_end_is_an_error_and_not_fewer_bytes() {
    let registry = RegistryServer::start();
    let repository = repository(&registry.reference("a:v1"), &options());
    let blob = noise(2, 1000);
    let digest = Digest::of(&blob);
    repository.push_blob_bytes(&digest, blob).await.unwrap();
    for (offset, len) in [(990, 11), (1000, 1), (5000, 10)] {
        assert!(
            repository.blob_range(&digest, offset, len).await.is_err(),
            "{offset}+{len}"
        );
    }
    let error = repository
        .blob_range(&digest, 0, 65 << 20)
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::TooLarge { .. }), "{error}");
    assert!(matches!(
        repository.blob(&digest, 999).await.unwrap_err(),
        SourceError::TooLarge { .. }
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_arrives_as_a_stream_and_its_length_is_held() {
    let registry = RegistryServer::start();
    let repository = repository(&registry.reference("a:v1"), &options());
    let blob = noise(3, 10_000_000);
    let digest = Digest::of(&blob);
    let pieces = |blob: &Bytes| {
        let pieces: Vec<_> = blob
            .chunks(65_536)
            .map(|c| Ok(Bytes::copy_from_slice(c)))
            .collect();
        futures_util::stream::iter(pieces)
    };
    let short = repository
        .push_blob(&digest, blob.len() as u64 + 1, pieces(&blob))
        .await
        .unwrap_err();
    assert!(
        matches!(&short, SourceError::Upload { .. }),
        "{}",
        chain(&short)
    );
    let long = repository
        .push_blob(&digest, blob.len() as u64 - 1, pieces(&blob))
        .await
        .unwrap_err();
    assert!(
        matches!(&long, SourceError::Upload { .. }),
        "{}",
        chain(&long)
    );
    let broken =
        pieces(&blob)
            .take(3)
            .chain(futures_util::stream::iter([Err(std::io::Error::other(
                "disk on fire",
            ))]));
    let broken = repository
        .push_blob(&digest, blob.len() as u64, broken)
        .await
        .unwrap_err();
    assert!(
        chain(&broken).contains("disk on fire"),
        "{}",
        chain(&broken)
    );
    assert!(!repository.blob_exists(&digest).await.unwrap());

    repository
        .push_blob(&digest, blob.len() as u64, pieces(&blob))
        .await
        .unwrap();
    assert_eq!(repository.blob(&digest, 20_000_000).await.unwrap(), blob);
    let other = Digest::of(b"something else");
    assert!(
        repository
            .push_blob(&other, blob.len() as u64, pieces(&blob))
            .await
            .is_err()
    );
    let size = repository
        .blob_stream(&digest, 5)
        .await
        .err()
        .expect("a wrong length is seen at once");
    assert!(
        matches!(
            size,
            SourceError::SizeMismatch {
                expected: 5,
                actual: 10_000_000,
                ..
            }
        ),
        "{size}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn manifests_come_by_tag_and_digest_with_their_media_type() {
    let registry = RegistryServer::start();
    let repository = repository(&registry.reference("a:v1"), &options());
    let image = push_fake_image(&repository, "v1", &[noise(4, 1000)], "amd64").await;
    for reference in [tag("v1"), ManifestRef::Digest(image.digest)] {
        let manifest = repository.manifest(&reference, 1 << 20).await.unwrap();
        assert_eq!(
            (manifest.bytes, manifest.digest),
            (image.manifest.clone(), image.digest)
        );
        assert_eq!(manifest.media_type, OCI_MANIFEST);
    }
    let missing = repository.manifest(tag("v2"), 1 << 20).await.unwrap_err();
    assert!(
        missing.is_not_found() && missing.to_string().contains("manifest v2"),
        "{missing}"
    );
    assert!(matches!(
        repository.manifest(tag("v1"), 10).await.unwrap_err(),
        SourceError::TooLarge { .. }
    ));
    let wrong = repository
        .push_manifest(Digest::of(b"x"), OCI_MANIFEST, image.manifest.clone())
        .await
        .unwrap_err();
    assert!(
        matches!(wrong, SourceError::DigestMismatch { .. }),
        "{wrong}"
    );
    let orphan = String::from_utf8(image.manifest.to_vec())
        .unwrap()
        .replace(&image.layers[0].hex(), &"0".repeat(64));
    let refused = repository
        .push_manifest(tag("bad"), OCI_MANIFEST, orphan.into())
        .await
        .unwrap_err();
    assert!(
        refused.to_string().contains("MANIFEST_BLOB_UNKNOWN"),
        "{}",
        chain(&refused)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_resolves_with_configuration_layers_and_diff_ids() {
    let registry = RegistryServer::start();
    let repository = repository(&registry.reference("a:v1"), &options());
    let image = push_fake_image(
        &repository,
        "v1",
        &[noise(5, 1000), noise(6, 2000)],
        "amd64",
    )
    .await;
    let resolved = repository.resolve(tag("v1")).await.unwrap();
    assert_eq!(
        (
            resolved.digest,
            resolved.config_digest,
            resolved.index_digest
        ),
        (image.digest, image.config, None)
    );
    assert_eq!(resolved.manifest_size, image.manifest.len() as u64);
    let layers: Vec<_> = resolved
        .layers
        .iter()
        .map(|l| (l.digest, l.diff_id, l.size))
        .collect();
    assert_eq!(
        layers,
        [
            (image.layers[0], image.layers[0], 1000),
            (image.layers[1], image.layers[1], 2000)
        ]
    );
    assert_eq!(resolved.config["config"]["Cmd"][0], "/x");
    let arm = SourceOptions {
        platform: Some("linux/arm64".parse().unwrap()),
        ..options()
    };
    let error = common::repository(&registry.reference("a"), &arm)
        .resolve(tag("v1"))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, SourceError::NoPlatform { available, .. } if available == "linux/amd64"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_is_followed_to_the_platform_that_is_asked_for() {
    let registry = RegistryServer::start();
    let repository = repository(&registry.reference("a:v1"), &options());
    let mut entries = Vec::new();
    let mut images = Vec::new();
    for (i, (architecture, variant)) in
        [("arm", "v6"), ("arm", "v7"), ("amd64", ""), ("riscv64", "")]
            .into_iter()
            .enumerate()
    {
        let image = push_fake_image(
            &repository,
            &format!("t{i}"),
            &[noise(10 + i as u64, 100)],
            architecture,
        )
        .await;
        let mut platform = json!({"os": "linux", "architecture": architecture});
        if !variant.is_empty() {
            platform["variant"] = variant.into();
        }
        entries.push(json!({"mediaType": OCI_MANIFEST, "digest": image.digest, "size": image.manifest.len(), "platform": platform}));
        images.push(image);
    }
    // An attestation as buildx adds it.
    entries.push(
        json!({"mediaType": OCI_MANIFEST, "digest": images[0].digest, "size": 1,
        "platform": {"os": "unknown", "architecture": "unknown"}}),
    );
    for (name, media_type) in [("oci", OCI_INDEX), ("docker", DOCKER_LIST)] {
        let index = Bytes::from(
            json!({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}).to_string(),
        );
        repository
            .push_manifest(tag(name), media_type, index.clone())
            .await
            .unwrap();
        for (platform, expected) in [
            ("linux/arm/v7", 1),
            ("linux/arm/v6", 0),
            ("linux/arm/v8", 1),
            ("linux/riscv64", 3),
        ] {
            let options = SourceOptions {
                platform: Some(platform.parse().unwrap()),
                ..options()
            };
            let repository = common::repository(&registry.reference("a"), &options);
            let resolved = repository.resolve_digest(tag(name)).await.unwrap();
            assert_eq!(resolved.digest, images[expected].digest, "{platform}");
            assert_eq!(resolved.index_digest, Some(Digest::of(&index)));
        }
        let s390x = SourceOptions {
            platform: Some("linux/s390x".parse().unwrap()),
            ..options()
        };
        let error = common::repository(&registry.reference("a"), &s390x)
            .resolve(tag(name))
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("linux/arm/v7")
                && error.contains("--platform")
                && !error.contains("unknown"),
            "{error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_pushed_by_skopeo_resolves_in_oci_and_docker_form() {
    let registry = RegistryServer::start();
    let dir = tempfile::tempdir().unwrap();
    let layout = umoci_layout(dir.path());
    let source = format!("oci:{}:v1", layout.display());
    for format in ["oci", "v2s2"] {
        let target = format!("docker://{}", registry.reference(&format!("x/{format}:v1")));
        run(
            "skopeo",
            &[
                "copy",
                "-q",
                "--format",
                format,
                "--dest-tls-verify=false",
                &source,
                &target,
            ],
        );
        let repository = repository(&target, &options());
        let image = repository.resolve(tag("v1")).await.unwrap();
        assert_eq!(image.layers.len(), 1);
        let layer = &image.layers[0];
        let packed = repository.blob(&layer.digest, layer.size).await.unwrap();
        let mut tar = Vec::new();
        std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&packed[..]), &mut tar)
            .unwrap();
        assert_eq!(Digest::of(&tar), layer.diff_id);
        assert_eq!(
            image.media_type,
            if format == "oci" {
                OCI_MANIFEST
            } else {
                DOCKER_MANIFEST
            }
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_is_taken_over_from_another_repository() {
    let registry = RegistryServer::start();
    let from = repository(&registry.reference("from:v1"), &options());
    let to = repository(&registry.reference("to:v1"), &options());
    let blob = noise(7, 5000);
    let digest = Digest::of(&blob);
    assert!(!to.mount_blob(&digest, "from").await.unwrap());
    from.push_blob_bytes(&digest, blob).await.unwrap();
    assert!(!to.blob_exists(&digest).await.unwrap());
    assert!(to.mount_blob(&digest, "from").await.unwrap());
    assert!(to.blob_exists(&digest).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_are_listed_over_several_pages_and_up_to_a_limit() {
    let registry = RegistryServer::start();
    let repository = repository(&registry.reference("a:v1"), &options());
    assert!(repository.tags(10).await.unwrap_err().is_not_found());
    let image = push_fake_image(&repository, "t0", &[noise(8, 10)], "amd64").await;
    for i in 1..7 {
        repository
            .push_manifest(tag(&format!("t{i}")), OCI_MANIFEST, image.manifest.clone())
            .await
            .unwrap();
    }
    // docker-registry 2.8.2 has no order of its own.
    let mut tags = repository.tags(100).await.unwrap();
    tags.sort();
    assert_eq!(tags, ["t0", "t1", "t2", "t3", "t4", "t5", "t6"]);
    assert_eq!(repository.tags(3).await.unwrap().len(), 3);
    // docker-registry 2.8.2 ignores the count; one that does not is played.
    let pages = Proxy::start("127.0.0.1:1", |seen| {
        match seen.target.split_once("last=") {
            None => Action::Answer(
                200,
                vec!["Link: </v2/a/tags/list?last=b&n=2>; rel=\"next\"".into()],
                br#"{"tags":["a","b"]}"#.to_vec(),
            ),
            Some(_) => Action::Answer(200, vec![], br#"{"tags":["c"]}"#.to_vec()),
        }
    })
    .await;
    let paged = common::repository(&format!("{}/a", pages.address), &options());
    assert_eq!(paged.tags(100).await.unwrap(), ["a", "b", "c"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn referrers_are_kept_under_the_fallback_tag_where_there_is_no_api() {
    let registry = RegistryServer::start();
    let proxy = Proxy::start(&registry.address, |_| {
        Action::Delay(std::time::Duration::from_millis(30))
    })
    .await;
    let repository = repository(&format!("{}/a:v1", proxy.address), &options());
    let image = push_fake_image(&repository, "v1", &[noise(9, 10)], "amd64").await;
    assert_eq!(repository.referrers(&image.digest, "").await.unwrap(), []);
    let one = push_artifact(&repository, &image.digest, "a/one", "1").await;
    let two = push_artifact(&repository, &image.digest, "a/two", "2").await;
    repository.add_referrer(&image.digest, &one).await.unwrap();
    repository.add_referrer(&image.digest, &two).await.unwrap();
    repository.add_referrer(&image.digest, &two).await.unwrap();
    assert_eq!(
        repository.referrers(&image.digest, "a/one").await.unwrap(),
        std::slice::from_ref(&one)
    );
    assert_eq!(
        repository.referrers(&image.digest, "").await.unwrap(),
        [one.clone(), two]
    );
    assert!(
        repository
            .tags(10)
            .await
            .unwrap()
            .contains(&referrers_tag(&image.digest))
    );

    // A fresh process asks for both at once, later ones only for the tag.
    proxy.forget();
    let fresh = common::repository(&format!("{}/a:v1", proxy.address), &options());
    assert_eq!(
        fresh.referrers(&image.digest, "a/one").await.unwrap(),
        std::slice::from_ref(&one)
    );
    let mut both: Vec<_> = proxy
        .seen()
        .iter()
        .map(|s| (s.connection, s.target.contains("/referrers/")))
        .collect();
    both.dedup_by_key(|(connection, _)| *connection);
    assert_eq!(both.len(), 2, "two connections: {:?}", proxy.log());
    proxy.forget();
    assert_eq!(
        fresh.referrers(&image.digest, "a/one").await.unwrap(),
        [one]
    );
    assert_eq!(
        proxy.log(),
        [format!(
            "GET /v2/a/manifests/{}",
            referrers_tag(&image.digest)
        )]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_writers_of_one_fallback_tag_all_stay() {
    let registry = RegistryServer::start();
    let reference = registry.reference("a:v1");
    let first = repository(&reference, &options());
    let image = push_fake_image(&first, "v1", &[noise(9, 10)], "amd64").await;
    // One after the other: docker-registry's file storage loses a blob that several push at once.
    let mut descriptors = Vec::new();
    for i in 0..6 {
        descriptors.push(push_artifact(&first, &image.digest, "a/t", &i.to_string()).await);
    }
    let tasks = descriptors.into_iter().map(|descriptor| {
        // Each its own: no lock of the process helps.
        let repository = repository(&reference, &options());
        tokio::spawn(async move {
            repository
                .add_referrer(&image.digest, &descriptor)
                .await
                .unwrap();
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    let mut notes: Vec<_> = first
        .referrers(&image.digest, "a/t")
        .await
        .unwrap()
        .iter()
        .map(|d| d.annotations["note"].clone())
        .collect();
    notes.sort();
    assert_eq!(notes, ["0", "1", "2", "3", "4", "5"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_the_referrers_api_is_believed() {
    let registry = RegistryServer::start();
    let entry = json!({"mediaType": OCI_MANIFEST, "digest": Digest::of(b"r"), "size": 5, "artifactType": "a/t"});
    let other = json!({"mediaType": OCI_MANIFEST, "digest": Digest::of(b"o"), "size": 5, "artifactType": "a/other"});
    let list = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry, other]})
        .to_string();
    let proxy = Proxy::start(&registry.address, move |seen| {
        if seen.target.contains("/referrers/") {
            Action::Answer(
                200,
                vec![format!("Content-Type: {OCI_INDEX}")],
                list.clone().into_bytes(),
            )
        } else {
            Action::Forward
        }
    })
    .await;
    let repository = repository(&format!("{}/a:v1", proxy.address), &options());
    let image = push_fake_image(&repository, "v1", &[noise(9, 10)], "amd64").await;
    let found = repository.referrers(&image.digest, "a/t").await.unwrap();
    assert_eq!(
        found.iter().map(|d| d.digest).collect::<Vec<_>>(),
        [Digest::of(b"r")]
    );
    let one = push_artifact(&repository, &image.digest, "a/one", "1").await;
    proxy.forget();
    repository.add_referrer(&image.digest, &one).await.unwrap();
    assert_eq!(proxy.log(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_pings_nothing_and_its_ranges_share_a_few_connections() {
    let registry = RegistryServer::start();
    let direct = repository(&registry.reference("a:v1"), &options());
    let image = push_fake_image(&direct, "v1", &[noise(9, 4_000_000)], "amd64").await;
    let artifact = push_artifact(&direct, &image.digest, "a/t", "x").await;
    direct.add_referrer(&image.digest, &artifact).await.unwrap();

    let proxy = Proxy::start(&registry.address, |_| Action::Forward).await;
    let repository = Arc::new(repository(&format!("{}/a:v1", proxy.address), &options()));
    let resolved = repository.resolve_digest(tag("v1")).await.unwrap();
    let referrers = repository.referrers(&resolved.digest, "a/t").await.unwrap();
    repository
        .manifest(referrers[0].digest, 1 << 20)
        .await
        .unwrap();
    assert_eq!(proxy.log()[0], "GET /v2/a/manifests/v1");
    assert_eq!(proxy.log().len(), 4, "{:?}", proxy.log());
    for round in 0..4 {
        let ranges = (0..8).map(|i| {
            let (repository, layer) = (repository.clone(), image.layers[0]);
            tokio::spawn(async move {
                repository
                    .blob_range(&layer, (round * 8 + i) * 100_000, 100_000)
                    .await
                    .unwrap()
            })
        });
        for range in ranges.collect::<Vec<_>>() {
            assert_eq!(range.await.unwrap().len(), 100_000);
        }
    }
    assert!(
        (2..=9).contains(&proxy.connections()),
        "{} connections for 36 requests",
        proxy.connections()
    );
}
