//! How long things take: a histogram of bounded memory, and the recent past.
//!
//! Both count in buckets that are an eighth of a power of two wide, so a percentile is at most an
//! eighth too high, from a microsecond to nineteen hours.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// Buckets for each doubling, as a power of two.
const STEP_BITS: u32 = 3;
const STEPS: usize = 1 << STEP_BITS;
/// Longer times count as this many bits of microseconds.
const LONGEST_BITS: u32 = 36;
const BUCKETS: usize = STEPS + (LONGEST_BITS - STEP_BITS) as usize * STEPS;

fn bucket(micros: u64) -> usize {
    let micros = micros.min((1 << LONGEST_BITS) - 1);
    if micros < STEPS as u64 {
        return micros as usize;
    }
    let doubling = micros.ilog2() - STEP_BITS;
    let step = (micros >> doubling) as usize - STEPS;
    STEPS + doubling as usize * STEPS + step
}

/// The longest time that falls into a bucket, in microseconds.
fn longest_of(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64;
    }
    let doubling = (bucket - STEPS) / STEPS;
    let step = (bucket - STEPS) % STEPS;
    (((STEPS + step + 1) as u64) << doubling) - 1
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The bucket of the `quantile` (0..=1) of `counts`.
fn at_quantile(counts: impl Iterator<Item = u64>, total: u64, quantile: f64) -> usize {
    let rank = ((total as f64 * quantile).ceil() as u64).max(1);
    let mut seen = 0;
    let mut last = 0;
    for (bucket, count) in counts.enumerate() {
        seen += count;
        if count > 0 {
            last = bucket;
        }
        if seen >= rank {
            return bucket;
        }
    }
    last
}

/// All times since the beginning, in 2 KiB. Many threads may add at once.
pub(crate) struct Histogram {
    counts: Box<[AtomicU64]>,
    max: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            max: AtomicU64::new(0),
        }
    }
}

impl std::fmt::Debug for Histogram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.snapshot().fmt(f)
    }
}

impl Histogram {
    /// Adds one time.
    pub fn add(&self, time: Duration) {
        let micros = micros(time);
        self.counts[bucket(micros)].fetch_add(1, Relaxed);
        self.max.fetch_max(micros, Relaxed);
    }

    /// The percentiles now.
    pub fn snapshot(&self) -> LatencySnapshot {
        let counts: Vec<u64> = self.counts.iter().map(|c| c.load(Relaxed)).collect();
        let total = counts.iter().sum();
        if total == 0 {
            return LatencySnapshot::default();
        }
        let max_us = self.max.load(Relaxed);
        let at = |quantile| {
            let bucket = at_quantile(counts.iter().copied(), total, quantile);
            longest_of(bucket).min(max_us)
        };
        LatencySnapshot {
            count: total,
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us,
        }
    }
}

/// Percentiles of times, in microseconds; each at most an eighth too high.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LatencySnapshot {
    /// How many times were measured.
    pub count: u64,
    /// Half of them were at most this.
    pub p50_us: u64,
    /// Nine of ten were.
    pub p90_us: u64,
    /// 99 of 100 were.
    pub p99_us: u64,
    /// 999 of 1,000 were.
    pub p999_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// Times that [`Recent`] remembers with full weight; then all weights are halved.
const REMEMBERED: u32 = 512;
/// With fewer times than this nothing is known.
const ENOUGH: u32 = 20;

/// The last few hundred times: older ones count less and less.
pub(crate) struct Recent {
    counts: Mutex<(Box<[u32]>, u32)>,
}

impl Default for Recent {
    fn default() -> Self {
        Self {
            counts: Mutex::new((vec![0; BUCKETS].into(), 0)),
        }
    }
}

impl Recent {
    /// Adds one time.
    pub fn add(&self, time: Duration) {
        let mut counts = self.counts.lock();
        let (counts, total) = &mut *counts;
        counts[bucket(micros(time))] += 1;
        *total += 1;
        if *total >= REMEMBERED {
            for count in counts.iter_mut() {
                *count /= 2;
            }
            *total = counts.iter().sum();
        }
    }

    /// The `quantile` (0..=1) of the recent past; `None` when too little is known.
    pub fn quantile(&self, quantile: f64) -> Option<Duration> {
        let counts = self.counts.lock();
        let (counts, total) = &*counts;
        if *total < ENOUGH {
            return None;
        }
        let counts = counts.iter().map(|c| u64::from(*c));
        let bucket = at_quantile(counts, u64::from(*total), quantile);
        Some(Duration::from_micros(longest_of(bucket)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_time_lies_in_its_bucket_and_at_most_an_eighth_below_its_end(micros in 0u64..1 << 36) {
            let end = longest_of(bucket(micros));
            prop_assert!(end >= micros);
            prop_assert!(end - micros <= micros / 8);
            prop_assert!(bucket(micros) < BUCKETS);
        }

        #[test]
        fn percentiles_are_those_of_a_sorted_list_within_an_eighth(mut times in prop::collection::vec(0u64..10_000_000, 1..300)) {
            let histogram = Histogram::default();
            for time in &times {
                histogram.add(Duration::from_micros(*time));
            }
            times.sort_unstable();
            let exact = |q: f64| times[((times.len() as f64 * q).ceil() as usize).max(1) - 1];
            let s = histogram.snapshot();
            prop_assert_eq!((s.count, s.max_us), (times.len() as u64, *times.last().unwrap()));
            for (found, q) in [(s.p50_us, 0.5), (s.p90_us, 0.9), (s.p99_us, 0.99), (s.p999_us, 0.999)] {
                prop_assert!(found >= exact(q) && found <= exact(q) + exact(q) / 8, "{} {}", found, exact(q));
            }
        }
    }

    #[test]
    fn the_longest_time_of_all_has_a_bucket() {
        let histogram = Histogram::default();
        histogram.add(Duration::MAX);
        assert_eq!(histogram.snapshot().max_us, u64::MAX);
        assert_eq!(histogram.snapshot().count, 1);
    }

    #[test]
    fn the_recent_past_forgets_and_knows_when_it_knows_too_little() {
        let recent = Recent::default();
        for _ in 0..ENOUGH - 1 {
            recent.add(Duration::from_secs(1));
        }
        assert_eq!(recent.quantile(0.5), None);
        recent.add(Duration::from_secs(1));
        assert!(recent.quantile(0.5).unwrap() >= Duration::from_secs(1));
        for _ in 0..5_000 {
            recent.add(Duration::from_millis(1));
        }
        assert!(recent.quantile(0.95).unwrap() < Duration::from_millis(2));
    }
}
