//! What the host cache keeps when somebody reads a large image once, beside plain LRU.
//!
//! One trace is replayed through the real cache and through a simulated LRU of the same bytes: starts
//! of images whose popularity is Zipf's, and three scans of many chunks that nobody reads again. The
//! cache is that of the mission at a 32nd of its size, with records of 16 KiB for chunks of 512 KiB:
//! 2 GiB of cache, scans of 6 GiB.

use std::num::NonZeroUsize;

use bytes::Bytes;
use lazyimg_chunkstore::{CacheOptions, HostCache};
use lazyimg_convergent::ChunkId;
use lru::LruCache;

use crate::error::{BenchError, io};
use crate::report::{Report, Row, Table};
use crate::stats::Samples;
use crate::suite::Bench;

const BENCH: &str = "eviction: starts of images, and scans that nobody repeats";

/// Length of a record, in bytes: a 32nd of a usual chunk.
const RECORD: usize = 16 << 10;

/// Bound of both caches, in bytes.
const CACHE: u64 = 64 << 20;

/// Images that are started.
const IMAGES: u64 = 40;

/// Images that share one base.
const FAMILY: u64 = 10;

/// Chunks of a base and of an image that a start reads.
const BASE: u64 = 120;
const OWN: u64 = 80;

/// Starts before the first scan, between scans and after the last.
const STARTS: usize = 300;

/// Starts that count as "after a scan".
const AFTER: usize = 40;

/// Chunks of a scan: 6 GiB of 512 KiB.
const SCAN: u64 = 12_288;

const SCANS: u64 = 3;

/// One step of the trace.
enum Step {
    Start(u64),
    Scan(u64),
}

/// Runs the bench.
pub fn run(bench: &Bench) -> Result<Report, BenchError> {
    let trace = trace();
    let dir = bench.dir.join("eviction");
    let options = CacheOptions {
        min_free_bytes: Some(0),
        ..CacheOptions::new(CACHE)
    };
    let cache = HostCache::open(&dir, options)
        .map_err(|e| BenchError::Setup(format!("the host cache: {e}")))?;
    let ours = replay(&trace, &mut Ours(&cache));
    cache.close();
    std::fs::remove_dir_all(&dir).map_err(io("the cache of the bench"))?;
    let most = NonZeroUsize::new(CACHE as usize / RECORD).unwrap_or(NonZeroUsize::MIN);
    let lru = replay(&trace, &mut Plain(LruCache::new(most)));

    let one = |share: f64| {
        let mut samples = Samples::default();
        samples.push(share * 100.0);
        samples
    };
    let row = |what: &str, ours: Share, lru: Share| {
        Row::new(BENCH, what, "% hits", &one(ours.rate())).peer("plain LRU", &one(lru.rate()))
    };
    let cells = |name: &str, t: &Tally| {
        let percent = |s: Share| format!("{:.1}", s.rate() * 100.0);
        vec![
            name.to_owned(),
            percent(t.usual),
            percent(t.after),
            (t.usual.missed + t.after.missed).to_string(),
        ]
    };
    Ok(Report {
        facts: Vec::new(),
        rows: vec![
            row("starts, undisturbed", ours.usual, lru.usual),
            row("the 40 starts after each scan", ours.after, lru.after).ratio_at_least(1.0),
        ],
        tables: vec![Table {
            bench: BENCH,
            title: format!(
                "{BENCH}: {IMAGES} images of {} chunks, cache of {} chunks, {SCANS} scans of {SCAN}",
                BASE + OWN,
                CACHE / RECORD as u64
            ),
            columns: [
                "policy",
                "hits, undisturbed, %",
                "hits after a scan, %",
                "chunks fetched for starts",
            ]
            .map(str::to_owned)
            .to_vec(),
            rows: vec![cells("lazyimg", &ours), cells("plain LRU", &lru)],
        }],
    })
}

/// The steps, the same in every run.
fn trace() -> Vec<Step> {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let weights: Vec<f64> = (1..=IMAGES).map(|rank| 1.0 / rank as f64).collect();
    let sum: f64 = weights.iter().sum();
    let mut steps = Vec::new();
    for scan in 0..=SCANS {
        for _ in 0..STARTS {
            // xorshift64*.
            random ^= random >> 12;
            random ^= random << 25;
            random ^= random >> 27;
            let word = random.wrapping_mul(0x2545_f491_4f6c_dd1d);
            let mut left = (word >> 11) as f64 / (1_u64 << 53) as f64 * sum;
            let image = weights.iter().position(|w| {
                left -= w;
                left < 0.0
            });
            steps.push(Step::Start(image.unwrap_or(0) as u64));
        }
        if scan < SCANS {
            steps.push(Step::Scan(scan));
        }
    }
    steps
}

/// A cache that is asked for a chunk and given it when it does not have it; whether it had it.
trait Policy {
    fn touch(&mut self, chunk: u64) -> bool;
}

struct Ours<'a>(&'a HostCache);

impl Policy for Ours<'_> {
    fn touch(&mut self, chunk: u64) -> bool {
        // An id is only a name here: nobody opens these records.
        let mut id = [0; 32];
        id[..8].copy_from_slice(&chunk.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
        id[8..16].copy_from_slice(&chunk.to_be_bytes());
        let id = ChunkId(id);
        if self.0.get(&id).is_some() {
            return true;
        }
        while !self.0.put(&id, Bytes::from(vec![chunk as u8; RECORD])) {
            self.0.flush();
        }
        if chunk.is_multiple_of(64) {
            self.0.flush();
        }
        false
    }
}

struct Plain(LruCache<u64, ()>);

impl Policy for Plain {
    fn touch(&mut self, chunk: u64) -> bool {
        let hit = self.0.get(&chunk).is_some();
        if !hit {
            self.0.put(chunk, ());
        }
        hit
    }
}

#[derive(Clone, Copy, Default)]
struct Share {
    hit: u64,
    missed: u64,
}

impl Share {
    fn add(&mut self, hit: bool) {
        if hit {
            self.hit += 1;
        } else {
            self.missed += 1;
        }
    }

    fn rate(self) -> f64 {
        self.hit as f64 / (self.hit + self.missed).max(1) as f64
    }
}

/// Chunks of starts; those of scans count for nobody.
#[derive(Default)]
struct Tally {
    usual: Share,
    after: Share,
}

fn replay(trace: &[Step], policy: &mut dyn Policy) -> Tally {
    let mut tally = Tally::default();
    // The caches fill first: the first starts count for nobody.
    let (mut starts, mut since_scan) = (0, usize::MAX);
    for step in trace {
        match step {
            Step::Scan(scan) => {
                for n in 0..SCAN {
                    policy.touch((1 << 40) + scan * SCAN + n);
                }
                since_scan = 0;
            }
            Step::Start(image) => {
                starts += 1;
                let base = (0..BASE).map(|n| (image / FAMILY) * BASE + n);
                let own = (0..OWN).map(|n| (1 << 20) + image * OWN + n);
                for chunk in base.chain(own) {
                    let hit = policy.touch(chunk);
                    if since_scan < AFTER {
                        tally.after.add(hit);
                    } else if starts > STARTS / 2 {
                        tally.usual.add(hit);
                    }
                }
                since_scan = since_scan.saturating_add(1);
            }
        }
    }
    tally
}
