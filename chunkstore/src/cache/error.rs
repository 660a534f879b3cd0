//! Why a cache directory cannot be used.

use std::io;
use std::path::PathBuf;

/// Why [`crate::HostCache::open`] fails. Damage inside the cache is not among the reasons: what
/// is damaged is forgotten.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// Another process has it.
    #[error("the cache {} is in use by {}", dir.display(), holder(*pid, work.as_deref()))]
    Locked {
        /// The cache directory.
        dir: PathBuf,
        /// Who holds it, if that is known.
        pid: Option<u32>,
        /// What for, if not for mounts.
        work: Option<String>,
    },
    /// A newer lazyimg made it.
    #[error("the cache {} has format {found}, this lazyimg knows up to {known}: update lazyimg, choose another --cache-dir, or delete the directory (it holds only copies)", dir.display())]
    Newer {
        /// The cache directory.
        dir: PathBuf,
        /// The format found.
        found: u32,
        /// The newest format this build knows.
        known: u32,
    },
    /// The directory belongs to another user, who could read or plant what is in it.
    #[error("the cache directory {} belongs to user {owner}, not to us (user {us}): choose another --cache-dir", dir.display())]
    NotOurs {
        /// The cache directory.
        dir: PathBuf,
        /// Its owner's uid.
        owner: u32,
        /// Our effective uid.
        us: u32,
    },
    /// The bound is too small to hold anything.
    #[error("a cache of {asked} bytes is too small: give it at least {least}")]
    TooSmall {
        /// The bound asked for, in bytes.
        asked: u64,
        /// The smallest bound, in bytes.
        least: u64,
    },
    /// The directory can't be made, read or locked.
    #[error("cannot {doing} {}: {source}; choose another --cache-dir, or mount without a cache", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Who has a cache, and what to do.
fn holder(pid: Option<u32>, work: Option<&str>) -> String {
    let who = pid.map_or("another process".to_owned(), |pid| format!("process {pid}"));
    match work {
        Some(work) => format!(
            "{who} (`{work}`): try again when it is done, or stop it, which loses nothing; or choose another --cache-dir"
        ),
        None => format!(
            "{who}; one daemon serves all mounts of a cache: ask it with `lazyimg status`, or choose another --cache-dir"
        ),
    }
}
