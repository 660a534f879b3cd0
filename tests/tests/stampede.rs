//! Two hundred mounts that start at once against a cold store hardly bother the registry.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may, and what it prints is of interest when it fails"
)]

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use lazyimg_tests::process::wait_for;
use lazyimg_tests::proxy::Request;
use lazyimg_tests::{Lazyimg, Proxy, Registry, Sample, Store, WorkDir, say};

const HOSTS: usize = 10;
const MOUNTS_PER_HOST: usize = 20;

/// Files that each mount reads.
const FILES: usize = 4;

/// What two busy cores may take for all of it.
const PATIENCE: Duration = Duration::from_secs(240);

/// The blob and the bytes of it that a request asks for; `None` unless it reads a blob.
fn range(request: &Request) -> Option<(String, String)> {
    let path = request.line.strip_prefix("GET ")?.split(' ').next()?;
    let whole = || "all of it".to_owned();
    let range = request.range.clone().unwrap_or_else(whole);
    let is_blob = path.contains("/blobs/");
    is_blob.then(|| (path.to_owned(), range))
}

/// First byte and the byte after the last of `bytes=FIRST-LAST`.
fn bounds(range: &str) -> Option<(u64, u64)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse::<u64>().ok()? + 1))
}

/// Bytes of these ranges, each byte of a blob once.
fn union(ranges: &HashSet<(String, String)>) -> u64 {
    let mut by_blob: HashMap<&str, Vec<(u64, u64)>> = HashMap::new();
    for (blob, range) in ranges {
        by_blob.entry(blob).or_default().extend(bounds(range));
    }
    let mut sum = 0;
    for pieces in by_blob.values_mut() {
        pieces.sort_unstable();
        let mut seen = 0;
        for (first, end) in pieces {
            sum += end.saturating_sub(seen.max(*first));
            seen = seen.max(*end);
        }
    }
    sum
}

/// Begins `lazyimg mount`, and waits for nothing.
fn begin(host: &Lazyimg, reference: &str, at: &Path, store: &str) -> Child {
    std::fs::create_dir_all(at).unwrap();
    let at = at.to_string_lossy();
    host.command(&["mount", reference, &at, "--store", store])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Requests for each distinct range, at most.
const MOST: f64 = 1.1;

#[test]
fn two_hundred_mounts_at_once_ask_the_registry_for_each_range_at_most_1_1_times() {
    // A chunk counts twice when whoever fetched it got no processor for longer than a lease is waited
    // for: on a machine that other work keeps from running, once more.
    let ratio = stampede("stampede");
    if ratio > MOST {
        let again = stampede("stampede-again");
        assert!(
            again <= MOST,
            "{ratio:.3}, then {again:.3} requests for each range"
        );
    }
}

/// Requests for each distinct range.
fn stampede(name: &str) -> f64 {
    let work = WorkDir::new(name);
    let sample = Sample::new(&work.dir("sample"), 61, 24);
    let registry = Registry::start(work.join("registry"));
    registry.push(&sample.layout, "v1", "app:v1");
    let proxy = Proxy::start(registry.port());
    let reference = proxy.reference("app:v1");
    let converter = Lazyimg::new(work.join("converter"));
    converter.convert(&reference);
    let store = Store::start(work.join("store"));
    let url = store.url();
    let host = |n| {
        let host = Lazyimg::new(work.join(format!("host{n}")));
        host.copy_secrets_from(&converter);
        host
    };
    let hosts: Vec<_> = (0..HOSTS).map(host).collect();
    let before = proxy.seen().len();

    let started = Instant::now();
    let mount = |n: usize| {
        let host = &hosts[n % HOSTS];
        let at = host.home().join(format!("mnt{}", n / HOSTS));
        let child = begin(host, &reference, &at, &url);
        (at, child)
    };
    // All of them run before the first is looked after.
    let mounts: Vec<_> = (0..HOSTS * MOUNTS_PER_HOST).map(mount).collect();
    std::thread::scope(|scope| {
        for (n, (at, mut child)) in mounts.into_iter().enumerate() {
            let (sample, host) = (&sample, &hosts[n % HOSTS]);
            scope.spawn(move || {
                let mut ended = None;
                wait_for("a mount is there", PATIENCE, || {
                    ended = child.try_wait().unwrap();
                    ended.is_some()
                });
                assert!(ended.is_some_and(|e| e.success()), "{}", host.log());
                // Hosts read much the same files, each in an order of its own.
                let mut random = fastrand::Rng::with_seed(n as u64);
                for file in random.choose_multiple(&sample.files, FILES) {
                    sample.check(&at, file).unwrap();
                }
            });
        }
    });
    let took = started.elapsed();

    let seen = proxy.seen().split_off(before);
    let asked: Vec<_> = seen.iter().filter_map(range).collect();
    let distinct: HashSet<_> = asked.iter().cloned().collect();
    let len = |(_, range): &(String, String)| bounds(range).map_or(0, |(first, end)| end - first);
    let fetched: u64 = asked.iter().map(len).sum();
    let (needed, ratio) = (union(&distinct), asked.len() as f64 / distinct.len() as f64);
    say!(
        "{} requests for {} distinct ranges: {ratio:.3} each; {fetched} bytes, of which {needed} different: {:.3} \
         each; {} requests in all, {took:.1?}",
        asked.len(),
        distinct.len(),
        fetched as f64 / needed as f64,
        seen.len(),
    );
    for host in &hosts {
        let tiers = &host.status()["mounts"][0]["tiers"];
        let (store, registry) = (&tiers["store"], &tiers["registry"]);
        println!(
            "store: {} chunks, errors {}, write-back {}, breaker {}; registry: {} chunks",
            store["chunks"],
            store["errors"],
            store["health"]["write_back"],
            store["health"]["origins"],
            registry["chunks"]
        );
    }
    assert!(
        needed > 1 << 20,
        "the registry was hardly asked: {asked:#?}"
    );
    let more_than_once: Vec<_> = distinct
        .iter()
        .map(|range| (asked.iter().filter(|one| *one == range).count(), range))
        .filter(|(times, _)| *times > 1)
        .collect();
    println!("asked for more than once: {more_than_once:#?}");
    ratio
}
