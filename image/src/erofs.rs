//! The metadata of an image as an EROFS file system: a deterministic writer, and a reader that
//! trusts nothing.
//!
//! EROFS is the kernel's read-only file system. What is written here is the part that holds names
//! and inodes; the bytes of regular files lie in a second device, the data space. The kernel
//! mounts the pair (`mount -t erofs -o device=DATA META`), `fsck.erofs` checks it, and the FUSE
//! front end serves the same bytes through [`Reader`]. `docs/erofs.md` specifies the subset byte by
//! byte; the format itself is the kernel's (`Documentation/filesystems/erofs.rst`,
//! `fs/erofs/erofs_fs.h`).
//!
//! - [`write`](fn@write) turns a [`crate::tree::Tree`] into bytes: equal trees give equal bytes.
//! - [`MetaSource`] is where a reader gets them; it may wait for bytes that have not arrived.
//! - [`Reader`] answers look-ups, listings and attributes; [`walk`](fn@walk) visits everything.

mod dirent;
mod disk;
mod layout;
mod read;
mod source;
mod walk;
mod write;
mod xattr;

#[cfg(test)]
mod tests;

pub use disk::{BLOCK_BYTES, FileType, MAX_DATA_BLOCKS, SYMLINK_BYTES};
pub use read::{DataPlace, DirEntry, InodeInfo, Nid, ReadError, Reader, Totals};
pub use source::{MetaError, MetaSource};
pub use walk::walk;
pub use write::{Problem, WriteError, write};
pub use xattr::{XATTR_VALUE_BYTES, XATTRS_BYTES, is_kept as xattr_is_kept};
