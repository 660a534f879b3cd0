//! Mount points: what is refused, what is taken off, and when the daemon ends.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use lazyimg_tests::lazyimg::wait_gone;
use lazyimg_tests::process::wait_for;
use lazyimg_tests::workdir::mounts_below;
use lazyimg_tests::{Lazyimg, Registry, Sample, WorkDir};
use rustix::process::{Pid, Signal, kill_process};

struct World {
    lazyimg: Lazyimg,
    registry: Registry,
    reference: String,
    sample: Sample,
    work: WorkDir,
}

fn world(name: &str) -> World {
    let work = WorkDir::new(name);
    let sample = Sample::new(&work.dir("sample"), 71, 2);
    let registry = Registry::start(work.join("registry"));
    let reference = registry.push(&sample.layout, "v1", "app:v1");
    let lazyimg = Lazyimg::new(work.join("home"));
    lazyimg.convert(&reference);
    World {
        lazyimg,
        registry,
        reference,
        sample,
        work,
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[test]
fn a_directory_that_cant_be_mounted_on_is_refused_in_words() {
    let w = world("refused");
    let missing = text(&w.work.join("missing"));
    let error = w.lazyimg.fails(1, &["mount", &w.reference, &missing]);
    assert!(error.contains(&missing), "{error}");
    let file = w.work.join("file");
    fs::write(&file, "").unwrap();
    let error = w.lazyimg.fails(1, &["mount", &w.reference, &text(&file)]);
    assert!(error.contains(&text(&file)), "{error}");
    let mount = w.lazyimg.mount(&w.reference, w.work.join("mnt"));
    let error = w
        .lazyimg
        .fails(1, &["mount", &w.reference, &text(mount.dir())]);
    assert!(
        error.contains("already") && error.contains(&w.reference),
        "{error}"
    );
    w.sample.assert_right(mount.dir());
}

#[test]
fn umount_takes_off_what_is_ours_and_nothing_else() {
    let w = world("umount");
    let plain = text(&w.work.dir("plain"));
    let error = w.lazyimg.fails(1, &["umount", &plain]);
    assert!(error.contains("not a lazyimg mount"), "{error}");
    let tmpfs = text(&w.work.dir("tmpfs"));
    lazyimg_tests::process::sh("mount", &["-t", "tmpfs", "tmpfs", &tmpfs]);
    let error = w.lazyimg.fails(1, &["umount", &tmpfs]);
    assert!(error.contains("tmpfs"), "{error}");
    assert_eq!(mounts_below(Path::new(&tmpfs)).len(), 1);

    let mount = w.lazyimg.mount(&w.reference, w.work.join("mnt"));
    let open = fs::File::open(mount.join(&w.sample.files[0])).unwrap();
    let error = w.lazyimg.fails(1, &["umount", &text(mount.dir())]);
    assert!(
        error.contains("in use") && error.contains("--lazy"),
        "what to do? {error}"
    );
    w.sample.assert_right(mount.dir());
    // Lazily it goes at once, and the open file stays readable.
    let said = w.lazyimg.run(&["umount", "--lazy", &text(mount.dir())]);
    assert_eq!(said.code, 0, "{said}");
    assert!(said.stderr.contains("open files"), "{said}");
    assert_eq!(mounts_below(mount.dir()).len(), 0);
    let truth = fs::read(w.sample.source.join(&w.sample.files[0])).unwrap();
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut &open, &mut bytes).unwrap();
    assert!(bytes == truth);
    drop(open);

    let (a, b) = (w.work.join("a"), w.work.join("b"));
    w.lazyimg.mount(&w.reference, &a).leave();
    w.lazyimg.mount(&w.reference, &b).leave();
    w.lazyimg.ok(&["umount", "--all"]);
    assert_eq!((mounts_below(&a).len(), mounts_below(&b).len()), (0, 0));
    w.lazyimg.ok(&["umount", "--all"]);
}

#[test]
fn the_daemon_ends_after_its_last_mount_and_begins_with_the_next() {
    let w = world("linger");
    let mount = w.lazyimg.mount(&w.reference, w.work.join("mnt"));
    let second = w.lazyimg.mount(&w.reference, w.work.join("second"));
    let pid = w.lazyimg.daemon();
    mount.umount();
    w.sample.assert_right(second.dir());
    assert_eq!(
        w.lazyimg.daemon(),
        pid,
        "one daemon serves all mounts of a cache"
    );
    second.umount();
    wait_gone(pid, Duration::from_secs(10));
    assert_eq!(w.lazyimg.status()["pid"], serde_json::Value::Null);
    let mount = w.lazyimg.mount(&w.reference, w.work.join("mnt"));
    assert_ne!(w.lazyimg.daemon(), pid);
    w.sample.assert_right(mount.dir());
    // Somebody else's `umount` is noticed too.
    let pid = w.lazyimg.daemon();
    lazyimg_tests::process::sh("umount", &[&text(mount.dir())]);
    wait_gone(pid, Duration::from_secs(10));
}

#[test]
fn a_daemon_that_is_told_to_end_takes_its_mounts_off() {
    let w = world("sigterm");
    for signal in [Signal::TERM, Signal::INT] {
        let mount = w.lazyimg.mount(&w.reference, w.work.join("mnt"));
        let pid = w.lazyimg.daemon();
        kill_process(pid, signal).unwrap();
        wait_gone(pid, Duration::from_secs(10));
        assert_eq!(mounts_below(mount.dir()).len(), 0, "{signal:?}");
        mount.leave();
    }
}

#[test]
fn a_mount_in_the_foreground_ends_with_its_signal_or_its_umount() {
    let w = world("foreground");
    let at = w.work.dir("mnt");
    for by in ["SIGTERM", "SIGINT", "umount"] {
        let mut command = w
            .lazyimg
            .command(&["mount", &w.reference, &text(&at), "--foreground"]);
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("it is mounted", Duration::from_secs(20), || {
            mounts_below(&at).len() == 1
        });
        w.sample.assert_right(&at);
        // Its status can be asked as that of any other.
        assert_eq!(w.lazyimg.status()["pid"], child.id());
        match by {
            "SIGTERM" => kill_process(Pid::from_child(&child), Signal::TERM).unwrap(),
            "SIGINT" => kill_process(Pid::from_child(&child), Signal::INT).unwrap(),
            _ => drop(w.lazyimg.ok(&["umount", &text(&at)])),
        }
        wait_for("it ends", Duration::from_secs(10), || {
            child.try_wait().unwrap().is_some()
        });
        assert!(child.wait().unwrap().success(), "{by}");
        assert_eq!(mounts_below(&at).len(), 0, "{by}");
    }
    // A cache has one daemon: the error says what to do.
    let mount = w.lazyimg.mount(&w.reference, w.work.join("other"));
    let error = w
        .lazyimg
        .fails(1, &["mount", &w.reference, &text(&at), "--foreground"]);
    assert!(
        error.contains("--foreground") && error.contains("--cache-dir"),
        "{error}"
    );
    drop(mount);
}

#[test]
fn two_mounts_of_images_with_equal_chunks_fetch_them_once() {
    let w = world("shared");
    let first = w.lazyimg.mount(&w.reference, w.work.join("a"));
    w.sample.assert_right(first.dir());
    let other = w.registry.push(&w.sample.layout, "v1", "other/name:v2");
    w.lazyimg.convert(&other);
    let second = w.lazyimg.mount(&other, w.work.join("b"));
    w.sample.assert_right(second.dir());
    assert_eq!(second.count("/fetched_bytes"), 0, "{:#}", second.status());
}

#[test]
fn a_cache_that_cant_be_used_is_an_error_that_says_so() {
    let w = world("bad-cache");
    let file = w.work.join("file");
    fs::write(&file, "").unwrap();
    let at = text(&w.work.dir("mnt"));
    let error = w.lazyimg.fails(
        1,
        &["mount", &w.reference, &at, "--cache-dir", &text(&file)],
    );
    assert!(error.contains(&text(&file)), "{error}");
    let error = w.lazyimg.fails(
        1,
        &["mount", &w.reference, &at, "--cache-dir", "/proc/nowhere"],
    );
    assert!(error.contains("/proc/nowhere"), "{error}");
    // Somebody else's directory.
    let user = Lazyimg::new_unprivileged(w.work.join("user"), 65_533);
    user.copy_secrets_from(&w.lazyimg);
    w.lazyimg
        .mount(&w.reference, w.work.join("mnt-root"))
        .umount();
    let mine = text(w.lazyimg.cache());
    let error = user.fails(1, &["mount", &w.reference, &at, "--cache-dir", &mine]);
    assert!(error.contains("ermission denied"), "{error}");
}
