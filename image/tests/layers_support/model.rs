//! A second opinion on what layers mean: the whole tree as a flat map from paths to nodes, every
//! rule written the slow and obvious way. Shares no code with `image::flatten`.

use std::collections::{BTreeMap, BTreeSet};

use super::Blocks;
use super::stack::{Op, What};

/// A path from the root: its names.
type Path = Vec<String>;

#[derive(Clone)]
struct Node {
    /// Type and what belongs to it, as `Tree::describe` puts it.
    what: String,
    link: Option<String>,
    mode: u16,
    uid: u32,
    mtime: (i64, u32),
    xattr: Option<String>,
    /// Names with the same number are hard links of each other.
    inode: usize,
}

/// A tree made of layers.
#[derive(Clone)]
pub struct Model {
    nodes: BTreeMap<Path, Node>,
    upper: BTreeSet<Path>,
    inodes: usize,
    /// An entry had a parent that was neither directory nor link to one; umoci 0.4.7 fails on it.
    pub replaced_parent: bool,
    /// Directories in which parents were made that nobody had mentioned, or deeper names were
    /// hidden, since they were described themselves: umoci dates those "now" as well.
    pub disturbed: BTreeSet<Path>,
    /// A hard link to itself; umoci fails on it.
    pub linked_itself: bool,
}

fn implied(inode: usize) -> Node {
    Node {
        what: "dir".into(),
        link: None,
        mode: 0o755,
        uid: 0,
        mtime: (0, 0),
        xattr: None,
        inode,
    }
}

fn split(path: &str) -> Path {
    path.split('/')
        .filter(|n| !n.is_empty() && *n != ".")
        .map(str::to_owned)
        .collect()
}

impl Default for Model {
    fn default() -> Self {
        Self {
            nodes: BTreeMap::from([(vec![], implied(0))]),
            upper: BTreeSet::new(),
            inodes: 1,
            replaced_parent: false,
            disturbed: BTreeSet::new(),
            linked_itself: false,
        }
    }
}

impl Model {
    /// The next layer begins.
    pub fn begin_layer(&mut self) {
        self.upper.clear();
    }

    /// Applies one entry; an error must be one of the real thing too.
    pub fn apply(&mut self, op: &Op) -> Result<(), String> {
        let mut path = split(&op.path);
        if op.what == What::Opaque {
            let dir = self.resolve(path)?;
            self.remove_lower(&dir, false);
            return Ok(());
        }
        let Some(name) = path.pop() else {
            let inode = self.nodes[&vec![]].inode;
            self.disturbed.remove(&vec![]);
            self.nodes.insert(vec![], Self::node(op, inode));
            return Ok(());
        };
        let parent = self.resolve(path)?;
        let at = [&parent[..], &[name]].concat();
        if op.what == What::Whiteout {
            self.remove_lower(&at, true);
            return Ok(());
        }
        for n in 1..=parent.len() {
            let dir = &parent[..n];
            let exists = self.nodes.get(dir);
            if exists.is_none_or(|node| node.what != "dir") {
                self.replaced_parent |= exists.is_some();
                self.remove(dir);
                self.inodes += 1;
                self.nodes.insert(dir.to_vec(), implied(self.inodes));
                self.disturbed.insert(dir[..n - 1].to_vec());
            }
        }
        match &op.what {
            What::Dir if self.nodes.get(&at).is_some_and(|n| n.what == "dir") => {
                self.disturbed.remove(&at);
                let inode = self.nodes[&at].inode;
                self.nodes.insert(at.clone(), Self::node(op, inode));
            }
            What::Hard(target) => {
                let (_, found) = self.file(target)?;
                if self.nodes.get(&at).is_some_and(|n| n.inode == found.inode) {
                    self.linked_itself = true;
                } else {
                    self.remove(&at);
                    let (_, found) = self.file(target)?;
                    self.nodes.insert(at.clone(), found);
                }
            }
            _ => {
                self.remove(&at);
                self.disturbed.remove(&at);
                self.inodes += 1;
                self.nodes.insert(at.clone(), Self::node(op, self.inodes));
            }
        }
        for n in 1..=at.len() {
            self.upper.insert(at[..n].to_vec());
        }
        Ok(())
    }

    fn file(&self, target: &str) -> Result<(Path, Node), String> {
        let mut path = split(target);
        let name = path.pop().ok_or("link to the root")?;
        let at = [&self.resolve(path)?[..], &[name]].concat();
        let node = self.nodes.get(&at).ok_or("link to nothing")?;
        if node.what == "dir" {
            return Err("link to a directory".into());
        }
        Ok((at, node.clone()))
    }

    fn node(op: &Op, inode: usize) -> Node {
        let (what, link) = match &op.what {
            What::Dir => ("dir".into(), None),
            What::File(text) if text.is_empty() => ("file 0 ".into(), None),
            What::File(text) => {
                let mut blocks = Blocks::default();
                blocks.data(0, text.as_bytes());
                (format!("file {} {}", text.len(), blocks.finish()), None)
            }
            What::Symlink(target) => (format!("symlink {target}"), Some(target.clone())),
            What::Fifo => ("fifo".into(), None),
            What::Char(minor) => (format!("char 1:{minor}"), None),
            What::Hard(_) | What::Whiteout | What::Opaque => unreachable!(),
        };
        let has_xattrs = matches!(op.what, What::Dir | What::File(_));
        Node {
            mode: if link.is_some() { 0o777 } else { op.meta.mode },
            what,
            link,
            uid: op.meta.uid,
            mtime: (op.meta.mtime, op.meta.nsec),
            xattr: op.meta.xattr.clone().filter(|_| has_xattrs),
            inode,
        }
    }

    /// Follows links in all names.
    fn resolve(&self, names: Path) -> Result<Path, String> {
        let mut ahead: Vec<String> = names.into_iter().rev().collect();
        let mut at: Path = vec![];
        let mut hops = 0;
        while let Some(name) = ahead.pop() {
            if name == ".." {
                at.pop();
                continue;
            }
            at.push(name);
            if let Some(target) = self.nodes.get(&at).and_then(|n| n.link.as_ref()) {
                hops += 1;
                if hops > 40 {
                    return Err("circle".into());
                }
                at.pop();
                if target.starts_with('/') {
                    at.clear();
                }
                ahead.extend(split(target).into_iter().rev());
            }
        }
        Ok(at)
    }

    fn remove(&mut self, at: &[String]) {
        self.nodes.retain(|path, _| !path.starts_with(at));
    }

    fn remove_lower(&mut self, at: &[String], itself: bool) {
        let hidden = |path: &Path| {
            path.starts_with(at) && !self.upper.contains(path) && (itself || path != at)
        };
        let gone: Vec<Path> = self
            .nodes
            .keys()
            .filter(|path| hidden(path))
            .cloned()
            .collect();
        let restored = &at[..at.len() - usize::from(itself)];
        for path in gone {
            self.nodes.remove(&path);
            let parent = &path[..path.len() - 1];
            if parent != restored && self.nodes.contains_key(parent) {
                self.disturbed.insert(parent.to_vec());
            }
        }
    }

    /// One line a name, as `Tree::describe`.
    pub fn describe(&self) -> Vec<String> {
        let mut by_name: Vec<_> = self.nodes.iter().collect();
        // The walk compares name by name, bytes; so does a vector of names.
        by_name.sort_by(|a, b| a.0.cmp(b.0));
        let mut first: BTreeMap<usize, String> = BTreeMap::new();
        by_name
            .into_iter()
            .map(|(path, node)| {
                let shown = path.join("/");
                let is_dir = node.what == "dir";
                let nlink = if is_dir {
                    let subdirs = self.nodes.iter().filter(|(p, n)| {
                        n.what == "dir" && p.len() == path.len() + 1 && p.starts_with(path)
                    });
                    2 + subdirs.count()
                } else {
                    self.nodes
                        .values()
                        .filter(|n| n.inode == node.inode)
                        .count()
                };
                let mut line = format!(
                    "/{shown} {:04o} {}:0 {}.{:09} nlink={nlink} {}",
                    node.mode, node.uid, node.mtime.0, node.mtime.1, node.what
                );
                if let Some(value) = &node.xattr {
                    line += &format!(" user.t={value}");
                }
                if !is_dir && nlink > 1 {
                    let known = first.entry(node.inode).or_insert(shown);
                    line += &format!(" same-as=/{known}");
                }
                line
            })
            .collect()
    }
}
