//! One conversion, pinned: layers made here, and every byte of what they become, as the golden vectors
//! of docs/format.md say. Whoever changes these numbers changes the form of every image, so it must be
//! a decision. Needs nothing.
#![allow(clippy::unwrap_used)] // Helpers outside of test functions.

#[path = "../../convergent/src/golden.rs"]
#[allow(dead_code, reason = "not every kind of vector is used here")]
mod golden;
#[path = "../src/tar/tests_support.rs"]
#[allow(dead_code, reason = "not every kind of entry is used here")]
mod raw;

use std::fs;
use std::path::Path;

use lazyimg_convergent::{Digest, DomainSecret, Salt, TenantKey};
use lazyimg_image::artifact;
use lazyimg_image::convert::{self, ConvertOptions, Form};
use lazyimg_image::limits::Limits;
use lazyimg_image::manifest::Entry;
use lazyimg_image::reference::ImageRef;
use lazyimg_image::source::{
    Descriptor, LayerDescriptor, Repository, ResolvedImage, SourceOptions,
};
use raw::{Raw, end};

/// The first bytes of BLAKE3's long output for a word: nothing that zstd could make shorter, so that
/// the chunks of the data space do not depend on its version.
fn noise(word: &str, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new()
        .update(word.as_bytes())
        .finalize_xof()
        .fill(&mut out);
    out
}

/// The two layers of the pinned image, uncompressed.
fn layers() -> [Vec<u8>; 2] {
    let file = |name: &str, body: &[u8]| Raw::new(name.as_bytes(), b'0').body(body);
    let mut base = Raw::new(b"d/", b'5').with(100, b"0000755\0").bytes();
    for n in 0..60 {
        let name = format!("d/s{n:02}");
        base.extend(file(&name, &noise(&name, 12_000)));
    }
    base.extend(file("gone", &noise("gone", 600_000)));
    let mut sparse = noise("sparse", 1_601_000);
    sparse[512 << 10..1 << 20].fill(0);
    base.extend(file("sparse", &sparse));
    base.extend(file("zeros", &[0; 100_000]));
    base.extend(end());
    let upper = [
        file(".wh.gone", b""),
        file("dup", &noise("d/s07", 12_000)),
        Raw::new(b"e/", b'5').with(100, b"0000755\0").bytes(),
        // So many that the metadata has two chunks.
        (0..600)
            .flat_map(|n| file(&format!("e/{n:03}"), b""))
            .collect(),
        file("new", &noise("new", 4000)),
        end(),
    ];
    [base, upper.concat()]
}

/// Writes the image as an OCI layout, tag `v1`.
fn layout(dir: &Path) {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let blob = |media_type: &str, bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        let size = bytes.len();
        format!(
            r#""mediaType":"application/vnd.oci.image.{media_type}","digest":"{digest}","size":{size}"#
        )
    };
    let [base, upper] = layers();
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{}","{}"]}}}}"#,
        Digest::of(&base),
        Digest::of(&upper)
    );
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{{}}},"layers":[{{{}}},{{{}}}]}}"#,
        blob("config.v1+json", config.as_bytes()),
        blob("layer.v1.tar", &base),
        blob("layer.v1.tar", &upper),
    );
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{{},"annotations":{{"org.opencontainers.image.ref.name":"v1"}}}}]}}"#,
        blob("manifest.v1+json", manifest.as_bytes())
    );
    fs::write(dir.join("index.json"), index).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

fn options() -> ConvertOptions {
    let secret = DomainSecret::from_bytes(golden::array("salt.secret"));
    ConvertOptions {
        salt: Salt::derive(&secret, "default", 1),
        domain: "default".into(),
        epoch: 1,
        level: 1,
        threads: 2,
        limits: Limits::default(),
        work_dir: std::env::temp_dir(),
    }
}

async fn convert(repo: &Repository, image: &ResolvedImage) -> Form {
    let runtime = tokio::runtime::Handle::current();
    let (repo, image) = (repo.clone(), image.clone());
    tokio::task::spawn_blocking(move || {
        let open = |l: &LayerDescriptor| {
            let stream = runtime.block_on(repo.blob_stream(&l.digest, l.size))?;
            Ok(stream.into_read(runtime.clone()))
        };
        let tenant = TenantKey::from_bytes(golden::array("seal.tenant-key"));
        convert::convert(&image, open, &tenant, &options(), &|_| {}).unwrap()
    })
    .await
    .unwrap()
}

fn shown(entries: &[Entry]) -> Vec<String> {
    let id = |e: &Entry| e.stored.map_or_else(|| "hole".into(), |s| s.id.hex());
    entries
        .iter()
        .map(|e| format!("{}:{}", e.blocks, id(e)))
        .collect()
}

/// All but the metadata's bytes (which docs/erofs.md has, and `fsck.erofs` reads elsewhere) was computed
/// with Python too, from docs/format.md alone: blake3 and hashlib, hmac and cryptography's AES-GCM. The
/// payloads of the metadata's chunks were only decompressed there.
#[tokio::test(flavor = "multi_thread")]
async fn this_image_has_these_bytes_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    layout(dir.path());
    let reference: ImageRef = format!("oci:{}:v1", dir.path().display()).parse().unwrap();
    let repo = Repository::open(&reference, &SourceOptions::default()).unwrap();
    let image = repo.resolve(reference.target()).await.unwrap();
    assert_eq!(image.digest.hex(), golden::text("form.image"));

    let form = convert(&repo, &image).await;
    assert_eq!(shown(&form.manifest.data), golden::words("form.data"));
    assert_eq!(
        Digest::of(&form.metadata).hex(),
        golden::text("form.metadata")
    );
    assert_eq!(shown(&form.manifest.meta), golden::words("form.meta"));
    let packs = form.manifest.packs.iter();
    let packs: Vec<_> = packs
        .map(|p| format!("{}:{}", p.len, p.digest.hex()))
        .collect();
    assert_eq!(packs, golden::words("form.packs"));
    assert_eq!(form.manifest.root().hex(), golden::text("form.root"));
    let manifest = Digest::of(&form.manifest.to_bytes());
    assert_eq!(manifest.hex(), golden::text("form.manifest"));

    let subject = Descriptor::new(&image.media_type, image.digest, image.manifest_size);
    let pushed = artifact::push(&repo, &form, subject, Some("v1"), &|_| {}).await;
    let artifact = pushed.unwrap().artifact;
    let json = fs::read_to_string(dir.path().join("blobs/sha256").join(artifact.hex())).unwrap();
    assert_eq!(json, golden::text("form.artifact"));
}
