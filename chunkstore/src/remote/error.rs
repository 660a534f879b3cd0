//! What a request to the store may come to.

use std::path::Path;
use std::time::Duration;

use lazyimg_convergent::ChunkId;

use super::frames::FrameError;
use crate::guard::Pass;
use crate::{FetchError, Source};

/// The codes of the store's errors: `docs/store.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreErrorCode {
    /// Not of this protocol, or a body whose hash is not the id.
    BadRequest,
    /// No token, or one that is not known.
    Unauthorized,
    /// The token's rights do not reach.
    Forbidden,
    /// The tenant's quota is used up.
    Quota,
    /// Not there, or not ours.
    NotFound,
    /// A manifest names chunks that were not put.
    Missing,
    /// The step is not allowed in this state.
    Conflict,
    /// A condition does not hold.
    Precondition,
    /// Longer than the limits.
    TooLarge,
    /// Too many requests under way.
    Busy,
    /// The engine is in trouble, or the store is draining.
    Unavailable,
    /// No room.
    Full,
}

impl StoreErrorCode {
    /// By the word of the protocol; where there is none (a proxy answered), by the status.
    pub(super) fn of(word: &str, status: u16) -> Option<Self> {
        Some(match (word, status) {
            ("bad_request", _) => Self::BadRequest,
            ("unauthorized", _) => Self::Unauthorized,
            ("forbidden", _) => Self::Forbidden,
            ("quota", _) => Self::Quota,
            ("not_found", _) => Self::NotFound,
            ("missing", _) => Self::Missing,
            ("conflict", _) => Self::Conflict,
            ("precondition", _) => Self::Precondition,
            ("too_large", _) => Self::TooLarge,
            ("busy", _) => Self::Busy,
            ("unavailable", _) => Self::Unavailable,
            ("full", _) => Self::Full,
            (_, 400) => Self::BadRequest,
            (_, 401) => Self::Unauthorized,
            (_, 403) => Self::Forbidden,
            (_, 404) => Self::NotFound,
            (_, 412) => Self::Precondition,
            (_, 413) => Self::TooLarge,
            (_, 429) => Self::Busy,
            (_, 507) => Self::Full,
            (_, 500..) => Self::Unavailable,
            _ => return None,
        })
    }
}

/// Why the store did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The client could not be made.
    #[error("the store's client cannot be set up: {0}")]
    Setup(#[source] Source),
    /// No token.
    #[error(
        "the store's token in {path} cannot be used: {source}; write the token that the store's operator gave you into it"
    )]
    Token {
        /// The file.
        path: String,
        /// What is wrong.
        #[source]
        source: Source,
    },
    /// No instance of the store is known.
    #[error("no instance of the store is known: {0}")]
    NoInstance(String),
    /// Not reached, or the connection broke.
    #[error("{instance}: {what} failed: {source}")]
    Transport {
        /// The instance's address.
        instance: String,
        /// What was asked.
        what: &'static str,
        /// The cause.
        #[source]
        source: Source,
    },
    /// The instance is not who it should be, or one of both speaks TLS and the other does not.
    #[error("{instance}: {what} failed: {advice} ({cause})")]
    Tls {
        /// The instance's address.
        instance: String,
        /// What was asked.
        what: &'static str,
        /// What to do.
        advice: &'static str,
        /// What is wrong.
        cause: String,
    },
    /// Nothing came in time.
    #[error("{instance}: {what}: nothing came within {limit:?}")]
    TimedOut {
        /// The instance's address.
        instance: String,
        /// What was asked.
        what: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// The store said no.
    #[error("{instance}: {what}: {message} ({code:?}, request {request})")]
    Refused {
        /// The instance's address.
        instance: String,
        /// What was asked.
        what: &'static str,
        /// Its code.
        code: StoreErrorCode,
        /// Its words.
        message: String,
        /// After which time to ask again, if it said so.
        retry_after: Option<Duration>,
        /// Its id in the store's log.
        request: String,
        /// Of [`StoreErrorCode::Missing`]: the chunks to put first.
        chunks: Vec<ChunkId>,
        /// Of [`StoreErrorCode::NotFound`]: who brings a reference.
        lease: Option<String>,
    },
    /// An answer that is not of the protocol.
    #[error(
        "{instance}: {what}: the answer is not one of a lazyimg store: {reason}; check the store's address"
    )]
    Protocol {
        /// The instance's address.
        instance: String,
        /// What was asked.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Not asked: the instance's circuit breaker is open.
    #[error(transparent)]
    Resting(FetchError),
    /// Longer than the protocol allows.
    #[error("{0}")]
    Limit(String),
}

impl StoreError {
    pub(super) fn token(path: &Path, source: impl Into<Source>) -> Self {
        Self::Token {
            path: path.display().to_string(),
            source: source.into(),
        }
    }

    pub(super) fn frames(instance: &str, what: &'static str, error: &FrameError) -> Self {
        match error {
            FrameError::CutOff(..) => Self::Transport {
                instance: instance.to_owned(),
                what,
                source: error.to_string().into(),
            },
            _ => Self::Protocol {
                instance: instance.to_owned(),
                what,
                reason: error.to_string(),
            },
        }
    }

    /// The store's code, if it was the store that said no.
    pub fn code(&self) -> Option<StoreErrorCode> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// Whether another instance, or this one a moment later, may answer.
    pub fn is_passing(&self) -> bool {
        use StoreErrorCode::{Busy, Unavailable};
        match self {
            Self::Transport { .. }
            | Self::Tls { .. }
            | Self::TimedOut { .. }
            | Self::Protocol { .. }
            | Self::Resting(_)
            | Self::NoInstance(_) => true,
            Self::Refused { code, .. } => matches!(code, Busy | Unavailable),
            Self::Setup(_) | Self::Token { .. } | Self::Limit(_) => false,
        }
    }

    /// Whether another instance may answer, but this one will not by itself.
    pub(super) fn needs_somebody(&self) -> bool {
        matches!(self, Self::Tls { .. })
    }

    /// Tells the guard what this says of the instance.
    pub(super) fn tell(&self, pass: Pass) {
        match self {
            // Nothing was sent.
            Self::Setup(_) | Self::Token { .. } | Self::Limit(_) | Self::NoInstance(_) => {
                drop(pass);
            }
            _ if self.code() == Some(StoreErrorCode::Busy) => pass.busy(),
            _ if self.is_passing() => pass.failed(self),
            _ => pass.succeeded(),
        }
    }

    /// Whether a request was sent: what follows it is another attempt.
    pub(super) fn was_asked(&self) -> bool {
        !matches!(self, Self::Resting(_) | Self::NoInstance(_))
    }

    /// After which time the store wished to be asked again, if it said so.
    pub(super) fn wish(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// As a tier says it. The chunks of one request share the error.
    pub(super) fn to_fetch(self: &std::sync::Arc<Self>) -> FetchError {
        use StoreErrorCode as Code;
        let unavailable = |retry_after| FetchError::Unavailable {
            retry_after,
            source: std::sync::Arc::clone(self).into(),
        };
        match &**self {
            Self::TimedOut { limit, .. } => FetchError::TimedOut(*limit),
            Self::Token { .. } => FetchError::Unauthorized(self.to_string()),
            Self::Limit(text) => FetchError::Invalid(text.clone()),
            Self::Refused {
                code, retry_after, ..
            } => match code {
                Code::NotFound => FetchError::NotFound(self.to_string()),
                Code::Unauthorized | Code::Forbidden | Code::Quota => FetchError::Unauthorized(
                    format!("{self}; check the store's token and its rights"),
                ),
                Code::BadRequest | Code::TooLarge => FetchError::Invalid(self.to_string()),
                _ => unavailable(*retry_after),
            },
            _ => unavailable(None),
        }
    }
}
