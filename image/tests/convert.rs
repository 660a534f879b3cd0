//! Conversion of hand-made OCI layouts, read back without lazyimg's own reader: `fsck.erofs`
//! extracts what was written. Needs erofs-utils and umoci; root, for owners and devices.
#![allow(clippy::unwrap_used)] // Helpers outside of test functions.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::run;
use lazyimg_convergent::{DomainSecret, Salt, TenantKey, chunk};
use lazyimg_image::artifact::{self, ArtifactError};
use lazyimg_image::convert::{self, ConvertOptions, Form};
use lazyimg_image::limits::Limits;
use lazyimg_image::manifest::Manifest;
use lazyimg_image::reference::ImageRef;
use lazyimg_image::source::{Descriptor, Repository, ResolvedImage, SourceOptions};

fn tenant() -> TenantKey {
    TenantKey::from_bytes([1; 32])
}

fn options(threads: usize) -> ConvertOptions {
    ConvertOptions {
        salt: Salt::derive(&DomainSecret::from_bytes([2; 32]), "test", 1),
        domain: "test".into(),
        epoch: 1,
        level: 1,
        threads,
        limits: Limits::default(),
        work_dir: std::env::temp_dir(),
    }
}

/// An OCI layout with one image, `tag`, of the given directories as layers.
fn layout(dir: &Path, tag: &str, layers: &[&Path]) {
    let image = format!("{}:{tag}", dir.display());
    if !dir.exists() {
        run("umoci", &["init", "--layout", &dir.display().to_string()]);
    }
    run("umoci", &["new", "--image", &image]);
    for layer in layers {
        let (layer, image) = (layer.display().to_string(), image.as_str());
        run("umoci", &["insert", "--image", image, &layer, "/"]);
    }
}

async fn open(dir: &Path, tag: &str) -> (Repository, ResolvedImage) {
    let reference: ImageRef = format!("oci:{}:{tag}", dir.display()).parse().unwrap();
    let repo = Repository::open(&reference, &SourceOptions::default()).unwrap();
    let image = repo.resolve(reference.target()).await.unwrap();
    (repo, image)
}

async fn convert(repo: &Repository, image: &ResolvedImage, threads: usize) -> Form {
    let runtime = tokio::runtime::Handle::current();
    let (repo, image) = (repo.clone(), image.clone());
    tokio::task::spawn_blocking(move || {
        let layer = |l: &lazyimg_image::source::LayerDescriptor| {
            let stream = runtime.block_on(repo.blob_stream(&l.digest, l.size))?;
            Ok(stream.into_read(runtime.clone()))
        };
        convert::convert(&image, layer, &tenant(), &options(threads), &|_| {}).unwrap()
    })
    .await
    .unwrap()
}

async fn push(
    repo: &Repository,
    image: &ResolvedImage,
    form: &Form,
    tag: &str,
) -> artifact::Pushed {
    let subject = Descriptor::new(&image.media_type, image.digest, image.manifest_size);
    artifact::push(repo, form, subject, Some(tag), &|_| {})
        .await
        .unwrap()
}

/// The data space, decrypted chunk by chunk.
fn assemble(form: &Form, path: &Path) {
    let blob = fs::File::create(path).unwrap();
    blob.set_len(form.manifest.header.data_len).unwrap();
    let keys = &form.keys[form.manifest.meta.len()..];
    let (mut start, mut next) = (0, keys.iter());
    for entry in &form.manifest.data {
        let len = u64::from(entry.blocks) * 4096;
        if let Some(stored) = entry.stored {
            let (mut at, mut left) = (0, stored.offset);
            for (piece, len) in &form.pieces[stored.pack as usize].pieces {
                if left == 0 {
                    at = *piece;
                    break;
                }
                left -= u64::from(*len);
            }
            let mut cipher = vec![0; stored.len as usize];
            form.spool.read_exact_at(&mut cipher, at).unwrap();
            let plain = chunk::open(next.next().unwrap(), &cipher, len as usize).unwrap();
            blob.write_all_at(&plain, start).unwrap();
        }
        start += len;
    }
}

fn pseudo_random(seed: u8, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new()
        .update(&[seed])
        .finalize_xof()
        .fill(&mut out);
    out
}

/// A base with small files, large ones, holes and links; and a layer on top of it.
fn trees(dir: &Path) -> (std::path::PathBuf, std::path::PathBuf) {
    let (base, upper) = (dir.join("base"), dir.join("upper"));
    fs::create_dir_all(base.join("usr/lib")).unwrap();
    for n in 0..300u32 {
        fs::write(
            base.join(format!("usr/lib/f{n}")),
            pseudo_random(n as u8, 3000 + n as usize * 40),
        )
        .unwrap();
    }
    fs::write(base.join("large"), pseudo_random(255, 1_700_000)).unwrap();
    let sparse = fs::File::create(base.join("sparse")).unwrap();
    sparse.set_len(5_000_000).unwrap();
    sparse.write_all_at(b"island", 3_000_000).unwrap();
    fs::hard_link(base.join("large"), base.join("usr/large-too")).unwrap();
    std::os::unix::fs::symlink("lib/f1", base.join("usr/link")).unwrap();
    fs::create_dir_all(upper.join("opt")).unwrap();
    fs::write(upper.join("opt/small"), b"one small file").unwrap();
    (base, upper)
}

#[tokio::test(flavor = "multi_thread")]
async fn fsck_erofs_extracts_from_the_form_what_the_layers_say() {
    let dir = tempfile::tempdir().unwrap();
    let (base, upper) = trees(dir.path());
    let oci = dir.path().join("oci");
    layout(&oci, "v1", &[&base, &upper]);
    let (repo, image) = open(&oci, "v1").await;
    let form = convert(&repo, &image, 2).await;
    let (meta, data, out) = (
        dir.path().join("m"),
        dir.path().join("d"),
        dir.path().join("out"),
    );
    fs::write(&meta, &form.metadata).unwrap();
    assemble(&form, &data);
    run(
        "fsck.erofs",
        &[
            &format!("--device={}", data.display()),
            &format!("--extract={}", out.display()),
            &meta.display().to_string(),
        ],
    );
    fs::create_dir(base.join("opt")).unwrap();
    fs::copy(upper.join("opt/small"), base.join("opt/small")).unwrap();
    run(
        "diff",
        &[
            "-r",
            "--no-dereference",
            &base.display().to_string(),
            &out.display().to_string(),
        ],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn one_thread_or_many_the_same_bytes_come_out() {
    let dir = tempfile::tempdir().unwrap();
    let (base, upper) = trees(dir.path());
    let oci = dir.path().join("oci");
    layout(&oci, "v1", &[&base, &upper]);
    let (repo, image) = open(&oci, "v1").await;
    let one = convert(&repo, &image, 1).await.manifest.to_bytes();
    for threads in [2, 7] {
        assert_eq!(
            convert(&repo, &image, threads).await.manifest.to_bytes(),
            one
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_image_uploads_nothing_and_a_small_layer_little() {
    let dir = tempfile::tempdir().unwrap();
    let (base, upper) = trees(dir.path());
    let oci = dir.path().join("oci");
    layout(&oci, "v1", &[&base]);
    layout(&oci, "v2", &[&base, &upper]);
    let (repo, v1) = open(&oci, "v1").await;
    let first = convert(&repo, &v1, 2).await;
    let pushed = push(&repo, &v1, &first, "v1").await;
    assert!(pushed.uploaded_chunks > 5);
    let again = push(&repo, &v1, &convert(&repo, &v1, 2).await, "v1").await;
    assert_eq!((again.uploaded_chunks, again.uploaded_bytes), (0, 0));
    assert_eq!(again.artifact, pushed.artifact);

    let (_, v2) = open(&oci, "v2").await;
    let second = convert(&repo, &v2, 2).await;
    let pushed = push(&repo, &v2, &second, "v2").await;
    assert!(pushed.uploaded_bytes < 2 * 512 * 1024, "{pushed:?}");
    let data = |m: &Manifest| {
        m.data
            .iter()
            .filter_map(|e| e.stored)
            .map(|s| s.id)
            .collect::<BTreeSet<_>>()
    };
    assert!(data(&second.manifest).is_superset(&data(&first.manifest)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_artifact_opens_for_its_tenant_its_image_and_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let (base, upper) = trees(dir.path());
    let oci = dir.path().join("oci");
    layout(&oci, "v1", &[&base]);
    layout(&oci, "v2", &[&upper]);
    let (repo, v1) = open(&oci, "v1").await;
    let target = |tag: &str| lazyimg_image::reference::ManifestRef::Tag(tag.into());
    let missing = artifact::open(&repo, &target("v1"), &tenant())
        .await
        .unwrap_err();
    assert!(
        matches!(missing, ArtifactError::NotConverted { .. }),
        "{missing}"
    );

    let form = convert(&repo, &v1, 2).await;
    push(&repo, &v1, &form, "v1").await;
    let opened = artifact::open(&repo, &target("v1"), &tenant())
        .await
        .unwrap();
    assert_eq!(opened.manifest.root(), form.manifest.root());
    let other = TenantKey::from_bytes([9; 32]);
    let refused = artifact::open(&repo, &target("v1"), &other)
        .await
        .unwrap_err();
    assert!(
        matches!(refused, ArtifactError::OtherKey { .. }),
        "{refused}"
    );

    // Listed as the artifact of another image, by tag and by subject: the sealed root tells.
    let (_, v2) = open(&oci, "v2").await;
    push(&repo, &v2, &form, "v2").await;
    let foreign = artifact::open(&repo, &target("v2"), &tenant())
        .await
        .unwrap_err();
    assert!(
        matches!(foreign, ArtifactError::WrongImage { .. }),
        "{foreign}"
    );

    let rotated = artifact::reseal(&repo, &v1.digest, Some("v1"), &tenant(), &other).await;
    rotated.unwrap();
    let opened = artifact::open(&repo, &target("v1"), &other).await.unwrap();
    assert_eq!(opened.manifest.root(), form.manifest.root());
}
