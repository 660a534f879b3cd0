//! A streaming reader of tar archives, over any [`std::io::Read`].
//!
//! Reads what the tools that make image layers have written over the years: v7, ustar, GNU (long
//! names `L` and `K`, base-256 numbers, sparse files `S` with extension blocks), and PAX extended
//! headers (`x`, `g`, Solaris' `X`): path, linkpath, size, uid, gid, mtime to the nanosecond,
//! `SCHILY.xattr.*`, `LIBARCHIVE.xattr.*`, `SCHILY.acl.*`, and GNU's sparse files 0.0, 0.1 and 1.0.
//!
//! Sources: POSIX.1-2017 "pax" (interchange formats), the GNU tar manual ("Tar Internals"), star(5),
//! libarchive's tar(5). Where readers disagree, this one follows Go's `archive/tar`, because
//! containerd, Docker and umoci read layers with it; the places are marked.
//!
//! Type flags:
//!
//! | flag | taken as |
//! |---|---|
//! | `0`, NUL, `7` | regular file; NUL with a trailing slash in the name: directory (v7) |
//! | `1` `2` `3` `4` `5` `6` | hard link, symbolic link, character and block device, directory, fifo |
//! | `S` | regular file, old GNU sparse map |
//! | `D` | directory; its body, GNU's list of names for incremental backups, is skipped |
//! | `x` `X` `g` `L` `K` | metadata of the entries that follow |
//! | `V` | GNU volume label: skipped |
//! | all others | refused; `M` and `N` among them, because skipping them would lose file content |

mod acl;
mod error;
mod header;
mod input;
mod number;
mod pax;
mod reader;
mod sparse;

pub use error::{TarError, TarProblem};
pub use reader::{BodyError, Entry, EntryKind, Reader};

/// Bytes of a tar block; headers take one, bodies are padded to a multiple.
pub const BLOCK: usize = 512;

#[cfg(test)]
pub(crate) mod tests_support;
