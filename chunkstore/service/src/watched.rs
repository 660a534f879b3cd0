//! Whether files have changed since they were read.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What files looked like when they were read.
#[derive(Debug, Default)]
pub(crate) struct Watched(Vec<(PathBuf, Option<Stamp>)>);

/// Device, inode, length, and the times of the last changes to content and to the inode.
type Stamp = (u64, u64, u64, (i64, i64), (i64, i64));

fn stamp(path: &Path) -> Option<Stamp> {
    let of = |meta: Metadata| {
        (
            meta.dev(),
            meta.ino(),
            meta.len(),
            (meta.mtime(), meta.mtime_nsec()),
            (meta.ctime(), meta.ctime_nsec()),
        )
    };
    std::fs::metadata(path).ok().map(of)
}

impl Watched {
    /// Adds a file. To be called *before* it is read: a change in between is then seen as one.
    pub fn add(&mut self, path: &Path) {
        self.0.push((path.to_owned(), stamp(path)));
    }

    /// Whether any of the files is not as it was.
    pub fn has_changed(&self) -> bool {
        self.0.iter().any(|(path, before)| stamp(path) != *before)
    }
}
