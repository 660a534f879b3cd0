//! The same layers give the same bytes, on any machine; what is there is not uploaded again.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::BTreeSet;
use std::fs;

use lazyimg_tests::image::Compression;
use lazyimg_tests::{Layout, Lazyimg, Registry, WorkDir};
use serde_json::Value;

/// Two chunks' worth of data, at the design's target of 512 KiB.
const TWO_CHUNKS: u64 = 2 * (512 << 10);

fn number(value: &Value, pointer: &str) -> u64 {
    value
        .pointer(pointer)
        .and_then(Value::as_u64)
        .unwrap_or_else(|| panic!("no {pointer} in {value:#}"))
}

/// Digest and length of each pack.
fn packs_in_order(inspect: &Value) -> Vec<(String, u64)> {
    let packs = inspect["packs"].as_array().unwrap();
    packs
        .iter()
        .map(|p| {
            (
                p["digest"].as_str().unwrap().to_owned(),
                number(p, "/bytes"),
            )
        })
        .collect()
}

fn packs(inspect: &Value) -> BTreeSet<String> {
    let packs = packs_in_order(inspect).into_iter();
    packs.map(|(digest, _)| digest).collect()
}

#[test]
fn converting_twice_gives_the_same_digests_on_any_machine_on_any_number_of_threads() {
    let work = WorkDir::new("same-bytes");
    let layout = Layout::prepared("django");
    let mut results = Vec::new();
    let first = Lazyimg::new(work.join("home-1"));
    for (machine, threads) in [(1, "1"), (2, "2"), (3, "7")] {
        // Another registry, another home, another directory for working files: another machine.
        let registry = Registry::start(work.join(format!("registry-{machine}")));
        let reference = registry.push(&layout, "v1", "app:v1");
        let before = registry.blobs();
        let own;
        let lazyimg = if machine == 1 {
            &first
        } else {
            own = Lazyimg::new(work.join(format!("home-{machine}")));
            own.copy_secrets_from(&first);
            &own
        };
        let scratch = work.dir(format!("scratch-{machine}"));
        let report = lazyimg.json(&[
            "convert",
            &reference,
            "--threads",
            threads,
            "--work-dir",
            &scratch.to_string_lossy(),
        ]);
        assert_eq!(
            fs::read_dir(&scratch).unwrap().count(),
            0,
            "working files are left behind"
        );
        assert!(number(&report, "/uploaded_chunks") > 0, "{report:#}");
        let pushed: BTreeSet<String> = registry.blobs().difference(&before).cloned().collect();
        results.push((report["artifact"].clone(), report["root"].clone(), pushed));
    }
    assert_eq!(results[0], results[1], "one thread and two");
    assert_eq!(results[0], results[2], "one thread and seven");
}

#[test]
fn converting_an_unchanged_image_uploads_nothing() {
    let work = WorkDir::new("unchanged");
    let layout = Layout::prepared("base");
    let registry = Registry::start(work.join("registry"));
    let gzip = registry.push(&layout, "v1", "base:v1");
    let zstd = registry.push(&layout, "zstd", "base:zstd");
    let lazyimg = Lazyimg::new(work.join("home"));
    let first = lazyimg.convert(&gzip);
    assert!(number(&first, "/uploaded_chunks") > 0, "{first:#}");
    let before = registry.blobs();

    let again = lazyimg.convert(&gzip);
    assert_eq!(number(&again, "/uploaded_chunks"), 0, "{again:#}");
    assert_eq!(number(&again, "/uploaded_bytes"), 0, "{again:#}");
    assert_eq!(again["artifact"], first["artifact"]);
    assert_eq!(registry.blobs(), before, "new blobs");

    // The same tree in another compression is another image of the same chunks.
    let other = lazyimg.convert(&zstd);
    assert_eq!(number(&other, "/uploaded_chunks"), 0, "{other:#}");
    let chunks_of = |reference: &str| packs(&lazyimg.json(&["inspect", reference]));
    assert_eq!(chunks_of(&gzip), chunks_of(&zstd));
}

/// The image with one small file in a layer of its own on top.
fn with_small_file(work: &WorkDir, name: &str) -> Layout {
    let prepared = Layout::prepared(name);
    let layout = Layout::create(work.join(format!("{name}-and-more")));
    let mut layers = prepared.layers("v1");
    layout.borrow(&prepared, &layers);
    let dir = work.dir(format!("{name}-layer/srv"));
    fs::write(dir.join("hello.txt"), "one small file\n").unwrap();
    layers.push(layout.add_layer(dir.parent().unwrap(), Compression::Gzip));
    layout.add_image("v2", &layers);
    layout
}

/// What one small file on top of a prepared image uploads.
fn upload_of_a_small_file(name: &str) {
    let work = WorkDir::new("small-file");
    let registry = Registry::start(work.join("registry"));
    let lazyimg = Lazyimg::new(work.join("home"));
    let v1 = registry.push(&Layout::prepared(name), "v1", "app:v1");
    lazyimg.convert(&v1);
    let v2 = registry.push(&with_small_file(&work, name), "v2", "app:v2");
    let before = registry.blobs();
    let report = lazyimg.convert(&v2);
    let uploaded = number(&report, "/uploaded_bytes");
    assert!(
        uploaded > 0 && uploaded < TWO_CHUNKS,
        "uploaded {uploaded} bytes of chunks: {report:#}"
    );
    // The registry's own count: no new blob but packs of these chunks, manifests and the referrers list.
    let new: u64 = registry
        .blobs()
        .difference(&before)
        .map(|d| registry.blob(d).len() as u64)
        .sum();
    let manifests = number(&report, "/manifest_bytes") + (64 << 10);
    assert!(
        new <= uploaded + manifests,
        "{new} bytes of new blobs, but {uploaded} of chunks: {report:#}"
    );
    let inspect = lazyimg.json(&["inspect", &v2, "--with", &v1]);
    assert_eq!(
        number(&inspect, "/shared/missing_from_this"),
        0,
        "every data chunk of the base is shared"
    );
    assert_eq!(
        number(&inspect, "/shared/only_in_this"),
        1,
        "one small file is one data chunk"
    );
}

#[test]
fn one_small_file_on_debian_uploads_less_than_two_chunks() {
    upload_of_a_small_file("base");
}

#[test]
fn one_small_file_on_42_000_files_uploads_less_than_two_chunks() {
    upload_of_a_small_file("node");
}

#[test]
fn images_with_a_common_base_have_exactly_its_packs_in_common() {
    let work = WorkDir::new("common-base");
    let registry = Registry::start(work.join("registry"));
    let lazyimg = Lazyimg::new(work.join("home"));
    let convert = |name: &str| {
        let reference = registry.push(&Layout::prepared(name), "v1", &format!("app:{name}"));
        let report = lazyimg.convert(&reference);
        let packs = packs_in_order(&lazyimg.json(&["inspect", &reference]));
        (reference, report, packs)
    };
    // What the base layer contributes: all packs of the image that has no other layer, but for the last,
    // which holds its metadata.
    let (_, _, packs) = convert("base");
    let (_, of_base) = packs.split_last().unwrap();
    assert!(!of_base.is_empty());
    let siblings = ["django", "node"].map(|name| {
        let (reference, report, packs) = convert(name);
        let (common, own) = packs.split_at(of_base.len());
        assert_eq!(common, of_base, "{name} begins with the packs of its base");
        // Nothing of them is uploaded again, whatever the layers above replace or delete.
        assert_eq!(number(&report, "/uploaded_packs"), own.len() as u64);
        let bytes: u64 = own.iter().map(|(_, bytes)| bytes).sum();
        assert_eq!(number(&report, "/uploaded_bytes"), bytes, "{report:#}");
        (reference, packs)
    });
    let [(django, django_packs), (node, node_packs)] = siblings;
    let both: Vec<_> = django_packs
        .into_iter()
        .filter(|pack| node_packs.contains(pack))
        .collect();
    assert_eq!(both, of_base, "siblings share their base and nothing else");
    // What inspect prints for people has its figures too.
    let inspect = lazyimg.json(&["inspect", &django, "--with", &node]);
    let shared = number(&inspect, "/shared/data_chunks");
    assert!(shared > 0, "{inspect:#}");
    let text = lazyimg.ok(&["inspect", &django, "--with", &node]);
    assert!(text.contains(&format!("shares     {shared} of ")), "{text}");
}
