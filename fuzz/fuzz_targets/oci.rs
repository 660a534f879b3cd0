//! OCI documents from a stranger: `index.json` of a layout, indexes, manifests, configurations.
//!
//! The first byte says which of them the input is; the others are small and right, and digests fit, so that
//! the fuzzer gets to each parser.
#![no_main]

use std::fs;
use std::path::Path;

use lazyimg_convergent::Digest;
use lazyimg_image::reference::ImageRef;
use lazyimg_image::source::{Repository, SourceOptions};
use libfuzzer_sys::fuzz_target;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// Stores a blob and describes it.
fn blob(layout: &Path, media_type: &str, bytes: &[u8]) -> String {
    let digest = Digest::of(bytes);
    fs::write(layout.join("blobs/sha256").join(digest.hex()), bytes).expect("a file in memory");
    format!(
        r#"{{"mediaType":"{media_type}","digest":"{digest}","size":{}}}"#,
        bytes.len()
    )
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, input)) = data.split_first() else {
        return;
    };
    let base = if Path::new("/dev/shm").is_dir() {
        "/dev/shm"
    } else {
        "/tmp"
    };
    let dir = tempfile::Builder::new()
        .prefix("lazyimg-fuzz-")
        .tempdir_in(base)
        .expect("a directory");
    let layout = dir.path();
    fs::create_dir_all(layout.join("blobs/sha256")).expect("a directory");
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .expect("a file");
    let config = |bytes: &[u8]| {
        let (config, layer) = (blob(layout, CONFIG, bytes), blob(layout, LAYER, b""));
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{config},"layers":[{layer}]}}"#
        )
    };
    let good = format!(
        r#"{{"os":"linux","architecture":"amd64","rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
        Digest::of(b"")
    );
    let index = match kind % 4 {
        0 => input.to_vec(),
        other => {
            let descriptor = match other {
                1 => blob(layout, INDEX, input),
                2 => blob(layout, MANIFEST, input),
                _ => blob(layout, MANIFEST, config(input).as_bytes()),
            };
            format!(r#"{{"schemaVersion":2,"manifests":[{descriptor}]}}"#).into_bytes()
        }
    };
    // What an index of the fuzzer may point to.
    blob(layout, MANIFEST, config(good.as_bytes()).as_bytes());
    fs::write(layout.join("index.json"), index).expect("a file");

    let reference: ImageRef = format!("oci:{}", layout.display())
        .parse()
        .expect("a layout");
    let repository =
        Repository::open(&reference, &SourceOptions::default()).expect("no TLS needed");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let subject = Digest::of(b"subject");
        if let Ok(image) = repository.resolve(reference.target()).await {
            let _ = repository
                .referrers(&image.digest, "application/vnd.lazyimg")
                .await;
        }
        let _ = repository
            .referrers(&subject, "application/vnd.lazyimg")
            .await;
        let _ = repository.tags(100).await;
    });
});
