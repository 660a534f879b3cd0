//! Directories as mount points: what is mounted there, whether it still answers, taking it off.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

/// The FUSE subtype of our mounts: they are of type `fuse.lazyimg`.
pub const SUBTYPE: &str = "lazyimg";

/// What `mountinfo` calls our mounts.
const FS_TYPE: &str = "fuse.lazyimg";

/// A live daemon answers `statfs` in microseconds; a busy machine may take a while to run it.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// A mount, as `/proc/self/mountinfo` lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Where.
    pub dir: PathBuf,
    /// Its device number: major, minor.
    pub device: (u32, u32),
    /// File system type: `fuse.lazyimg` for ours.
    pub fs_type: String,
    /// Source; ours say which image.
    pub source: String,
}

impl MountEntry {
    /// Whether some lazyimg serves (or served) it.
    pub fn is_ours(&self) -> bool {
        self.fs_type == FS_TYPE
    }
}

/// Whether a mount of ours still works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// Its daemon answers.
    Alive,
    /// Its daemon is gone: every access fails with ENOTCONN.
    Stale,
    /// Nothing answers in time: its daemon is stopped, or can't run.
    Hung,
}

/// How to take a mount off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unmount {
    /// Only if nothing uses it.
    Clean,
    /// At once for new users; files that are open stay readable until they are closed.
    Lazy,
    /// Lazy, and what is under way fails. Needs root.
    Force,
}

/// Why a mount could not be taken off, or a directory not be used.
#[derive(Debug, thiserror::Error)]
pub enum MountpointError {
    /// Files are open, or a program's working directory is inside.
    #[error("{} is in use; stop what uses it (`fuser -vm {}`), or detach it with --lazy", dir.display(), dir.display())]
    Busy {
        /// Where.
        dir: PathBuf,
    },
    /// Nothing is mounted there, or something else is.
    #[error("{} is not a lazyimg mount{}", dir.display(), found.as_deref().map_or(String::new(), |t| format!(" (it is of type {t})")))]
    NotOurs {
        /// Where.
        dir: PathBuf,
        /// What is mounted there.
        found: Option<String>,
    },
    /// The directory can't be used.
    #[error("{}: {cause}", dir.display())]
    Directory {
        /// Which.
        dir: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// It is mounted already.
    #[error("{} is a lazyimg mount already ({source_name}); unmount it first", dir.display())]
    Mounted {
        /// Where.
        dir: PathBuf,
        /// Its image.
        source_name: String,
    },
    /// A mount that does not answer.
    #[error("{} is a lazyimg mount that does not answer; `lazyimg umount --force` it (as root) or kill its daemon", dir.display())]
    Hung {
        /// Where.
        dir: PathBuf,
    },
    /// The system call or the helper failed.
    #[error("cannot unmount {}: {cause}", dir.display())]
    Unmount {
        /// Where.
        dir: PathBuf,
        /// Why.
        cause: String,
    },
    /// The list of mounts can't be read.
    #[error("cannot read /proc/self/mountinfo: {0}")]
    Mountinfo(#[source] io::Error),
}

/// An absolute path without symbolic links, found without touching the last component, which may be
/// a mount that does not answer.
///
/// # Errors
/// When the parent does not exist.
pub fn resolve(dir: &Path) -> Result<PathBuf, MountpointError> {
    let fail = |cause| MountpointError::Directory {
        dir: dir.to_owned(),
        cause,
    };
    let absolute = std::path::absolute(dir).map_err(fail)?;
    // The last component itself may be a symbolic link to the mount: readlink(2) of a stale mount
    // fails with ENOTCONN, of anything else that is no link with EINVAL.
    if let Ok(resolved) = absolute.canonicalize() {
        return Ok(resolved);
    }
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.canonicalize().map_err(fail)?.join(name)),
        _ => Ok(absolute),
    }
}

/// The topmost mount at exactly `dir` (resolved).
///
/// # Errors
/// When the list of mounts can't be read.
pub fn mounted_at(dir: &Path) -> Result<Option<MountEntry>, MountpointError> {
    let text = std::fs::read("/proc/self/mountinfo").map_err(MountpointError::Mountinfo)?;
    Ok(parse_mountinfo(&text)
        .filter(|entry| entry.dir == dir)
        .last())
}

/// Entries of a mountinfo file (proc_pid_mountinfo(5)), oldest first; lines it does not understand
/// are left out.
fn parse_mountinfo(text: &[u8]) -> impl Iterator<Item = MountEntry> + '_ {
    text.split(|&b| b == b'\n').filter_map(|line| {
        let mut fields = line.split(|&b| b == b' ');
        let device = std::str::from_utf8(fields.nth(2)?).ok()?.split_once(':')?;
        let dir = fields.nth(1)?;
        let mut after = fields.skip_while(|f| f != b"-").skip(1);
        let fs_type = after.next()?;
        let source = after.next()?;
        Some(MountEntry {
            dir: PathBuf::from(std::ffi::OsString::from_vec(unescape(dir))),
            device: (device.0.parse().ok()?, device.1.parse().ok()?),
            fs_type: String::from_utf8_lossy(fs_type).into_owned(),
            source: String::from_utf8_lossy(&unescape(source)).into_owned(),
        })
    })
}

/// Undoes the kernel's `\ooo` for blanks, tabs, line ends and backslashes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| after.get(..3))
            .flatten()
            .and_then(|digits| {
                let text = std::str::from_utf8(digits).ok()?;
                u8::from_str_radix(text, 8).ok()
            });
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = &after[3..];
            }
            None => {
                out.push(first);
                rest = after;
            }
        }
    }
    out
}

/// Asks the mount at `dir` whether it is there, and does not wait for ever.
pub fn probe(dir: &Path) -> Health {
    let (send, receive) = mpsc::channel();
    let dir = dir.to_owned();
    // A thread of its own: on a hung mount it stays behind until the mount is forced off.
    let spawned = std::thread::Builder::new()
        .name("lazyimg-probe".to_owned())
        .spawn(move || {
            let _ = send.send(rustix::fs::statfs(&dir));
        });
    match spawned.map(|_| receive.recv_timeout(PROBE_TIMEOUT)) {
        Ok(Ok(Err(Errno::NOTCONN | Errno::CONNABORTED))) => Health::Stale,
        Ok(Ok(_)) => Health::Alive,
        Ok(Err(_)) | Err(_) => Health::Hung,
    }
}

/// Makes `dir` (resolved) ready to be mounted on: it is a directory, and a stale mount of ours is
/// taken off it. Says what was done, if something was. Blocks.
///
/// # Errors
/// See [`MountpointError`].
pub fn prepare(dir: &Path) -> Result<Option<String>, MountpointError> {
    let mut note = None;
    while let Some(entry) = mounted_at(dir)?.filter(MountEntry::is_ours) {
        match probe(dir) {
            Health::Alive => {
                return Err(MountpointError::Mounted {
                    dir: dir.to_owned(),
                    source_name: entry.source,
                });
            }
            Health::Hung => {
                return Err(MountpointError::Hung {
                    dir: dir.to_owned(),
                });
            }
            Health::Stale => {
                unmount(dir, Unmount::Lazy)?;
                note = Some(format!(
                    "took off the stale mount of {} that a dead daemon left at {}",
                    entry.source,
                    dir.display()
                ));
            }
        }
    }
    let fail = |cause| MountpointError::Directory {
        dir: dir.to_owned(),
        cause,
    };
    if !std::fs::metadata(dir).map_err(fail)?.is_dir() {
        return Err(fail(io::Error::from(io::ErrorKind::NotADirectory)));
    }
    Ok(note)
}

/// Takes the topmost mount off `dir` (resolved). Without the right to do it, `fusermount3` is asked,
/// which lets users take off their own. Blocks for the time that takes.
///
/// # Errors
/// [`MountpointError::Busy`] and [`MountpointError::Unmount`].
pub fn unmount(dir: &Path, how: Unmount) -> Result<(), MountpointError> {
    let flags = match how {
        Unmount::Clean => UnmountFlags::empty(),
        Unmount::Lazy => UnmountFlags::DETACH,
        Unmount::Force => UnmountFlags::FORCE | UnmountFlags::DETACH,
    } | UnmountFlags::NOFOLLOW;
    let fail = |cause: String| MountpointError::Unmount {
        dir: dir.to_owned(),
        cause,
    };
    match rustix::mount::unmount(dir, flags) {
        Ok(()) => Ok(()),
        Err(Errno::BUSY) => Err(MountpointError::Busy {
            dir: dir.to_owned(),
        }),
        Err(Errno::PERM) if how == Unmount::Force => {
            Err(fail("only root may force a mount off".to_owned()))
        }
        Err(Errno::PERM) => fusermount(dir, how == Unmount::Lazy),
        Err(Errno::INVAL) => Err(MountpointError::NotOurs {
            dir: dir.to_owned(),
            found: None,
        }),
        Err(error) => Err(fail(error.to_string())),
    }
}

fn fusermount(dir: &Path, lazy: bool) -> Result<(), MountpointError> {
    let mut command = Command::new("fusermount3");
    command.arg("-u");
    if lazy {
        command.arg("-z");
    }
    let output = command.arg("--").arg(dir).stdin(Stdio::null()).output();
    let cause = match output {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            "fusermount3 is not installed (Debian: apt install fuse3)".to_owned()
        }
        Err(error) => error.to_string(),
    };
    if cause.contains("busy") {
        return Err(MountpointError::Busy {
            dir: dir.to_owned(),
        });
    }
    Err(MountpointError::Unmount {
        dir: dir.to_owned(),
        cause,
    })
}

/// A text as the source of a mount: what could be taken for an option or a separator is replaced.
pub fn source_name(text: &str) -> String {
    const LONGEST: usize = 255;
    let plain = |c: char| c.is_ascii_alphanumeric() || "._:/@+-=[]".contains(c);
    let name: String = text
        .chars()
        .take(LONGEST)
        .map(|c| if plain(c) { c } else { '_' })
        .collect();
    if name.is_empty() {
        SUBTYPE.to_owned()
    } else {
        name
    }
}

/// The mount namespace of this process, as the kernel names it: `mnt:[4026531841]`.
///
/// # Errors
/// When /proc is not mounted.
pub fn namespace() -> io::Result<String> {
    let link = std::fs::read_link("/proc/self/ns/mnt")?;
    Ok(OsStr::from_bytes(link.as_os_str().as_bytes())
        .to_string_lossy()
        .into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_with_optional_fields_and_escapes() {
        let text = b"22 1 254:0 / / rw - ext4 /dev/vda rw\n\
            36 22 0:40 / /mnt/a\\040b\\134 ro,nosuid shared:1 master:2 - fuse.lazyimg host:5000/x:v1 ro,user_id=0\n\
            garbage\n";
        let entries: Vec<_> = parse_mountinfo(text).collect();
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[1].dir, Path::new("/mnt/a b\\"));
        assert_eq!(entries[1].source, "host:5000/x:v1");
        assert_eq!(entries[1].device, (0, 40));
        assert!(entries[1].is_ours() && !entries[0].is_ours());
    }

    #[test]
    fn a_source_can_not_smuggle_in_mount_options() {
        assert_eq!(source_name("oci:/a b,dev\\:v1"), "oci:/a_b_dev_:v1");
        assert_eq!(source_name(""), "lazyimg");
        assert!(source_name(&"x".repeat(9999)).len() <= 255);
    }

    #[test]
    fn a_plain_directory_is_ready_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(prepare(dir.path()).unwrap(), None);
        let file = dir.path().join("f");
        std::fs::write(&file, "").unwrap();
        assert!(matches!(
            prepare(&file),
            Err(MountpointError::Directory { .. })
        ));
        assert!(matches!(
            prepare(&dir.path().join("gone")),
            Err(MountpointError::Directory { .. })
        ));
    }
}
