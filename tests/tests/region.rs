//! Hosts, a regional store and a registry: what goes on when one of them is gone.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::path::PathBuf;
use std::time::Duration;

use lazyimg_tests::process::wait_for;
use lazyimg_tests::tree::read_file;
use lazyimg_tests::{Lazyimg, Mounted, Registry, Sample, Store, WorkDir};

const EIO: i32 = 5;

/// `--read-timeout`, in seconds.
const TIMEOUT: u64 = 10;

/// What a busy machine may take.
const PATIENCE: Duration = Duration::from_secs(60);

struct Setup {
    /// The host that converts, and mounts where a test needs only one.
    lazyimg: Lazyimg,
    registry: Registry,
    store: Store,
    sample: Sample,
    reference: String,
    work: WorkDir,
}

impl Setup {
    /// A registry with an image, and an empty store.
    fn new(name: &str) -> Self {
        let work = WorkDir::new(name);
        let sample = Sample::new(&work.dir("sample"), 51, 12);
        let registry = Registry::start(work.join("registry"));
        let reference = registry.push(&sample.layout, "v1", "app:v1");
        Self {
            lazyimg: Lazyimg::new(work.join("home")),
            store: Store::start(work.join("store")),
            registry,
            sample,
            reference,
            work,
        }
    }

    /// Converts the image into registry and store.
    fn convert(&self) -> serde_json::Value {
        let url = self.store.url();
        let convert = ["convert", &self.reference, "--store", &url];
        self.lazyimg.json(&convert)
    }

    /// A host that has never seen the image: keys, and nothing else.
    fn fresh_host(&self, name: &str) -> Lazyimg {
        let host = Lazyimg::new(self.work.join(name));
        host.copy_secrets_from(&self.lazyimg);
        host
    }

    fn mount<'a>(&self, host: &'a Lazyimg, at: &str, more: &[&str]) -> Mounted<'a> {
        let (url, timeout) = (self.store.url(), TIMEOUT.to_string());
        let flags = [
            "--store",
            &url,
            "--read-timeout",
            &timeout,
            "--hot-bytes",
            "0",
        ];
        let flags = [&flags[..], more].concat();
        host.mount_with(&self.reference, host.home().join(at), &flags)
    }

    fn large(&self) -> Vec<PathBuf> {
        let large = self.sample.files.iter().filter(|f| f.starts_with("large"));
        large.cloned().collect()
    }
}

#[test]
fn a_host_without_registry_and_credentials_mounts_what_the_store_has() {
    let mut setup = Setup::new("region-alone");
    let report = setup.convert();
    assert_eq!(report["store"]["uploaded_chunks"], report["chunks"]);
    setup.registry.stop();
    for (name, more) in [("one", &[][..]), ("two", &["--store-only"])] {
        let host = setup.fresh_host(name);
        let mount = setup.mount(&host, "mnt", more);
        setup.sample.assert_right(mount.dir());
        assert!(
            mount.count("/tiers/store/chunks") > 0,
            "{:#}",
            mount.status()
        );
        assert_eq!(mount.count("/errors"), 0);
        mount.umount();
    }
    // By digest too, and again from what is in the host's cache.
    let host = setup.fresh_host("exact");
    let image = report["image"].as_str().expect("a digest").to_owned();
    let exact = format!("{}@{image}", setup.registry.reference("app"));
    let url = setup.store.url();
    let flags = ["--store", url.as_str(), "--store-only"];
    let mount = host.mount_with(&exact, host.home().join("mnt"), &flags);
    setup.sample.assert_right(mount.dir());
}

#[test]
fn an_image_named_by_digest_is_that_image_whatever_the_store_says() {
    let mut setup = Setup::new("region-digest");
    let image = setup.convert()["image"].as_str().unwrap().to_owned();
    let other = Sample::new(&setup.work.dir("other"), 52, 3);
    let other_name = setup.registry.push(&other.layout, "v1", "app:v2");
    let url = setup.store.url();
    let convert = ["convert", other_name.as_str(), "--store", &url];
    let other_image = setup.lazyimg.json(&convert)["image"].clone();
    let app = setup.registry.reference("app");
    let exact = format!("{app}@{image}");
    // Somebody in the region says that this digest is of the other image.
    let body = serde_json::json!({ "image": other_image }).to_string();
    let name = format!("{exact}#linux/amd64");
    let name = name.replace('/', "%2F").replace('#', "%23");
    let put = format!("PUT /v1/refs/{name}");
    http(&url, &put, "application/json", &body);
    let host = setup.fresh_host("host");
    for only in [&["--store", &url, "--store-only"][..], &["--store", &url]] {
        let flags = [only, &["--platform", "linux/amd64"]].concat();
        let mount = host.mount_with(&exact, host.home().join("mnt"), &flags);
        setup.sample.assert_right(mount.dir());
        mount.umount();
    }

    // The digest of an index: it says itself which images are in it, and the store has it.
    let size = setup.registry.blob(&image).len();
    let kind = "application/vnd.oci.image.index.v1+json";
    let index = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": kind,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": image,
            "size": size,
            "platform": { "os": "linux", "architecture": "amd64" },
        }],
    })
    .to_string();
    let digest = lazyimg_convergent::Digest::of(index.as_bytes());
    let registry = format!("http://{}", setup.registry.host());
    let put = format!("PUT /v2/app/manifests/{digest}");
    http(&registry, &put, kind, &index);
    let index = format!("{app}@{digest}");
    let flags = ["--store", &url, "--platform", "linux/amd64"];
    let convert = [&["convert", &index][..], &flags].concat();
    assert_eq!(setup.lazyimg.json(&convert)["image"], image.as_str());
    let host = setup.fresh_host("index");
    let mount = host.mount_with(&index, host.home().join("mnt"), &flags);
    setup.sample.assert_right(mount.dir());
    assert_eq!(mount.count("/tiers/registry/chunks"), 0);
    mount.umount();
    setup.registry.stop();
    for (n, only) in [&["--store-only"][..], &[]].iter().enumerate() {
        let host = setup.fresh_host(&format!("index-{n}"));
        let mount = host.mount_with(&index, host.home().join("mnt"), &[&flags, *only].concat());
        setup.sample.assert_right(mount.dir());
        mount.umount();
    }
    // A store that lost it, or has another under its name, proves nothing; the image's own digest does
    // not need it.
    // docs/store.md: half of the digest's hex digits.
    let name = format!("index-{}", &digest.hex()[..32]);
    let profile = format!("/v1/images/{image}/profiles/{name}");
    http(&url, &format!("PUT {profile}"), kind, "{\"manifests\":[]}");
    let host = setup.fresh_host("unproved");
    std::fs::create_dir_all(host.home().join("mnt")).unwrap();
    let at = host.home().join("mnt").to_string_lossy().into_owned();
    for (code, only) in [(3, &["--store-only"][..]), (5, &[])] {
        let mount = [&["mount", &index, &at][..], &flags, only].concat();
        let words = host.fails(code, &mount);
        assert!(words.contains(&format!("name {exact}")), "{words}");
    }
    let mount = host.mount_with(&exact, host.home().join("mnt"), &flags);
    setup.sample.assert_right(mount.dir());
}

/// One request to a server on loopback, which must succeed.
#[track_caller]
fn http(server: &str, request: &str, kind: &str, body: &str) {
    use std::io::{Read, Write};
    let host = server.trim_start_matches("http://");
    let mut socket = std::net::TcpStream::connect(host).unwrap();
    let len = body.len();
    let head = format!("{request} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n");
    let head = format!("{head}content-type: {kind}\r\ncontent-length: {len}\r\n\r\n");
    socket.write_all((head + body).as_bytes()).unwrap();
    let mut said = String::new();
    socket.read_to_string(&mut said).unwrap();
    assert!(said.starts_with("HTTP/1.1 2"), "{request}: {said}");
}

#[test]
fn an_image_may_live_in_the_store_alone() {
    let setup = Setup::new("region-only");
    let before = setup.registry.blobs();
    let url = setup.store.url();
    let convert = ["convert", &setup.reference, "--store", &url, "--store-only"];
    let report = setup.lazyimg.json(&convert);
    assert_eq!(report["artifact"], serde_json::Value::Null);
    assert_eq!(
        setup.registry.blobs(),
        before,
        "nothing is pushed to the registry"
    );
    let host = setup.fresh_host("host");
    let mount = setup.mount(&host, "mnt", &[]);
    setup.sample.assert_right(mount.dir());
    // Twice is nothing new.
    let again = setup.lazyimg.json(&convert);
    assert_eq!(again["store"]["uploaded_chunks"], 0, "{again:#}");
    // Without a store it says what to do.
    let alone = setup.fresh_host("alone");
    std::fs::create_dir_all(alone.home().join("mnt")).unwrap();
    let at = alone.home().join("mnt").to_string_lossy().into_owned();
    alone.fails(3, &["mount", &setup.reference, &at]);
    let words = alone.fails(2, &["mount", &setup.reference, &at, "--store-only"]);
    assert!(words.contains("--store URL"), "{words}");
}

#[test]
fn a_store_that_does_not_know_the_image_says_so_when_nobody_else_may_be_asked() {
    let setup = Setup::new("region-unknown");
    let at = setup.work.dir("mnt").to_string_lossy().into_owned();
    let url = setup.store.url();
    setup.lazyimg.convert(&setup.reference);
    let flags = ["--store", &url, "--store-only"];
    let mount = [&["mount", &setup.reference, &at][..], &flags].concat();
    let words = setup.lazyimg.fails(3, &mount);
    assert!(words.contains("convert it with --store"), "{words}");
}

#[test]
fn a_store_that_is_gone_costs_delays_and_no_errors_and_is_used_again_when_it_is_back() {
    let mut setup = Setup::new("region-store-gone");
    setup.convert();
    let host = setup.fresh_host("host");
    let mount = setup.mount(&host, "mnt", &[]);
    let large = setup.large();
    let (first, rest) = large.split_at(1);
    setup.sample.check(mount.dir(), &first[0]).unwrap();
    assert_eq!(
        mount.count("/tiers/registry/chunks"),
        0,
        "{:#}",
        mount.status()
    );

    setup.store.kill();
    setup.sample.check(mount.dir(), &rest[0]).unwrap();
    assert!(
        mount.count("/tiers/registry/chunks") > 0,
        "{:#}",
        mount.status()
    );

    setup.store.restart();
    setup.store.freeze();
    setup.sample.check(mount.dir(), &rest[1]).unwrap();
    setup.store.thaw();
    assert_eq!(mount.count("/errors"), 0, "{:#}", mount.status());

    // It is used again, without a remount. Chunks that are cached must be forgotten to be asked for.
    let before = mount.count("/tiers/store/chunks");
    wait_for("the store is used again", PATIENCE, || {
        host.ok(&["cache", "trim", "--to", "0"]);
        for file in &large {
            lazyimg_tests::sample::forget(&mount.join(file));
            setup.sample.check(mount.dir(), file).unwrap();
        }
        mount.count("/tiers/store/chunks") > before
    });
    assert_eq!(mount.count("/errors"), 0, "{:#}", mount.status());
    setup.sample.assert_right(mount.dir());
}

#[test]
fn with_everything_gone_resident_reads_go_on_and_all_others_work_after_the_return() {
    let mut setup = Setup::new("region-all-gone");
    setup.convert();
    let host = setup.fresh_host("host");
    let mount = setup.mount(&host, "mnt", &[]);
    let large = setup.large();
    let (cached, missing) = (&large[0], &large[large.len() - 1]);
    setup.sample.check(mount.dir(), cached).unwrap();
    setup.store.kill();
    setup.registry.stop();
    let failed = read_file(&mount.join(missing));
    assert_eq!(failed.err(), Some(EIO));
    lazyimg_tests::sample::forget(&mount.join(cached));
    setup.sample.check(mount.dir(), cached).unwrap();
    assert!(std::fs::read_dir(mount.join("small")).unwrap().count() > 10);
    setup.store.restart();
    setup.registry.restart();
    wait_for("everything reads again", PATIENCE, || {
        setup.sample.unreadable(mount.dir()).is_empty()
    });
}

#[test]
fn what_came_from_the_registry_is_in_the_store_for_the_next_host() {
    let mut setup = Setup::new("region-write-back");
    setup.lazyimg.convert(&setup.reference);
    let first = setup.fresh_host("first");
    let mount = setup.mount(&first, "mnt", &[]);
    setup.sample.assert_right(mount.dir());
    assert!(mount.count("/tiers/registry/chunks") > 0);
    wait_for("every chunk was put", PATIENCE, || {
        let status = mount.status();
        let put = &status["tiers"]["store"]["health"]["write_back"];
        let count = |n: &serde_json::Value| n.as_u64().unwrap_or(0);
        count(&put["put"]["chunks"]) + count(&put["had"]) >= mount.count("/chunks")
    });
    // The next host asks the registry what the tag means now, and for no chunk.
    let second = setup.fresh_host("second");
    let mount = setup.mount(&second, "mnt", &[]);
    setup.sample.assert_right(mount.dir());
    assert_eq!(
        mount.count("/tiers/registry/chunks"),
        0,
        "{:#}",
        mount.status()
    );
    mount.umount();
    // A mount that may not write leaves nothing.
    setup.store.stop();
    let _ = std::fs::remove_dir_all(setup.store.data());
    setup.store.restart();
    let third = setup.fresh_host("third");
    let mount = setup.mount(&third, "mnt", &["--no-write-back"]);
    setup.sample.assert_right(mount.dir());
    let stats: serde_json::Value = serde_json::from_str(&third.ok(&[
        "store",
        "stats",
        "--json",
        "--store",
        &setup.store.url(),
    ]))
    .unwrap();
    let chunks = stats.pointer("/roots/0/chunks").and_then(|n| n.as_u64());
    assert_eq!(chunks, Some(0), "{stats:#}");
}

#[test]
fn a_wrong_byte_in_the_store_is_recorded_replaced_and_never_read() {
    use std::os::unix::fs::FileExt;
    let mut setup = Setup::new("region-wrong-byte");
    setup.convert();
    setup.store.stop();
    // One byte in the middle of every 300 kB.
    for segment in setup.store.segments() {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&segment)
            .unwrap();
        let len = file.metadata().unwrap().len();
        for at in (200_000..len).step_by(300_000) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 4], at).unwrap();
        }
    }
    setup.store.restart();
    let host = setup.fresh_host("host");
    let mount = setup.mount(&host, "mnt", &[]);
    setup.sample.assert_right(mount.dir());
    assert_eq!(mount.count("/errors"), 0);
    assert!(
        mount.count("/tiers/registry/chunks") > 5,
        "{:#}",
        mount.status()
    );
    // Once they are replaced the registry is not needed.
    let url = setup.store.url();
    setup.registry.stop();
    wait_for("the store is whole again", PATIENCE, || {
        let host = setup.fresh_host("next");
        let _ = std::fs::remove_dir_all(host.cache());
        let at = host.home().join("mnt");
        let flags = [
            "--store",
            url.as_str(),
            "--store-only",
            "--read-timeout",
            "4",
        ];
        let mount = host.mount_with(&setup.reference, &at, &flags);
        let whole = setup.sample.unreadable(mount.dir()).is_empty();
        mount.umount();
        host.stop();
        whole
    });
}

#[test]
fn ten_mounts_of_images_with_a_common_base_keep_one_copy_of_each_chunk() {
    let setup = Setup::new("region-shared");
    setup.convert();
    let host = setup.fresh_host("host");
    let mounts: Vec<_> = (0..10)
        .map(|n| setup.mount(&host, &format!("mnt{n}"), &[]))
        .collect();
    for mount in &mounts {
        setup.sample.assert_right(mount.dir());
    }
    let status = host.status();
    let count = |name: &str| status["resident"][name].as_u64().unwrap();
    assert_eq!(count("named_chunks"), 10 * count("chunks"), "{status:#}");
    assert_eq!(count("named_bytes"), 10 * count("bytes"));
    let fetched: u64 = mounts.iter().map(|m| m.count("/fetched_bytes")).sum();
    assert_eq!(fetched, count("bytes"), "each chunk came once");
}
