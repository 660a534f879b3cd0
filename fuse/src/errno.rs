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
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A chunk could not be had.
    #[error(transparent)]
    Chunk(#[from] ReadError),
    /// Metadata could not be had or does not make sense.
    #[error("{}", chain(.0))]
    Meta(#[from] erofs::ReadError),
}

impl Failure {
    /// What the kernel, and so the program, is told.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Chunk(_) | Self::Meta(_) => Errno::EIO,
        }
    }

    /// The chunk's failure behind it, if it is one.
    pub fn chunk(&self) -> Option<&ReadError> {
        match self {
            Self::Chunk(error) => Some(error),
            Self::Meta(error) => causes(error).find_map(|cause| cause.downcast_ref()),
        }
    }

    /// Equal for failures of one cause: one of them in the log is enough. Names of chunks, places
    /// in the metadata and times are not part of it, or an outage would be as many causes as there
    /// are requests.
    pub fn cause(&self) -> String {
        match self.chunk() {
            Some(ReadError::Tiers { failures, .. } | ReadError::TimedOut { failures, .. })
                if !failures.is_empty() =>
            {
                let causes: Vec<_> = failures
                    .iter()
                    .map(|f| format!("{}: {:?}", f.tier, std::mem::discriminant(f.error.root())))
                    .collect();
                causes.join("; ")
            }
            Some(ReadError::Tiers { .. }) => "no tier".to_owned(),
            Some(ReadError::TimedOut { .. }) => "timeout".to_owned(),
            Some(ReadError::Abandoned { .. }) => "abandoned".to_owned(),
            // These name a chunk, or a place in the metadata, that stays bad: each is a cause of its
            // own.
            Some(ReadError::Undecryptable { .. } | ReadError::BadSpec { .. }) | None => {
                self.to_string()
            }
        }
    }
}

/// An error and what is behind it, one after the other.
pub fn causes<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source())
}

/// An error with all its causes on one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in causes(error).skip(1) {
        let next = cause.to_string();
        // `#[error(transparent)]` and messages that embed their source repeat themselves.
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use lazyimg_chunkstore::{FetchError, TierFailure};
    use lazyimg_convergent::ChunkId;

    use super::*;

    fn read_error(chunk: u8, error: FetchError) -> ReadError {
        ReadError::TimedOut {
            id: ChunkId([chunk; 32]),
            waited: Duration::from_millis(u64::from(chunk)),
            failures: vec![TierFailure {
                tier: "registry".to_owned(),
                error: Arc::new(FetchError::Shared(Arc::new(error))),
            }],
        }
    }

    fn meta(place: u8, error: FetchError) -> Failure {
        erofs::ReadError::Meta(erofs::MetaError::Unavailable {
            offset: u64::from(place) * 1000,
            len: usize::from(place),
            cause: Box::new(read_error(place, error)),
        })
        .into()
    }

    #[test]
    fn an_outage_is_one_cause_whatever_chunk_and_place_it_hits() {
        let down = || FetchError::unavailable("connection refused");
        let first = meta(1, down());
        assert_eq!(first.cause(), meta(2, down()).cause());
        assert_eq!(first.cause(), Failure::from(read_error(3, down())).cause());
        let told = first.to_string();
        assert!(
            told.contains("metadata bytes 1000+1") && told.contains("connection refused"),
            "{told}"
        );
        assert!(matches!(first.chunk(), Some(ReadError::TimedOut { .. })));
    }

    #[test]
    fn another_failure_is_another_cause() {
        let corrupt = || FetchError::Corrupt("x".to_owned());
        let down = || FetchError::unavailable("x");
        assert_ne!(meta(1, down()).cause(), meta(1, corrupt()).cause());
        let broken = |at| Failure::from(erofs::ReadError::Corrupt { at, what: "x" });
        assert!(broken(1).chunk().is_none());
        assert_ne!(broken(1).cause(), broken(2).cause());
    }
}
