//! Where client and daemon meet: a socket and a lock in the cache directory.
//!
//! The lock says who is the daemon; the kernel frees it however the daemon ends. The socket is
//! removed and made by who holds the lock. Socket addresses are limited to 108 bytes and cache
//! directories are not, so both sides go through `/proc/self/fd`.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

const SOCKET: &str = "control.sock";
const LOCK: &str = "daemon.lock";

/// The daemon's log in the cache directory; the one before it ends in `.1`.
pub const LOG: &str = "daemon.log";

/// The right to be the daemon of a cache directory, until it is dropped.
#[derive(Debug)]
pub struct DaemonLock {
    _file: File,
}

fn through_fd(dir: &File, name: &str) -> PathBuf {
    Path::new("/proc/self/fd")
        .join(dir.as_raw_fd().to_string())
        .join(name)
}

/// Makes the cache directory, for its user only.
///
/// # Errors
/// What the system says.
pub fn make_dir(cache_dir: &Path) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(cache_dir)
}

impl DaemonLock {
    /// Takes the lock if nobody has it.
    ///
    /// # Errors
    /// `WouldBlock` when somebody has; else what the system says.
    pub fn take(cache_dir: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(cache_dir.join(LOCK))?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        // For people who look; nothing reads it.
        let _ = file
            .set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(Self { _file: file })
    }

    /// Makes the socket, for its user only.
    ///
    /// # Errors
    /// What the system says.
    pub fn listen(&self, cache_dir: &Path) -> io::Result<UnixListener> {
        self.remove_socket(cache_dir)?;
        let dir = File::open(cache_dir)?;
        let listener = UnixListener::bind(through_fd(&dir, SOCKET))?;
        // Until here the directory's mode kept others out, and peers are checked anyway.
        std::fs::set_permissions(
            cache_dir.join(SOCKET),
            std::fs::Permissions::from_mode(0o600),
        )?;
        Ok(listener)
    }

    /// Removes the socket: who connects from now on finds that there is no daemon.
    ///
    /// # Errors
    /// What the system says; a socket that is not there is fine.
    pub fn remove_socket(&self, cache_dir: &Path) -> io::Result<()> {
        match std::fs::remove_file(cache_dir.join(SOCKET)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Connects to the daemon of a cache directory; `None` when there is none.
///
/// # Errors
/// What the system says, for example that the directory is another user's.
pub fn connect(cache_dir: &Path) -> io::Result<Option<UnixStream>> {
    let absent = |error: &io::Error| {
        matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
        )
    };
    let dir = match File::open(cache_dir) {
        Ok(dir) => dir,
        Err(error) if absent(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    match UnixStream::connect(through_fd(&dir, SOCKET)) {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The user at the other end of a connection.
///
/// # Errors
/// What the system says.
pub fn peer_uid(stream: &impl std::os::fd::AsFd) -> io::Result<u32> {
    Ok(rustix::net::sockopt::socket_peercred(stream)?.uid.as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_daemon_and_its_socket_is_private() {
        let dir = tempfile::tempdir().unwrap();
        // Longer than a socket address may be.
        let cache = dir.path().join("x".repeat(120)).join("y".repeat(120));
        make_dir(&cache).unwrap();
        assert!(connect(&cache).unwrap().is_none());
        let lock = DaemonLock::take(&cache).unwrap();
        assert_eq!(
            DaemonLock::take(&cache).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        let listener = lock.listen(&cache).unwrap();
        let stream = connect(&cache).unwrap().unwrap();
        assert_eq!(
            peer_uid(&stream).unwrap(),
            rustix::process::geteuid().as_raw()
        );
        let mode = std::fs::metadata(cache.join(SOCKET))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
        assert!(
            connect(&cache).unwrap().is_none(),
            "a dead daemon's socket is no daemon"
        );
        lock.remove_socket(&cache).unwrap();
        drop(lock);
        DaemonLock::take(&cache).unwrap();
    }
}
