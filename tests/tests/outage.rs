//! A registry that fails is an error within a bounded time, never a hang and never a wrong byte.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::path::Path;
use std::time::{Duration, Instant};

use lazyimg_tests::proxy::Target;
use lazyimg_tests::tree::read_file;
use lazyimg_tests::{Fault, Lazyimg, Mounted, Proxy, Registry, Sample, WorkDir};

const EIO: i32 = 5;

/// `--read-timeout` of these tests, in seconds.
const TIMEOUT: u64 = 3;

/// What a busy machine may add to it.
const SLACK: Duration = Duration::from_secs(20);

struct Setup {
    lazyimg: Lazyimg,
    registry: Registry,
    sample: Sample,
    work: WorkDir,
}

impl Setup {
    fn new(name: &str) -> Self {
        let work = WorkDir::new(name);
        let sample = Sample::new(&work.dir("sample"), 41, 12);
        let registry = Registry::start(work.join("registry"));
        let reference = registry.push(&sample.layout, "v1", "app:v1");
        let lazyimg = Lazyimg::new(work.join("home"));
        lazyimg.convert(&reference);
        Self {
            lazyimg,
            registry,
            sample,
            work,
        }
    }

    fn mount(&self, reference: &str, at: &str) -> Mounted<'_> {
        let timeout = TIMEOUT.to_string();
        let flags = ["--read-timeout", timeout.as_str(), "--hot-bytes", "2097152"];
        self.lazyimg
            .mount_with(reference, self.work.join(at), &flags)
    }

    /// The large files: far from each other in the image, so that reading one fetches no other.
    fn large(&self) -> Vec<&Path> {
        let large = self.sample.files.iter().filter(|f| f.starts_with("large"));
        large.map(|f| f.as_path()).collect()
    }
}

/// Reads a file that can't be had; panics unless that is an I/O error in time.
#[track_caller]
fn assert_fails_in_time(path: &Path) -> Duration {
    let started = Instant::now();
    let result = read_file(path);
    let took = started.elapsed();
    assert_eq!(result.err(), Some(EIO), "reading {}", path.display());
    assert!(
        took < Duration::from_secs(TIMEOUT) + SLACK,
        "the error took {took:?}"
    );
    took
}

#[test]
fn a_registry_that_is_gone_costs_errors_in_time_and_reads_work_again_when_it_is_back() {
    let mut setup = Setup::new("outage");
    let reference = setup.registry.reference("app:v1");
    let lazyimg = &setup.lazyimg;
    let timeout = TIMEOUT.to_string();
    let flags = ["--read-timeout", timeout.as_str(), "--hot-bytes", "0"];
    let mount = lazyimg.mount_with(&reference, setup.work.join("mnt"), &flags);
    let large: Vec<_> = setup
        .sample
        .files
        .iter()
        .filter(|f| f.starts_with("large"))
        .collect();
    let (cached, missing) = (large[0], large[large.len() - 1]);
    setup.sample.check(mount.dir(), cached).unwrap();
    let fetched = mount.count("/fetched_bytes");
    assert!(
        fetched < mount.count("/stored_bytes") / 2,
        "too much was fetched: {:#}",
        mount.status()
    );

    setup.registry.stop();
    assert_fails_in_time(&mount.join(missing));
    assert_fails_in_time(&mount.join(missing));
    // The tree is there, and so is what was read before, past the kernel's memory too.
    lazyimg_tests::sample::forget(&mount.join(cached));
    setup.sample.check(mount.dir(), cached).unwrap();
    assert!(std::fs::read_dir(mount.join("small")).unwrap().count() > 10);
    let lines: Vec<String> = lazyimg
        .log()
        .lines()
        .filter(|l| l.contains("EIO"))
        .map(str::to_owned)
        .collect();
    // One cause is one line. While the registry rests after its failures, a read that waits for it to be
    // asked again is another.
    assert!((1..=2).contains(&lines.len()), "{lines:#?}");
    assert!(
        lines[0].to_lowercase().contains("refused"),
        "the cause is missing: {}",
        lines[0]
    );
    assert!(mount.count("/errors") >= 2, "{:#}", mount.status());

    setup.registry.restart();
    setup.sample.assert_right(mount.dir());
}

#[test]
fn a_frozen_registry_costs_errors_in_time_and_hangs_nobody_else() {
    let setup = Setup::new("frozen");
    let other = Registry::start(setup.work.join("other-registry"));
    other.push(&setup.sample.layout, "v1", "app:v1");
    setup.lazyimg.convert(&other.reference("app:v1"));
    let frozen = setup.mount(&setup.registry.reference("app:v1"), "frozen");
    let good_sample = Sample::new(&setup.work.dir("good"), 99, 12);
    let good_reference = other.push(&good_sample.layout, "v1", "good:v1");
    setup.lazyimg.convert(&good_reference);
    let good = setup.mount(&good_reference, "good-mnt");
    let large = setup.large();
    setup.sample.check(frozen.dir(), large[0]).unwrap();

    setup.registry.freeze();
    let stuck: Vec<_> = large[1..]
        .iter()
        .map(|file| frozen.join(file))
        .map(|path| std::thread::spawn(move || assert_fails_in_time(&path)))
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    // Same daemon, another registry; and what is cached of the frozen one.
    let timed = |what: &dyn Fn()| {
        let started = Instant::now();
        what();
        started.elapsed()
    };
    let other = timed(&|| good_sample.assert_right(good.dir()));
    lazyimg_tests::sample::forget(&frozen.join(large[0]));
    let cached = timed(&|| setup.sample.check(frozen.dir(), large[0]).unwrap());
    let status = timed(&|| drop(setup.lazyimg.status()));
    for reader in stuck {
        let waited = reader
            .join()
            .expect("every read of the frozen registry fails in time");
        assert!(
            waited > Duration::from_millis(500),
            "it was not stuck: {waited:?}"
        );
    }
    assert!(
        other.max(cached).max(status) < SLACK,
        "others waited: another registry's image {other:?}, cached reads {cached:?}, status {status:?}"
    );
    setup.registry.thaw();
    setup.sample.assert_right(frozen.dir());
}

#[test]
fn passing_faults_of_the_registry_are_not_seen_by_readers() {
    let setup = Setup::new("faults");
    let proxy = Proxy::start(setup.registry.port());
    let faults = [
        Fault::Status(503),
        Fault::Status(500),
        Fault::Status(429),
        Fault::Close,
        Fault::Truncate(1000),
        Fault::Truncate(0),
        Fault::Flip(5000),
        Fault::Delay(300),
    ];
    for fault in faults {
        let mount = setup.mount(&proxy.reference("app:v1"), "mnt");
        // Wrong bytes are worth one more request, not a policy of them.
        let times = if matches!(fault, Fault::Flip(_)) {
            1
        } else {
            2
        };
        proxy.set_times(fault, Target::Blobs, times);
        let unreadable = setup.sample.unreadable(mount.dir());
        assert_eq!(
            unreadable,
            Vec::new(),
            "after {fault:?}; log: {}",
            setup.lazyimg.log()
        );
        if matches!(fault, Fault::Flip(_)) {
            assert!(
                mount.count("/stats/tiers/0/corrupt") >= 1,
                "{:#}",
                mount.status()
            );
        }
        mount.umount();
        setup.lazyimg.stop();
        std::fs::remove_dir_all(setup.lazyimg.cache()).unwrap();
    }
}

#[test]
fn lasting_faults_are_errors_in_time_never_wrong_bytes_and_gone_with_the_fault() {
    let setup = Setup::new("lasting");
    let proxy = Proxy::start(setup.registry.port());
    let mount = setup.mount(&proxy.reference("app:v1"), "mnt");
    let large = setup.large();
    let faults = [
        Fault::Status(503),
        Fault::Close,
        Fault::Truncate(777),
        Fault::Stall(0),
        Fault::Stall(999),
        Fault::Status(404),
    ];
    for (fault, file) in faults.iter().zip(&large) {
        proxy.set(*fault, Target::Reads);
        assert_fails_in_time(&mount.join(file));
        proxy.heal();
        lazyimg_tests::process::wait_for("reads work again", Duration::from_secs(10), || {
            setup.sample.check(mount.dir(), file).is_ok()
        });
    }
    // Every answer damaged: never a byte of it reaches a reader.
    proxy.set(Fault::Flip(20), Target::Blobs);
    setup.sample.unreadable(mount.dir());
    proxy.heal();
    setup.sample.assert_right(mount.dir());
}

#[test]
fn a_mount_whose_registry_is_down_or_frozen_fails_with_exit_code_5() {
    let mut setup = Setup::new("mount-down");
    let reference = setup.registry.reference("app:v1");
    let at = setup.work.dir("mnt").to_string_lossy().into_owned();
    setup.registry.stop();
    let error = setup.lazyimg.fails(5, &["mount", &reference, &at]);
    assert!(
        error.contains(&setup.registry.host()),
        "which registry? {error}"
    );
    setup.lazyimg.fails(5, &["convert", &reference]);
    setup.lazyimg.fails(5, &["inspect", &reference]);
    setup.lazyimg.fails(5, &["verify", &reference]);
    setup.registry.restart();
    setup
        .sample
        .assert_right(setup.mount(&reference, "mnt").dir());
}

#[test]
fn verify_without_the_registry_calls_nothing_damaged() {
    let mut setup = Setup::new("verify-outage");
    let reference = setup.registry.reference("app:v1");
    let timeout = TIMEOUT.to_string();
    let mount = setup.lazyimg.mount_with(
        &reference,
        setup.work.join("mnt"),
        &["--read-timeout", timeout.as_str()],
    );
    let large = setup.sample.files.iter().find(|f| f.starts_with("large"));
    setup.sample.check(mount.dir(), large.unwrap()).unwrap();
    let dir = mount.dir().to_string_lossy().into_owned();
    setup.registry.stop();
    let offline = setup.lazyimg.run(&["verify", &dir, "--json"]);
    assert_eq!(offline.code, 5, "{offline}");
    let report: serde_json::Value = serde_json::from_slice(&offline.stdout).unwrap();
    assert_eq!(report["damaged"], 0, "{report:#}");
    assert!(report["cached"].as_u64().unwrap() > 0, "{report:#}");
    assert!(report["unreachable"].as_u64().unwrap() > 0, "{report:#}");
    assert!(
        !offline.stderr.contains("convert the image again"),
        "{offline}"
    );
    let told = setup.lazyimg.run(&["verify", &dir]).text();
    assert!(
        told.contains("could not be checked") && !told.contains("inodes"),
        "{told}"
    );
    setup.registry.restart();
    setup.lazyimg.ok(&["verify", &dir]);
}

#[test]
fn a_conversion_over_a_failing_registry_is_right_or_an_error() {
    let setup = Setup::new("convert-faults");
    let wanted = setup.lazyimg.convert(&setup.registry.reference("app:v1"));
    for fault in [Fault::Status(503), Fault::Close, Fault::Truncate(100_000)] {
        let proxy = Proxy::start(setup.registry.port());
        proxy.set_times(fault, Target::Reads, 2);
        let report = setup.lazyimg.convert(&proxy.reference("app:v1"));
        assert_eq!(report["artifact"], wanted["artifact"], "{fault:?}");
    }
    let proxy = Proxy::start(setup.registry.port());
    proxy.set(Fault::Flip(70_000), Target::Blobs);
    let error = setup
        .lazyimg
        .fails(6, &["convert", &proxy.reference("app:v1")]);
    assert!(
        error.contains("layer") && error.contains("sha256:"),
        "which layer? {error}"
    );
}
