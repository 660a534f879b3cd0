//! Failures in the log: each distinct cause once in a while, all of them counted.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::errno::Failure;

/// A cause that was logged is silent for so long: an outage of an hour leaves 12 lines, not one
/// for each of a million reads.
pub const REPEAT_AFTER: Duration = Duration::from_secs(300);

/// Causes remembered at once. More at one time would be noise; the oldest is forgotten.
pub const MAX_CAUSES: usize = 64;

/// Counts failures and decides which of them are logged.
#[derive(Debug)]
pub struct Faults {
    mount: String,
    total: AtomicU64,
    seen: Mutex<HashMap<String, Seen>>,
}

#[derive(Debug)]
struct Seen {
    logged: Instant,
    silent: u64,
}

impl Faults {
    /// For the mount of this name (its directory), which begins every line.
    pub fn new(mount: impl Into<String>) -> Self {
        Self {
            mount: mount.into(),
            total: AtomicU64::new(0),
            seen: Mutex::default(),
        }
    }

    /// Requests answered with an error since the mount began.
    pub fn total(&self) -> u64 {
        self.total.load(Relaxed)
    }

    /// Counts a failure of `operation` and logs it unless its cause was logged lately.
    pub fn record(&self, operation: &str, failure: &Failure) {
        self.total.fetch_add(1, Relaxed);
        self.log(operation, "answered with EIO", failure);
    }

    /// Logs a failure of `operation` that no request has seen, unless its cause was logged lately.
    /// `outcome`: what follows from it.
    pub fn log(&self, operation: &str, outcome: &str, failure: &Failure) {
        if let Some(silent) = self.due(failure.cause(), Instant::now()) {
            tracing::warn!(
                mount = %self.mount,
                operation,
                unlogged_before = silent,
                "{outcome}: {failure}"
            );
        }
    }

    /// How many failures of this cause were not logged since the last line, if a line is due now.
    fn due(&self, cause: String, now: Instant) -> Option<u64> {
        let mut seen = self.seen.lock();
        if let Some(entry) = seen.get_mut(&cause) {
            if now.duration_since(entry.logged) < REPEAT_AFTER {
                entry.silent += 1;
                return None;
            }
            entry.logged = now;
            return Some(std::mem::take(&mut entry.silent));
        }
        if seen.len() >= MAX_CAUSES
            && let Some(oldest) = seen
                .iter()
                .min_by_key(|(_, s)| s.logged)
                .map(|(c, _)| c.clone())
        {
            seen.remove(&oldest);
        }
        seen.insert(
            cause,
            Seen {
                logged: now,
                silent: 0,
            },
        );
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_logged_once_and_again_after_a_while() {
        let faults = Faults::new("m");
        let now = Instant::now();
        assert_eq!(faults.due("a".into(), now), Some(0));
        assert_eq!(faults.due("a".into(), now), None);
        assert_eq!(faults.due("b".into(), now), Some(0));
        assert_eq!(faults.due("a".into(), now + REPEAT_AFTER), Some(1));
    }

    #[test]
    fn the_memory_of_causes_is_bounded() {
        let faults = Faults::new("m");
        let now = Instant::now();
        for i in 0..10 * MAX_CAUSES {
            assert_eq!(faults.due(i.to_string(), now), Some(0));
        }
        assert!(faults.seen.lock().len() <= MAX_CAUSES);
    }
}
