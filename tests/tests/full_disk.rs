//! With the cache's file system full, reads go on without caching.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::io::Write;
use std::path::Path;

use lazyimg_tests::process::sh;
use lazyimg_tests::{Lazyimg, Registry, Sample, WorkDir};

/// Fills a file system to the last byte.
fn fill(dir: &Path) {
    let mut file = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join("filler"))
        .unwrap();
    for size in [1 << 20, 4096, 512, 1] {
        let piece = vec![0xa5; size];
        while file.write_all(&piece).is_ok() {}
    }
    // Blocks that are promised only would come back.
    let _ = file.sync_all();
}

/// A file system of some MB for the cache.
fn small_disk(work: &WorkDir, kind: &str, megabytes: u64) -> std::path::PathBuf {
    let at = work.dir("disk");
    let target = at.to_string_lossy().into_owned();
    match kind {
        "tmpfs" => drop(sh(
            "mount",
            &[
                "-t",
                "tmpfs",
                "-o",
                &format!("size={megabytes}m,mode=755"),
                "tmpfs",
                &target,
            ],
        )),
        _ => {
            let image = work.join("disk.img");
            fs::File::create(&image)
                .unwrap()
                .set_len(megabytes << 20)
                .unwrap();
            let image = image.to_string_lossy().into_owned();
            sh("mkfs.ext4", &["-q", "-m", "0", "-F", &image]);
            sh("mount", &["-o", "loop", &image, &target]);
        }
    }
    at
}

struct Setup {
    lazyimg: Lazyimg,
    _registry: Registry,
    reference: String,
    sample: Sample,
    disk: std::path::PathBuf,
    work: WorkDir,
}

fn setup(kind: &str) -> Setup {
    let work = WorkDir::new("full-disk");
    let sample = Sample::new(&work.dir("sample"), 31, 12);
    let registry = Registry::start(work.join("registry"));
    let reference = registry.push(&sample.layout, "v1", "app:v1");
    let disk = small_disk(&work, kind, 64);
    let lazyimg = Lazyimg::new(work.join("home")).with_cache(disk.join("cache"));
    lazyimg.convert(&reference);
    Setup {
        lazyimg,
        _registry: registry,
        reference,
        sample,
        disk,
        work,
    }
}

/// A disk that others fill while a mount is in use, and empty again.
fn filled_in_use(kind: &str) {
    let s = setup(kind);
    let mount = s
        .lazyimg
        .mount_with(&s.reference, s.work.join("mnt"), &["--hot-bytes", "0"]);
    let some = s.sample.files.len() / 4;
    for file in &s.sample.files[..some] {
        s.sample.check(mount.dir(), file).unwrap();
    }
    fill(&s.disk);
    s.sample.assert_right(mount.dir());
    let status = mount.status();
    assert_eq!(mount.count("/stats/errors"), 0, "{status:#}");
    assert_eq!(mount.count("/errors"), 0, "{status:#}");
    // Again, past the kernel's memory: what was cached and what was not.
    s.sample
        .files
        .iter()
        .for_each(|f| lazyimg_tests::sample::forget(&mount.join(f)));
    s.sample.assert_right(mount.dir());
    mount.umount();
    s.lazyimg.stop();

    // A new daemon on a disk without a free byte.
    let mount = s
        .lazyimg
        .mount_with(&s.reference, s.work.join("mnt"), &["--hot-bytes", "0"]);
    s.sample.assert_right(mount.dir());
    s.lazyimg.kill_daemon();
    let mount = {
        mount.leave();
        s.lazyimg
            .mount_with(&s.reference, s.work.join("mnt"), &["--hot-bytes", "0"])
    };
    s.sample.assert_right(mount.dir());

    // Room again, and a new daemon: caching goes on.
    mount.umount();
    s.lazyimg.stop();
    fs::remove_file(s.disk.join("filler")).unwrap();
    let mount = s
        .lazyimg
        .mount_with(&s.reference, s.work.join("mnt"), &["--hot-bytes", "0"]);
    s.sample.assert_right(mount.dir());
    lazyimg_tests::process::wait_for(
        "the cache holds the image",
        std::time::Duration::from_secs(10),
        || mount.count("/resident_chunks") == mount.count("/chunks"),
    );
    assert_eq!(mount.count("/stats/errors"), 0, "{:#}", mount.status());
}

#[test]
fn reads_go_on_when_a_tmpfs_with_the_cache_is_full() {
    filled_in_use("tmpfs");
}

#[test]
fn reads_go_on_when_an_ext4_with_the_cache_is_full() {
    filled_in_use("ext4");
}

/// Where not even the cache's directory can be made there is no place for the daemon's socket.
#[test]
fn a_disk_without_room_for_the_caches_directory_is_an_error_that_names_it() {
    let s = setup("ext4");
    fill(&s.disk);
    let at = s.work.dir("mnt").to_string_lossy().into_owned();
    let error = s.lazyimg.fails(1, &["mount", &s.reference, &at]);
    assert!(
        error.contains("No space left") && error.contains(&*s.lazyimg.cache().to_string_lossy()),
        "{error}"
    );
    // With the directory made, nothing else is needed.
    fs::remove_file(s.disk.join("filler")).unwrap();
    fs::create_dir(s.lazyimg.cache()).unwrap();
    fill(&s.disk);
    let mount = s.lazyimg.mount(&s.reference, &at);
    s.sample.assert_right(mount.dir());
    assert_eq!(mount.count("/stats/errors"), 0, "{:#}", mount.status());
    let warnings = s
        .lazyimg
        .log()
        .lines()
        .filter(|l| l.contains("WARN"))
        .count();
    assert!(
        warnings < 10,
        "a full disk is one warning, not one for each chunk: {}",
        s.lazyimg.log()
    );
}

#[test]
fn a_bounded_cache_evicts_and_stays_within_its_bound() {
    let work = WorkDir::new("bound");
    let sample = Sample::new(&work.dir("sample"), 32, 40);
    let registry = Registry::start(work.join("registry"));
    let reference = registry.push(&sample.layout, "v1", "app:v1");
    let lazyimg = Lazyimg::new(work.join("home"));
    lazyimg.convert(&reference);
    let bound: u64 = 16 << 20;
    let mount = lazyimg.mount_with(
        &reference,
        work.join("mnt"),
        &["--cache-bytes", &bound.to_string(), "--hot-bytes", "0"],
    );
    for _ in 0..2 {
        sample
            .files
            .iter()
            .for_each(|f| lazyimg_tests::sample::forget(&mount.join(f)));
        sample.assert_right(mount.dir());
        let on_disk: u64 = sh("du", &["-sB1", &lazyimg.cache().to_string_lossy()])
            .split_whitespace()
            .next()
            .and_then(|n| n.parse().ok())
            .unwrap();
        assert!(
            on_disk <= bound + (4 << 20),
            "{on_disk} bytes on disk, the bound is {bound}"
        );
    }
    assert!(
        mount.count("/resident_bytes") > bound / 4,
        "an evicting cache still holds something"
    );
}
