//! What can go wrong between us and the place an image comes from.

use std::error::Error as StdError;
use std::path::PathBuf;
use std::time::Duration;

use crate::credentials::CredentialsError;

/// A cause of any type, kept for the chain of sources.
pub type Cause = Box<dyn StdError + Send + Sync + 'static>;

/// Why an image, a blob or a tag could not be had or put. Addresses in messages carry no query:
/// signed redirect targets hold secrets there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// It is not there.
    #[error("{what} was not found in {place}")]
    NotFound {
        /// The manifest, blob or tag.
        what: String,
        /// Repository or directory.
        place: String,
    },
    /// The registry wants (other) credentials, or grants them less than we ask.
    #[error("{place} refuses {what}: {hint}")]
    Unauthorized {
        /// What was asked.
        what: String,
        /// Repository.
        place: String,
        /// What the registry said and what to do.
        hint: String,
    },
    /// Credentials could not be looked up.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// Too many requests; try later.
    #[error("{url} answers that there are too many requests ({}){}", times(.attempts), retry_text(.retry_after))]
    RateLimited {
        /// Address without its query.
        url: String,
        /// How long the registry asks us to stay away.
        retry_after: Option<Duration>,
        /// How often it was tried.
        attempts: u32,
    },
    /// No answer, or a broken one, after the last attempt.
    #[error("{method} {url} failed after {} in {:.1} s", times(.attempts), .elapsed.as_secs_f64())]
    Unreachable {
        /// HTTP method.
        method: String,
        /// Address without its query.
        url: String,
        /// How often it was tried.
        attempts: u32,
        /// Wall-clock time of all attempts.
        elapsed: Duration,
        /// The last failure.
        #[source]
        cause: Cause,
    },
    /// A failure below HTTP, in the words of the network.
    #[error("{text}")]
    Transport {
        /// The chain of causes in one line, without addresses.
        text: String,
    },
    /// The deadline passed.
    #[error("{method} {url}: {phase} took longer than {:.1} s", .limit.as_secs_f64())]
    TimedOut {
        /// HTTP method.
        method: String,
        /// Address without its query.
        url: String,
        /// What we were waiting for.
        phase: &'static str,
        /// The deadline.
        limit: Duration,
    },
    /// An HTTP status nobody expects here.
    #[error("{method} {url} answered {status}: {message}")]
    Status {
        /// HTTP method.
        method: String,
        /// Address without its query.
        url: String,
        /// The status code.
        status: u16,
        /// The registry's own words, cut and cleaned.
        message: String,
    },
    /// A redirect that is not followed.
    #[error("{url} redirects in a way that is not followed: {reason}")]
    Redirect {
        /// Address without its query.
        url: String,
        /// Why not.
        reason: String,
    },
    /// The bytes are not those that the digest promises.
    #[error("{what} is corrupt or was tampered with: expected {expected}, got {actual}")]
    DigestMismatch {
        /// The manifest or blob.
        what: String,
        /// Promised.
        expected: String,
        /// Received.
        actual: String,
    },
    /// The length is not the promised one.
    #[error("{what} has a wrong length: expected {expected} bytes, got {actual}")]
    SizeMismatch {
        /// The blob.
        what: String,
        /// Promised, in bytes.
        expected: u64,
        /// Received, in bytes; for an endless answer, where we stopped.
        actual: u64,
    },
    /// More than a limit allows.
    #[error("{what} is larger than the limit of {limit} {unit}")]
    TooLarge {
        /// What was measured.
        what: String,
        /// The limit.
        limit: u64,
        /// `bytes`, `layers`, …
        unit: &'static str,
    },
    /// A document or layer of a type that can't be converted.
    #[error("{what} has the media type `{media_type}`: {hint}")]
    UnsupportedMediaType {
        /// The manifest or layer.
        what: String,
        /// As the registry names it.
        media_type: String,
        /// Why not, and what to do.
        hint: &'static str,
    },
    /// A digest that is not SHA-256, or not a digest.
    #[error("{what} is named by `{digest}`; only sha256 digests are supported")]
    UnsupportedDigest {
        /// What is so named.
        what: String,
        /// The text.
        digest: String,
    },
    /// No image for this platform.
    #[error(
        "there is no image for {wanted} in {what}; it has: {available}. Choose one with --platform"
    )]
    NoPlatform {
        /// Digest or tag of the index, or of the image.
        what: String,
        /// What was asked.
        wanted: String,
        /// Comma-separated.
        available: String,
    },
    /// A document that breaks the specification.
    #[error("{what} is malformed: {reason}")]
    Malformed {
        /// The document.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The server ignores range requests and the blob is too large to skip through.
    #[error(
        "{url} ignores range requests; reading {offset} bytes to skip them is more than the limit of {limit}. Lazy mounts need a registry that answers ranges"
    )]
    RangesUnsupported {
        /// Address without its query.
        url: String,
        /// Where the range starts, in bytes.
        offset: u64,
        /// How much would be skipped at most, in bytes.
        limit: u64,
    },
    /// The body that the caller wanted to upload failed or had a wrong length.
    #[error("the data to upload as {what} could not be read")]
    Upload {
        /// The blob.
        what: String,
        /// The caller's error.
        #[source]
        cause: std::io::Error,
    },
    /// Other writers kept overwriting the list of referrers.
    #[error(
        "the referrers of {subject} in {place} kept changing while we added ours; run the command again"
    )]
    Contended {
        /// The image.
        subject: String,
        /// Repository.
        place: String,
    },
    /// The OCI layout could not be read or written.
    #[error("could not {action} {}", .path.display())]
    Io {
        /// `read`, `write`, …
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// The system's word.
        #[source]
        cause: std::io::Error,
    },
    /// The HTTP client could not be made: mostly broken TLS roots.
    #[error(
        "the HTTP client could not be set up; check SSL_CERT_FILE and the system's CA certificates"
    )]
    Setup {
        /// Why.
        #[source]
        cause: Cause,
    },
    /// This kind of source can't do that.
    #[error("{what} is not possible with {place}")]
    Unsupported {
        /// The operation.
        what: &'static str,
        /// Repository or directory.
        place: String,
    },
}

impl SourceError {
    /// Whether the same request may succeed a little later, without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::RateLimited { .. }
            | Self::Unreachable { .. }
            | Self::TimedOut { .. }
            | Self::Transport { .. }
            | Self::Contended { .. } => true,
            Self::Status { status, .. } => is_retryable_status(*status),
            _ => false,
        }
    }

    /// Whether it is simply not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
        cause: std::io::Error,
    ) -> Self {
        Self::Io {
            action,
            path: path.into(),
            cause,
        }
    }

    pub(crate) fn malformed(what: impl Into<String>, reason: impl ToString) -> Self {
        Self::Malformed {
            what: what.into(),
            reason: reason.to_string(),
        }
    }
}

/// The statuses that a proxy or an overloaded registry gives for a moment.
pub(crate) fn is_retryable_status(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

fn times(attempts: &u32) -> String {
    match attempts {
        1 => "1 attempt".to_owned(),
        more => format!("{more} attempts"),
    }
}

fn retry_text(retry_after: &Option<Duration>) -> String {
    match retry_after {
        Some(wait) => format!("; it asks to wait {} s", wait.as_secs().max(1)),
        None => String::new(),
    }
}
