//! Faults on the wire between a host, the store and the registry: a right byte or an error in time.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use lazyimg_tests::process::wait_for;
use lazyimg_tests::proxy::{Request, Target};
use lazyimg_tests::sample::forget;
use lazyimg_tests::{Fault, Lazyimg, Mounted, Proxy, Registry, Sample, Store, WorkDir, say};

const EIO: i32 = 5;

/// `--read-timeout`, in seconds.
const TIMEOUT: u64 = 4;

/// What a busy machine may add to it.
const SLACK: Duration = Duration::from_secs(30);

/// How long a tier may be left alone after it has failed, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of a file that a test reads at once: one read for the kernel, so one deadline.
const PIECE: u64 = 4096;

/// What can happen on a wire. Offsets: nothing of an answer's body, the head of its first frame, the
/// middle of its first chunk.
const FAULTS: [Fault; 15] = [
    Fault::Status(429),
    Fault::Status(500),
    Fault::Status(503),
    Fault::Close,
    Fault::Reset(0),
    Fault::Reset(3000),
    Fault::Stall(0),
    Fault::Stall(3000),
    Fault::Truncate(0),
    Fault::Truncate(3000),
    Fault::Swap,
    Fault::Flip(0),
    Fault::Flip(6),
    Fault::Flip(500),
    Fault::Trickle(40),
];

struct Setup {
    converter: Lazyimg,
    store: Proxy,
    registry: Proxy,
    sample: Sample,
    reference: String,
    engine: Store,
    /// It serves as long as it is here.
    _upstream: Registry,
    work: WorkDir,
}

impl Setup {
    /// An image in a registry and in a store, each behind a proxy.
    fn new(name: &str) -> Self {
        let work = WorkDir::new(name);
        let sample = Sample::new(&work.dir("sample"), 71, 16);
        let upstream = Registry::start(work.join("registry"));
        upstream.push(&sample.layout, "v1", "app:v1");
        let engine = Store::start(work.join("store"));
        let (store, registry) = (Proxy::start(engine.port()), Proxy::start(upstream.port()));
        let reference = registry.reference("app:v1");
        let converter = Lazyimg::new(work.join("converter"));
        converter.ok(&["convert", &reference, "--store", &engine.url()]);
        Self {
            converter,
            store,
            registry,
            sample,
            reference,
            engine,
            _upstream: upstream,
            work,
        }
    }

    /// A host that has never seen the image: keys, and nothing else.
    fn host(&self, name: &str) -> Lazyimg {
        let host = Lazyimg::new(self.work.join(name));
        host.copy_secrets_from(&self.converter);
        host
    }

    fn mount<'a>(&self, host: &'a Lazyimg) -> Mounted<'a> {
        let (url, timeout) = (self.store.url(), TIMEOUT.to_string());
        let flags = [
            "--store",
            &url,
            "--read-timeout",
            &timeout,
            "--hot-bytes",
            "0",
        ];
        host.mount_with(&self.reference, host.home().join("mnt"), &flags)
    }

    fn heal(&self) {
        self.store.heal();
        self.registry.heal();
    }

    /// Nothing is on the host any more: reads go to the tiers.
    fn forget_all(&self, host: &Lazyimg, mount: &Mounted<'_>) {
        host.ok(&["cache", "trim", "--to", "0"]);
        for file in &self.sample.files {
            forget(&mount.join(file));
        }
    }

    /// Waits until the store gives chunks again: one that has failed is left alone for a while.
    fn wait_for_the_store(&self, host: &Lazyimg, mount: &Mounted<'_>) {
        let before = mount.count("/tiers/store/chunks");
        wait_for("the store is used again", PATIENCE, || {
            self.forget_all(host, mount);
            self.sample
                .check(mount.dir(), &self.sample.files[7])
                .is_ok()
                && mount.count("/tiers/store/chunks") > before
        });
    }

    /// Reads a piece of every file that has several chunks and of a few others, all at once. Gives how
    /// many could not be read; panics at a wrong byte, another error than EIO, or one that comes late.
    #[track_caller]
    fn read_pieces(&self, mount: &Mounted<'_>, seed: u64) -> usize {
        let one = |at: usize, file: &Path| -> bool {
            let (truth, read) = (self.sample.source.join(file), mount.join(file));
            let truth = std::fs::read(truth).unwrap();
            let mut random = fastrand::Rng::with_seed(seed * 1000 + at as u64);
            let start = random.u64(..truth.len() as u64);
            let end = truth.len().min((start + PIECE) as usize);
            let wanted = &truth[start as usize..end];
            let mut got = vec![0; wanted.len()];
            let begun = Instant::now();
            let file = File::open(&read).unwrap();
            let result = file.read_exact_at(&mut got, start);
            let took = begun.elapsed();
            assert!(
                took < Duration::from_secs(TIMEOUT) + SLACK,
                "{}: {result:?} took {took:?}",
                read.display()
            );
            match result {
                Ok(()) => assert!(
                    wanted == got,
                    "WRONG BYTES in {} from {start}",
                    read.display()
                ),
                Err(error) => assert_eq!(error.raw_os_error(), Some(EIO), "{error}"),
            }
            wanted == got
        };
        let chosen = self.sample.files.iter().enumerate();
        let chosen = chosen.filter(|(at, file)| file.starts_with("large") || at % 5 == 0);
        std::thread::scope(|scope| {
            let read = |(at, file): (usize, &std::path::PathBuf)| {
                let file = file.clone();
                scope.spawn(move || one(at, &file))
            };
            let readers: Vec<_> = chosen.map(read).collect();
            let right = |reader: std::thread::ScopedJoinHandle<'_, bool>| reader.join().unwrap();
            readers
                .into_iter()
                .map(right)
                .filter(|right| !right)
                .count()
        })
    }
}

#[test]
fn whatever_happens_on_the_wire_to_the_store_costs_no_reader_an_error_or_a_wrong_byte() {
    let setup = Setup::new("faults-store");
    let host = setup.host("host");
    let mount = setup.mount(&host);
    setup.sample.assert_right(mount.dir());
    for (seed, fault) in FAULTS.into_iter().enumerate() {
        setup.wait_for_the_store(&host, &mount);
        setup.forget_all(&host, &mount);
        let (hit, begun) = (setup.store.faulted(), Instant::now());
        setup.store.set(fault, Target::Reads);
        let failed = setup.read_pieces(&mount, seed as u64);
        assert_eq!(failed, 0, "{fault:?}: {:#}\n{}", mount.status(), host.log());
        let hit = setup.store.faulted() - hit;
        assert!(hit > 0, "{fault:?} has not happened");
        say!("{fault:?}: {hit} times, {:.1?}", begun.elapsed());
        setup.heal();
    }
    // Not asserted: `errors` of the mount. It counts what the kernel asked ahead of a reader too, in the
    // first half of the read timeout, and what came in the second half.
    setup.wait_for_the_store(&host, &mount);
    setup.forget_all(&host, &mount);
    setup.sample.assert_right(mount.dir());
}

#[test]
fn whatever_happens_on_all_wires_is_right_bytes_or_eio_in_time_and_heals_without_a_remount() {
    let setup = Setup::new("faults-both");
    let host = setup.host("host");
    let mount = setup.mount(&host);
    setup.sample.assert_right(mount.dir());
    for (seed, fault) in FAULTS.into_iter().enumerate() {
        setup.wait_for_the_store(&host, &mount);
        setup.forget_all(&host, &mount);
        let (hit, begun) = (
            setup.store.faulted() + setup.registry.faulted(),
            Instant::now(),
        );
        setup.store.set(fault, Target::Reads);
        setup.registry.set(fault, Target::Reads);
        let failed = setup.read_pieces(&mount, seed as u64);
        let hit = setup.store.faulted() + setup.registry.faulted() - hit;
        assert!(hit > 1, "{fault:?} has happened {hit} times");
        say!(
            "{fault:?}: {hit} times, {failed} errors, {:.1?}",
            begun.elapsed()
        );
        setup.heal();
        // No remount, nothing but time.
        wait_for("all reads are right again", PATIENCE, || {
            setup.read_pieces(&mount, seed as u64) == 0
        });
    }
    setup.wait_for_the_store(&host, &mount);
    setup.forget_all(&host, &mount);
    setup.sample.assert_right(mount.dir());
}

/// Tokens of a fresh retry budget (`chunkstore/src/guard/retry.rs`).
const BUDGET: f64 = 20.0;
/// What a success puts back.
const PER_SUCCESS: f64 = 0.2;
/// What a second puts back.
const PER_SECOND: f64 = 0.5;

#[test]
fn in_a_storm_of_503_the_registry_gets_no_more_requests_than_ranges_and_retry_budget() {
    let mut setup = Setup::new("faults-storm");
    let host = setup.host("host");
    let mount = setup.mount(&host);
    // Successes before the storm: the budget is full at its begin, and cannot be more than full.
    setup.sample.assert_right(mount.dir());
    setup.forget_all(&host, &mount);
    setup.engine.kill();
    let before = setup.registry.seen().len();
    setup.registry.set(Fault::Status(503), Target::Reads);
    let begun = Instant::now();
    let reads = 6;
    let mut failed = 0;
    for seed in 0..reads {
        failed += setup.read_pieces(&mount, 100 + seed);
    }
    assert!(
        failed > 20,
        "only {failed} reads failed: {:#}",
        mount.status()
    );

    let storm: Vec<Request> = setup.registry.seen().split_off(before);
    let elapsed = begun.elapsed().as_secs_f64();
    let distinct: HashSet<_> = storm.iter().collect();
    // Each distinct request may go out once, which needs no token. Whatever goes out beyond that took a
    // token: there were 20, each of the `successes` in the storm (none: the proxy answers all) put back
    // a fifth, each second a half. One more for the clock's grain.
    let successes = 0.0;
    let tokens = BUDGET + PER_SUCCESS * successes + PER_SECOND * elapsed;
    let most = distinct.len() as f64 + tokens + 1.0;
    say!(
        "{failed} reads failed in {elapsed:.1} s; {} requests, {} distinct; {most:.1} are allowed",
        storm.len(),
        distinct.len()
    );
    assert!(!storm.is_empty(), "nobody asked the registry");
    assert!(storm.len() as f64 <= most, "{storm:#?}");
    let health = mount.status()["tiers"]["registry"]["health"].clone();
    let retries = health["retries"].as_u64().unwrap();
    assert!(retries as f64 <= tokens + 1.0, "{health:#}");

    // The storm is over, and nobody needs a remount.
    setup.heal();
    wait_for("all reads are right again", PATIENCE, || {
        setup.sample.unreadable(mount.dir()).is_empty()
    });
    setup.engine.restart();
    setup.wait_for_the_store(&host, &mount);
    setup.sample.assert_right(mount.dir());
}
