//! Where the host cache is, on what, and how much room it has.

use std::path::Path;

use lazyimg_fuse::mountpoint;

use super::{Check, State, check};
use crate::args::Doctor;
use crate::output::bytes;

const WHAT: &str = "cache";

/// Below this, a cache is of little use and eviction starts at once, in bytes.
const LITTLE_SPACE: u64 = 2 << 30;

/// File systems in memory.
const IN_MEMORY: &[&str] = &["tmpfs", "ramfs"];

/// File systems that other hosts write to as well, or that are behind a network.
const REMOTE: &[&str] = &["nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs"];

pub fn check_cache(args: &Doctor) -> Check {
    let place = args.cache.place.cache_dir.clone();
    let Some(dir) = place.or_else(crate::config::cache_dir) else {
        return check(
            WHAT,
            State::Fail,
            "neither HOME nor XDG_CACHE_HOME is set",
            "say where with --cache-dir",
        );
    };
    let dir = std::path::absolute(&dir).unwrap_or(dir);
    let existing = dir
        .ancestors()
        .find(|p| p.exists())
        .unwrap_or(Path::new("/"));
    if let Err(e) = rustix::fs::access(existing, rustix::fs::Access::WRITE_OK) {
        return check(
            WHAT,
            State::Fail,
            format!("{}: {e}", existing.display()),
            "choose a directory of yours with --cache-dir",
        );
    }
    let stat = match rustix::fs::statvfs(existing) {
        Ok(stat) => stat,
        Err(e) => {
            return check(
                WHAT,
                State::Note,
                format!("{}: {e}", existing.display()),
                "",
            );
        }
    };
    let free = stat.f_bavail * stat.f_frsize;
    let kind = file_system(existing).unwrap_or_else(|| "an unknown file system".into());
    let finding = format!(
        "{}{}: {} free on {kind}, at most {} used",
        dir.display(),
        if existing == dir {
            ""
        } else {
            " (not there yet)"
        },
        bytes(free),
        bytes(args.cache.cache_bytes())
    );
    let advice = if free < LITTLE_SPACE {
        "little space: the cache will forget early; choose another place with --cache-dir"
    } else if IN_MEMORY.contains(&kind.as_str()) {
        "this file system is in memory: it takes what programs need, and a restart of the host empties it"
    } else if REMOTE.contains(&kind.as_str()) {
        "a cache on a remote file system is slow: choose a local disk with --cache-dir"
    } else {
        return check(WHAT, State::Ok, finding, "");
    };
    check(WHAT, State::Note, finding, advice)
}

/// The type of the file system that `dir` is on.
fn file_system(dir: &Path) -> Option<String> {
    let dir = dir.canonicalize().ok()?;
    let mounted = |dir: &Path| mountpoint::mounted_at(dir).ok().flatten();
    dir.ancestors().find_map(mounted).map(|m| m.fs_type)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_system_of_a_directory_is_that_of_the_mount_above_it() {
        let proc = file_system(Path::new("/proc/self/task"));
        assert_eq!(proc.as_deref(), Some("proc"));
        assert!(file_system(Path::new("/")).is_some());
    }
}
