//! What protects an origin (a registry's host, an instance of the store) and those who wait for it:
//! a retry budget, hedges behind a token bucket, a circuit breaker.
//!
//! One [`Guard`] for one origin, shared by all that ask it: all mounts of a daemon. [`Guards`] owns
//! them.

mod breaker;
mod bucket;
pub(crate) mod retry;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::FetchError;
use crate::latency::Recent;
use breaker::{Breaker, Entry};
use bucket::HedgeBucket;
use retry::RetryBudget;

pub use breaker::{BreakerOptions, BreakerState};

/// Origins remembered at once; those that nobody uses are forgotten first.
const MAX_ORIGINS: usize = 1_024;
/// A request that was given up when nothing had come for this long counts as a failure.
const HUNG: Duration = Duration::from_secs(5);
/// A hedge goes out when this part of the answers would have come.
const HEDGE_QUANTILE: f64 = 0.95;
/// Length of a remembered cause, in bytes.
const MAX_CAUSE: usize = 300;

/// The guards of a process, by origin. Cheap to clone. Whoever serves many mounts has one.
#[derive(Clone, Default)]
pub struct Guards {
    shared: Arc<SharedGuards>,
}

#[derive(Default)]
struct SharedGuards {
    options: BreakerOptions,
    by_origin: Mutex<HashMap<String, Arc<Guard>>>,
}

impl std::fmt::Debug for Guards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let origins = self.shared.by_origin.lock().len();
        f.debug_struct("Guards").field("origins", &origins).finish()
    }
}

impl Guards {
    /// Guards whose breakers behave so.
    pub fn new(options: BreakerOptions) -> Self {
        Self {
            shared: Arc::new(SharedGuards {
                options,
                by_origin: Mutex::default(),
            }),
        }
    }

    /// The guard of `origin`: a host with its port, or an address.
    pub fn of(&self, origin: &str) -> Arc<Guard> {
        let mut by_origin = self.shared.by_origin.lock();
        if let Some(known) = by_origin.get(origin) {
            return Arc::clone(known);
        }
        if by_origin.len() >= MAX_ORIGINS {
            by_origin.retain(|_, guard| Arc::strong_count(guard) > 1);
        }
        let new = Arc::new(Guard::new(origin, self.shared.options.clone()));
        if by_origin.len() < MAX_ORIGINS {
            by_origin.insert(origin.to_owned(), Arc::clone(&new));
        }
        new
    }
}

/// What protects one origin.
pub struct Guard {
    origin: String,
    budget: RetryBudget,
    hedges: Mutex<HedgeBucket>,
    breaker: Mutex<Breaker>,
    /// Told when the breaker closes or a probe's place is free.
    changed: Notify,
    first_bytes: Recent,
    last_failure: Mutex<String>,
}

/// What a guard looks like, for `status`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OriginHealth {
    /// The origin's name.
    pub origin: String,
    /// Its circuit breaker.
    pub breaker: BreakerState,
    /// How often that has opened.
    pub openings: u64,
    /// The last failure, unless the breaker is closed.
    pub last_failure: Option<String>,
}

impl Guard {
    /// A guard that nobody shares.
    pub(crate) fn new(origin: &str, options: BreakerOptions) -> Self {
        Self {
            origin: origin.to_owned(),
            budget: RetryBudget::new(),
            hedges: Mutex::default(),
            breaker: Mutex::new(Breaker::new(options, Instant::now())),
            changed: Notify::new(),
            first_bytes: Recent::default(),
            last_failure: Mutex::default(),
        }
    }

    /// The origin's name.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// What it looks like now.
    pub fn health(&self) -> OriginHealth {
        let breaker = self.breaker.lock();
        let state = breaker.state();
        OriginHealth {
            origin: self.origin.clone(),
            breaker: state,
            openings: breaker.openings(),
            last_failure: (state != BreakerState::Closed).then(|| self.last_failure.lock().clone()),
        }
    }

    /// A place for one request to the origin. An open breaker refuses it at once.
    pub(crate) fn enter(self: &Arc<Self>) -> Result<Pass, FetchError> {
        let entered = self.breaker.lock().enter(Instant::now());
        match entered {
            Ok(entry) => {
                self.hedges.lock().request();
                Ok(Pass {
                    guard: Arc::clone(self),
                    entry,
                    since: Instant::now(),
                    heard: false,
                    told: false,
                })
            }
            Err(wait) => Err(self.refusal(wait)),
        }
    }

    /// [`Guard::enter`] that waits for an open breaker, but not beyond `until`.
    pub(crate) async fn enter_until(self: &Arc<Self>, until: Instant) -> Result<Pass, FetchError> {
        loop {
            let refused = match self.enter() {
                Ok(pass) => return Ok(pass),
                Err(refused) => refused,
            };
            if !self.usable_until(until).await {
                return Err(refused);
            }
        }
    }

    /// Waits until a request would pass; false when that will not be before `until`.
    pub(crate) async fn usable_until(&self, until: Instant) -> bool {
        loop {
            // Before the look: what changes after it wakes us.
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let now = Instant::now();
            let Some(wait) = self.breaker.lock().wait(now) else {
                return true;
            };
            let left = until.saturating_duration_since(now);
            if left.is_zero() || wait > left {
                return false;
            }
            // At least a millisecond, lest a clock's grain makes this spin.
            let pause = wait.max(Duration::from_millis(1));
            let _ = tokio::time::timeout(pause, changed).await;
        }
    }

    fn refusal(&self, wait: Duration) -> FetchError {
        let last = self.last_failure.lock().clone();
        FetchError::Unavailable {
            retry_after: Some(wait),
            source: format!(
                "{} was not asked, since it has failed too often (last: {last}); it is tried again by itself",
                self.origin
            )
            .into(),
        }
    }

    /// Takes a token for a retry; false when there is none: then do not retry.
    pub(crate) fn may_retry(&self) -> bool {
        self.budget.take()
    }

    /// How long to wait for the first byte before a hedge, if there may be one: what most answers
    /// of late needed, at least `floor`.
    pub(crate) fn hedge_after(&self, floor: Duration) -> Option<Duration> {
        if !self.hedges.lock().has() {
            return None;
        }
        Some(self.first_bytes.quantile(HEDGE_QUANTILE)?.max(floor))
    }

    /// Takes a token for a hedge; false when there is none: then do not hedge.
    pub(crate) fn may_hedge(&self) -> bool {
        self.hedges.lock().take()
    }

    /// Notes how long a first byte took.
    pub(crate) fn first_byte(&self, time: Duration) {
        self.first_bytes.add(time);
    }

    /// Whether all is well as far as is known.
    pub(crate) fn is_closed(&self) -> bool {
        self.breaker.lock().state() == BreakerState::Closed
    }

    /// Whether a request would pass now, be it as a probe.
    pub(crate) fn is_usable(&self) -> bool {
        self.breaker.lock().wait(Instant::now()).is_none()
    }
}

/// A request under way. Tell how it ended; dropped, it counts as given up.
pub(crate) struct Pass {
    guard: Arc<Guard>,
    entry: Entry,
    /// When it began, or when bytes came last; later while it waits by intent.
    since: Instant,
    /// Whether anything of an answer has come.
    heard: bool,
    told: bool,
}

impl Pass {
    /// The origin was asked to take so long: silence until then says nothing.
    pub fn waits(&mut self, by_intent: Duration) {
        self.since += by_intent;
    }

    /// Bytes of a good answer came.
    pub fn heard(&mut self) {
        self.since = self.since.max(Instant::now());
        self.heard = true;
    }

    /// The origin answered that it has too much to do: it lives. It earns no retries by that.
    pub fn busy(mut self) {
        self.told = true;
        self.close();
    }

    /// The origin answered: with what was asked for, or that it is not there, or not ours.
    pub fn succeeded(mut self) {
        self.told = true;
        self.guard.budget.put_back();
        self.close();
    }

    fn close(&self) {
        let closed = self
            .guard
            .breaker
            .lock()
            .succeeded(self.entry, Instant::now());
        if closed {
            tracing::info!(origin = self.guard.origin, "it answers again");
            self.guard.changed.notify_waiters();
        }
    }

    /// The origin is in trouble.
    pub fn failed(mut self, cause: &dyn std::fmt::Display) {
        self.told = true;
        self.note_failure(cause);
    }

    /// What a result says of the origin.
    pub fn end<T>(self, result: &Result<T, FetchError>) {
        match result {
            Err(error) if error.root().is_retryable() => self.failed(error),
            _ => self.succeeded(),
        }
    }

    fn note_failure(&self, cause: &dyn std::fmt::Display) {
        let mut text = cause.to_string();
        text.truncate(text.floor_char_boundary(MAX_CAUSE));
        *self.guard.last_failure.lock() = text;
        let mut breaker = self.guard.breaker.lock();
        let was_closed = breaker.state() == BreakerState::Closed;
        let opened = breaker.failed(self.entry, Instant::now(), retry::random());
        drop(breaker);
        if opened && was_closed {
            let cause = self.guard.last_failure.lock().clone();
            tracing::warn!(origin = self.guard.origin, %cause, "it fails too often: it is left alone but for a probe now and then");
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if self.told {
            return;
        }
        if self.since.elapsed() >= HUNG {
            self.note_failure(&format!("nothing came for {HUNG:?}"));
        } else if self.heard {
            // Slow it may be, but it was answering.
            self.close();
        } else {
            let mut breaker = self.guard.breaker.lock();
            breaker.cancelled(self.entry, Instant::now());
        }
        self.guard.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    fn broken() -> Arc<Guard> {
        let guard = Guards::default().of("registry.test");
        for _ in 0..5 {
            guard.enter().unwrap().failed(&"told to fail");
        }
        guard
    }

    #[test]
    fn one_origin_has_one_guard_and_unused_ones_are_forgotten() {
        let guards = Guards::default();
        let kept = guards.of("a");
        assert!(Arc::ptr_eq(&kept, &guards.clone().of("a")));
        for n in 0..5_000 {
            guards.of(&n.to_string());
        }
        assert!(guards.shared.by_origin.lock().len() <= MAX_ORIGINS);
        assert!(Arc::ptr_eq(&kept, &guards.of("a")));
    }

    #[test]
    fn an_open_breaker_refuses_at_once_and_tells_the_last_cause() {
        let guard = broken();
        let refused = guard.enter().err().unwrap();
        assert!(refused.is_retryable());
        let text = match refused {
            FetchError::Unavailable { source, .. } => source.to_string(),
            other => panic!("{other}"),
        };
        assert!(text.contains("registry.test was not asked"), "{text}");
        assert!(text.contains("told to fail"), "{text}");
        let health = guard.health();
        assert_eq!((health.breaker, health.openings), (BreakerState::Open, 1));
    }

    #[tokio::test]
    async fn those_who_wait_for_the_breaker_pass_when_the_probe_came_back() {
        let guard = broken();
        let waiting: Vec<_> = (0..20)
            .map(|_| {
                let guard = Arc::clone(&guard);
                tokio::spawn(async move {
                    let pass = guard.enter_until(soon()).await.unwrap();
                    let entry = pass.entry;
                    pass.succeeded();
                    entry
                })
            })
            .collect();
        let mut probes = 0;
        for one in waiting {
            probes += usize::from(one.await.unwrap() == Entry::Probe);
        }
        assert_eq!(probes, 1);
        assert!(guard.is_closed());
    }

    #[tokio::test]
    async fn a_probe_that_is_dropped_lets_the_next_one_try() {
        let guard = broken();
        drop(guard.enter_until(soon()).await.unwrap());
        let next = guard.enter_until(soon()).await.unwrap();
        assert_eq!(next.entry, Entry::Probe);
    }

    /// `pass`, as if all of it had been so much earlier.
    fn aged(mut pass: Pass, by: Duration) -> Pass {
        pass.since = pass.since.checked_sub(by).unwrap();
        pass
    }

    #[test]
    fn only_silence_counts_against_who_is_given_up_not_slowness() {
        let guard = Guards::default().of("a");
        for _ in 0..9 {
            let mut flowing = aged(guard.enter().unwrap(), HUNG * 2);
            flowing.heard();
            drop(flowing);
            let mut waits = guard.enter().unwrap();
            waits.waits(HUNG);
            drop(aged(waits, HUNG));
            drop(guard.enter().unwrap());
        }
        assert!(guard.is_closed());
        for _ in 0..5 {
            drop(aged(guard.enter().unwrap(), HUNG));
        }
        assert!(!guard.is_closed());
    }

    #[tokio::test]
    async fn a_probe_that_was_being_answered_when_it_was_given_up_closes_the_breaker() {
        let guard = broken();
        let mut probe = guard.enter_until(soon()).await.unwrap();
        probe.heard();
        drop(probe);
        assert!(guard.is_closed());
    }

    #[tokio::test]
    async fn an_origin_with_too_much_to_do_is_not_in_trouble() {
        let guard = Guards::default().of("a");
        for _ in 0..50 {
            guard.enter().unwrap().busy();
        }
        assert!(guard.is_closed());
        let rests = broken();
        rests.enter_until(soon()).await.unwrap().busy();
        assert!(rests.is_closed());
    }

    #[tokio::test]
    async fn a_rest_that_is_over_is_seen_without_a_request() {
        let guard = broken();
        assert!(!guard.is_usable());
        assert!(!guard.usable_until(Instant::now()).await);
        assert!(guard.usable_until(soon()).await);
        assert!(guard.is_usable() && !guard.is_closed());
    }

    #[tokio::test]
    async fn who_does_not_want_to_wait_is_refused_at_once() {
        assert!(broken().enter_until(Instant::now()).await.is_err());
    }

    #[test]
    fn an_answer_that_it_is_not_there_is_an_answer() {
        let guard = broken();
        let fresh = Guards::default().of("other");
        for _ in 0..50 {
            let missing: Result<(), _> = Err(FetchError::NotFound("x".to_owned()));
            fresh.enter().unwrap().end(&missing);
        }
        assert!(fresh.is_closed() && !guard.is_closed());
    }

    #[test]
    fn hedges_need_tokens_and_a_known_past() {
        let guard = Guards::default().of("a");
        let floor = Duration::from_millis(20);
        assert_eq!(guard.hedge_after(floor), None);
        for _ in 0..40 {
            guard.enter().unwrap().succeeded();
            guard.first_byte(Duration::from_millis(1));
        }
        assert_eq!(guard.hedge_after(floor), Some(floor));
        assert!(guard.may_hedge() && guard.may_hedge() && !guard.may_hedge());
        assert_eq!(guard.hedge_after(floor), None);
    }
}
