//! Where each inode, directory and symbolic link goes in the metadata.
//!
//! Breadth first: the root, then what it holds, then what its directories hold, in order. Blocks of
//! a directory that do not fit behind its inode come right before the inodes of what it holds. So
//! the first bytes answer the first questions, and a directory's listing and its `stat`s are
//! neighbours.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;

use super::dirent;
use super::disk::{
    BLOCK_BYTES, CHUNK_INDEX_BYTES, DATA_CHUNK_MAX_BITS, DataLayout, FIRST_INODE_OFFSET, FileType,
    HOLE_CHUNK_MAX_BITS, INODE_BYTES, NAME_BYTES, SLOT_BYTES, SYMLINK_BYTES, chunk_bits,
    encode_rdev,
};
use super::write::{Place, Problem, WriteError};
use super::xattr;
use crate::tree::{InodeId, Kind, Tree};

/// What follows an inode and its extended attributes, or lies in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Body {
    /// Nothing.
    Empty,
    /// The number of a device, encoded.
    Device(u32),
    /// Chunk indexes of a file.
    Chunks {
        /// Size of a chunk, as a power of two.
        bits: u32,
        /// Indexes.
        count: u64,
        /// First block in the data space; `None` is a hole.
        first: Option<u32>,
    },
    /// `blocks` whole blocks of the metadata from `first`, then `inline` bytes behind the inode.
    Meta {
        size: u64,
        blocks: u64,
        first: u32,
        inline: u64,
    },
}

impl Body {
    pub fn data_layout(&self) -> DataLayout {
        match self {
            Self::Chunks { .. } => DataLayout::Chunks,
            Self::Meta { inline, .. } if *inline > 0 => DataLayout::Inline,
            Self::Empty | Self::Device(_) | Self::Meta { .. } => DataLayout::Plain,
        }
    }

    /// Bytes behind an inode that with its extended attributes takes `before` bytes.
    fn bytes_behind(&self, before: u64) -> u64 {
        match self {
            Self::Empty | Self::Device(_) => 0,
            Self::Chunks { count, .. } => {
                before.next_multiple_of(CHUNK_INDEX_BYTES) - before + count * CHUNK_INDEX_BYTES
            }
            Self::Meta { inline, .. } => *inline,
        }
    }
}

/// An inode with its place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    pub id: InodeId,
    /// Index of the directory through which it was first met; the root's is its own.
    pub parent: usize,
    /// Where it begins, in bytes; a multiple of [`SLOT_BYTES`].
    pub at: u64,
    pub xattr_bytes: u32,
    pub body: Body,
}

impl Placed {
    pub fn nid(&self) -> u64 {
        self.at / SLOT_BYTES
    }

    /// Where what follows inode and extended attributes begins.
    pub fn body_at(&self) -> u64 {
        self.at + INODE_BYTES + u64::from(self.xattr_bytes)
    }
}

/// All inodes in the order of the metadata, the root first.
pub(super) struct Layout {
    pub inodes: Vec<Placed>,
    /// Index in `inodes` by inode id.
    index: Vec<u32>,
    /// Bytes of the metadata, a multiple of the block size.
    pub total_bytes: u64,
}

const NOT_PLACED: u32 = u32::MAX;

impl Layout {
    /// The place of an inode of the tree.
    pub fn placed(&self, id: InodeId) -> &Placed {
        &self.inodes[self.index[id.0 as usize] as usize]
    }

    /// The directory that `..` of inode number `i` in order names.
    pub fn parent_of(&self, i: usize) -> &Placed {
        &self.inodes[self.inodes[i].parent]
    }
}

/// Places all inodes of a tree.
pub(super) fn plan(tree: &Tree, place: Place<'_>, data_blocks: u64) -> Result<Layout, WriteError> {
    let ids = tree.inodes().last().map_or(0, |(id, _)| id.0 as usize + 1);
    let mut planner = Planner {
        tree,
        place,
        data_blocks,
        layout: Layout {
            inodes: Vec::with_capacity(tree.inode_count()),
            index: vec![NOT_PLACED; ids],
            total_bytes: 0,
        },
        cursor: FIRST_INODE_OFFSET,
    };
    planner.run()?;
    Ok(planner.layout)
}

struct Planner<'a> {
    tree: &'a Tree,
    place: Place<'a>,
    data_blocks: u64,
    layout: Layout,
    /// First byte that is free.
    cursor: u64,
}

impl Planner<'_> {
    fn run(&mut self) -> Result<(), WriteError> {
        let tree = self.tree;
        let mut queue = VecDeque::new();
        queue.push_back(self.add(tree.root(), 0)?);
        while let Some(dir) = queue.pop_front() {
            self.add_blocks(dir)?;
            let Kind::Dir(entries) = &tree.get(self.layout.inodes[dir].id).kind else {
                continue;
            };
            for (name, &id) in entries {
                check_name(name).map_err(|problem| self.error(dir, Some(name), problem))?;
                if self.layout.index[id.0 as usize] != NOT_PLACED {
                    continue;
                }
                let child = self.add(id, dir)?;
                if tree.is_dir(id) {
                    queue.push_back(child);
                } else {
                    self.add_blocks(child)?;
                }
            }
        }
        // Behind the last inode there are always the 12 bytes of a header of extended attributes:
        // fsck.erofs 1.5 reads them even where an inode has none.
        let end = self.cursor + u64::from(super::disk::XATTR_HEADER_BYTES);
        self.layout.total_bytes = end.next_multiple_of(BLOCK_BYTES);
        if u32::try_from(self.layout.total_bytes / BLOCK_BYTES).is_err() {
            return Err(WriteError::MetadataTooLarge {
                bytes: self.layout.total_bytes,
            });
        }
        Ok(())
    }

    /// Gives an inode its place and returns its index.
    fn add(&mut self, id: InodeId, parent: usize) -> Result<usize, WriteError> {
        let index = self.layout.inodes.len();
        self.layout.index[id.0 as usize] =
            u32::try_from(index).expect("ids have 32 bits, and one stays unused");
        self.layout.inodes.push(Placed {
            id,
            parent,
            at: 0,
            xattr_bytes: 0,
            body: Body::Empty,
        });
        let (xattr_bytes, body) = self
            .measure(id)
            .map_err(|problem| self.error(index, None, problem))?;
        let head = INODE_BYTES + u64::from(xattr_bytes);
        let bytes = head + body.bytes_behind(head);
        let at = self.cursor.next_multiple_of(SLOT_BYTES);
        // What fits in a block lies in one block; what is longer starts with one.
        let at = if at % BLOCK_BYTES + bytes > BLOCK_BYTES {
            at.next_multiple_of(BLOCK_BYTES)
        } else {
            at
        };
        self.cursor = at + bytes;
        self.layout.inodes[index] = Placed {
            id,
            parent,
            at,
            xattr_bytes,
            body,
        };
        Ok(index)
    }

    /// Gives an inode the whole blocks it needs, at the cursor.
    fn add_blocks(&mut self, index: usize) -> Result<(), WriteError> {
        let Body::Meta { blocks, first, .. } = &mut self.layout.inodes[index].body else {
            return Ok(());
        };
        if *blocks == 0 {
            return Ok(());
        }
        let at = self.cursor.next_multiple_of(BLOCK_BYTES);
        *first = u32::try_from(at / BLOCK_BYTES)
            .map_err(|_| WriteError::MetadataTooLarge { bytes: at })?;
        self.cursor = at + *blocks * BLOCK_BYTES;
        Ok(())
    }

    fn measure(&self, id: InodeId) -> Result<(u32, Body), Problem> {
        let inode = self.tree.get(id);
        if inode.meta.mtime.nsec >= 1_000_000_000 {
            return Err(Problem::Nanoseconds {
                nsec: inode.meta.mtime.nsec,
            });
        }
        let xattr_bytes = xattr::encoded_bytes(&inode.meta.xattrs)?;
        let body = match &inode.kind {
            Kind::Dir(entries) => {
                let packing = dirent::measure(name_lens(entries));
                meta_body(packing.size(), xattr_bytes)
            }
            Kind::Symlink(target) => {
                if target.is_empty() || target.len() > SYMLINK_BYTES || target.contains(&0) {
                    return Err(Problem::SymlinkTarget { len: target.len() });
                }
                meta_body(target.len() as u64, xattr_bytes)
            }
            Kind::File { size: 0, .. } | Kind::Fifo | Kind::Socket => Body::Empty,
            Kind::File { size, content } => {
                let first = match content {
                    Some(content) => (self.place)(*content),
                    None => return Err(Problem::NoContent { size: *size }),
                };
                self.chunks(*size, first)?
            }
            Kind::Char(rdev) | Kind::Block(rdev) => {
                Body::Device(encode_rdev(*rdev).ok_or(Problem::DeviceNumber {
                    major: rdev.major,
                    minor: rdev.minor,
                })?)
            }
        };
        Ok((xattr_bytes, body))
    }

    fn chunks(&self, size: u64, first: Option<u32>) -> Result<Body, Problem> {
        if size > i64::MAX.unsigned_abs() {
            return Err(Problem::FileSize { size });
        }
        let max_bits = match first {
            Some(_) => DATA_CHUNK_MAX_BITS,
            None => HOLE_CHUNK_MAX_BITS,
        };
        let end = first.map_or(0, |block| u64::from(block) + size.div_ceil(BLOCK_BYTES));
        if end > self.data_blocks {
            return Err(Problem::OutsideDataSpace {
                end,
                data_blocks: self.data_blocks,
            });
        }
        let bits = chunk_bits(size, max_bits);
        Ok(Body::Chunks {
            bits,
            count: size.div_ceil(1 << bits),
            first,
        })
    }

    /// An error about inode number `index`, or about `name` in that directory, with its path.
    fn error(&self, index: usize, name: Option<&[u8]>, problem: Problem) -> WriteError {
        let mut names: Vec<&[u8]> = name.into_iter().collect();
        let mut index = index;
        while index != 0 {
            let Placed { id, parent, .. } = self.layout.inodes[index];
            let name = self
                .tree
                .entries(self.layout.inodes[parent].id)
                .and_then(|entries| entries.iter().find(|(_, child)| **child == id));
            names.extend(name.map(|(name, _)| name.as_slice()));
            index = parent;
        }
        names.reverse();
        WriteError::Entry {
            path: names.join(&b'/').escape_ascii().to_string(),
            problem,
        }
    }
}

/// Data of `size` bytes in the metadata: what does not fill a block goes behind the inode where
/// inode, extended attributes and it fit in one block together.
fn meta_body(size: u64, xattr_bytes: u32) -> Body {
    let tail = size % BLOCK_BYTES;
    let inline = if INODE_BYTES + u64::from(xattr_bytes) + tail <= BLOCK_BYTES {
        tail
    } else {
        0
    };
    Body::Meta {
        size,
        blocks: (size - inline).div_ceil(BLOCK_BYTES),
        first: 0,
        inline,
    }
}

/// The lengths of a directory's names in the order in which they are stored: byte order, with `.`
/// and `..` among them.
fn name_lens(entries: &BTreeMap<Vec<u8>, InodeId>) -> impl Iterator<Item = usize> {
    let before = |limit: &[u8]| {
        let names = (Bound::Unbounded, Bound::Excluded(limit));
        entries.range::<[u8], _>(names).count()
    };
    let (dot, dotdot) = (before(b"."), before(b".."));
    let mut lens: Vec<usize> = Vec::with_capacity(entries.len() + 2);
    lens.extend(entries.keys().map(Vec::len));
    lens.insert(dotdot, 2);
    lens.insert(dot, 1);
    lens.into_iter()
}

fn check_name(name: &[u8]) -> Result<(), Problem> {
    let impossible = name.is_empty()
        || name.len() > NAME_BYTES
        || name == b"."
        || name == b".."
        || name.iter().any(|&b| b == 0 || b == b'/');
    if impossible {
        return Err(Problem::Name { len: name.len() });
    }
    Ok(())
}

/// The type that an inode's directory entries and its mode say.
pub(super) fn file_type(kind: &Kind) -> FileType {
    match kind {
        Kind::Dir(_) => FileType::Directory,
        Kind::File { .. } => FileType::Regular,
        Kind::Symlink(_) => FileType::Symlink,
        Kind::Char(_) => FileType::CharDevice,
        Kind::Block(_) => FileType::BlockDevice,
        Kind::Fifo => FileType::Fifo,
        Kind::Socket => FileType::Socket,
    }
}
