//! OCI image layouts, read and written together with umoci and skopeo.

#![allow(clippy::unwrap_used)] // Helpers outside of test functions.

mod common;

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use common::*;
use futures_util::TryStreamExt as _;
use lazyimg_convergent::Digest;
use lazyimg_image::reference::{ImageRef, ManifestRef};
use lazyimg_image::source::{Repository, SourceError, SourceOptions};
use serde_json::{Value, json};

fn tag(tag: &str) -> ManifestRef {
    ManifestRef::Tag(tag.into())
}

fn open(dir: &Path) -> Repository {
    repository(&format!("oci:{}", dir.display()), &options())
}

fn index(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("index.json")).unwrap()).unwrap()
}

fn files(dir: &Path) -> usize {
    std::fs::read_dir(dir.join("blobs/sha256")).unwrap().count()
}

#[tokio::test]
async fn an_image_made_by_umoci_resolves_by_tag_digest_and_alone() {
    let dir = tempfile::tempdir().unwrap();
    let layout = umoci_layout(dir.path());
    let repository = open(&layout);
    let image = repository.resolve(tag("v1")).await.unwrap();
    assert_eq!(image.layers.len(), 1);
    for reference in [ManifestRef::Sole, image.digest.into()] {
        assert_eq!(
            repository.resolve(reference).await.unwrap().digest,
            image.digest
        );
    }
    let reference: ImageRef = format!("oci:{}:v1", layout.display()).parse().unwrap();
    assert_eq!(reference.target(), tag("v1"));
    assert_eq!(repository.tags(10).await.unwrap(), ["v1"]);
    let missing = repository.resolve(tag("v2")).await.unwrap_err();
    assert!(missing.is_not_found(), "{missing}");
}

#[tokio::test]
async fn blobs_are_read_whole_in_part_and_as_a_stream() {
    let dir = tempfile::tempdir().unwrap();
    let repository = open(dir.path());
    let blob = noise(1, 2_000_001);
    let digest = Digest::of(&blob);
    assert!(!repository.blob_exists(&digest).await.unwrap());
    repository
        .push_blob_bytes(&digest, blob.clone())
        .await
        .unwrap();
    assert!(repository.blob_exists(&digest).await.unwrap());
    assert_eq!(repository.blob(&digest, 3_000_000).await.unwrap(), blob);
    assert_eq!(
        repository.blob_range(&digest, 1_999_991, 10).await.unwrap(),
        blob[1_999_991..]
    );
    let pieces: Vec<Bytes> = repository
        .blob_stream(&digest, 2_000_001)
        .await
        .unwrap()
        .try_collect()
        .await
        .unwrap();
    assert_eq!(pieces.concat(), blob);
    assert!(matches!(
        repository.blob_range(&digest, 1_999_991, 11).await,
        Err(SourceError::Malformed { .. })
    ));
    assert!(matches!(
        repository.blob(&digest, 1000).await,
        Err(SourceError::TooLarge { .. })
    ));
    assert!(matches!(
        repository.blob_stream(&digest, 7).await.err(),
        Some(SourceError::SizeMismatch { .. })
    ));
    assert!(
        repository
            .blob(&Digest::of(b"none"), 10)
            .await
            .unwrap_err()
            .is_not_found()
    );
}

#[tokio::test]
async fn a_flipped_bit_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let layout = umoci_layout(dir.path());
    let repository = open(&layout);
    let image = repository.resolve(tag("v1")).await.unwrap();
    for digest in [image.digest, image.config_digest] {
        let path = layout.join("blobs/sha256").join(digest.hex());
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        bad[20] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        let error = repository.resolve(tag("v1")).await.unwrap_err();
        assert!(
            matches!(error, SourceError::DigestMismatch { .. }),
            "{error}"
        );
        std::fs::write(&path, &good).unwrap();
    }
    repository.resolve(tag("v1")).await.unwrap();
}

#[tokio::test]
async fn what_we_write_skopeo_and_umoci_read() {
    let dir = tempfile::tempdir().unwrap();
    let source = umoci_layout(dir.path());
    let (from, to) = (open(&source), dir.path().join("copy"));
    let image = from.resolve(tag("v1")).await.unwrap();
    let copy = open(&to);
    for (digest, size) in [
        (image.layers[0].digest, image.layers[0].size),
        (image.config_digest, image.config_bytes.len() as u64),
    ] {
        let body = from
            .blob_stream(&digest, size)
            .await
            .unwrap()
            .map_err(std::io::Error::other);
        copy.push_blob(&digest, size, body).await.unwrap();
    }
    let manifest = from.manifest(tag("v1"), 1 << 20).await.unwrap();
    copy.push_manifest(tag("new"), &manifest.media_type, manifest.bytes)
        .await
        .unwrap();
    let text = run(
        "skopeo",
        &["inspect", "--raw", &format!("oci:{}:new", to.display())],
    );
    assert_eq!(Digest::of(text.as_bytes()), image.digest);
    let unpacked = dir.path().join("unpacked");
    run(
        "umoci",
        &[
            "unpack",
            "--rootless",
            "--image",
            &format!("{}:new", to.display()),
            unpacked.to_str().unwrap(),
        ],
    );
    assert_eq!(
        std::fs::read(unpacked.join("rootfs/srv/hello")).unwrap(),
        b"hello, world\n"
    );
}

#[tokio::test]
async fn a_blob_that_is_not_what_was_said_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let repository = open(dir.path());
    let good = noise(1, 1000);
    repository
        .push_blob_bytes(&Digest::of(&good), good.clone())
        .await
        .unwrap();
    let body = |bytes: &Bytes| futures_util::stream::iter([Ok(bytes.clone())]);
    let other = Digest::of(b"other");
    assert!(matches!(
        repository.push_blob_bytes(&other, good.clone()).await,
        Err(SourceError::DigestMismatch { .. })
    ));
    assert!(matches!(
        repository.push_blob(&other, 1000, body(&good)).await,
        Err(SourceError::DigestMismatch { .. })
    ));
    assert!(matches!(
        repository.push_blob(&other, 999, body(&good)).await,
        Err(SourceError::Upload { .. })
    ));
    assert!(matches!(
        repository.push_blob(&other, 1001, body(&good)).await,
        Err(SourceError::Upload { .. })
    ));
    let broken =
        futures_util::stream::iter([Ok(good.clone()), Err(std::io::Error::other("broken"))]);
    assert!(matches!(
        repository.push_blob(&other, 2000, broken).await,
        Err(SourceError::Upload { .. })
    ));
    assert_eq!(files(dir.path()), 1);
    assert!(!repository.blob_exists(&other).await.unwrap());
}

#[tokio::test]
async fn referrers_are_found_by_their_subject_and_do_not_hide_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let layout = umoci_layout(dir.path());
    let repository = open(&layout);
    let image = repository.resolve(ManifestRef::Sole).await.unwrap();
    assert_eq!(repository.referrers(&image.digest, "").await.unwrap(), []);
    let one = push_artifact(&repository, &image.digest, "a/one", "1").await;
    let two = push_artifact(&repository, &image.digest, "a/two", "2").await;
    repository.add_referrer(&image.digest, &two).await.unwrap();
    let digests = |found: Vec<lazyimg_image::source::Descriptor>| {
        found.iter().map(|d| d.digest).collect::<Vec<_>>()
    };
    assert_eq!(
        digests(repository.referrers(&image.digest, "").await.unwrap()),
        [one.digest, two.digest]
    );
    assert_eq!(
        digests(repository.referrers(&image.digest, "a/two").await.unwrap()),
        [two.digest]
    );
    assert_eq!(repository.referrers(&one.digest, "").await.unwrap(), []);
    assert_eq!(
        repository.resolve(ManifestRef::Sole).await.unwrap().digest,
        image.digest
    );
    assert_eq!(repository.tags(10).await.unwrap(), ["v1"]);
}

#[tokio::test]
async fn what_other_tools_wrote_into_the_index_stays() {
    let dir = tempfile::tempdir().unwrap();
    let layout = umoci_layout(dir.path());
    let mut foreign = index(&layout);
    foreign["x-tool"] = json!({"kept": true});
    foreign["manifests"][0]["x-field"] = json!([1]);
    std::fs::write(layout.join("index.json"), foreign.to_string()).unwrap();
    let repository = open(&layout);
    let manifest = repository.manifest(tag("v1"), 1 << 20).await.unwrap();
    repository
        .push_manifest(tag("v2"), &manifest.media_type, manifest.bytes)
        .await
        .unwrap();
    let now = index(&layout);
    assert_eq!(
        (&now["x-tool"]["kept"], &now["manifests"][0]["x-field"][0]),
        (&json!(true), &json!(1))
    );
    assert_eq!(repository.tags(10).await.unwrap(), ["v1", "v2"]);
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(layout.join("index.json"))
                .unwrap()
                .permissions()
        ) & 0o777,
        0o644
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_writers_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Arc::new(umoci_layout(dir.path()));
    let manifest = open(&layout).manifest(tag("v1"), 1 << 20).await.unwrap();
    let writers = (0..12).map(|i| {
        let (layout, manifest) = (layout.clone(), manifest.clone());
        tokio::spawn(async move {
            let reference = tag(&format!("t{i}"));
            open(&layout)
                .push_manifest(reference, &manifest.media_type, manifest.bytes)
                .await
                .unwrap();
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    assert_eq!(open(&layout).tags(100).await.unwrap().len(), 13);
}

#[tokio::test]
async fn nested_indexes_are_followed_and_loops_end() {
    let dir = tempfile::tempdir().unwrap();
    let layout = umoci_layout(dir.path());
    let repository = open(&layout);
    let image = repository.manifest(tag("v1"), 1 << 20).await.unwrap();
    let platform = json!({"os": "linux", "architecture": lazyimg_image::platform::Platform::host().architecture});
    let mut entry = json!({"mediaType": image.media_type, "digest": image.digest, "size": image.bytes.len(), "platform": platform});
    for depth in 1..8 {
        let index = Bytes::from(
            json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}).to_string(),
        );
        entry = json!({"mediaType": OCI_INDEX, "digest": Digest::of(&index), "size": index.len(), "platform": platform});
        let pushed = repository
            .push_manifest(tag(&format!("depth{depth}")), OCI_INDEX, index)
            .await
            .unwrap();
        let resolved = repository.resolve(tag(&format!("depth{depth}"))).await;
        if depth <= 5 {
            let resolved = resolved.unwrap();
            assert_eq!(
                (resolved.digest, resolved.index_digest),
                (image.digest, Some(pushed.digest))
            );
        } else {
            assert!(resolved.unwrap_err().to_string().contains("nest deeper"));
        }
    }
}

#[tokio::test]
async fn an_untagged_layout_of_several_platforms_is_one_image() {
    let dir = tempfile::tempdir().unwrap();
    let layout = umoci_layout(dir.path());
    let mut both = index(&layout);
    let mut entry = both["manifests"][0].clone();
    entry["annotations"] = json!({});
    entry["platform"] = json!({"os": "linux", "architecture": lazyimg_image::platform::Platform::host().architecture});
    let mut other = entry.clone();
    other["platform"]["architecture"] = "s390x".into();
    other["digest"] = json!(Digest::of(b"other"));
    both["manifests"] = json!([other, entry]);
    std::fs::write(layout.join("index.json"), both.to_string()).unwrap();
    let resolved = open(&layout).resolve(ManifestRef::Sole).await.unwrap();
    assert_eq!(json!(resolved.digest), entry["digest"]);
    let arm = SourceOptions {
        platform: Some("linux/arm64".parse().unwrap()),
        ..options()
    };
    let error = repository(&format!("oci:{}", layout.display()), &arm)
        .resolve(ManifestRef::Sole)
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::NoPlatform { .. }), "{error}");
}

#[tokio::test]
async fn what_is_no_layout_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for path in [
        dir.path().to_owned(),
        dir.path().join("missing"),
        "/dev/null".into(),
    ] {
        let error = open(&path)
            .resolve(ManifestRef::Sole)
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("is it an OCI layout?") && error.contains(path.to_str().unwrap()),
            "{error}"
        );
    }
    std::fs::write(dir.path().join("index.json"), "[]").unwrap();
    assert!(matches!(
        open(dir.path()).resolve(ManifestRef::Sole).await,
        Err(SourceError::Malformed { .. })
    ));
}

#[tokio::test]
async fn a_fifo_in_the_place_of_a_blob_hangs_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let repository = open(dir.path());
    repository
        .push_blob_bytes(&Digest::of(b"x"), "x".into())
        .await
        .unwrap();
    let digest = Digest::of(b"fifo");
    let fifo = dir.path().join("blobs/sha256").join(digest.hex());
    run("mkfifo", &[fifo.to_str().unwrap()]);
    let read = tokio::time::timeout(
        std::time::Duration::from_secs(5),
        repository.blob(&digest, 10),
    );
    assert!(matches!(
        read.await.expect("no hang"),
        Err(SourceError::Malformed { .. })
    ));
}
