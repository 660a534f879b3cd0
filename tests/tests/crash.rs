//! kill -9 at any moment: after a new mount every byte is right.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use lazyimg_tests::{Lazyimg, Registry, Sample, WorkDir};
use rustix::mount::{UnmountFlags, unmount};

/// Reads random pieces until `stop`; wrong bytes are a panic. Counts the pieces.
fn read_on(sample: &Sample, root: &Path, seed: u64, stop: &AtomicBool, read: &AtomicU64) {
    let mut random = fastrand::Rng::with_seed(seed);
    while !stop.load(Relaxed) {
        // Errors are expected once the daemon is dead.
        match sample.check_piece(root, &mut random) {
            Ok(()) => drop(read.fetch_add(1, Relaxed)),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Whether something holds before the time is up.
fn in_time(limit: Duration, holds: impl Fn() -> bool) -> bool {
    let started = Instant::now();
    while !holds() && started.elapsed() < limit {
        std::thread::sleep(Duration::from_millis(10));
    }
    holds()
}

/// Mounts, reads with several threads, kills at a random moment, mounts again, and so on.
fn kill_many_times(name: &str, rounds: u64, megabytes: usize, flags: &[&str]) {
    let work = WorkDir::new(name);
    let sample = Sample::new(&work.dir("sample"), 21, megabytes);
    let registry = Registry::start(work.join("registry"));
    let reference = registry.push(&sample.layout, "v1", "app:v1");
    let lazyimg = Lazyimg::new(work.join("home"));
    lazyimg.convert(&reference);
    let at = work.join("mnt");
    let mut random = fastrand::Rng::with_seed(22);
    let read = AtomicU64::new(0);
    for round in 0..rounds {
        // The first mount is new, the others find a mount point whose daemon is dead.
        lazyimg.mount_with(&reference, &at, flags).leave();
        let stop = AtomicBool::new(false);
        let readers = std::thread::scope(|scope| {
            let reader = |n| (round * 10 + n, &stop, &read, &sample, at.as_path());
            let spawn = |n| {
                let (seed, stop, read, sample, at) = reader(n);
                scope.spawn(move || read_on(sample, at, seed, stop, read))
            };
            let readers: Vec<_> = (0..3).map(spawn).collect();
            std::thread::sleep(Duration::from_micros(random.u64(..400_000)));
            lazyimg.kill_daemon();
            stop.store(true, Relaxed);
            let all_done = || readers.iter().all(|r| r.is_finished());
            // A process has ended when the last of its threads has, and one may wait for a busy disk.
            if !in_time(Duration::from_secs(60), all_done) {
                // Or they would hang for as long as the machine runs, and this test with them.
                let _ = unmount(&at, UnmountFlags::FORCE);
                panic!("round {round}: readers hang in the kernel though their daemon was killed");
            }
            readers
                .into_iter()
                .map(|r| r.join())
                .filter(Result::is_err)
                .count()
        });
        assert_eq!(readers, 0, "round {round}: a reader got wrong bytes");
        if round % 6 == 5 {
            let mount = lazyimg.mount_with(&reference, &at, flags);
            sample.assert_right(mount.dir());
            assert_eq!(
                mount.count("/stats/errors"),
                0,
                "round {round}: {:#}",
                mount.status()
            );
            mount.leave();
            lazyimg.kill_daemon();
        }
    }
    assert!(
        read.load(Relaxed) > 2 * rounds,
        "only {} pieces were read",
        read.load(Relaxed)
    );
    let mount = lazyimg.mount_with(&reference, &at, flags);
    sample.assert_right(mount.dir());
    lazyimg.ok(&["verify", &at.to_string_lossy()]);
    assert_eq!(mount.count("/stats/errors"), 0, "{:#}", mount.status());
}

#[test]
fn a_daemon_killed_during_reads_and_cache_writes_leaves_nothing_wrong() {
    kill_many_times("crash", 24, 30, &["--hot-bytes", "0"]);
}

#[test]
fn a_daemon_killed_while_its_small_cache_evicts_leaves_nothing_wrong() {
    kill_many_times("crash-evict", 24, 40, &["--cache-bytes", "16777216"]);
}

#[test]
fn a_reader_of_a_killed_daemon_gets_an_error_and_does_not_hang() {
    let work = WorkDir::new("crash-reader");
    let sample = Sample::new(&work.dir("sample"), 23, 4);
    let registry = Registry::start(work.join("registry"));
    let reference = registry.push(&sample.layout, "v1", "app:v1");
    let lazyimg = Lazyimg::new(work.join("home"));
    lazyimg.convert(&reference);
    let mount = lazyimg.mount_with(&reference, work.join("mnt"), &["--read-timeout", "60"]);
    registry.freeze();
    let stuck = {
        let (source, root) = (sample.files[0].clone(), mount.dir().to_owned());
        std::thread::spawn(move || lazyimg_tests::tree::read_file(&root.join(source)))
    };
    std::thread::sleep(Duration::from_millis(500));
    assert!(
        !stuck.is_finished(),
        "the registry is frozen, what was read?"
    );
    lazyimg.kill_daemon();
    lazyimg_tests::process::wait_for("the reader ends", Duration::from_secs(5), || {
        stuck.is_finished()
    });
    assert!(stuck.join().unwrap().is_err());
    registry.thaw();
    // `umount` takes a dead mount off, and a new mount takes its place.
    mount.umount();
    sample.assert_right(lazyimg.mount(&reference, work.join("mnt")).dir());
}
