//! Visiting every name of an image.

use std::collections::HashSet;
use std::ops::ControlFlow;

use super::disk::{DIRENT_BYTES, FileType};
use super::read::{InodeInfo, Nid, ReadError, Reader};
use super::source::MetaSource;

/// Visits every name depth first, names in byte order, a directory before what it holds, beginning
/// with the root, whose path is empty; paths have no leading slash. The same order as
/// [`crate::tree::Tree::walk`]. Stops when `f` breaks.
///
/// Corrupt metadata ends the walk with an error in time linear in its length: a directory that is
/// reached twice is refused, and so are more names than the bytes have room for.
///
/// # Errors
/// As for every read of [`Reader`].
pub fn walk<M: MetaSource>(
    reader: &Reader<M>,
    f: &mut dyn FnMut(&[u8], &InodeInfo) -> ControlFlow<()>,
) -> Result<(), ReadError> {
    let mut names_left = reader.totals().meta_blocks * super::BLOCK_BYTES / DIRENT_BYTES as u64;
    let mut entered = HashSet::new();
    let mut path = Vec::new();
    let root = reader.inode(reader.root())?;
    if f(&path, &root).is_break() {
        return Ok(());
    }
    entered.insert(root.nid);
    let mut stack = vec![Level {
        names: names(reader, root.nid, &mut names_left)?.into_iter(),
        path_bytes: 0,
    }];
    while let Some(level) = stack.last_mut() {
        path.truncate(level.path_bytes);
        let Some((name, nid)) = level.names.next() else {
            stack.pop();
            continue;
        };
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(&name);
        let info = reader.inode(nid)?;
        if f(&path, &info).is_break() {
            return Ok(());
        }
        if info.file_type == FileType::Directory {
            if !entered.insert(nid) {
                return Err(ReadError::Corrupt {
                    at: nid.wrapping_mul(super::disk::SLOT_BYTES),
                    what: "a directory with two names",
                });
            }
            stack.push(Level {
                names: names(reader, nid, &mut names_left)?.into_iter(),
                path_bytes: path.len(),
            });
        }
    }
    Ok(())
}

struct Level {
    names: std::vec::IntoIter<(Vec<u8>, Nid)>,
    path_bytes: usize,
}

fn names<M: MetaSource>(
    reader: &Reader<M>,
    dir: Nid,
    names_left: &mut u64,
) -> Result<Vec<(Vec<u8>, Nid)>, ReadError> {
    let mut names = Vec::new();
    let mut too_many = false;
    reader.read_dir(dir, 0, &mut |entry| {
        if *names_left == 0 {
            too_many = true;
            return ControlFlow::Break(());
        }
        *names_left -= 1;
        if entry.name != b"." && entry.name != b".." {
            names.push((entry.name.to_vec(), entry.nid));
        }
        ControlFlow::Continue(())
    })?;
    if too_many {
        return Err(ReadError::Corrupt {
            at: dir.wrapping_mul(super::disk::SLOT_BYTES),
            what: "more names than the metadata has room for",
        });
    }
    Ok(names)
}
