//! The one tree that the layers of an image make, in memory: names, metadata, and which content a
//! file has (the bytes themselves went to a [`crate::flatten::ContentSink`]).
//!
//! An arena of inodes: directories own their names, an inode that is not a directory may have
//! several (hard links). Ids are handed out in order of creation and never reused, so equal input
//! gives equal ids.

use std::collections::BTreeMap;
use std::collections::btree_map;

/// An inode of one [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(pub u32);

/// The bytes of a regular file, as the content sink that stored them numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentId(pub u32);

/// A modification time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mtime {
    /// Seconds since 1970-01-01T00:00:00Z, rounded down; negative before.
    pub sec: i64,
    /// Nanoseconds on top of `sec`, below 1,000,000,000.
    pub nsec: u32,
}

/// An extended attribute: its full name (`user.x`, `security.capability`) and its value.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// What every inode has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Meta {
    /// Permission bits with setuid, setgid and sticky: `0o7777`. The type is in [`Kind`].
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Mtime,
    /// Extended attributes, sorted by name, each name once.
    pub xattrs: Vec<Xattr>,
}

impl Meta {
    /// What a directory gets that no layer describes, and the root before a layer does: 0755, owned
    /// by root, dated 1970, no attributes.
    pub fn implied_dir() -> Self {
        Self {
            mode: 0o755,
            ..Self::default()
        }
    }
}

/// A device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rdev {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory: its names in byte order.
    Dir(BTreeMap<Vec<u8>, InodeId>),
    /// A regular file.
    File {
        /// Apparent size in bytes, holes included.
        size: u64,
        /// Its bytes; `None` exactly when `size` is 0.
        content: Option<ContentId>,
    },
    /// A symbolic link and its target, as the layer wrote it.
    Symlink(Vec<u8>),
    /// A character device.
    Char(Rdev),
    /// A block device.
    Block(Rdev),
    /// A named pipe.
    Fifo,
    /// A socket. No tar format has them; here for completeness of the model.
    Socket,
}

/// One file, directory or other node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// Mode, owner, time, attributes.
    pub meta: Meta,
    /// Type and what belongs to it.
    pub kind: Kind,
    /// The layer whose entry this is, counted from 0 at the base: the one that created it or, for a
    /// directory, that last described it.
    pub layer: u32,
}

struct Slot {
    /// `None` once the last name is gone.
    inode: Option<Inode>,
    /// Names of a non-directory; 2 + subdirectories for a directory.
    links: u32,
}

/// The tree of an image. See the module's text.
pub struct Tree {
    slots: Vec<Slot>,
    live: usize,
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// A tree with nothing but a root: a directory, 0755, 0:0, mtime 0.
    pub fn new() -> Self {
        Self {
            slots: vec![Slot {
                inode: Some(Inode {
                    meta: Meta::implied_dir(),
                    kind: Kind::Dir(BTreeMap::new()),
                    layer: 0,
                }),
                links: 2,
            }],
            live: 1,
        }
    }

    /// The root directory. It can't be removed.
    pub fn root(&self) -> InodeId {
        InodeId(0)
    }

    /// The inode with this id.
    ///
    /// # Panics
    /// When `id` is of another tree, or was removed: ids that [`Tree::walk`], [`Tree::child`] and the
    /// directories give are always good until the tree changes.
    pub fn get(&self, id: InodeId) -> &Inode {
        self.try_get(id).expect("an inode id of this tree")
    }

    /// The inode with this id, or `None` when it was removed.
    pub fn try_get(&self, id: InodeId) -> Option<&Inode> {
        self.slots.get(id.0 as usize)?.inode.as_ref()
    }

    /// The metadata of an inode, to change.
    ///
    /// # Panics
    /// As [`Tree::get`].
    pub fn meta_mut(&mut self, id: InodeId) -> &mut Meta {
        &mut self.inode_mut(id).meta
    }

    /// Says which layer described this inode last.
    ///
    /// # Panics
    /// As [`Tree::get`].
    pub fn set_layer(&mut self, id: InodeId, layer: u32) {
        self.inode_mut(id).layer = layer;
    }

    /// The names of a directory; `None` when `id` is something else.
    ///
    /// # Panics
    /// As [`Tree::get`].
    pub fn entries(&self, id: InodeId) -> Option<&BTreeMap<Vec<u8>, InodeId>> {
        match &self.get(id).kind {
            Kind::Dir(entries) => Some(entries),
            _ => None,
        }
    }

    /// True for a directory.
    ///
    /// # Panics
    /// As [`Tree::get`].
    pub fn is_dir(&self, id: InodeId) -> bool {
        self.entries(id).is_some()
    }

    /// What `name` is in directory `dir`; `None` when there is no such name or `dir` is no directory.
    ///
    /// # Panics
    /// As [`Tree::get`].
    pub fn child(&self, dir: InodeId, name: &[u8]) -> Option<InodeId> {
        self.entries(dir)?.get(name).copied()
    }

    /// Finds a path from the root, without following symbolic links; empty components and `.` are
    /// skipped, so `""` and `"/"` are the root.
    pub fn lookup(&self, path: &[u8]) -> Option<InodeId> {
        path.split(|&b| b == b'/')
            .filter(|name| !name.is_empty() && *name != b".")
            .try_fold(self.root(), |dir, name| self.child(dir, name))
    }

    /// Link count as `stat` shows it: names of a file, 2 + subdirectories of a directory.
    ///
    /// # Panics
    /// When `id` is of another tree.
    pub fn nlink(&self, id: InodeId) -> u32 {
        self.slots[id.0 as usize].links
    }

    /// Number of inodes that can be reached, the root included. Hard links count once.
    pub fn inode_count(&self) -> usize {
        self.live
    }

    /// True when any inode has an extended attribute. Looks at each inode.
    pub fn has_xattrs(&self) -> bool {
        self.slots
            .iter()
            .filter_map(|slot| slot.inode.as_ref())
            .any(|inode| !inode.meta.xattrs.is_empty())
    }

    /// Every live inode once, in order of id, which is the order in which the layers brought them.
    pub fn inodes(&self) -> impl Iterator<Item = (InodeId, &Inode)> {
        (0..)
            .zip(&self.slots)
            .filter_map(|(id, slot)| Some((InodeId(id), slot.inode.as_ref()?)))
    }

    /// Creates an inode under a new name. What had the name before is removed.
    ///
    /// # Panics
    /// When `dir` is not a directory of this tree, when a directory inode comes with entries, or
    /// beyond 2³² inodes (the limits on entries are far below).
    pub fn insert(&mut self, dir: InodeId, name: Vec<u8>, inode: Inode) -> InodeId {
        let id = InodeId(u32::try_from(self.slots.len()).expect("fewer than 2^32 inodes"));
        let is_dir = match &inode.kind {
            Kind::Dir(entries) => {
                assert!(entries.is_empty(), "a directory is inserted empty");
                true
            }
            _ => false,
        };
        self.slots.push(Slot {
            inode: Some(inode),
            links: if is_dir { 2 } else { 0 },
        });
        self.live += 1;
        self.attach(dir, name, id);
        id
    }

    /// Gives an inode that is not a directory one more name (a hard link). What had the name before
    /// is removed; when it was this inode, nothing changes.
    ///
    /// # Panics
    /// When `dir` is not a directory of this tree, or `id` is one.
    pub fn link(&mut self, dir: InodeId, name: Vec<u8>, id: InodeId) {
        assert!(!self.is_dir(id), "a directory has one name");
        if self.child(dir, &name) != Some(id) {
            self.attach(dir, name, id);
        }
    }

    /// Removes a name, and with a directory everything below it. False when there was none.
    ///
    /// # Panics
    /// When `dir` is not a directory of this tree.
    pub fn remove(&mut self, dir: InodeId, name: &[u8]) -> bool {
        let Some(id) = self.entries_mut(dir).remove(name) else {
            return false;
        };
        if self.is_dir(id) {
            self.slots[dir.0 as usize].links -= 1;
        }
        self.release(id);
        true
    }

    /// Walks the tree depth first, names in byte order, a directory before what it holds, beginning
    /// with the root, whose path is empty. A hard-linked inode comes once for each of its names.
    pub fn walk(&self) -> Walk<'_> {
        Walk {
            tree: self,
            stack: Vec::new(),
            path: Vec::new(),
            started: false,
        }
    }

    /// One line for each name in the order of [`Tree::walk`]: everything the tree says of it, for
    /// comparing trees in tests. `content` prints the bytes of a file; hard links are told by the
    /// first path of their inode.
    pub fn describe(&self, content: &dyn Fn(ContentId) -> String) -> Vec<String> {
        let mut first: BTreeMap<InodeId, String> = BTreeMap::new();
        let mut lines = Vec::new();
        let mut walk = self.walk();
        while let Some((path, id)) = walk.next_entry() {
            let path = path.escape_ascii().to_string();
            let inode = self.get(id);
            let what = match &inode.kind {
                Kind::Dir(_) => "dir".to_owned(),
                Kind::File { size, content: c } => {
                    format!("file {size} {}", c.map_or(String::new(), content))
                }
                Kind::Symlink(target) => format!("symlink {}", target.escape_ascii()),
                Kind::Char(r) => format!("char {}:{}", r.major, r.minor),
                Kind::Block(r) => format!("block {}:{}", r.major, r.minor),
                Kind::Fifo => "fifo".to_owned(),
                Kind::Socket => "socket".to_owned(),
            };
            let m = &inode.meta;
            let mut line = format!(
                "/{path} {:04o} {}:{} {}.{:09} nlink={} {what}",
                m.mode,
                m.uid,
                m.gid,
                m.mtime.sec,
                m.mtime.nsec,
                self.nlink(id)
            );
            for (name, value) in &m.xattrs {
                line += &format!(" {}={}", name.escape_ascii(), value.escape_ascii());
            }
            if !self.is_dir(id) && self.nlink(id) > 1 {
                let known = first.entry(id).or_insert(path);
                line += &format!(" same-as=/{known}");
            }
            lines.push(line);
        }
        lines
    }

    fn inode_mut(&mut self, id: InodeId) -> &mut Inode {
        self.slots[id.0 as usize]
            .inode
            .as_mut()
            .expect("an inode id of this tree")
    }

    fn entries_mut(&mut self, dir: InodeId) -> &mut BTreeMap<Vec<u8>, InodeId> {
        match &mut self.inode_mut(dir).kind {
            Kind::Dir(entries) => entries,
            _ => panic!("names are added to and removed from directories"),
        }
    }

    fn attach(&mut self, dir: InodeId, name: Vec<u8>, id: InodeId) {
        self.remove(dir, &name);
        self.entries_mut(dir).insert(name, id);
        if self.is_dir(id) {
            self.slots[dir.0 as usize].links += 1;
        } else {
            self.slots[id.0 as usize].links += 1;
        }
    }

    /// One name of `id` is gone: drops what nothing names any more. Without recursion, because a
    /// layer decides the depth.
    fn release(&mut self, id: InodeId) {
        let mut doomed = vec![id];
        while let Some(id) = doomed.pop() {
            let slot = &mut self.slots[id.0 as usize];
            let dir = matches!(&slot.inode, Some(inode) if matches!(inode.kind, Kind::Dir(_)));
            slot.links -= if dir { slot.links } else { 1 };
            if slot.links > 0 {
                continue;
            }
            self.live -= 1;
            if let Some(Inode {
                kind: Kind::Dir(entries),
                ..
            }) = slot.inode.take()
            {
                doomed.extend(entries.into_values());
            }
        }
    }
}

/// A walk over a tree, see [`Tree::walk`]. The path is lent, so this is no `Iterator`.
pub struct Walk<'a> {
    tree: &'a Tree,
    /// The directories being listed, each with the length of its own path.
    stack: Vec<(btree_map::Iter<'a, Vec<u8>, InodeId>, usize)>,
    path: Vec<u8>,
    started: bool,
}

impl Walk<'_> {
    /// The next name: its path from the root without a leading slash, and its inode.
    pub fn next_entry(&mut self) -> Option<(&[u8], InodeId)> {
        let id = if self.started {
            loop {
                let (entries, path_len) = self.stack.last_mut()?;
                self.path.truncate(*path_len);
                match entries.next() {
                    Some((name, &id)) => {
                        if !self.path.is_empty() {
                            self.path.push(b'/');
                        }
                        self.path.extend_from_slice(name);
                        break id;
                    }
                    None => {
                        self.stack.pop();
                    }
                }
            }
        } else {
            self.started = true;
            self.tree.root()
        };
        if let Some(entries) = self.tree.entries(id) {
            self.stack.push((entries.iter(), self.path.len()));
        }
        Some((&self.path, id))
    }
}

#[cfg(test)]
mod tests;
