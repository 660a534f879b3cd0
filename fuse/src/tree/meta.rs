//! Answers from the metadata: names, attributes, listings.

use std::ffi::OsStr;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;

use fuser::{
    Errno, Generation, INodeNo, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEntry, ReplyStatfs, ReplyXattr,
};
use lazyimg_image::erofs::{BLOCK_BYTES, DirEntry, FileType, InodeInfo, ReadError};

use super::{Shared, TTL};
use crate::attr::{absent, file_attr, kind};
use crate::errno::Failure;

/// The longest name, in bytes (NAME_MAX).
const NAME_MAX: u32 = 255;

/// Inodes are never reused: an image does not change.
const GENERATION: Generation = Generation(0);

impl Shared {
    pub(super) fn inode(&self, ino: INodeNo) -> Result<InodeInfo, Failure> {
        Ok(self.reader.inode(self.inos.nid(ino))?)
    }

    /// Notes a failure; what to answer.
    pub(super) fn failed(&self, operation: &str, failure: &Failure) -> Errno {
        self.faults.record(operation, failure);
        failure.errno()
    }

    pub(super) fn lookup(&self, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        // Linux lets FUSE have names of up to a page.
        if name.len() > NAME_MAX as usize {
            return reply.error(Errno::ENAMETOOLONG);
        }
        let found = || -> Result<Option<InodeInfo>, Failure> {
            // File handles (`name_to_handle_at`, NFS) look up `.` of any inode.
            let nid = if name == "." {
                Some(self.inos.nid(parent))
            } else {
                self.reader.lookup(self.inos.nid(parent), name.as_bytes())?
            };
            Ok(nid.map(|nid| self.reader.inode(nid)).transpose()?)
        };
        match found() {
            Ok(Some(info)) => {
                reply.entry(&TTL, &file_attr(self.inos.ino(info.nid), &info), GENERATION)
            }
            Ok(None) => reply.entry(&TTL, &absent(), GENERATION),
            Err(failure) => reply.error(self.failed("lookup", &failure)),
        }
    }

    pub(super) fn getattr(&self, ino: INodeNo, reply: ReplyAttr) {
        match self.inode(ino) {
            Ok(info) => reply.attr(&TTL, &file_attr(ino, &info)),
            Err(failure) => reply.error(self.failed("getattr", &failure)),
        }
    }

    pub(super) fn readlink(&self, ino: INodeNo, reply: ReplyData) {
        match self.reader.read_link(self.inos.nid(ino)) {
            Ok(target) => reply.data(&target),
            Err(ReadError::WrongType { .. }) => reply.error(Errno::EINVAL),
            Err(error) => reply.error(self.failed("readlink", &error.into())),
        }
    }

    pub(super) fn readdir(&self, ino: INodeNo, cookie: u64, mut reply: ReplyDirectory) {
        let mut added = false;
        let listed = self.list(ino, cookie, &mut |entry| {
            let ino = self.inos.ino(entry.nid);
            let full = reply.add(
                ino,
                entry.cookie_after,
                kind(entry.file_type),
                OsStr::from_bytes(entry.name),
            );
            added |= !full;
            Ok(!full)
        });
        match listed {
            Err(errno) if !added => reply.error(errno),
            // What was listed so far; the next call meets the error.
            _ => reply.ok(),
        }
    }

    pub(super) fn readdirplus(&self, ino: INodeNo, cookie: u64, mut reply: ReplyDirectoryPlus) {
        let mut added = false;
        let listed = self.list(ino, cookie, &mut |entry| {
            let ino = self.inos.ino(entry.nid);
            let attr = if matches!(entry.name, b"." | b"..") {
                // The kernel takes number and type of these, and nothing else.
                fuser::FileAttr {
                    ino,
                    kind: kind(FileType::Directory),
                    ..absent()
                }
            } else {
                file_attr(ino, &self.reader.inode(entry.nid)?)
            };
            let name = OsStr::from_bytes(entry.name);
            let full = reply.add(ino, entry.cookie_after, name, &TTL, &attr, GENERATION);
            added |= !full;
            Ok(!full)
        });
        match listed {
            Err(errno) if !added => reply.error(errno),
            _ => reply.ok(),
        }
    }

    /// Calls `each` for the entries from `cookie` on, until it says false.
    fn list(
        &self,
        ino: INodeNo,
        cookie: u64,
        each: &mut dyn FnMut(DirEntry<'_>) -> Result<bool, ReadError>,
    ) -> Result<(), Errno> {
        let mut broken = Ok(());
        let read =
            self.reader
                .read_dir(self.inos.nid(ino), cookie, &mut |entry| match each(entry) {
                    Ok(true) => ControlFlow::Continue(()),
                    Ok(false) => ControlFlow::Break(()),
                    Err(error) => {
                        broken = Err(error);
                        ControlFlow::Break(())
                    }
                });
        match read.and(broken) {
            Ok(()) => Ok(()),
            Err(ReadError::WrongType { .. }) => Err(Errno::ENOTDIR),
            Err(error) => Err(self.failed("readdir", &error.into())),
        }
    }

    pub(super) fn statfs(&self, reply: ReplyStatfs) {
        let totals = self.reader.totals();
        reply.statfs(
            totals.data_blocks + totals.meta_blocks,
            0,
            0,
            totals.inodes,
            0,
            BLOCK_BYTES as u32,
            NAME_MAX,
            BLOCK_BYTES as u32,
        );
    }

    pub(super) fn getxattr(&self, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        match self.reader.xattr(self.inos.nid(ino), name.as_bytes()) {
            Ok(Some(value)) => answer_xattr(&value, size, reply),
            Ok(None) => reply.error(Errno::ENODATA),
            Err(error) => reply.error(self.failed("getxattr", &error.into())),
        }
    }

    pub(super) fn listxattr(&self, ino: INodeNo, privileged: bool, size: u32, reply: ReplyXattr) {
        match self.reader.xattrs(self.inos.nid(ino)) {
            Ok(all) => {
                let mut names = Vec::new();
                for (name, _) in all {
                    // As every Linux file system does.
                    if privileged || !name.starts_with(b"trusted.") {
                        names.extend_from_slice(&name);
                        names.push(0);
                    }
                }
                answer_xattr(&names, size, reply);
            }
            Err(error) => reply.error(self.failed("listxattr", &error.into())),
        }
    }
}

/// The protocol of getxattr(2): a size of 0 asks how much it would be.
fn answer_xattr(value: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(value.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}
