//! EROFS inodes as FUSE shows them.

use std::time::{Duration, SystemTime};

use fuser::{FileAttr, INodeNo};
use lazyimg_image::erofs::{BLOCK_BYTES, FileType, InodeInfo, Nid};
use lazyimg_image::tree::{Mtime, Rdev};

/// FUSE inode number of the root, fixed by the kernel (`FUSE_ROOT_ID`).
const FUSE_ROOT: u64 = 1;

/// What `st_blocks` counts in, in bytes (stat(2)).
const STAT_BLOCK: u64 = 512;

/// FUSE inode numbers from EROFS ones: the same but for the root, which must be 1 and swaps places
/// with nid 1, so that both ways are exact whatever the metadata says.
#[derive(Debug, Clone, Copy)]
pub struct Inos {
    root: Nid,
}

impl Inos {
    /// For an image whose root directory is `root`.
    pub fn new(root: Nid) -> Self {
        Self { root }
    }

    fn swap(self, number: u64) -> u64 {
        match number {
            n if n == self.root => FUSE_ROOT,
            FUSE_ROOT => self.root,
            n => n,
        }
    }

    /// The number that the kernel is told.
    pub fn ino(self, nid: Nid) -> INodeNo {
        INodeNo(self.swap(nid))
    }

    /// The number that the kernel's number stands for.
    pub fn nid(self, ino: INodeNo) -> Nid {
        self.swap(ino.0)
    }
}

/// The attributes of an inode. Block counts are what the kernel's EROFS shows: the size in whole
/// blocks. Access and change time are the modification time, the only one that layers carry.
pub fn file_attr(ino: INodeNo, info: &InodeInfo) -> FileAttr {
    let time = system_time(info.mtime);
    FileAttr {
        ino,
        size: info.size,
        blocks: info.size.div_ceil(BLOCK_BYTES) * (BLOCK_BYTES / STAT_BLOCK),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: SystemTime::UNIX_EPOCH,
        kind: kind(info.file_type),
        perm: info.mode & 0o7777,
        nlink: info.nlink,
        uid: info.uid,
        gid: info.gid,
        rdev: encode_dev(info.rdev),
        blksize: BLOCK_BYTES as u32,
        flags: 0,
    }
}

/// The answer to a look-up that found nothing: inode 0, which the kernel remembers as absent.
pub fn absent() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: SystemTime::UNIX_EPOCH,
        mtime: SystemTime::UNIX_EPOCH,
        ctime: SystemTime::UNIX_EPOCH,
        crtime: SystemTime::UNIX_EPOCH,
        kind: fuser::FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

/// FUSE's name for a type.
pub fn kind(file_type: FileType) -> fuser::FileType {
    match file_type {
        FileType::Regular => fuser::FileType::RegularFile,
        FileType::Directory => fuser::FileType::Directory,
        FileType::CharDevice => fuser::FileType::CharDevice,
        FileType::BlockDevice => fuser::FileType::BlockDevice,
        FileType::Fifo => fuser::FileType::NamedPipe,
        FileType::Socket => fuser::FileType::Socket,
        FileType::Symlink => fuser::FileType::Symlink,
    }
}

/// Linux's 32-bit device number (`new_encode_dev`): 12 bits of major, 20 of minor.
fn encode_dev(dev: Rdev) -> u32 {
    (dev.minor & 0xff) | (dev.major << 8) | ((dev.minor & !0xff) << 12)
}

/// Saturates at what a `SystemTime` can hold: the 64-bit seconds of Linux.
fn system_time(time: Mtime) -> SystemTime {
    let nanos = Duration::from_nanos(u64::from(time.nsec));
    let seconds = Duration::from_secs(time.sec.unsigned_abs());
    let whole = if time.sec < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(seconds)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(seconds)
    };
    whole
        .and_then(|t| t.checked_add(nanos))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_inode_1_and_no_other_inode_is() {
        for root in [1, 36, 1 << 40] {
            let inos = Inos::new(root);
            assert_eq!(inos.ino(root), INodeNo(1));
            for nid in [0, 1, 2, 36, 37, 1 << 40, u64::MAX] {
                assert_eq!(inos.nid(inos.ino(nid)), nid);
                assert_eq!(inos.ino(nid) == INodeNo(1), nid == root);
            }
        }
    }

    #[test]
    fn times_before_1970_keep_their_nanoseconds() {
        let time = system_time(Mtime {
            sec: -2,
            nsec: 500_000_000,
        });
        assert_eq!(time, SystemTime::UNIX_EPOCH - Duration::from_millis(1500));
    }

    #[test]
    fn device_numbers_survive() {
        let dev = encode_dev(Rdev {
            major: 0xabc,
            minor: 0xdef12,
        });
        assert_eq!(
            (dev >> 8 & 0xfff, dev & 0xff | dev >> 12 & 0xfff00),
            (0xabc, 0xdef12)
        );
    }
}
