//! The front ends that show an image as a file system, and the daemon that serves them.
//!
//! - [`tree`]: a FUSE file system; [`mount`] puts one at a directory.
//! - [`daemon`]: one process for each cache directory, serving all of its mounts;
//!   [`client`] talks to it, in the words of [`protocol`] (`docs/control.md`).
//!
//! `docs/mount.md` has what a mount promises and which test proves it.

mod attach;
mod attr;
pub mod client;
pub mod daemon;
pub mod errno;
pub mod faults;
pub mod log;
pub mod meta;
pub mod mount;
pub mod mountpoint;
pub mod opener;
pub mod protocol;
pub mod readahead;
pub mod rendezvous;
pub mod tally;
pub mod tree;
pub mod view;
