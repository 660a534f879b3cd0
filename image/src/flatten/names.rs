//! Names in layers: split, checked, and resolved inside the root.

use std::collections::VecDeque;

use super::EntryProblem;
use crate::limits::{Limits, within};
use crate::tree::{InodeId, Kind, Tree};

/// What every whiteout's name begins with.
const WHITEOUT: &[u8] = b".wh.";
/// The whole name of an opaque whiteout.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What AUFS's own names begin with.
pub(super) const AUFS: &[u8] = b".wh..wh.";

/// A path cut into its last name and what stands before it. Slashes at both ends, doubled ones and
/// `.` are gone.
pub(super) struct Split<'a> {
    pub parents: Vec<&'a [u8]>,
    pub name: &'a [u8],
}

impl<'a> Split<'a> {
    /// Cuts a path; `None` is the root.
    pub(super) fn path(path: &'a [u8], limits: &Limits) -> Result<Option<Self>, EntryProblem> {
        within(
            path.len() as u64,
            limits.path_bytes as u64,
            "bytes in a path",
            None,
        )?;
        let mut parents: Vec<_> = components(path).collect();
        for name in &parents {
            if *name == b".." {
                return Err(EntryProblem::DotDot(path.to_vec()));
            }
            if name.contains(&0) {
                return Err(EntryProblem::Nul(path.to_vec()));
            }
            within(
                name.len() as u64,
                limits.name_bytes as u64,
                "bytes in a name",
                None,
            )?;
        }
        Ok(parents.pop().map(|name| Self { parents, name }))
    }
}

fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&b| b == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
}

/// What a whiteout hides.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Hidden<'a> {
    /// One name.
    Name(&'a [u8]),
    /// Everything in its directory.
    All,
}

/// Whether a name is a whiteout, and of what.
pub(super) fn whiteout(name: &[u8]) -> Result<Option<Hidden<'_>>, EntryProblem> {
    if name == OPAQUE {
        return Ok(Some(Hidden::All));
    }
    match name.strip_prefix(WHITEOUT) {
        None => Ok(None),
        Some(b"" | b"." | b"..") => Err(EntryProblem::Whiteout),
        Some(hidden) => Ok(Some(Hidden::Name(hidden))),
    }
}

/// Whether Linux's virtual file system, and EROFS, have a place for an attribute of this name.
pub(super) fn linux_xattr(name: &[u8]) -> bool {
    const NAME_MAX: usize = 255;
    let suffix = [&b"user."[..], b"trusted.", b"security."]
        .iter()
        .find_map(|prefix| name.strip_prefix(*prefix));
    let acl = matches!(
        name,
        b"system.posix_acl_access" | b"system.posix_acl_default"
    );
    name.len() <= NAME_MAX && !name.contains(&0) && (acl || suffix.is_some_and(|s| !s.is_empty()))
}

/// Follows the parents of a name, symbolic links among them, inside the root.
pub(super) struct Parents<'a> {
    tree: &'a Tree,
    limits: &'a Limits,
}

/// Where the parents of a name are.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    /// Directories that exist, from the root (not included) down.
    dirs: Vec<InodeId>,
    /// Names of directories below them that do not, or that are something else.
    missing: Vec<Vec<u8>>,
    /// Bytes of all these names.
    lengths: Vec<usize>,
    root: Option<InodeId>,
}

impl Resolved {
    /// Directories that exist, from below the root down.
    pub(super) fn dirs(&self) -> &[InodeId] {
        &self.dirs
    }

    /// Names to create below the last of them.
    pub(super) fn missing(&self) -> &[Vec<u8>] {
        &self.missing
    }

    /// The parent itself, when it exists.
    pub(super) fn existing(&self) -> Option<InodeId> {
        if self.missing.is_empty() {
            self.dirs.last().copied().or(self.root)
        } else {
            None
        }
    }

    fn up(&mut self) {
        if self.missing.pop().is_none() {
            self.dirs.pop();
        }
        self.lengths.pop();
    }

    fn restart(&mut self) {
        self.dirs.clear();
        self.missing.clear();
        self.lengths.clear();
    }
}

impl<'a> Parents<'a> {
    pub(super) fn new(tree: &'a Tree, limits: &'a Limits) -> Self {
        Self { tree, limits }
    }

    /// Resolves names that [`Split::path`] gave.
    ///
    /// A name that does not exist is taken as a directory to be, so that `..` behind it leads back
    /// (as in securejoin). So is one that exists and is neither directory nor symbolic link.
    pub(super) fn resolve(&self, parents: &[&'a [u8]]) -> Result<Resolved, EntryProblem> {
        let mut at = Resolved {
            root: Some(self.tree.root()),
            ..Resolved::default()
        };
        let mut hops = 0;
        let mut steps = 0;
        let mut bytes = 0;
        let mut ahead: VecDeque<&[u8]> = parents.iter().copied().collect();
        while let Some(name) = ahead.pop_front() {
            steps += 1;
            within(
                steps,
                self.limits.resolve_steps as u64,
                "names looked up on the way to one entry, through symbolic links",
                Some("--max-resolve-steps"),
            )?;
            if name == b".." {
                bytes -= at.lengths.last().copied().unwrap_or(0);
                at.up();
                continue;
            }
            let there = at.existing().and_then(|dir| self.tree.child(dir, name));
            if let Some(id) = there
                && let Kind::Symlink(target) = &self.tree.get(id).kind
            {
                hops += 1;
                if hops > self.limits.symlink_hops {
                    return Err(EntryProblem::SymlinkLoop(self.limits.symlink_hops));
                }
                if target.first() == Some(&b'/') {
                    at.restart();
                    bytes = 0;
                }
                let target: Vec<_> = components(target).collect();
                for name in target.into_iter().rev() {
                    ahead.push_front(name);
                }
                continue;
            }
            match there.filter(|&id| self.tree.is_dir(id)) {
                Some(dir) => at.dirs.push(dir),
                None => {
                    within(
                        name.len() as u64,
                        self.limits.name_bytes as u64,
                        "bytes in a name",
                        None,
                    )?;
                    at.missing.push(name.to_vec());
                }
            }
            at.lengths.push(name.len() + 1);
            bytes += name.len() + 1;
            within(
                bytes as u64,
                self.limits.path_bytes as u64,
                "bytes in a path",
                None,
            )?;
            within(
                at.lengths.len() as u64,
                self.limits.path_depth as u64,
                "directories above an entry",
                Some("--max-path-depth"),
            )?;
        }
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whiteouts_are_told_from_names_that_only_look_like_them() {
        assert_eq!(whiteout(b"wh.x").unwrap(), None);
        assert_eq!(whiteout(b".whx").unwrap(), None);
        assert_eq!(whiteout(b".wh.x").unwrap(), Some(Hidden::Name(b"x")));
        assert_eq!(whiteout(b".wh..wh..opq").unwrap(), Some(Hidden::All));
        assert_eq!(whiteout(b".wh...x").unwrap(), Some(Hidden::Name(b"..x")));
        for bad in [&b".wh."[..], b".wh..", b".wh..."] {
            assert!(matches!(whiteout(bad), Err(EntryProblem::Whiteout)));
        }
    }

    #[test]
    fn only_attributes_that_linux_can_hold_are_kept() {
        for good in [
            "user.x",
            "trusted.overlay.opaque",
            "security.capability",
            "system.posix_acl_access",
        ] {
            assert!(linux_xattr(good.as_bytes()), "{good}");
        }
        for bad in [
            "",
            "user.",
            "com.apple.x",
            "system.nfs4_acl",
            "user.\0",
            "users.x",
        ] {
            assert!(!linux_xattr(bad.as_bytes()), "{bad}");
        }
        assert!(!linux_xattr(&[b"user.".to_vec(), vec![b'x'; 251]].concat()));
    }
}
