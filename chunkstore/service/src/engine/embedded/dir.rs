//! The data directory: its mode, its lock, its version, and how much room its disk has.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use crate::engine::EngineError;

/// The format that this build reads and writes.
pub const FORMAT: u32 = 1;

/// What begins the VERSION file.
const VERSION_WORD: &str = "lazyimg-store-engine";

/// How often the lock is tried, and how long between: a process that was killed may have left it
/// to a child that is about to exec, for a moment.
const LOCK_ATTEMPTS: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(30);

/// What stays free for RocksDB, which must not meet a full disk: at least this many bytes.
const LEAST_RESERVE: u64 = 24 << 20;
/// And at most this many, unless it is set.
const MOST_RESERVE: u64 = 1 << 30;

/// A data directory that is ours alone until this is dropped.
pub struct DataDir {
    path: PathBuf,
    dir: File,
    /// Holds the lock; the kernel frees it when the process ends, however it ends.
    lock: File,
    reserve: u64,
}

impl Drop for DataDir {
    fn drop(&mut self) {
        self.unlock();
    }
}

/// An error of the directory, in words.
fn setup(doing: &str, path: &Path, e: &io::Error) -> EngineError {
    EngineError::Setup(format!(
        "cannot {doing} {}: {e}; the store needs a data directory of its own that it may write",
        path.display()
    ))
}

impl DataDir {
    /// Makes the directory if need be, takes the lock, checks the version. `reserve`: bytes of the
    /// filesystem that stay free; `None` for a twentieth, at most 1 GiB.
    pub fn open(path: &Path, reserve: Option<u64>) -> Result<Self, EngineError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|e| setup("make the data directory", path, &e))?;
        let dir = File::open(path).map_err(|e| setup("open the data directory", path, &e))?;
        make_private(&dir, path)?;
        let lock = take_lock(path)?;
        let mut this = Self {
            path: path.to_owned(),
            dir,
            lock,
            reserve: 0,
        };
        this.check_version()?;
        // RocksDB would make its own, and not see to it that a power cut leaves its name.
        for folder in [this.segments(), this.docs()] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&folder)
                .map_err(|e| setup("make", &folder, &e))?;
        }
        this.dir.sync_all().map_err(|e| setup("sync", path, &e))?;
        let (_, total) = this
            .room()
            .map_err(|e| setup("ask for the room of", path, &e))?;
        this.reserve = reserve.unwrap_or((total / 20).clamp(LEAST_RESERVE, MOST_RESERVE));
        Ok(this)
    }

    /// Gives the lock back: another process may have the directory from here on.
    pub fn unlock(&self) {
        // Closing is not enough: a child between fork and exec may hold the same open file.
        let _ = rustix::fs::flock(&self.lock, FlockOperation::Unlock);
    }

    /// The data directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the folders of the roots lie.
    pub fn segments(&self) -> PathBuf {
        self.path.join("segments")
    }

    /// Where the index of the chunks lies.
    pub fn index(&self) -> PathBuf {
        self.path.join("index")
    }

    /// Where the documents lie.
    pub fn docs(&self) -> PathBuf {
        self.path.join("docs")
    }

    /// A file that is there when the index is to be built anew.
    pub fn rebuild_mark(&self) -> PathBuf {
        self.path.join("index.rebuild")
    }

    /// Puts a damaged index aside (one is kept, for whoever wants to know why) and leaves none.
    pub fn move_index_aside(&self) -> io::Result<()> {
        let aside = self.path.join("index.damaged");
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

    /// Fails when `bytes` more would leave less than what is to stay free.
    pub fn need_room(&self, bytes: u64) -> Result<(), EngineError> {
        let (free, _) = self
            .room()
            .map_err(|e| EngineError::Unavailable(format!("cannot ask for free disk: {e}")))?;
        if free.saturating_sub(bytes) >= self.reserve {
            return Ok(());
        }
        Err(EngineError::Full(format!(
            "{free} bytes are free on the disk of {}, {} of them are to stay free",
            self.path.display(),
            self.reserve
        )))
    }

    /// Bytes of disk used by everything in the directory.
    pub fn used(&self) -> io::Result<u64> {
        let mut sum = 0;
        let mut folders = vec![self.path.clone()];
        while let Some(folder) = folders.pop() {
            let entries = match fs::read_dir(&folder) {
                // RocksDB and garbage collection delete while we look.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            for entry in entries {
                let entry = entry?;
                match entry.metadata() {
                    Ok(meta) if meta.is_dir() => folders.push(entry.path()),
                    Ok(meta) => sum += meta.blocks() * 512,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(sum)
    }

    /// Reads VERSION; writes it where nothing is yet. A directory that holds something else is refused.
    fn check_version(&self) -> Result<(), EngineError> {
        let path = self.path.join("VERSION");
        match fs::read_to_string(&path) {
            Ok(text) if parse_version(&text) == Some(FORMAT) => return Ok(()),
            Ok(text) => {
                let advice = match parse_version(&text) {
                    Some(found) => format!(
                        "it has format {found}, this lazyimg knows {FORMAT}: update lazyimg"
                    ),
                    None => "its VERSION file is not a store's, or damaged: restore it from a \
                             backup, or choose another directory"
                        .to_owned(),
                };
                return Err(EngineError::Setup(format!(
                    "cannot use the data directory {}: {advice}",
                    self.path.display()
                )));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(setup("read", &path, &e)),
        }
        let entries = fs::read_dir(&self.path).map_err(|e| setup("list", &self.path, &e))?;
        // `VERSION.new` may be left of a first start that was cut off.
        let ours = ["LOCK", "VERSION.new", "lost+found"];
        for entry in entries {
            let entry = entry.map_err(|e| setup("list", &self.path, &e))?;
            if !ours.iter().any(|name| entry.file_name() == *name) {
                return Err(EngineError::Setup(format!(
                    "{} is no data directory of a store and not empty (there is {:?}): choose an \
                     empty one",
                    self.path.display(),
                    entry.file_name()
                )));
            }
        }
        let new = self.path.join("VERSION.new");
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(version_text(FORMAT).as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            self.dir.sync_all()
        };
        write().map_err(|e| setup("write", &path, &e))
    }
}

fn take_lock(dir: &Path) -> Result<File, EngineError> {
    let path = dir.join("LOCK");
    let mut lock = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(&path)
        .map_err(|e| setup("open the lock", &path, &e))?;
    for _ in 0..LOCK_ATTEMPTS {
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                // The pid is a courtesy to whoever finds the lock taken; a full disk may refuse it.
                let _ = lock
                    .set_len(0)
                    .and_then(|()| writeln!(lock, "{}", std::process::id()));
                return Ok(lock);
            }
            Err(Errno::WOULDBLOCK) => std::thread::sleep(LOCK_PAUSE),
            Err(Errno::INTR) => {}
            Err(e) => return Err(setup("lock", &path, &e.into())),
        }
    }
    let mut text = String::new();
    let _ = lock.read_to_string(&mut text);
    let owner = match text.trim().parse::<u32>() {
        Ok(pid) => format!("process {pid}"),
        Err(_) => "another process".to_owned(),
    };
    Err(EngineError::Setup(format!(
        "the data directory {} is in use by {owner}: one store process owns it; stop that one first",
        dir.display()
    )))
}

/// The text of VERSION: the format's number and a check, so that damage is no newer version.
pub fn version_text(format: u32) -> String {
    let words = format!("{VERSION_WORD} {format}");
    let crc = crc32c::crc32c(words.as_bytes());
    format!("{words} {crc:08x}\n")
}

fn parse_version(text: &str) -> Option<u32> {
    let format = text.split(' ').nth(1)?.parse().ok()?;
    (text == version_text(format)).then_some(format)
}

fn make_private(dir: &File, path: &Path) -> Result<(), EngineError> {
    let meta = dir.metadata().map_err(|e| setup("stat", path, &e))?;
    let us = rustix::process::geteuid().as_raw();
    if meta.uid() != us {
        return Err(EngineError::Setup(format!(
            "the data directory {} belongs to user {}, the store runs as {us}: change its owner, or \
             choose another directory",
            path.display(),
            meta.uid()
        )));
    }
    if meta.mode() & 0o077 != 0 {
        dir.set_permissions(fs::Permissions::from_mode(0o700))
            .map_err(|e| setup("take other users' rights from", path, &e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folders_of_what_is_acknowledged_have_names_before_anything_is_in_them() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(&dir.path().join("data"), None).unwrap();
        for folder in [data.segments(), data.docs()] {
            let mode = fs::metadata(&folder).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700, "{}", folder.display());
        }
    }
}
