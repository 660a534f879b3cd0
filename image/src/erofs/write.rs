//! Turning a tree into the bytes of its metadata.

use sha2::{Digest, Sha256};

use super::dirent::{self, Entry};
use super::disk::{
    BLOCK_BYTES, CHUNK_INDEX_BYTES, DEVICE_SLOT, DEVICE_SLOT_BYTES, FileType, InodeHead,
    MAX_DATA_BLOCKS, SUPER_OFFSET, SuperBlock, encode_chunk_format, encode_chunk_index,
    encode_device_slot, put, set_checksum, set_uuid,
};
use super::layout::{Body, Layout, file_type, plan};
use super::xattr;
use crate::tree::{ContentId, Kind, Tree};

/// Where a content lies in the data space: its first block, or `None` when all of it is zeros.
pub(super) type Place<'a> = &'a dyn Fn(ContentId) -> Option<u32>;

/// Why a tree can't be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// One entry says something that EROFS can't.
    #[error("/{path}: {problem}")]
    Entry {
        /// Path from the root, bytes outside of ASCII escaped.
        path: String,
        /// What it is.
        #[source]
        problem: Problem,
    },
    /// The data space has too many blocks.
    #[error(
        "the files take {blocks} blocks of 4 KiB, more than the {MAX_DATA_BLOCKS} (16 TiB) that EROFS can address"
    )]
    DataSpaceTooLarge {
        /// Blocks that it has.
        blocks: u64,
    },
    /// The metadata itself has too many blocks.
    #[error("names and inodes take {bytes} bytes, more than the 16 TiB that EROFS can address")]
    MetadataTooLarge {
        /// Bytes that it would have, at least.
        bytes: u64,
    },
}

/// What EROFS can't say of an entry.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Problem {
    /// Not a name.
    #[error(
        "a name of {len} bytes that is empty, longer than 255, `.`, `..`, or has a slash or a zero byte"
    )]
    Name {
        /// Its length.
        len: usize,
    },
    /// Not a link target.
    #[error(
        "a symbolic link target of {len} bytes that is empty, longer than {SYMLINK_BYTES}, or has a zero byte",
        SYMLINK_BYTES = super::SYMLINK_BYTES
    )]
    SymlinkTarget {
        /// Its length.
        len: usize,
    },
    /// A device number beyond Linux's own range.
    #[error("device number {major}:{minor} is beyond 4095:1048575, the largest that Linux has")]
    DeviceNumber {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A file larger than files can be.
    #[error("a size of {size} bytes is beyond 2^63 - 1")]
    FileSize {
        /// Its size.
        size: u64,
    },
    /// A file with a size and no content.
    #[error("{size} bytes without content (a fault of the caller, not of the image)")]
    NoContent {
        /// Its size.
        size: u64,
    },
    /// A file that would end behind the data space.
    #[error(
        "data up to block {end} of a data space of {data_blocks} blocks (a fault of the caller, not of the image)"
    )]
    OutsideDataSpace {
        /// The block behind its last.
        end: u64,
        /// Blocks of the data space.
        data_blocks: u64,
    },
    /// A time that is not normal.
    #[error("a modification time with {nsec} nanoseconds, a second or more")]
    Nanoseconds {
        /// The nanoseconds.
        nsec: u32,
    },
    /// A name of an extended attribute that Linux does not have.
    #[error("the name of extended attribute {name} is longer than 255 bytes or has a zero byte")]
    XattrName {
        /// Its name, escaped.
        name: String,
    },
    /// A value that is too long.
    #[error(
        "extended attribute {name} has {len} bytes; EROFS holds at most {max}",
        max = xattr::XATTR_VALUE_BYTES
    )]
    XattrValue {
        /// Its name, escaped.
        name: String,
        /// Bytes of its value.
        len: usize,
    },
    /// Too many attributes.
    #[error(
        "the extended attributes take {len} bytes together; EROFS holds at most {max} for one inode",
        max = xattr::XATTRS_BYTES
    )]
    XattrTotal {
        /// Bytes that they would take.
        len: usize,
    },
    /// Bytes that are no ACL.
    #[error("extended attribute {name} is not a POSIX ACL; the kernel would not open the file")]
    Acl {
        /// Its name.
        name: String,
    },
}

/// Writes the metadata of a tree; its length is a multiple of 4096.
///
/// `place` says where each content begins in the data space: at the block it returns, without a gap,
/// or nowhere because the whole file is zeros (`None`). Contents that are equal may share a block.
/// The data space has `data_blocks` blocks.
///
/// The result depends on nothing but the arguments. Extended attributes for which
/// [`super::xattr_is_kept`] is false are left out.
///
/// # Errors
/// [`WriteError::Entry`] names the entry that EROFS can't hold, and why.
pub fn write(
    tree: &Tree,
    place: &dyn Fn(ContentId) -> Option<u32>,
    data_blocks: u64,
) -> Result<Vec<u8>, WriteError> {
    let device_blocks = u32::try_from(data_blocks).map_err(|_| WriteError::DataSpaceTooLarge {
        blocks: data_blocks,
    })?;
    let layout = plan(tree, place, data_blocks)?;
    let bytes = usize::try_from(layout.total_bytes).map_err(|_| WriteError::MetadataTooLarge {
        bytes: layout.total_bytes,
    })?;
    let mut image = vec![0; bytes];
    for i in 0..layout.inodes.len() {
        emit_inode(&mut image, tree, &layout, i);
    }
    put(
        &mut image,
        usize::from(DEVICE_SLOT) * DEVICE_SLOT_BYTES,
        &encode_device_slot(device_blocks),
    );
    let superblock = SuperBlock {
        root_nid: u16::try_from(layout.inodes[0].nid()).expect("the root is in the first blocks"),
        inodes: layout.inodes.len() as u64,
        meta_blocks: u32::try_from(layout.total_bytes / BLOCK_BYTES).expect("checked by plan"),
        uuid: [0; 16],
        has_xattrs: layout.inodes.iter().any(|placed| placed.xattr_bytes > 0),
    };
    put(&mut image, SUPER_OFFSET, &superblock.encode());
    let uuid = uuid_of(&image);
    set_uuid(&mut image, &uuid);
    let first = image
        .first_chunk_mut()
        .expect("metadata has at least one block");
    set_checksum(first);
    Ok(image)
}

/// A UUID of version 8 out of the bytes themselves, so that different images have different ones,
/// which overlayfs wants of its lower file systems, and equal images equal ones.
fn uuid_of(image: &[u8]) -> [u8; 16] {
    let digest = Sha256::digest(image);
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("offsets are within the image, which is in memory")
}

fn emit_inode(image: &mut [u8], tree: &Tree, layout: &Layout, i: usize) {
    let placed = &layout.inodes[i];
    let inode = tree.get(placed.id);
    let meta = &inode.meta;
    let (size, union) = match (placed.body, &inode.kind) {
        (Body::Chunks { bits, .. }, Kind::File { size, .. }) => (*size, encode_chunk_format(bits)),
        (Body::Meta { size, first, .. }, _) => (size, first),
        (Body::Device(rdev), _) => (0, rdev),
        (Body::Empty | Body::Chunks { .. }, _) => (0, 0),
    };
    let head = InodeHead {
        layout: placed.body.data_layout(),
        xattr_bytes: placed.xattr_bytes,
        mode: file_type(&inode.kind).mode_bits() | meta.mode & 0o7777,
        size,
        union,
        ino: u32::try_from(i + 1).unwrap_or(u32::MAX),
        uid: meta.uid,
        gid: meta.gid,
        mtime: meta.mtime,
        nlink: tree.nlink(placed.id),
    };
    put(image, index(placed.at), &head.encode());
    let body_at = index(placed.body_at());
    if placed.xattr_bytes > 0 {
        let room = &mut image[body_at - placed.xattr_bytes as usize..body_at];
        xattr::encode_into(room, &meta.xattrs).expect("measured before");
    }
    match placed.body {
        Body::Empty | Body::Device(_) => (),
        Body::Chunks { bits, count, first } => {
            let at = body_at.next_multiple_of(CHUNK_INDEX_BYTES as usize);
            let blocks = 1u64 << (bits - BLOCK_BYTES.trailing_zeros());
            for i in 0..count {
                let block = first.map(|first| {
                    u32::try_from(u64::from(first) + i * blocks).expect("within the data space")
                });
                let at = at + index(i * CHUNK_INDEX_BYTES);
                put(image, at, &encode_chunk_index(block));
            }
        }
        Body::Meta {
            blocks,
            first,
            inline,
            ..
        } => {
            let dir;
            let data = match &inode.kind {
                Kind::Symlink(target) => target,
                _ => {
                    dir = encode_dir(tree, layout, i);
                    &dir
                }
            };
            let (whole, tail) = data.split_at(data.len() - index(inline));
            debug_assert_eq!(blocks, (whole.len() as u64).div_ceil(BLOCK_BYTES));
            put(image, index(u64::from(first) * BLOCK_BYTES), whole);
            put(image, body_at, tail);
        }
    }
}

fn encode_dir(tree: &Tree, layout: &Layout, i: usize) -> Vec<u8> {
    let directory = FileType::Directory;
    let mut entries = vec![
        Entry {
            name: b".",
            nid: layout.inodes[i].nid(),
            file_type: directory,
        },
        Entry {
            name: b"..",
            nid: layout.parent_of(i).nid(),
            file_type: directory,
        },
    ];
    let children = tree.entries(layout.inodes[i].id);
    entries.extend(children.into_iter().flatten().map(|(name, &id)| Entry {
        name,
        nid: layout.placed(id).nid(),
        file_type: file_type(&tree.get(id).kind),
    }));
    entries.sort_by_key(|entry| entry.name);
    dirent::encode(&entries)
}
