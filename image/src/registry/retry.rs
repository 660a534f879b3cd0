//! Trying again: which failures, how often, after which pause.

use std::future::Future;
use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, RETRY_AFTER};
use tokio::time::Instant;

use crate::source::{RetryPolicy, SourceError};

/// How one attempt failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The same again would fail the same way.
    Final(SourceError),
    /// It may pass.
    Passing {
        /// What happened.
        cause: SourceError,
        /// What the server asked for.
        retry_after: Option<Duration>,
    },
}

impl From<SourceError> for Failure {
    fn from(cause: SourceError) -> Self {
        Self::Final(cause)
    }
}

impl Failure {
    /// A failure that may pass, without word from the server.
    pub(super) fn passing(cause: SourceError) -> Self {
        Self::Passing {
            cause,
            retry_after: None,
        }
    }

    /// The error, when nobody tries again.
    pub(super) fn into_error(self) -> SourceError {
        match self {
            Self::Final(cause) | Self::Passing { cause, .. } => cause,
        }
    }
}

/// What is being tried, for messages.
#[derive(Debug, Clone)]
pub(super) struct Label {
    pub(super) method: &'static str,
    pub(super) url: String,
}

/// Runs `attempt` until it succeeds, fails for good, has been tried often enough, or `limit` is
/// over. `limit` covers everything: attempts and pauses.
pub(super) async fn run<T, F, Fut>(
    policy: &RetryPolicy,
    limit: Duration,
    label: &Label,
    mut attempt: F,
) -> Result<T, SourceError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, Failure>>,
{
    let begun = Instant::now();
    let deadline = begun + limit;
    let mut last: Option<(SourceError, Option<Duration>)> = None;
    let mut attempts = 0;
    while attempts < policy.attempts.max(1) {
        attempts += 1;
        match tokio::time::timeout_at(deadline, attempt()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(Failure::Final(cause))) => return Err(cause),
            Ok(Err(Failure::Passing { cause, retry_after })) => {
                let pause =
                    backoff(policy, attempts, fastrand::f64()).max(retry_after.unwrap_or_default());
                let too_long = retry_after.is_some_and(|asked| asked > policy.longest_retry_after);
                tracing::debug!(method = label.method, url = %label.url, attempts, %cause, ?pause, "attempt failed");
                last = Some((cause, retry_after));
                if too_long || Instant::now() + pause >= deadline {
                    break;
                }
                if attempts < policy.attempts {
                    tokio::time::sleep(pause).await;
                }
            }
            Err(_) => break,
        }
    }
    Err(match last {
        None => SourceError::TimedOut {
            method: label.method.into(),
            url: label.url.clone(),
            phase: "the request",
            limit,
        },
        Some((SourceError::RateLimited { url, .. }, retry_after)) => SourceError::RateLimited {
            url,
            retry_after,
            attempts,
        },
        Some((cause, _)) => SourceError::Unreachable {
            method: label.method.into(),
            url: label.url.clone(),
            attempts,
            elapsed: begun.elapsed(),
            cause: Box::new(cause),
        },
    })
}

/// The pause after the `attempts`-th failure: doubling, capped, the upper half of it random so that
/// a thousand hosts that failed together do not come back together. `random` is in 0..1.
pub(super) fn backoff(policy: &RetryPolicy, attempts: u32, random: f64) -> Duration {
    let doubled = policy
        .base
        .saturating_mul(1 << attempts.saturating_sub(1).min(16));
    doubled.min(policy.cap).mul_f64(0.5 + random / 2.0)
}

/// What `Retry-After` asks for: seconds or a date (RFC 9110, 10.2.3).
pub(super) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse::<u64>() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => Some(
            httpdate::parse_http_date(text)
                .ok()?
                .duration_since(now)
                .unwrap_or_default(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn policy() -> RetryPolicy {
        RetryPolicy {
            attempts: 4,
            base: Duration::from_millis(100),
            cap: Duration::from_millis(300),
            longest_retry_after: Duration::from_secs(5),
        }
    }

    fn label() -> Label {
        Label {
            method: "GET",
            url: "http://h/x".into(),
        }
    }

    fn status(status: u16) -> SourceError {
        SourceError::Status {
            method: "GET".into(),
            url: "http://h/x".into(),
            status,
            message: "busy".into(),
        }
    }

    fn limited(seconds: u64) -> Failure {
        let cause = SourceError::RateLimited {
            url: "http://h/x".into(),
            retry_after: None,
            attempts: 1,
        };
        Failure::Passing {
            cause,
            retry_after: Some(Duration::from_secs(seconds)),
        }
    }

    #[test]
    fn pauses_double_up_to_the_cap_and_vary_by_half() {
        let millis = |attempts, random| backoff(&policy(), attempts, random).as_millis();
        assert_eq!(
            [
                millis(1, 0.0),
                millis(2, 0.0),
                millis(3, 0.0),
                millis(60, 0.0)
            ],
            [50, 100, 150, 150]
        );
        assert!((99..=100).contains(&millis(1, 0.999_999)));
    }

    #[test]
    fn retry_after_is_read_as_seconds_and_as_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let read = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, value.parse().unwrap());
            retry_after(&headers, now).map(|d| d.as_secs())
        };
        assert_eq!(read("7"), Some(7));
        assert_eq!(read("Sun, 09 Sep 2001 01:46:50 GMT"), Some(10));
        assert_eq!(read("Sun, 09 Sep 2001 01:46:30 GMT"), Some(0));
        assert_eq!(read("soon"), None);
        assert_eq!(read("-1"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_passing_failure_is_tried_again_and_a_final_one_is_not() {
        let calls = Cell::new(0);
        let result = run(&policy(), Duration::from_secs(60), &label(), || {
            calls.set(calls.get() + 1);
            let n = calls.get();
            async move {
                if n < 3 {
                    Err(Failure::passing(status(503)))
                } else {
                    Ok(n)
                }
            }
        })
        .await;
        assert_eq!(result.unwrap(), 3);
        calls.set(0);
        let result: Result<(), _> = run(&policy(), Duration::from_secs(60), &label(), || {
            calls.set(calls.get() + 1);
            async { Err(Failure::Final(status(400))) }
        })
        .await;
        assert!(matches!(
            result,
            Err(SourceError::Status { status: 400, .. })
        ));
        assert_eq!(calls.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_failure_is_told_with_the_number_of_attempts() {
        let result: Result<(), _> = run(&policy(), Duration::from_secs(60), &label(), || async {
            Err(Failure::passing(status(502)))
        })
        .await;
        let error = result.unwrap_err();
        assert!(error.to_string().contains("after 4 attempts"), "{error}");
        assert!(
            std::error::Error::source(&error)
                .unwrap()
                .to_string()
                .contains("502")
        );
        assert!(error.is_retryable());
    }

    #[tokio::test(start_paused = true)]
    async fn a_retry_after_is_waited_for_unless_it_is_too_long() {
        let begun = Instant::now();
        let calls = Cell::new(0);
        let result = run(&policy(), Duration::from_secs(60), &label(), || {
            calls.set(calls.get() + 1);
            let n = calls.get();
            async move { if n == 1 { Err(limited(3)) } else { Ok(()) } }
        })
        .await;
        result.unwrap();
        assert_eq!(begun.elapsed().as_secs(), 3);
        let begun = Instant::now();
        let result: Result<(), _> = run(&policy(), Duration::from_secs(60), &label(), || async {
            Err(limited(3600))
        })
        .await;
        let error = result.unwrap_err();
        assert!(
            matches!(&error, SourceError::RateLimited { retry_after: Some(d), .. } if d.as_secs() == 3600)
        );
        assert!(begun.elapsed().as_secs() < 1);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_lasts_longer_than_its_limit() {
        let begun = Instant::now();
        let result: Result<(), _> = run(&policy(), Duration::from_secs(2), &label(), || async {
            std::future::pending().await
        })
        .await;
        assert!(matches!(result, Err(SourceError::TimedOut { .. })));
        assert_eq!(begun.elapsed().as_secs(), 2);
    }
}
