//! What a reader sees when something fails: the one place that turns errors into errno.
//!
//! The choices that could be argued:
//!
//! | failure | errno | why |
//! |---|---|---|
//! | a chunk can't be had, now | `EIO` | Programs know it as "this read failed"; a later read may work. `ETIMEDOUT` or `ENETDOWN` surprise programs that believe in local disks; `EAGAIN` makes some spin. |
//! | authorisation refused | `EIO` | `EACCES` would claim that the file's permissions forbid the read. |
//! | metadata or manifest corrupt | `EIO` | `EUCLEAN` is what the kernel's EROFS answers, but many programs print "Structure needs cleaning", and `fsck` of the mount is not the cure. |
//! | any write | `EROFS` | As on every read-only file system. |
//! | reading a directory's bytes | `EISDIR` | read(2). |
//! | attribute not there | `ENODATA` | getxattr(2). |
//! | no attribute in the whole image | `ENOSYS` | Linux then never asks again and answers `EOPNOTSUPP` itself: overlayfs saves one round trip per file. |

use fuser::Errno;
use lazyimg_chunkstore::ReadError;
use lazyimg_image::erofs;

/// A request that failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    /// A chunk of the data space could not be had.
    #[error(transparent)]
    Chunk(#[from] ReadError),
    /// Metadata could not be had or does not make sense.
    #[error("{0}")]
    Meta(String),
    /// No answer within the mount's read timeout.
    #[error(
        "no answer within the read timeout of {0:?}; the fetch goes on, a later read may find it"
    )]
    TimedOut(std::time::Duration),
}

impl From<erofs::ReadError> for Failure {
    fn from(error: erofs::ReadError) -> Self {
        Self::Meta(chain(&error))
    }
}

impl Failure {
    /// What the kernel, and so the program, is told.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Chunk(_) | Self::Meta(_) | Self::TimedOut(_) => Errno::EIO,
        }
    }

    /// Equal for failures of one cause: one of them in the log is enough. Names of chunks are not
    /// part of it, or an outage would be as many causes as there are chunks.
    pub fn cause(&self) -> String {
        match self {
            Self::Chunk(
                ReadError::Tiers { failures, .. } | ReadError::TimedOut { failures, .. },
            ) if !failures.is_empty() => {
                let causes: Vec<_> = failures
                    .iter()
                    .map(|f| format!("{}: {:?}", f.tier, std::mem::discriminant(root(&f.error))))
                    .collect();
                causes.join("; ")
            }
            Self::Chunk(ReadError::Tiers { .. }) => "no tier".to_owned(),
            Self::Chunk(ReadError::TimedOut { .. }) | Self::TimedOut(_) => "timeout".to_owned(),
            // These name a chunk that stays bad: each is a cause of its own.
            Self::Chunk(error @ (ReadError::Undecryptable { .. } | ReadError::BadSpec { .. })) => {
                error.to_string()
            }
            Self::Chunk(ReadError::Abandoned { .. }) => "abandoned".to_owned(),
            Self::Meta(text) => text.clone(),
        }
    }
}

/// The failure that retries ended with.
fn root(error: &lazyimg_chunkstore::FetchError) -> &lazyimg_chunkstore::FetchError {
    match error {
        lazyimg_chunkstore::FetchError::GaveUp { last, .. } => root(last),
        other => other,
    }
}

/// An error with all its causes on one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // `#[error(transparent)]` and messages that embed their source repeat themselves.
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
