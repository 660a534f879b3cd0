//! Applies layers to a tree, one entry after the other: what an unpack would do to a directory.
//!
//! The rules are those of the OCI image specification ("Image Layer Filesystem Changeset"), and
//! where it is silent those of umoci's unpack as root:
//!
//! - A directory over a directory keeps the children and takes the new metadata, all of it.
//!   Everything else replaces what had the name, with all below it, and touches no other hard link
//!   of it.
//! - `.wh.NAME` removes NAME, `.wh..wh..opq` everything in its directory, as far as *lower layers*
//!   brought it: what the same layer brought stays, wherever in the layer the whiteout stands.
//! - Symbolic links in the parents of a name are followed inside the image's root, as if it were
//!   chrooted: `..` stops at the root, an absolute target begins there.
//! - Parents that nobody mentions are made: 0755, 0:0, dated 1970. A parent that is no directory is
//!   replaced by one.
//! - `..` in a name or in a hard link's target is refused (umoci would cut it off). A leading slash
//!   means the image's root.
//! - A hard link takes over the inode of its target, whichever layer brought that; the link's own
//!   metadata is ignored. A link to itself changes nothing, as with GNU tar.
//! - Names below `.wh..wh.*` at the root are AUFS's own (old Docker images): hard links into them
//!   work while the layer is applied, then they are removed.
//! - Extended attributes that no Linux file system could hold (other names than `user.*`,
//!   `trusted.*`, `security.*` and the two of `system.posix_acl_*`) are left out and counted.

mod error;
mod names;
mod upper;

use std::collections::BTreeMap;
use std::error::Error;
use std::io::Read;

use crate::limits::{Exceeded, Limits, within};
use crate::tar::{BodyError, Entry, EntryKind, Reader};
use crate::tree::{ContentId, Inode, InodeId, Kind, Meta, Tree};

use names::{Parents, Resolved, Split};
use upper::Upper;

pub use error::{EntryProblem, FlattenError};

/// Takes the bytes of regular files, in the order of the layer's entries.
pub trait ContentSink {
    /// Why the sink can't take any more.
    type Error: Error + Send + Sync + 'static;

    /// An entry begins, of any kind, under this name of the layer's own: for sinks to which the order
    /// matters.
    fn entry(&mut self, _path: &[u8]) {}

    /// A regular file's body begins; `size` is its apparent size in bytes, above 0.
    ///
    /// # Errors
    /// The sink's own; they end the layer.
    fn begin(&mut self, size: u64) -> Result<(), Self::Error>;

    /// Bytes at `offset`. Offsets only grow, slices do not overlap and are never empty; gaps, also
    /// the one up to `size`, are zeros.
    ///
    /// # Errors
    /// The sink's own; they end the layer.
    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Self::Error>;

    /// The body is complete. The id is the sink's to choose; equal bodies may get the same one.
    ///
    /// # Errors
    /// The sink's own; they end the layer.
    fn finish(&mut self) -> Result<ContentId, Self::Error>;
}

/// What the layers of an image have asked for so far; one value for all of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Entries, and parents that had to be made.
    pub entries: u64,
    /// Apparent bytes of regular files, those included that a later layer replaces.
    pub file_bytes: u64,
    /// Bytes of names, link targets and extended attributes.
    pub metadata_bytes: u64,
}

/// What one layer held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerSummary {
    /// Entries of the archive, whiteouts included.
    pub entries: u64,
    /// Regular files.
    pub files: u64,
    /// Apparent bytes of these files.
    pub file_bytes: u64,
    /// Hard links.
    pub hard_links: u64,
    /// Whiteouts, opaque ones included.
    pub whiteouts: u64,
    /// Extended attributes left out, because no Linux file system could hold them, and ACLs in
    /// text left out, because they name users that only the writer's system knows.
    pub dropped_xattrs: u64,
}

/// Applies one layer.
///
/// `layer` counts from 0 at the base and must be above that of every layer applied before; `name`
/// is what messages call it (its digest). On error the tree is left half-changed: throw it away.
///
/// # Errors
/// See [`FlattenError`]: names the layer and, as far as known, the entry.
pub fn apply_layer<R: Read, S: ContentSink>(
    tree: &mut Tree,
    layer: u32,
    name: &str,
    tar: R,
    sink: &mut S,
    limits: &Limits,
    count: &mut Counters,
) -> Result<LayerSummary, FlattenError> {
    let fail = |entry: Option<&[u8]>, problem| FlattenError::new(layer, name, entry, problem);
    let layers = within(
        u64::from(layer) + 1,
        u64::from(limits.layers),
        "layers in one image",
        Some("--max-layers"),
    );
    layers.map_err(|e| fail(None, e.into()))?;
    let mut apply = Apply {
        upper: Upper::new(layer),
        tree,
        layer,
        limits,
        count,
        summary: LayerSummary::default(),
    };
    let mut reader = Reader::new(tar, limits);
    let mut last = None;
    loop {
        let entry = match reader.next_entry() {
            Ok(Some(entry)) => entry,
            Ok(None) => break,
            Err(e) => return Err(FlattenError::tar(layer, name, e, last)),
        };
        let path = entry.path.clone();
        sink.entry(&path);
        apply
            .entry(entry, &mut reader, sink)
            .map_err(|problem| match problem {
                EntryProblem::Tar(e) => FlattenError::tar(layer, name, *e, None),
                problem => fail(Some(&path), problem),
            })?;
        last = Some(path);
    }
    apply.remove_aufs_names();
    Ok(apply.summary)
}

/// One layer being applied.
struct Apply<'a> {
    tree: &'a mut Tree,
    layer: u32,
    limits: &'a Limits,
    count: &'a mut Counters,
    summary: LayerSummary,
    upper: Upper,
}

impl Apply<'_> {
    fn entry<R: Read, S: ContentSink>(
        &mut self,
        entry: Entry,
        reader: &mut Reader<R>,
        sink: &mut S,
    ) -> Result<(), EntryProblem> {
        self.summary.entries += 1;
        self.summary.dropped_xattrs += entry.dropped_acls;
        self.count_entry(entry.path.len())?;
        let Some(Split { parents, name }) = Split::path(&entry.path, self.limits)? else {
            return self.root(entry);
        };
        if let Some(hidden) = names::whiteout(name)? {
            self.summary.whiteouts += 1;
            return self.whiteout(&parents, hidden);
        }
        let resolved = Parents::new(self.tree, self.limits).resolve(&parents)?;
        let parent = self.make_parents(&resolved)?;
        match entry.kind {
            EntryKind::HardLink(target) => {
                self.summary.hard_links += 1;
                self.link(parent, name, &target)?;
            }
            kind => {
                let meta = self.checked_meta(entry.meta)?;
                self.create(parent, name, meta, kind, reader, sink)?;
            }
        }
        Ok(())
    }

    /// The entry for the root itself: `./`, `/`.
    fn root(&mut self, entry: Entry) -> Result<(), EntryProblem> {
        if entry.kind != EntryKind::Dir {
            return Err(EntryProblem::RootNotDirectory);
        }
        let meta = self.checked_meta(entry.meta)?;
        let root = self.tree.root();
        *self.tree.meta_mut(root) = meta;
        self.tree.set_layer(root, self.layer);
        Ok(())
    }

    fn create<R: Read, S: ContentSink>(
        &mut self,
        parent: InodeId,
        name: &[u8],
        mut meta: Meta,
        kind: EntryKind,
        reader: &mut Reader<R>,
        sink: &mut S,
    ) -> Result<(), EntryProblem> {
        let kind = match kind {
            EntryKind::Dir => {
                let there = self.tree.child(parent, name);
                if let Some(dir) = there.filter(|&id| self.tree.is_dir(id)) {
                    *self.tree.meta_mut(dir) = meta;
                    self.tree.set_layer(dir, self.layer);
                    return Ok(());
                }
                Kind::Dir(BTreeMap::new())
            }
            EntryKind::File(size) => {
                self.summary.files += 1;
                self.summary.file_bytes += size;
                self.count.file_bytes = self.count.file_bytes.saturating_add(size);
                within(
                    self.count.file_bytes,
                    self.limits.image_bytes,
                    "bytes of files in one image, holes included",
                    Some("--max-image-bytes"),
                )?;
                let content = if size == 0 {
                    None
                } else {
                    Some(store(size, reader, sink)?)
                };
                Kind::File { size, content }
            }
            EntryKind::Symlink(target) => {
                if target.is_empty() || target.contains(&0) {
                    return Err(EntryProblem::EmptyTarget);
                }
                within(
                    target.len() as u64,
                    self.limits.path_bytes as u64,
                    "bytes in a link's target",
                    None,
                )?;
                self.count_metadata(target.len())?;
                // Linux has no modes for symbolic links: they read as 0777 everywhere.
                meta.mode = 0o777;
                Kind::Symlink(target)
            }
            EntryKind::Char(rdev) => Kind::Char(rdev),
            EntryKind::Block(rdev) => Kind::Block(rdev),
            EntryKind::Fifo => Kind::Fifo,
            EntryKind::HardLink(_) => unreachable!("hard links are made by `link`"),
        };
        let inode = Inode {
            meta,
            kind,
            layer: self.layer,
        };
        self.tree.insert(parent, name.to_vec(), inode);
        Ok(())
    }

    /// The inode that a hard link's target names.
    fn link_target(&self, target: &[u8]) -> Result<InodeId, EntryProblem> {
        let nothing = || EntryProblem::LinkToNothing(target.to_vec());
        let split = Split::path(target, self.limits)?;
        let Some(Split { parents, name }) = split else {
            return Err(EntryProblem::LinkToDirectory(target.to_vec()));
        };
        let resolved = Parents::new(self.tree, self.limits).resolve(&parents)?;
        let parent = resolved.existing().ok_or_else(nothing)?;
        let id = self.tree.child(parent, name).ok_or_else(nothing)?;
        if self.tree.is_dir(id) {
            return Err(EntryProblem::LinkToDirectory(target.to_vec()));
        }
        Ok(id)
    }

    fn link(&mut self, parent: InodeId, name: &[u8], target: &[u8]) -> Result<(), EntryProblem> {
        let before = self.link_target(target)?;
        if self.tree.child(parent, name) != Some(before) {
            // What the link replaces goes first, and may take the target with it.
            self.tree.remove(parent, name);
        }
        let id = self.link_target(target)?;
        self.tree.link(parent, name.to_vec(), id);
        if self.tree.get(id).layer != self.layer {
            self.upper.add_name(parent, name);
        }
        Ok(())
    }

    /// Makes what is missing of an entry's parents, and marks all of them as this layer's.
    fn make_parents(&mut self, resolved: &Resolved) -> Result<InodeId, EntryProblem> {
        let mut parent = resolved.dirs().last().copied().unwrap_or(self.tree.root());
        self.upper.touch(resolved.dirs());
        for name in resolved.missing() {
            self.count_entry(name.len())?;
            let inode = Inode {
                meta: Meta::implied_dir(),
                kind: Kind::Dir(BTreeMap::new()),
                layer: self.layer,
            };
            parent = self.tree.insert(parent, name.clone(), inode);
        }
        Ok(parent)
    }

    fn whiteout(
        &mut self,
        parents: &[&[u8]],
        hidden: names::Hidden<'_>,
    ) -> Result<(), EntryProblem> {
        let resolved = Parents::new(self.tree, self.limits).resolve(parents)?;
        // Nothing there, nothing to hide: as umoci, no parents are made for it.
        let Some(dir) = resolved.existing() else {
            return Ok(());
        };
        match hidden {
            names::Hidden::Name(name) => self.upper.hide(self.tree, dir, name),
            names::Hidden::All => self.upper.hide_below(self.tree, dir),
        }
        Ok(())
    }

    /// Drops the attributes that Linux has no place for.
    fn checked_meta(&mut self, mut meta: Meta) -> Result<Meta, EntryProblem> {
        let before = meta.xattrs.len();
        meta.xattrs.retain(|(name, _)| names::linux_xattr(name));
        self.summary.dropped_xattrs += (before - meta.xattrs.len()) as u64;
        let bytes = meta.xattrs.iter().map(|(n, v)| n.len() + v.len()).sum();
        self.count_metadata(bytes)?;
        Ok(meta)
    }

    fn count_entry(&mut self, name_bytes: usize) -> Result<(), Exceeded> {
        self.count.entries += 1;
        within(
            self.count.entries,
            self.limits.entries_per_image,
            "entries in one image",
            Some("--max-entries"),
        )?;
        self.count_metadata(name_bytes)
    }

    fn count_metadata(&mut self, bytes: usize) -> Result<(), Exceeded> {
        self.count.metadata_bytes += bytes as u64;
        within(
            self.count.metadata_bytes,
            self.limits.metadata_bytes,
            "bytes of names, link targets and extended attributes in one image",
            Some("--max-metadata-bytes"),
        )
    }

    fn remove_aufs_names(&mut self) {
        let root = self.tree.root();
        let doomed: Vec<Vec<u8>> = self
            .tree
            .entries(root)
            .into_iter()
            .flat_map(|entries| entries.range(names::AUFS.to_vec()..))
            .map(|(name, _)| name)
            .take_while(|name| name.starts_with(names::AUFS))
            .cloned()
            .collect();
        for name in doomed {
            self.tree.remove(root, &name);
        }
    }
}

/// Hands a file's bytes to the sink.
fn store<R: Read, S: ContentSink>(
    size: u64,
    reader: &mut Reader<R>,
    sink: &mut S,
) -> Result<ContentId, EntryProblem> {
    let failed = |e: S::Error| EntryProblem::Sink(Box::new(e));
    sink.begin(size).map_err(failed)?;
    reader
        .body(|offset, bytes| sink.data(offset, bytes))
        .map_err(|e| match e {
            BodyError::Tar(e) => EntryProblem::Tar(Box::new(e)),
            BodyError::Taker(e) => failed(e),
        })?;
    sink.finish().map_err(failed)
}

#[cfg(test)]
mod tests;
