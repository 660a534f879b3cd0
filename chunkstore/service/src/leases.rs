//! Who brings what is missing: one asker holds a lease, the others wait for what it brings.
//!
//! Leases are in the memory of one process. They save work; nothing that is promised depends on them.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

/// How long one asker may take to bring what it was told to.
pub const LEASE: Duration = Duration::from_secs(10);

/// The most leases at a time. Beyond it everybody is told to bring what is missing.
pub const MAX_LEASES: usize = 100_000;

/// Leases on things named by `K`.
#[derive(Debug)]
pub struct Leases<K> {
    table: Mutex<Table<K>>,
    duration: Duration,
    most: usize,
}

#[derive(Debug)]
struct Table<K> {
    leases: HashMap<K, Lease>,
    /// In the order in which they end: all last equally long.
    ends: VecDeque<(Instant, K)>,
}

#[derive(Debug)]
struct Lease {
    ends: Instant,
    /// What it was for has come. The entry stays until the lease would have ended, for those who looked
    /// before it came and ask after.
    brought: bool,
    change: Arc<Notify>,
}

/// What one who looked in vain is told.
#[derive(Debug)]
pub enum Asked {
    /// To bring it: the lease is the asker's.
    Yours,
    /// It has come since: look again.
    Look,
    /// Somebody else is bringing it.
    Wait(Wait),
}

/// A place among those who wait for one lease.
#[derive(Debug)]
pub struct Wait {
    ends: Instant,
    change: std::pin::Pin<Box<tokio::sync::futures::OwnedNotified>>,
}

impl Wait {
    /// Waits until it came, the lease ended, or `deadline`; false at the deadline.
    pub async fn until(self, deadline: Instant) -> bool {
        let first = deadline.min(self.ends);
        tokio::select! {
            () = self.change => true,
            () = tokio::time::sleep_until(first) => Instant::now() < deadline,
        }
    }
}

impl<K: Clone + Eq + Hash> Default for Leases<K> {
    fn default() -> Self {
        Self::new(LEASE, MAX_LEASES)
    }
}

impl<K: Clone + Eq + Hash> Leases<K> {
    /// Leases of a duration, and how many there may be.
    pub fn new(duration: Duration, most: usize) -> Self {
        let table = Mutex::new(Table {
            leases: HashMap::new(),
            ends: VecDeque::new(),
        });
        Self {
            table,
            duration,
            most,
        }
    }

    /// Asks for a lease on something that is missing. `again`: the asker has looked since it was told
    /// to, and it is missing still.
    pub fn ask(&self, key: &K, again: bool) -> Asked {
        let now = Instant::now();
        let mut table = self.table.lock();
        table.forget_ended(now);
        match table.leases.get_mut(key) {
            Some(lease) if !lease.brought => {
                let mut change = Box::pin(Arc::clone(&lease.change).notified_owned());
                // From here on a notice reaches it, polled or not.
                change.as_mut().enable();
                let ends = lease.ends;
                Asked::Wait(Wait { ends, change })
            }
            Some(_) if !again => Asked::Look,
            Some(lease) => {
                // It came and went. The entry keeps its end: the order of ends must hold.
                lease.brought = false;
                Asked::Yours
            }
            None => {
                if table.leases.len() < self.most {
                    let ends = now + self.duration;
                    let lease = Lease {
                        ends,
                        brought: false,
                        change: Arc::new(Notify::new()),
                    };
                    table.leases.insert(key.clone(), lease);
                    table.ends.push_back((ends, key.clone()));
                }
                Asked::Yours
            }
        }
    }

    /// It has come: wakes all who wait for it.
    pub fn brought(&self, key: &K) {
        let mut table = self.table.lock();
        if let Some(lease) = table.leases.get_mut(key) {
            lease.brought = true;
            lease.change.notify_waiters();
        }
    }

    /// Leases that are held.
    pub fn held(&self) -> usize {
        let mut table = self.table.lock();
        table.forget_ended(Instant::now());
        table.leases.values().filter(|l| !l.brought).count()
    }
}

impl<K: Eq + Hash> Table<K> {
    fn forget_ended(&mut self, now: Instant) {
        while self.ends.front().is_some_and(|(ends, _)| *ends <= now) {
            let ended = self.ends.pop_front();
            if let Some(lease) = ended.and_then(|(_, key)| self.leases.remove(&key)) {
                lease.change.notify_waiters();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn in_seconds(n: u32) -> Instant {
        Instant::now() + SECOND * n
    }

    #[tokio::test(start_paused = true)]
    async fn one_asker_brings_it_and_the_others_are_woken_when_it_came() {
        let leases = Leases::default();
        assert!(matches!(leases.ask(&1, false), Asked::Yours));
        assert!(matches!(leases.ask(&2, false), Asked::Yours), "another one");
        let Asked::Wait(first) = leases.ask(&1, false) else {
            panic!("it is being brought")
        };
        let Asked::Wait(second) = leases.ask(&1, true) else {
            panic!("it is being brought")
        };
        // Before they wait: the notice must not be lost.
        leases.brought(&1);
        let begun = Instant::now();
        assert!(first.until(in_seconds(30)).await);
        assert!(second.until(in_seconds(30)).await);
        assert_eq!(begun.elapsed(), Duration::ZERO);
        assert_eq!(leases.held(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn who_looked_before_it_came_and_asks_after_is_told_to_look_again() {
        let leases = Leases::default();
        assert!(matches!(leases.ask(&1, false), Asked::Yours));
        leases.brought(&1);
        assert!(matches!(leases.ask(&1, false), Asked::Look));
        // It has gone again, and is brought again by one of two.
        assert!(matches!(leases.ask(&1, true), Asked::Yours));
        assert!(matches!(leases.ask(&1, true), Asked::Wait(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_ends_without_it_goes_to_one_of_those_who_wait() {
        let leases = Leases::default();
        assert!(matches!(leases.ask(&1, false), Asked::Yours));
        let waits = (0..3).map(|_| match leases.ask(&1, false) {
            Asked::Wait(wait) => wait,
            other => panic!("{other:?}"),
        });
        let deadline = in_seconds(30);
        for wait in waits.collect::<Vec<_>>() {
            assert!(wait.until(deadline).await, "before the deadline");
        }
        assert_eq!(leases.held(), 0);
        assert!(matches!(leases.ask(&1, true), Asked::Yours));
        assert!(matches!(leases.ask(&1, true), Asked::Wait(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_beyond_the_deadline() {
        let leases = Leases::default();
        assert!(matches!(leases.ask(&1, false), Asked::Yours));
        let Asked::Wait(wait) = leases.ask(&1, false) else {
            panic!("it is being brought")
        };
        let begun = Instant::now();
        assert!(!wait.until(in_seconds(3)).await);
        assert!(begun.elapsed() >= SECOND * 3 && begun.elapsed() < SECOND * 4);
    }

    #[tokio::test(start_paused = true)]
    async fn leases_are_bounded_in_number_and_forgotten_when_they_end() {
        let leases = Leases::new(SECOND, 2);
        for key in 0..100 {
            assert!(matches!(leases.ask(&key, false), Asked::Yours));
        }
        assert_eq!(leases.held(), 2);
        tokio::time::advance(SECOND).await;
        assert_eq!(leases.held(), 0);
        let table = leases.table.lock();
        assert!(table.leases.is_empty() && table.ends.is_empty());
    }
}
