//! The cache directory: its mode, its lock, its version, and how much room its disk has.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::CacheError;
use super::record::check;

/// The newest format this build reads and writes.
pub const FORMAT: u32 = 1;

/// What begins the VERSION file.
const VERSION_WORD: &str = "lazyimg-cache";

/// Length of the lock's text that is read, in bytes.
const LOCK_TEXT: u64 = 256;

/// A cache directory that is ours alone until this is dropped.
pub struct CacheDir {
    path: PathBuf,
    dir: File,
    /// Holds the lock; the kernel frees it when the process ends, however it ends.
    lock: File,
}

impl Drop for CacheDir {
    fn drop(&mut self) {
        // Closing is not enough: a child between fork and exec may hold the same open file.
        let _ = rustix::fs::flock(&self.lock, FlockOperation::Unlock);
    }
}

/// How often the lock is tried, and how long between: a process that was killed may have left it
/// to a child that is about to exec, for a moment.
const LOCK_ATTEMPTS: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(30);

/// Takes the lock; false when another process keeps it.
fn try_lock(lock: &File) -> io::Result<bool> {
    for _ in 0..LOCK_ATTEMPTS {
        match rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) => std::thread::sleep(LOCK_PAUSE),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(false)
}

impl CacheDir {
    /// Makes the directory if need be, takes the lock, checks the version. `work`: for what, if not for
    /// mounts.
    pub fn open(path: &Path, work: Option<&str>) -> Result<Self, CacheError> {
        let io = |doing, path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| CacheError::Io {
                doing,
                path,
                source,
            }
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(io("make the cache directory", path))?;
        let dir = File::open(path).map_err(io("open the cache directory", path))?;
        make_private(&dir, path)?;
        let lock_path = path.join("LOCK");
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&lock_path)
            .map_err(io("open the lock", &lock_path))?;
        if !try_lock(&lock).map_err(io("lock", &lock_path))? {
            let mut text = String::new();
            let _ = (&lock).take(LOCK_TEXT).read_to_string(&mut text);
            let (pid, work) = holder(&text);
            return Err(CacheError::Locked {
                dir: path.to_owned(),
                pid,
                work,
            });
        }
        // The text is a courtesy to whoever finds the lock taken; a full disk may refuse it.
        let text = match work {
            Some(work) => format!("{}\n{work}\n", std::process::id()),
            None => format!("{}\n", std::process::id()),
        };
        let _ = lock
            .set_len(0)
            .and_then(|()| lock.write_all(text.as_bytes()));
        let this = Self {
            path: path.to_owned(),
            dir,
            lock,
        };
        this.check_version()?;
        for sub in [this.segments(), this.index()] {
            // A full or read-only disk is no reason to fail: the cache then holds nothing.
            if let Err(e) = fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&sub)
            {
                tracing::warn!(path = %sub.display(), error = %e, "cannot make a cache folder");
            }
        }
        Ok(this)
    }

    /// The cache directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where segment files lie.
    pub fn segments(&self) -> PathBuf {
        self.path.join("segments")
    }

    /// Where RocksDB lies.
    pub fn index(&self) -> PathBuf {
        self.path.join("index")
    }

    /// Disk used by the index and by a damaged one put aside, in bytes.
    pub fn index_bytes(&self) -> u64 {
        [self.index(), self.aside()]
            .iter()
            .filter_map(|dir| fs::read_dir(dir).ok())
            .flatten()
            // RocksDB may delete a file while we look.
            .filter_map(|entry| entry.ok()?.metadata().ok())
            .map(|meta| meta.blocks() * 512)
            .sum()
    }

    fn aside(&self) -> PathBuf {
        self.path.join("index.damaged")
    }

    /// Puts a damaged index aside (one is kept, for whoever wants to know why) and leaves none.
    pub fn move_index_aside(&self) -> io::Result<()> {
        let aside = self.aside();
        let gone = |r: io::Result<()>| match r {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        gone(fs::remove_dir_all(&aside))?;
        gone(fs::rename(self.index(), &aside))
    }

    /// Free bytes for us and total bytes of the filesystem.
    pub fn room(&self) -> io::Result<(u64, u64)> {
        let s = rustix::fs::fstatvfs(&self.dir)?;
        Ok((
            s.f_bavail.saturating_mul(s.f_frsize),
            s.f_blocks.saturating_mul(s.f_frsize),
        ))
    }

    /// Reads VERSION, or writes it. Damage in it is mended: records carry their own version.
    fn check_version(&self) -> Result<(), CacheError> {
        let path = self.path.join("VERSION");
        match fs::read_to_string(&path) {
            Ok(text) => match parse_version(&text) {
                Some(FORMAT) => return Ok(()),
                Some(found) => {
                    return Err(CacheError::Newer {
                        dir: self.path.clone(),
                        found,
                        known: FORMAT,
                    });
                }
                None => {
                    tracing::warn!(path = %path.display(), "the cache's VERSION is damaged, writing it anew");
                }
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => {
                tracing::warn!(path = %path.display(), error = %e, "cannot read the cache's VERSION, writing it anew");
            }
        }
        let new = self.path.join("VERSION.new");
        if let Err(e) = fs::write(&new, version_text(FORMAT)).and_then(|()| fs::rename(&new, &path))
        {
            tracing::warn!(path = %path.display(), error = %e, "cannot write the cache's VERSION");
        }
        Ok(())
    }
}

/// Whose lock it is and what for, by its text.
fn holder(text: &str) -> (Option<u32>, Option<String>) {
    let mut lines = text.lines();
    let pid = lines.next().and_then(|line| line.trim().parse().ok());
    let work = lines.next().map(|line| {
        let line = line.trim().chars().filter(|c| !c.is_control());
        line.collect::<String>()
    });
    (pid, work.filter(|work| !work.is_empty()))
}

/// The text of VERSION: the format's number and a check, so that damage is no newer version.
fn version_text(format: u32) -> String {
    let words = format!("{VERSION_WORD} {format}");
    let [a, b, c, d] = check(&[words.as_bytes()]);
    format!("{words} {a:02x}{b:02x}{c:02x}{d:02x}\n")
}

fn parse_version(text: &str) -> Option<u32> {
    let format = text.split(' ').nth(1)?.parse().ok()?;
    (text == version_text(format)).then_some(format)
}

fn make_private(dir: &File, path: &Path) -> Result<(), CacheError> {
    let io = |doing| {
        move |source| CacheError::Io {
            doing,
            path: path.to_owned(),
            source,
        }
    };
    let meta = dir.metadata().map_err(io("stat"))?;
    let us = rustix::process::geteuid().as_raw();
    if meta.uid() != us {
        return Err(CacheError::NotOurs {
            dir: path.to_owned(),
            owner: meta.uid(),
            us,
        });
    }
    if meta.mode() & 0o077 != 0 {
        dir.set_permissions(fs::Permissions::from_mode(0o700))
            .map_err(io("take other users' rights from"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_file_is_pinned() {
        assert_eq!(version_text(1), "lazyimg-cache 1 78e2e655\n");
        assert_eq!(parse_version(&version_text(1)), Some(1));
        assert_eq!(parse_version(&version_text(77)), Some(77));
        for bad in ["", "lazyimg-cache 2 78e2e655\n", "lazyimg-cache 1\n", "x"] {
            assert_eq!(parse_version(bad), None);
        }
    }

    #[test]
    fn a_newer_cache_is_refused_with_a_way_out() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("VERSION"), version_text(2)).unwrap();
        let Err(e) = CacheDir::open(dir.path(), None) else {
            panic!("opened a newer format");
        };
        assert!(matches!(e, CacheError::Newer { found: 2, .. }));
        assert!(e.to_string().contains("update lazyimg"));
    }

    #[test]
    fn a_damaged_version_file_is_mended() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("VERSION"), "lazyimg-cache 3 78e2e655\n").unwrap();
        drop(CacheDir::open(dir.path(), None).unwrap());
        let text = fs::read_to_string(dir.path().join("VERSION")).unwrap();
        assert_eq!(text, version_text(FORMAT));
    }

    #[test]
    fn the_directory_is_private_to_its_user() {
        let dir = tempfile::tempdir().unwrap();
        let made = dir.path().join("a/b");
        drop(CacheDir::open(&made, None).unwrap());
        assert_eq!(fs::metadata(&made).unwrap().mode() & 0o777, 0o700);
        fs::set_permissions(&made, fs::Permissions::from_mode(0o755)).unwrap();
        drop(CacheDir::open(&made, None).unwrap());
        assert_eq!(fs::metadata(&made).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn another_users_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(dir.path(), Some(12345), None)
            .expect("this test must run as root");
        assert!(matches!(
            CacheDir::open(dir.path(), None),
            Err(CacheError::NotOurs { owner: 12345, .. })
        ));
    }

    #[test]
    fn a_second_opener_learns_who_holds_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let first = CacheDir::open(dir.path(), None).unwrap();
        match CacheDir::open(dir.path(), None) {
            Err(error @ CacheError::Locked { .. }) => {
                let pid = format!("process {}", std::process::id());
                let text = error.to_string();
                assert!(
                    text.contains(&pid) && text.contains("lazyimg status"),
                    "{text}"
                );
            }
            _ => panic!("two locks on one directory"),
        }
        drop(first);
        assert!(CacheDir::open(dir.path(), None).is_ok());
    }

    #[test]
    fn a_second_opener_learns_what_the_lock_is_held_for_and_that_this_will_end() {
        let dir = tempfile::tempdir().unwrap();
        let first = CacheDir::open(dir.path(), Some("lazyimg cache verify")).unwrap();
        let Err(error @ CacheError::Locked { .. }) = CacheDir::open(dir.path(), None) else {
            panic!("two locks on one directory");
        };
        let text = error.to_string();
        let pid = format!("process {} (`lazyimg cache verify`)", std::process::id());
        assert!(text.contains(&pid) && text.contains("try again"), "{text}");
        assert!(!text.contains("lazyimg status"), "{text}");
        drop(first);
        // Nothing is left of it for the next holder.
        let _mounts = CacheDir::open(dir.path(), None).unwrap();
        let Err(error) = CacheDir::open(dir.path(), None) else {
            panic!("two locks on one directory");
        };
        assert!(!error.to_string().contains("verify"), "{error}");
    }

    #[test]
    fn a_lock_with_anything_in_it_is_only_a_lock() {
        for text in ["", "\n", "x\ny\n", "-1", "99999999999999"] {
            assert_eq!(holder(text).0, None, "{text:?}");
        }
        assert_eq!(holder("7\n"), (Some(7), None));
        let (pid, work) = holder("7\na\u{1b}[2Jb\nc");
        assert_eq!((pid, work.as_deref()), (Some(7), Some("a[2Jb")));
    }
}
