//! The daemon's log: a file that does not grow without bound.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use tracing_subscriber::fmt::MakeWriter;

/// A log of this many bytes becomes `daemon.log.1`, replacing the one before: at most twice this on
/// disk.
pub const MAX_LOG_BYTES: u64 = 1 << 20;

/// Appends to a file of at most [`MAX_LOG_BYTES`]; also what a panic prints lands there.
#[derive(Debug)]
pub struct BoundedLog {
    path: PathBuf,
    open: Mutex<(File, u64)>,
}

/// Opens a log file for appending, readable by its user only.
///
/// # Errors
/// What the system says.
pub fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

impl BoundedLog {
    /// The log at `path`.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        let len = file.metadata()?.len();
        Ok(Self {
            path: path.to_owned(),
            open: Mutex::new((file, len)),
        })
    }

    fn append(&self, line: &[u8]) -> io::Result<()> {
        let mut guard = self.open.lock();
        let (file, len) = &mut *guard;
        if *len + line.len() as u64 > MAX_LOG_BYTES {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            // When this fails the file only grows on, a little later it is tried again.
            if std::fs::rename(&self.path, old).is_ok() {
                *file = open(&self.path)?;
                *len = 0;
                // What is printed past us, a panic, goes to the new file as well.
                let _ = rustix::stdio::dup2_stderr(&*file);
            }
        }
        file.write_all(line)?;
        *len += line.len() as u64;
        Ok(())
    }
}

impl Write for &BoundedLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.append(line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for BoundedLog {
    type Writer = &'a BoundedLog;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

/// The end of a log, for an error message: at most `max` bytes, from the beginning of a line.
pub fn tail(path: &Path, from: u64, max: usize) -> String {
    let Ok(bytes) = std::fs::read(path) else {
        return String::new();
    };
    let new = bytes
        .get(usize::try_from(from).unwrap_or(usize::MAX)..)
        .unwrap_or(&bytes);
    let cut = new.len().saturating_sub(max);
    let start = if cut == 0 {
        0
    } else {
        new[cut..]
            .iter()
            .position(|&b| b == b'\n')
            .map_or(cut, |i| cut + i + 1)
    };
    String::from_utf8_lossy(&new[start..]).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_never_takes_more_than_twice_its_bound() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = BoundedLog::new(&path).unwrap();
        let line = [b'x'; 1000];
        // Not through append's renaming twice in one test binary: standard error is shared.
        for _ in 0..MAX_LOG_BYTES / 1000 {
            (&log).write_all(&line).unwrap();
        }
        assert!(std::fs::metadata(&path).unwrap().len() <= MAX_LOG_BYTES);
    }

    #[test]
    fn the_tail_of_a_log_begins_with_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "old\nfirst\nsecond\n").unwrap();
        assert_eq!(tail(&path, 4, 100), "first\nsecond");
        assert_eq!(tail(&path, 0, 9), "second");
        assert_eq!(tail(&dir.path().join("none"), 0, 9), "");
    }
}
