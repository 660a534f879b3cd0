//! Admission: when reads in flight are slow, new mounts wait or are refused; running ones go first.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Store;

/// How often those who wait look.
const LOOK: Duration = Duration::from_millis(25);
/// Ended fetches that are remembered, and for how long.
const REMEMBERED: usize = 64;
const RECENT: Duration = Duration::from_secs(10);

/// When a host counts as overloaded. Of all three: many reads under way, half of them slow, and the
/// oldest slow too.
#[derive(Debug, Clone)]
pub struct AdmissionOptions {
    /// Fetches for readers under way, over all mounts, below which the host is never overloaded.
    /// 0: mounts are always admitted.
    pub busy: usize,
    /// A fetch that takes longer is slow. It is compared with the median of the fetches under way
    /// (their age) and of those that ended in the last 10 s (their duration).
    pub slow: Duration,
}

impl Default for AdmissionOptions {
    fn default() -> Self {
        Self {
            busy: 8,
            slow: Duration::from_secs(2),
        }
    }
}

/// Why a mount was not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "this host is overloaded: {under_way} reads wait for their chunks, the oldest for {oldest:.1?}, half of them longer than {median:.1?}; mounts that run go first. Try again later, or see `lazyimg status` for the tier that is slow"
)]
pub struct Overloaded {
    /// Fetches for readers under way.
    pub under_way: usize,
    /// The age of the oldest.
    pub oldest: Duration,
    /// Half of them, and of those that ended lately, took longer.
    pub median: Duration,
}

/// The right to open one more mount.
#[derive(Debug)]
#[must_use = "a mount that was not admitted must not be opened"]
pub struct Admitted {
    /// How long that took.
    pub waited: Duration,
}

/// The fetches for readers of a host.
pub struct Admission {
    options: AdmissionOptions,
    state: Mutex<State>,
    /// Who waits stands in line: all at once would be the next overload.
    line: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    next: u64,
    under_way: BTreeMap<u64, Instant>,
    ended: VecDeque<(Instant, Duration)>,
}

/// A fetch under way, until dropped.
pub struct Counted {
    admission: Arc<Admission>,
    number: u64,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut state = self.admission.state.lock();
        if let Some(begun) = state.under_way.remove(&self.number) {
            if state.ended.len() >= REMEMBERED {
                state.ended.pop_front();
            }
            let now = Instant::now();
            state.ended.push_back((now, now - begun));
        }
    }
}

impl Admission {
    pub fn new(options: AdmissionOptions) -> Self {
        Self {
            options,
            state: Mutex::default(),
            line: tokio::sync::Mutex::default(),
        }
    }

    /// Notes that a fetch for readers has begun.
    pub fn began(self: &Arc<Self>) -> Counted {
        let mut state = self.state.lock();
        let number = state.next;
        state.next += 1;
        state.under_way.insert(number, Instant::now());
        drop(state);
        Counted {
            admission: Arc::clone(self),
            number,
        }
    }

    /// What is wrong with the host at `now`, if something is.
    pub fn overload(&self, now: Instant) -> Option<Overloaded> {
        let mut state = self.state.lock();
        if self.options.busy == 0 || state.under_way.len() < self.options.busy {
            return None;
        }
        let age = |since: &Instant| now.saturating_duration_since(*since);
        let oldest = state.under_way.values().next().map(age)?;
        if oldest < self.options.slow {
            return None;
        }
        state.ended.retain(|(ended, _)| age(ended) < RECENT);
        let mut times: Vec<Duration> = state.under_way.values().map(age).collect();
        times.extend(state.ended.iter().map(|(_, took)| *took));
        let middle = (times.len() - 1) / 2;
        let median = *times.select_nth_unstable(middle).1;
        (median >= self.options.slow).then_some(Overloaded {
            under_way: state.under_way.len(),
            oldest,
            median,
        })
    }
}

impl Store {
    /// Asks whether one more image may be mounted: at once, or within `wait` when reads in flight are
    /// slow. Call it before anything is fetched for the mount. Reads of running mounts never ask.
    ///
    /// # Errors
    /// [`Overloaded`] when the time is up.
    pub async fn admit(&self, wait: Duration) -> Result<Admitted, Overloaded> {
        let admission = &self.host.admission;
        let begun = Instant::now();
        let Some(overloaded) = admission.overload(begun) else {
            return Ok(Admitted {
                waited: Duration::ZERO,
            });
        };
        let in_line = async {
            let _turn = admission.line.lock().await;
            loop {
                // First: the one before us has only just begun.
                tokio::time::sleep(LOOK).await;
                if admission.overload(Instant::now()).is_none() {
                    return;
                }
            }
        };
        match tokio::time::timeout(wait, in_line).await {
            Ok(()) => Ok(Admitted {
                waited: begun.elapsed(),
            }),
            Err(_) => Err(admission.overload(Instant::now()).unwrap_or(overloaded)),
        }
    }

    /// What is wrong with the host now, if something is: for `status`.
    pub fn overload(&self) -> Option<Overloaded> {
        self.host.admission.overload(Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission() -> Arc<Admission> {
        Arc::new(Admission::new(AdmissionOptions::default()))
    }

    const SLOW: Duration = Duration::from_secs(3);

    #[test]
    fn many_slow_reads_are_an_overload_and_few_or_fast_ones_are_not() {
        let admission = admission();
        let mut reads: Vec<_> = (0..7).map(|_| admission.began()).collect();
        let now = Instant::now();
        assert_eq!(admission.overload(now + SLOW), None, "few");
        reads.push(admission.began());
        assert_eq!(admission.overload(Instant::now()), None, "fast");
        let found = admission.overload(Instant::now() + SLOW).unwrap();
        assert_eq!(found.under_way, 8);
        assert!(found.oldest >= SLOW && found.median >= SLOW);
        let text = found.to_string();
        assert!(
            text.contains("8 reads wait") && text.contains("lazyimg status"),
            "{text}"
        );
        drop(reads);
        assert_eq!(admission.overload(Instant::now() + SLOW), None, "over");
    }

    #[test]
    fn slow_reads_among_many_that_ended_fast_are_no_overload() {
        let admission = admission();
        for _ in 0..100 {
            drop(admission.began());
        }
        let reads: Vec<_> = (0..8).map(|_| admission.began()).collect();
        assert_eq!(admission.overload(Instant::now() + SLOW), None);
        // What ended long ago says nothing any more.
        assert!(admission.overload(Instant::now() + RECENT * 2).is_some());
        drop(reads);
    }

    #[test]
    fn a_bound_of_zero_admits_always() {
        let admission = Arc::new(Admission::new(AdmissionOptions {
            busy: 0,
            ..AdmissionOptions::default()
        }));
        let _reads: Vec<_> = (0..100).map(|_| admission.began()).collect();
        assert_eq!(admission.overload(Instant::now() + SLOW), None);
    }
}
