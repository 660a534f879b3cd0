//! Why a chunk could not be had.

use std::sync::Arc;
use std::time::Duration;

use lazyimg_convergent::ChunkId;
use lazyimg_convergent::chunk::OpenError;

/// A cause from below: an HTTP client, a socket, a file.
pub type Source = Box<dyn std::error::Error + Send + Sync + 'static>;

/// Why one tier did not give one chunk.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The tier does not have it. Another tier may.
    #[error("not there: {0}")]
    NotFound(String),
    /// The tier refuses us.
    #[error("not authorised: {0}")]
    Unauthorized(String),
    /// The tier can't be reached or is in trouble; it may work later.
    #[error("unavailable: {source}")]
    Unavailable {
        /// How long the tier asked us to wait, if it did.
        retry_after: Option<Duration>,
        /// What happened.
        #[source]
        source: Source,
    },
    /// No answer in time.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// The tier's bytes are not the chunk's: wrong length or wrong hash.
    #[error("wrong bytes: {0}")]
    Corrupt(String),
    /// The request itself can't be made: a length or a range outside the format's limits.
    #[error("impossible request: {0}")]
    Invalid(String),
    /// An attempt was tried again until the tier's policy gave up; the last cause.
    #[error("gave up after {attempts} attempts: {last}")]
    GaveUp {
        /// How often the request was made.
        attempts: u32,
        /// Why the last one failed.
        #[source]
        last: Box<FetchError>,
    },
    /// The failure of a request that was for other chunks too.
    #[error(transparent)]
    Shared(Arc<FetchError>),
}

impl FetchError {
    /// An [`FetchError::Unavailable`] without a wish of the tier's.
    pub fn unavailable(source: impl Into<Source>) -> Self {
        Self::Unavailable {
            retry_after: None,
            source: source.into(),
        }
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self.root() {
            Self::NotFound(_) => ErrorKind::NotFound,
            Self::Unauthorized(_) => ErrorKind::Unauthorized,
            Self::TimedOut(_) => ErrorKind::TimedOut,
            Self::Corrupt(_) => ErrorKind::Corrupt,
            Self::Invalid(_) => ErrorKind::Invalid,
            // What is behind them is the root.
            Self::Unavailable { .. } | Self::GaveUp { .. } | Self::Shared(_) => {
                ErrorKind::Unavailable
            }
        }
    }

    /// The failure itself, without what was said of its retries and of who shares it.
    pub fn root(&self) -> &FetchError {
        match self {
            Self::GaveUp { last, .. } => last.root(),
            Self::Shared(error) => error.root(),
            other => other,
        }
    }

    /// Whether the same request to the same tier may succeed a moment later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::TimedOut(_) => true,
            Self::Shared(error) => error.is_retryable(),
            _ => false,
        }
    }
}

/// The kinds of [`FetchError`], for counting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The tier does not have it.
    NotFound,
    /// The tier refuses us.
    Unauthorized,
    /// The tier is in trouble.
    Unavailable,
    /// No answer in time.
    TimedOut,
    /// Wrong bytes.
    Corrupt,
    /// The request can't be made.
    Invalid,
}

/// One tier's part in a failed read.
#[derive(Debug, Clone)]
pub struct TierFailure {
    /// [`crate::Tier::name`].
    pub tier: String,
    /// Its answer. Shared: one fetch may have had many readers.
    pub error: Arc<FetchError>,
}

/// Why a chunk could not be given to a reader. Cheap to clone: waiters share one failed fetch.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// Every tier was asked, none had good bytes.
    #[error("chunk {id}: {}", list(.failures))]
    Tiers {
        /// Which chunk.
        id: ChunkId,
        /// Every tier asked, in order.
        failures: Vec<TierFailure>,
    },
    /// The reader's time was up before a tier had answered.
    #[error("chunk {id}: nothing arrived within {waited:?} ({}); the fetch goes on, a later read may find it", list(.failures))]
    TimedOut {
        /// Which chunk.
        id: ChunkId,
        /// How long the reader waited.
        waited: Duration,
        /// Tiers that had failed until then.
        failures: Vec<TierFailure>,
    },
    /// The stored bytes are the right ones (their hash is the id), but the key does not open them,
    /// or they are not of the length that the manifest says: the manifest is wrong.
    #[error(
        "chunk {id} is intact but does not open: {source}; the image's manifest does not belong to this chunk, convert the image again"
    )]
    Undecryptable {
        /// Which chunk.
        id: ChunkId,
        /// What is wrong.
        source: OpenError,
    },
    /// A chunk whose lengths the format forbids.
    #[error("chunk {id}: {reason}; the image's manifest is damaged or hostile")]
    BadSpec {
        /// Which chunk.
        id: ChunkId,
        /// What is wrong.
        reason: String,
    },
    /// The fetch ended without an answer: the process is shutting down, or a fetching task died.
    #[error("chunk {id}: the fetch was abandoned (the daemon is stopping)")]
    Abandoned {
        /// Which chunk.
        id: ChunkId,
    },
}

impl ReadError {
    /// The chunk that could not be read.
    pub fn id(&self) -> &ChunkId {
        match self {
            Self::Tiers { id, .. }
            | Self::TimedOut { id, .. }
            | Self::Undecryptable { id, .. }
            | Self::BadSpec { id, .. }
            | Self::Abandoned { id } => id,
        }
    }

    /// Whether every tier failed for a reason that lies with its servers, not with who asked: then
    /// another who asks the same servers now gets the same answer.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Tiers { failures, .. } => {
                !failures.is_empty() && failures.iter().all(|f| f.error.root().is_retryable())
            }
            _ => false,
        }
    }

    /// Whether this says that the chunk is damaged or gone: no tier has good bytes of it, or its
    /// manifest is wrong. Otherwise it could not be had now, and what it is like is not known.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Undecryptable { .. } | Self::BadSpec { .. } => true,
            Self::TimedOut { .. } | Self::Abandoned { .. } => false,
            Self::Tiers { failures, .. } => {
                let mut roots = failures.iter().map(|f| f.error.root());
                let corrupt = |e: &FetchError| matches!(e, FetchError::Corrupt(_));
                let no_hope = |e: &FetchError| {
                    matches!(e, FetchError::NotFound(_) | FetchError::Invalid(_)) || corrupt(e)
                };
                roots.clone().any(corrupt) || (!failures.is_empty() && roots.all(no_hope))
            }
        }
    }
}

fn list(failures: &[TierFailure]) -> String {
    if failures.is_empty() {
        return "no tier has answered".to_owned();
    }
    failures
        .iter()
        .map(|f| format!("{}: {}", f.tier, chain(&*f.error)))
        .collect::<Vec<_>>()
        .join("; ")
}

/// An error with its causes: "GET … failed" alone does not say that the connection was refused.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Some messages embed their source.
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(errors: Vec<FetchError>) -> ReadError {
        let failure = |error| TierFailure {
            tier: "t".to_owned(),
            error: Arc::new(FetchError::Shared(Arc::new(FetchError::GaveUp {
                attempts: 2,
                last: Box::new(error),
            }))),
        };
        ReadError::Tiers {
            id: ChunkId([1; 32]),
            failures: errors.into_iter().map(failure).collect(),
        }
    }

    #[test]
    fn only_what_is_known_to_be_bad_or_gone_is_damage() {
        let corrupt = || FetchError::Corrupt("x".to_owned());
        let gone = || FetchError::NotFound("x".to_owned());
        let refused = || FetchError::Unauthorized("x".to_owned());
        let late = || FetchError::TimedOut(Duration::from_secs(1));
        for (errors, damage) in [
            (vec![corrupt()], true),
            (vec![gone()], true),
            (vec![gone(), corrupt()], true),
            (vec![corrupt(), FetchError::unavailable("down")], true),
            (vec![FetchError::Invalid("x".to_owned())], true),
            (vec![FetchError::unavailable("down")], false),
            (vec![late()], false),
            (vec![refused()], false),
            // A near store that never had it says nothing of the far one that is down.
            (vec![gone(), FetchError::unavailable("down")], false),
            (vec![], false),
        ] {
            let error = failed(errors);
            assert_eq!(error.is_damage(), damage, "{error}");
        }
        assert!(
            !ReadError::Abandoned {
                id: ChunkId([1; 32])
            }
            .is_damage()
        );
    }
}
