//! A circuit breaker: an origin in trouble is left alone but for one probe now and then. Pure: the
//! caller brings the time.

use std::time::{Duration, Instant};

/// When a breaker opens and for how long.
#[derive(Debug, Clone)]
pub struct BreakerOptions {
    /// So many failures in a row open it.
    pub failures: u32,
    /// So many requests within the last seconds, of which half failed, open it too.
    pub rate_requests: u32,
    /// How long it stays open the first time. Each probe that fails doubles it.
    pub rest: Duration,
    /// The longest that it stays open between two probes.
    pub longest_rest: Duration,
}

impl Default for BreakerOptions {
    fn default() -> Self {
        Self {
            failures: 5,
            rate_requests: 20,
            rest: Duration::from_millis(250),
            longest_rest: Duration::from_secs(2),
        }
    }
}

/// Failure rates are of the last one to two of these.
const WINDOW: Duration = Duration::from_secs(5);
/// When a probe is under way, others are told to come back after this.
const PROBE_WISH: Duration = Duration::from_millis(100);
/// A probe of which nothing is heard for this long is taken for lost.
const PROBE_LOST: Duration = Duration::from_secs(60);

/// What a request is to the breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// One of many.
    Normal,
    /// The one that finds out whether the origin is back.
    Probe,
}

/// What a breaker looks like from outside.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BreakerState {
    /// Requests pass.
    #[default]
    Closed,
    /// Requests fail at once.
    Open,
    /// One request is finding out; the others fail at once.
    HalfOpen,
}

/// See the module.
#[derive(Debug)]
pub struct Breaker {
    options: BreakerOptions,
    state: State,
    openings: u64,
}

#[derive(Debug)]
enum State {
    Closed { in_a_row: u32, rate: Rate },
    Open { until: Instant, rest: Duration },
    Probing { since: Instant, rest: Duration },
}

/// Successes and failures of this window and of the one before.
#[derive(Debug)]
struct Rate {
    since: Instant,
    now: (u32, u32),
    before: (u32, u32),
}

impl Rate {
    fn new(now: Instant) -> Self {
        Self {
            since: now,
            now: (0, 0),
            before: (0, 0),
        }
    }

    fn note(&mut self, failed: bool, now: Instant) {
        let age = now.saturating_duration_since(self.since);
        if age >= WINDOW {
            self.before = if age < WINDOW * 2 { self.now } else { (0, 0) };
            self.now = (0, 0);
            self.since = now;
        }
        let slot = if failed {
            &mut self.now.1
        } else {
            &mut self.now.0
        };
        *slot = slot.saturating_add(1);
    }

    fn is_bad(&self, least: u32) -> bool {
        let good = self.now.0.saturating_add(self.before.0);
        let bad = self.now.1.saturating_add(self.before.1);
        bad >= good && good.saturating_add(bad) >= least
    }
}

impl Breaker {
    /// A closed one.
    pub fn new(options: BreakerOptions, now: Instant) -> Self {
        Self {
            options,
            state: State::Closed {
                in_a_row: 0,
                rate: Rate::new(now),
            },
            openings: 0,
        }
    }

    /// After which time to ask again; `None`: a request would pass now. Changes nothing.
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        match &self.state {
            State::Open { until, .. } if now < *until => Some(*until - now),
            State::Probing { since, .. } if now.saturating_duration_since(*since) < PROBE_LOST => {
                Some(PROBE_WISH)
            }
            State::Closed { .. } | State::Open { .. } | State::Probing { .. } => None,
        }
    }

    /// Whether a request may go out; else after which time to ask again.
    ///
    /// # Errors
    /// That time.
    pub fn enter(&mut self, now: Instant) -> Result<Entry, Duration> {
        if let Some(wait) = self.wait(now) {
            return Err(wait);
        }
        let rest = match &self.state {
            State::Closed { .. } => return Ok(Entry::Normal),
            State::Open { rest, .. } | State::Probing { rest, .. } => *rest,
        };
        self.state = State::Probing { since: now, rest };
        Ok(Entry::Probe)
    }

    /// A request went well; whether that closed the breaker.
    pub fn succeeded(&mut self, entry: Entry, now: Instant) -> bool {
        match (&mut self.state, entry) {
            (State::Closed { in_a_row, rate }, _) => {
                *in_a_row = 0;
                rate.note(false, now);
                false
            }
            (State::Probing { .. }, Entry::Probe) => {
                self.state = State::Closed {
                    in_a_row: 0,
                    rate: Rate::new(now),
                };
                true
            }
            // An answer from before the trouble.
            _ => false,
        }
    }

    /// A request failed; whether that opened the breaker. `random`, uniform in 0..1, spreads the
    /// probes of many hosts.
    pub fn failed(&mut self, entry: Entry, now: Instant, random: f64) -> bool {
        let rest = match (&mut self.state, entry) {
            (State::Closed { in_a_row, rate }, _) => {
                *in_a_row += 1;
                rate.note(true, now);
                let opens =
                    *in_a_row >= self.options.failures || rate.is_bad(self.options.rate_requests);
                if !opens {
                    return false;
                }
                self.openings += 1;
                self.options.rest
            }
            (State::Probing { rest, .. }, Entry::Probe) => {
                rest.saturating_mul(2).min(self.options.longest_rest)
            }
            _ => return false,
        };
        let jitter = 0.75 + 0.5 * random.clamp(0.0, 1.0);
        self.state = State::Open {
            until: now + rest.mul_f64(jitter),
            rest,
        };
        true
    }

    /// A request was given up before it had an answer: it says nothing. A probe's place is free.
    pub fn cancelled(&mut self, entry: Entry, now: Instant) {
        if let (State::Probing { rest, .. }, Entry::Probe) = (&self.state, entry) {
            self.state = State::Open {
                until: now,
                rest: *rest,
            };
        }
    }

    /// What it looks like.
    pub fn state(&self) -> BreakerState {
        match self.state {
            State::Closed { .. } => BreakerState::Closed,
            State::Open { .. } => BreakerState::Open,
            State::Probing { .. } => BreakerState::HalfOpen,
        }
    }

    /// How often it has opened.
    pub fn openings(&self) -> u64 {
        self.openings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaker(now: Instant) -> Breaker {
        Breaker::new(BreakerOptions::default(), now)
    }

    fn broken(now: Instant) -> Breaker {
        let mut breaker = breaker(now);
        for _ in 0..5 {
            let entry = breaker.enter(now).unwrap();
            breaker.failed(entry, now, 0.5);
        }
        assert_eq!(breaker.state(), BreakerState::Open);
        breaker
    }

    #[test]
    fn failures_in_a_row_open_it_and_one_success_between_does_not() {
        let now = Instant::now();
        let mut b = breaker(now);
        for round in 0..9 {
            let entry = b.enter(now).unwrap();
            if round == 4 {
                b.succeeded(entry, now);
            } else {
                b.failed(entry, now, 0.5);
            }
        }
        assert_eq!(b.state(), BreakerState::Closed);
        assert!(b.failed(Entry::Normal, now, 0.5));
        assert_eq!((b.state(), b.openings()), (BreakerState::Open, 1));
    }

    #[test]
    fn an_origin_that_fails_every_second_request_is_left_alone_too() {
        let now = Instant::now();
        let mut b = breaker(now);
        for _ in 0..9 {
            b.succeeded(Entry::Normal, now);
            assert!(!b.failed(Entry::Normal, now, 0.5));
        }
        b.succeeded(Entry::Normal, now);
        assert!(b.failed(Entry::Normal, now, 0.5));
    }

    #[test]
    fn old_failures_do_not_count() {
        let mut now = Instant::now();
        let mut b = breaker(now);
        for _ in 0..100 {
            now += Duration::from_secs(3);
            assert!(!b.failed(Entry::Normal, now, 0.5));
            b.succeeded(Entry::Normal, now);
        }
    }

    #[test]
    fn while_open_nothing_passes_then_one_probe_then_all_again() {
        let now = Instant::now();
        let mut b = broken(now);
        let wait = b.enter(now).unwrap_err();
        assert!(wait <= Duration::from_millis(250));
        assert_eq!(b.wait(now), Some(wait));
        let later = now + wait;
        assert_eq!(b.wait(later), None);
        assert_eq!(b.enter(later), Ok(Entry::Probe));
        assert!(b.enter(later).is_err(), "one probe");
        assert!(b.wait(later).is_some());
        assert!(!b.succeeded(Entry::Normal, later), "an old answer");
        assert_eq!(b.state(), BreakerState::HalfOpen);
        assert!(b.succeeded(Entry::Probe, later));
        assert_eq!(b.enter(later), Ok(Entry::Normal));
    }

    #[test]
    fn a_probe_that_fails_doubles_the_rest_up_to_a_bound() {
        let mut now = Instant::now();
        let mut b = broken(now);
        let mut rests = Vec::new();
        for _ in 0..8 {
            let wait = b.enter(now).unwrap_err();
            rests.push(wait);
            now += wait;
            assert_eq!(b.enter(now), Ok(Entry::Probe));
            b.failed(Entry::Probe, now, 0.5);
        }
        assert_eq!(rests[0] * 2, rests[1]);
        assert_eq!(rests[7], BreakerOptions::default().longest_rest);
        assert_eq!(b.openings(), 1, "one trouble");
    }

    #[test]
    fn a_probe_that_is_given_up_or_lost_leaves_its_place_to_the_next() {
        let now = Instant::now();
        let mut b = broken(now);
        let now = now + Duration::from_secs(1);
        assert_eq!(b.enter(now), Ok(Entry::Probe));
        b.cancelled(Entry::Probe, now);
        assert_eq!(b.enter(now), Ok(Entry::Probe));
        assert!(b.enter(now).is_err());
        assert_eq!(b.enter(now + PROBE_LOST), Ok(Entry::Probe));
    }
}
