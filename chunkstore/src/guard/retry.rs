//! When to try again: bounded attempts, full jitter, and a budget over all requests.
//!
//! Full jitter after Brooker, "Exponential Backoff And Jitter" (AWS, 2015); the budget is a token
//! bucket as in Finagle and the AWS SDKs: when everything fails, retries must not double the load.

use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The first pause is drawn from zero to this; each further range is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// No pause is longer: a reader is waiting.
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// A tier that asks for a longer pause than this is given up for now.
const LONGEST_WISH: Duration = Duration::from_secs(5);

/// Tokens of a fresh budget, and the most it holds. One retry takes one.
const BUDGET_TOKENS: f64 = 20.0;
/// What a request that succeeds puts back: at most a fifth of all requests are retries.
const TOKENS_PER_SUCCESS: f64 = 0.2;
/// What a second puts back, so that a quiet mount recovers too.
const TOKENS_PER_SECOND: f64 = 0.5;

/// The pause before attempt `attempt` + 1 (attempts count from 1), or `None` when the tier asked
/// for more time than a reader has. `random` is uniform in 0..1.
pub fn pause(attempt: u32, wish: Option<Duration>, random: f64) -> Option<Duration> {
    let range = FIRST_PAUSE
        .saturating_mul(1 << attempt.saturating_sub(1).min(10))
        .min(LONGEST_PAUSE);
    let jitter = range.mul_f64(random.clamp(0.0, 1.0));
    match wish {
        Some(wish) if wish > LONGEST_WISH => None,
        Some(wish) => Some(wish + jitter),
        None => Some(jitter),
    }
}

/// A random number in 0..1. Not for secrets.
pub fn random() -> f64 {
    (RandomState::new().hash_one(0u8) >> 11) as f64 / (1u64 << 53) as f64
}

/// Tokens that retries take and successes put back.
pub(crate) struct RetryBudget {
    state: Mutex<(f64, Instant)>,
}

impl RetryBudget {
    /// A full budget.
    pub fn new() -> Self {
        Self {
            state: Mutex::new((BUDGET_TOKENS, Instant::now())),
        }
    }

    /// Takes a token; false when there is none: then do not retry.
    pub fn take(&self) -> bool {
        let mut state = self.state.lock();
        let (tokens, since) = &mut *state;
        let now = Instant::now();
        let earned = now.duration_since(*since).as_secs_f64() * TOKENS_PER_SECOND;
        *tokens = (*tokens + earned).min(BUDGET_TOKENS);
        *since = now;
        let enough = *tokens >= 1.0;
        if enough {
            *tokens -= 1.0;
        }
        enough
    }

    /// Notes a request that succeeded.
    pub fn put_back(&self) {
        let mut state = self.state.lock();
        state.0 = (state.0 + TOKENS_PER_SUCCESS).min(BUDGET_TOKENS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_stay_bounded() {
        assert_eq!(pause(1, None, 1.0), Some(FIRST_PAUSE));
        assert_eq!(pause(2, None, 1.0), Some(FIRST_PAUSE * 2));
        assert_eq!(pause(60, None, 1.0), Some(LONGEST_PAUSE));
        assert_eq!(pause(3, None, 0.0), Some(Duration::ZERO));
    }

    #[test]
    fn a_tiers_wish_is_respected_or_it_is_given_up() {
        let wish = Duration::from_secs(2);
        assert!(pause(1, Some(wish), 0.5).unwrap() >= wish);
        assert_eq!(pause(1, Some(Duration::from_secs(60)), 0.5), None);
    }

    #[test]
    fn an_empty_budget_ends_retries_and_successes_refill_it() {
        let budget = RetryBudget::new();
        let taken = (0..100).filter(|_| budget.take()).count();
        assert!((20..=21).contains(&taken), "{taken}");
        for _ in 0..10 {
            budget.put_back();
        }
        assert!(budget.take());
    }

    #[test]
    fn random_numbers_differ_and_stay_in_range() {
        let many: Vec<f64> = (0..100).map(|_| random()).collect();
        assert!(many.iter().all(|r| (0.0..1.0).contains(r)));
        assert!(many.windows(2).any(|w| w[0] != w[1]));
    }
}
