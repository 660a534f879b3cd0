//! Making a FUSE mount: the system call where we may, `fusermount3` where not.
//!
//! fuser could do it, but at a session's end fuser 0.18 unmounts whatever lies at the directory
//! then, which after a lazy unmount may be somebody else's mount (`is_mounted` in its
//! `src/mnt/mod.rs` takes POLLERR for "still mounted"). And a later supervisor that keeps the device
//! open over a restart needs the device by itself.

use std::fs::OpenOptions;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::MountFlags as Flags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::mount::{MountError, MountFlags};
use crate::mountpoint::{self, SUBTYPE};

const DEVICE: &str = "/dev/fuse";
const HELPER: &str = "fusermount3";

/// Mounts a file system that does not answer yet at `dir`; the device to answer on. `source` is what
/// `mountinfo` shows. Blocks.
///
/// # Errors
/// See [`MountError`].
pub fn attach(dir: &Path, source: &str, flags: &MountFlags) -> Result<OwnedFd, MountError> {
    let source = mountpoint::source_name(source);
    match by_system_call(dir, &source, flags) {
        Err(MountError::Other { cause, .. }) if cause.raw_os_error() == Some(libc::EPERM) => {
            by_helper(dir, &source, flags)
        }
        outcome => outcome,
    }
}

fn by_system_call(dir: &Path, source: &str, flags: &MountFlags) -> Result<OwnedFd, MountError> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open(DEVICE)
        .map_err(|cause| match cause.kind() {
            io::ErrorKind::NotFound => MountError::NoDevice,
            io::ErrorKind::PermissionDenied => MountError::DeviceClosed,
            _ => other(dir, cause),
        })?;
    let mut options = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    if flags.lets_others_in() {
        options.push_str(",allow_other");
    }
    let options = std::ffi::CString::new(options).map_err(|e| other(dir, e.into()))?;
    let mut kernel = Flags::RDONLY;
    kernel.set(Flags::NOSUID, !flags.suid);
    kernel.set(Flags::NODEV, !flags.dev);
    rustix::mount::mount(
        source,
        dir,
        format!("fuse.{SUBTYPE}"),
        kernel,
        options.as_c_str(),
    )
    .map_err(|errno| other(dir, errno.into()))?;
    Ok(device.into())
}

/// `fusermount3` is setuid root. It mounts, and sends the device through the socket that
/// `_FUSE_COMMFD` names (libfuse, `util/fusermount.c`): its standard input, here.
fn by_helper(dir: &Path, source: &str, flags: &MountFlags) -> Result<OwnedFd, MountError> {
    let (ours, theirs) = UnixStream::pair().map_err(|e| other(dir, e))?;
    let mut options = format!("ro,fsname={source},subtype={SUBTYPE},default_permissions");
    for (on, option) in [
        (flags.suid, ",suid"),
        (flags.dev, ",dev"),
        (flags.lets_others_in(), ",allow_other"),
    ] {
        if on {
            options.push_str(option);
        }
    }
    let child = Command::new(HELPER)
        .args(["-o", &options, "--"])
        .arg(dir)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|cause| match cause.kind() {
            io::ErrorKind::NotFound => MountError::NoHelper,
            _ => other(dir, cause),
        })?;
    // The other end is the child's alone now, so this ends when the child does.
    let received = receive_fd(&ours);
    let output = child.wait_with_output().map_err(|e| other(dir, e))?;
    if let Some(device) = received.map_err(|e| other(dir, e))? {
        return Ok(device);
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if text.contains("user_allow_other") {
        return Err(MountError::AllowOther);
    }
    Err(other(dir, io::Error::other(text)))
}

/// A file descriptor sent over a socket; `None` when the peer hangs up without one.
fn receive_fd(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    loop {
        let mut buffers = [IoSliceMut::new(&mut byte)];
        match rustix::net::recvmsg(socket, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
            Ok(_) => break,
        }
    }
    Ok(control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    }))
}

fn other(dir: &Path, cause: io::Error) -> MountError {
    MountError::Other {
        dir: dir.to_owned(),
        cause,
    }
}
