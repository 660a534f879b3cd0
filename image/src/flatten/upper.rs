//! What the layer at hand brought, so that its whiteouts hit only what is below it.

use std::collections::HashSet;

use crate::tree::{InodeId, Tree};

/// The names that the current layer brought ("upper", as overlayfs says), and whiteouts over them.
///
/// A name is upper when its inode is of this layer (created, or a directory described anew), when
/// it is a directory above such a name, or when it is a hard link made by this layer.
pub(super) struct Upper {
    layer: u32,
    /// Directories of lower layers that are above an upper name.
    touched: HashSet<InodeId>,
    /// Hard links made by this layer to inodes of lower ones.
    links: HashSet<(InodeId, Vec<u8>)>,
    /// Directories in which nothing is left of lower layers: each is searched once, however many
    /// whiteouts a layer heaps on it.
    cleared: HashSet<InodeId>,
}

impl Upper {
    pub(super) fn new(layer: u32) -> Self {
        Self {
            layer,
            touched: HashSet::new(),
            links: HashSet::new(),
            cleared: HashSet::new(),
        }
    }

    /// Marks directories from the root down: when the last is known, the others are.
    pub(super) fn touch(&mut self, dirs: &[InodeId]) {
        for &dir in dirs.iter().rev() {
            if !self.touched.insert(dir) {
                break;
            }
        }
    }

    /// A hard link to a lower layer's inode.
    pub(super) fn add_name(&mut self, dir: InodeId, name: &[u8]) {
        self.links.insert((dir, name.to_vec()));
    }

    fn is_upper(&self, tree: &Tree, dir: InodeId, name: &[u8], id: InodeId) -> bool {
        tree.get(id).layer == self.layer
            || self.touched.contains(&id)
            || (!self.links.is_empty() && self.links.contains(&(dir, name.to_vec())))
    }

    /// Removes what lower layers have under this name.
    pub(super) fn hide(&mut self, tree: &mut Tree, dir: InodeId, name: &[u8]) {
        let Some(id) = tree.child(dir, name) else {
            return;
        };
        if !self.is_upper(tree, dir, name, id) {
            tree.remove(dir, name);
        } else if tree.is_dir(id) {
            self.hide_below(tree, id);
        }
    }

    /// Removes what lower layers have in this directory, and in those of this layer below it.
    pub(super) fn hide_below(&mut self, tree: &mut Tree, dir: InodeId) {
        let mut todo = vec![dir];
        while let Some(dir) = todo.pop() {
            if !self.cleared.insert(dir) {
                continue;
            }
            let Some(entries) = tree.entries(dir) else {
                continue;
            };
            let mut lower = Vec::new();
            for (name, &id) in entries {
                if !self.is_upper(tree, dir, name, id) {
                    lower.push(name.clone());
                } else if tree.is_dir(id) {
                    todo.push(id);
                }
            }
            for name in lower {
                tree.remove(dir, &name);
            }
        }
    }
}
