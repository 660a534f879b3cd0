//! A tree at a directory: the FUSE session and its end.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use fuser::{Config, Session, SessionACL};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::attach::attach;
use crate::mountpoint::{self, MountpointError, Unmount};
use crate::tree::{Shared, TreeFs};

/// Threads that take requests, at least: a read of a chunk on disk keeps one busy for a
/// millisecond, and others should not wait for it.
const MIN_THREADS: usize = 4;

/// How a tree is mounted: what mount(8) calls options.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MountFlags {
    /// Whether setuid bits and file capabilities count.
    pub suid: bool,
    /// Whether device files work.
    pub dev: bool,
    /// Whether users other than the one who mounts may look inside. By default, when root mounts;
    /// others need `user_allow_other` in /etc/fuse.conf.
    pub allow_other: Option<bool>,
}

impl MountFlags {
    /// Whether others may look inside, the default resolved.
    pub fn lets_others_in(&self) -> bool {
        self.allow_other
            .unwrap_or_else(|| rustix::process::geteuid().is_root())
    }
}

/// Why a tree could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// This kernel has no FUSE, or /dev/fuse was not passed into this container.
    #[error(
        "/dev/fuse is missing: load the module (`modprobe fuse`), or pass the device into this container"
    )]
    NoDevice,
    /// /dev/fuse is closed to us.
    #[error(
        "/dev/fuse may not be opened by this user; as root: chmod 0666 /dev/fuse (udev's default)"
    )]
    DeviceClosed,
    /// The setuid helper is missing.
    #[error("mounting without root takes fusermount3 (Debian: apt install fuse3)")]
    NoHelper,
    /// `allow_other` is forbidden.
    #[error(
        "--allow-other takes a line `user_allow_other` in /etc/fuse.conf, which root can write"
    )]
    AllowOther,
    /// Anything else.
    #[error("cannot mount at {}: {cause}", dir.display())]
    Other {
        /// Where.
        dir: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

/// A mounted tree. Dropping it does not unmount: say so with [`TreeMount::unmount`].
pub struct TreeMount {
    dir: PathBuf,
    shared: Arc<Shared>,
    ended: Mutex<Receiver<()>>,
}

impl TreeMount {
    /// Mounts `tree` at `dir` (resolved, prepared). `image` becomes the source of the mount;
    /// `at_end` is called when the session is over, whoever ended it. Returns when the tree can be
    /// used. Blocks.
    ///
    /// # Errors
    /// See [`MountError`].
    pub fn start(
        tree: TreeFs,
        dir: &Path,
        image: &str,
        flags: &MountFlags,
        at_end: impl FnOnce() + Send + 'static,
    ) -> Result<Self, MountError> {
        let shared = tree.shared();
        let device = attach(dir, image, flags)?;
        // From here on there is something to take off when the rest fails.
        Self::begin(tree, shared, device, dir, flags, at_end).map_err(|cause| {
            let _ = mountpoint::unmount(dir, Unmount::Lazy);
            MountError::Other {
                dir: dir.to_owned(),
                cause,
            }
        })
    }

    fn begin(
        tree: TreeFs,
        shared: Arc<Shared>,
        device: OwnedFd,
        dir: &Path,
        flags: &MountFlags,
        at_end: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let acl = if flags.lets_others_in() {
            SessionACL::All
        } else {
            SessionACL::Owner
        };
        let session = Session::from_fd(tree, device, acl, config(acl))?;
        if let Some(entry) = mountpoint::mounted_at(dir).map_err(io::Error::other)? {
            shared.start_filling(dir, entry.device)?;
        }
        let (at_exit, ended) = channel();
        let thread = Arc::clone(&shared);
        let name = dir.to_owned();
        std::thread::Builder::new()
            .name("lazyimg-session".to_owned())
            .spawn(move || serve(session, &thread, &name, at_exit, at_end))?;
        Ok(Self {
            dir: dir.to_owned(),
            shared,
            ended: Mutex::new(ended),
        })
    }

    /// Where it is mounted.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Requests that were answered with an error.
    pub fn errors(&self) -> u64 {
        self.shared.errors()
    }

    /// Bytes that the kernel was advised to read before anybody asked.
    pub fn filled_bytes(&self) -> u64 {
        self.shared.filler().filled_bytes()
    }

    /// Takes it off its directory. The session ends when nothing uses the tree any more: at once
    /// after [`Unmount::Clean`] and [`Unmount::Force`].
    ///
    /// # Errors
    /// [`MountpointError::Busy`] and others; it stays mounted then.
    pub fn unmount(&self, how: Unmount) -> Result<(), MountpointError> {
        let _quiet = self.shared.filler().pause();
        mountpoint::unmount(&self.dir, how)
    }

    /// Waits until the session is over, at most `patience`; whether it is.
    pub fn wait(&self, patience: Duration) -> bool {
        // The other end is dropped at the session's end, which is the signal.
        !matches!(
            self.ended.lock().recv_timeout(patience),
            Err(RecvTimeoutError::Timeout)
        )
    }
}

fn serve(
    session: Session<TreeFs>,
    shared: &Shared,
    dir: &Path,
    at_exit: Sender<()>,
    at_end: impl FnOnce(),
) {
    if let Err(error) = session.run() {
        tracing::error!(mount = %dir.display(), "the session ended with an error: {error}");
    }
    shared.filler().stop();
    drop(at_exit);
    at_end();
}

fn config(acl: SessionACL) -> Config {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut config = Config::default();
    config.acl = acl;
    config.n_threads = Some(cores.max(MIN_THREADS));
    config
}
