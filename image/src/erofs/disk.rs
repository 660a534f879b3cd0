//! The on-disk structures: field offsets, constants, and their encoding to and from bytes. No I/O
//! and no policy. All integers are little-endian. Names and offsets follow the kernel's
//! `fs/erofs/erofs_fs.h`.

use crate::tree::{Mtime, Rdev};

/// Bytes of a block. Fixed: every kernel that has EROFS supports 4 KiB, only some support others.
pub const BLOCK_BYTES: u64 = 4096;

/// `BLOCK_BYTES` as a power of two, the form in which the superblock has it.
pub(super) const BLOCK_BITS: u8 = 12;

/// Blocks that the data space may have: addresses are 32 bits wide and the highest one means
/// "hole".
pub const MAX_DATA_BLOCKS: u64 = u32::MAX as u64;

/// Bytes of the longest symlink target: `PATH_MAX` without its closing zero. The kernel follows no
/// longer one.
pub const SYMLINK_BYTES: usize = 4095;

/// Where the superblock lies. The first KiB belongs to boot loaders and is zero.
pub(super) const SUPER_OFFSET: usize = 1024;
pub(super) const SUPER_BYTES: usize = 128;

/// Where the device table lies, in units of [`DEVICE_SLOT_BYTES`]: right behind the superblock.
pub(super) const DEVICE_SLOT: u16 = 9;
pub(super) const DEVICE_SLOT_BYTES: usize = 128;

/// The first byte that inodes may use: behind the superblock and the one device slot.
pub(super) const FIRST_INODE_OFFSET: u64 =
    DEVICE_SLOT as u64 * DEVICE_SLOT_BYTES as u64 + DEVICE_SLOT_BYTES as u64;

/// An inode number (nid) counts slots of this many bytes from the start of the metadata.
pub(super) const SLOT_BYTES: u64 = 32;

/// Bytes of an extended inode, the only kind that is written: compact ones have no mtime.
pub(super) const INODE_BYTES: u64 = 64;

pub(super) const CHUNK_INDEX_BYTES: u64 = 8;
pub(super) const DIRENT_BYTES: usize = 12;

/// Longest name in a directory.
pub(super) const NAME_BYTES: usize = 255;

/// A file's data is one chunk where it can be, but no chunk of data is larger than 1 GiB:
/// `fsck.erofs` 1.5 reads a chunk with one `pread`, which Linux cuts at 2 GiB, into a buffer whose
/// size it keeps in 32 bits.
pub(super) const DATA_CHUNK_MAX_BITS: u32 = 30;

/// The largest chunk that the format can say, for holes, which nobody reads: 2^(12 + 31) bytes.
pub(super) const HOLE_CHUNK_MAX_BITS: u32 = BLOCK_BITS as u32 + CHUNK_BITS_MASK as u32;

/// The device id of the data space.
pub(super) const DATA_DEVICE: u16 = 1;

/// The block address that means "these are zeros".
pub(super) const NULL_BLOCK: u32 = u32::MAX;

const MAGIC: u32 = 0xE0F5_E1E2;
pub(super) const COMPAT_CHECKSUM: u32 = 0x1;
const COMPAT_MTIME: u32 = 0x2;
const INCOMPAT_CHUNKED_FILE: u32 = 0x4;
const INCOMPAT_DEVICE_TABLE: u32 = 0x8;
const INCOMPAT: u32 = INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE;

const CHUNK_BITS_MASK: u16 = 0x1f;
const CHUNK_FORMAT_INDEXES: u16 = 0x20;

const FORMAT_EXTENDED: u16 = 1;

/// Volume name of an image in which no inode has extended attributes, so that a front end can
/// refuse all questions about them without asking any inode.
const VOLUME_PLAIN: [u8; 16] = *b"lazyimg/1\0\0\0\0\0\0\0";
/// Volume name of an image in which at least one inode has extended attributes. The last byte must
/// be zero: the kernel refuses names without an end.
const VOLUME_XATTRS: [u8; 16] = *b"lazyimg/1+xattr\0";

pub(super) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(super) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

pub(super) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// What the superblock of an image of ours says; everything else in it is fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SuperBlock {
    pub root_nid: u16,
    /// Number of inodes.
    pub inodes: u64,
    /// Blocks of the metadata.
    pub meta_blocks: u32,
    pub uuid: [u8; 16],
    pub has_xattrs: bool,
}

const SUPER_CHECKSUM: usize = 4;
const SUPER_UUID: usize = 48;

impl SuperBlock {
    /// The 128 bytes, with a checksum of zero: see [`set_checksum`].
    pub fn encode(&self) -> [u8; SUPER_BYTES] {
        let mut b = [0; SUPER_BYTES];
        put(&mut b, 0, &MAGIC.to_le_bytes());
        put(&mut b, 8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
        b[12] = BLOCK_BITS;
        put(&mut b, 14, &self.root_nid.to_le_bytes());
        put(&mut b, 16, &self.inodes.to_le_bytes());
        put(&mut b, 36, &self.meta_blocks.to_le_bytes());
        put(&mut b, SUPER_UUID, &self.uuid);
        let volume = if self.has_xattrs {
            VOLUME_XATTRS
        } else {
            VOLUME_PLAIN
        };
        put(&mut b, 64, &volume);
        put(&mut b, 80, &INCOMPAT.to_le_bytes());
        put(&mut b, 86, &1u16.to_le_bytes());
        put(&mut b, 88, &DEVICE_SLOT.to_le_bytes());
        b
    }

    /// Reads a superblock; an error says in what respect it is not of the subset.
    pub fn decode(b: &[u8; SUPER_BYTES]) -> Result<Self, &'static str> {
        if le32(b, 0) != MAGIC {
            return Err("no EROFS magic number");
        }
        if b[12] != BLOCK_BITS || b[90] != 0 {
            return Err("blocks are not of 4096 bytes");
        }
        if le32(b, 80) != INCOMPAT {
            return Err("features beyond chunked files and a device table");
        }
        if le16(b, 86) != 1 || le16(b, 88) != DEVICE_SLOT {
            return Err("not exactly one data device, described behind the superblock");
        }
        if le32(b, 40) != 0 {
            return Err("inode numbers do not count from the start");
        }
        Ok(Self {
            root_nid: le16(b, 14),
            inodes: le64(b, 16),
            meta_blocks: le32(b, 36),
            uuid: b[SUPER_UUID..SUPER_UUID + 16]
                .try_into()
                .expect("16 bytes are 16 bytes"),
            has_xattrs: b[64..80] != VOLUME_PLAIN,
        })
    }
}

/// Stores the checksum of the first block: CRC-32C, begun with all ones and not inverted at the
/// end, over everything from the superblock to the end of the block, the checksum itself as zero.
pub(super) fn set_checksum(block: &mut [u8; BLOCK_BYTES as usize]) {
    let at = SUPER_OFFSET + SUPER_CHECKSUM;
    put(block, at, &[0; 4]);
    let sum = crc32c(&block[SUPER_OFFSET..]);
    put(block, at, &sum.to_le_bytes());
}

/// True when the first block has the checksum that [`set_checksum`] would store.
pub(super) fn checksum_is_right(block: &[u8; BLOCK_BYTES as usize]) -> bool {
    let mut copy = *block;
    set_checksum(&mut copy);
    copy == *block
}

/// Stores the uuid in a finished image.
pub(super) fn set_uuid(image: &mut [u8], uuid: &[u8; 16]) {
    put(image, SUPER_OFFSET + SUPER_UUID, uuid);
}

fn crc32c(bytes: &[u8]) -> u32 {
    const REFLECTED_CASTAGNOLI: u32 = 0x82F6_3B78;
    bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (REFLECTED_CASTAGNOLI & (crc & 1).wrapping_neg())
        })
    })
}

/// The slot of the one device: no tag, `blocks` blocks, not mapped into the metadata's addresses.
pub(super) fn encode_device_slot(blocks: u32) -> [u8; DEVICE_SLOT_BYTES] {
    let mut b = [0; DEVICE_SLOT_BYTES];
    put(&mut b, 64, &blocks.to_le_bytes());
    b
}

/// Blocks of the device that a slot describes.
pub(super) fn decode_device_slot(b: &[u8; DEVICE_SLOT_BYTES]) -> u32 {
    le32(b, 64)
}

/// What kind of file an inode or a directory entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum FileType {
    /// Regular file.
    Regular = 1,
    /// Directory.
    Directory = 2,
    /// Character device.
    CharDevice = 3,
    /// Block device.
    BlockDevice = 4,
    /// Named pipe.
    Fifo = 5,
    /// Socket.
    Socket = 6,
    /// Symbolic link.
    Symlink = 7,
}

impl FileType {
    /// The type bits of a mode (`S_IFREG` …).
    pub const fn mode_bits(self) -> u16 {
        match self {
            Self::Regular => 0o100_000,
            Self::Directory => 0o040_000,
            Self::CharDevice => 0o020_000,
            Self::BlockDevice => 0o060_000,
            Self::Fifo => 0o010_000,
            Self::Socket => 0o140_000,
            Self::Symlink => 0o120_000,
        }
    }

    const ALL: [Self; 7] = [
        Self::Regular,
        Self::Directory,
        Self::CharDevice,
        Self::BlockDevice,
        Self::Fifo,
        Self::Socket,
        Self::Symlink,
    ];

    /// The type that a mode's type bits say.
    pub fn from_mode(mode: u16) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|t| t.mode_bits() == mode & 0o170_000)
    }

    /// The type that a directory entry's byte says.
    pub(super) fn from_dirent(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|&t| t as u8 == byte)
    }
}

/// Where an inode's data lies (`i_format` bits 1 to 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DataLayout {
    /// In whole blocks of the metadata.
    Plain,
    /// Whole blocks, and the rest behind the inode.
    Inline,
    /// In chunks, whose indexes lie behind the inode.
    Chunks,
}

/// The fields of an extended inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InodeHead {
    pub layout: DataLayout,
    /// Bytes of the extended attributes that follow: 0, or 12 + 4n with n > 0.
    pub xattr_bytes: u32,
    pub mode: u16,
    pub size: u64,
    /// First block, chunk format or device number, as layout and mode say.
    pub union: u32,
    /// A running number; only 32-bit programs see it.
    pub ino: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Mtime,
    pub nlink: u32,
}

/// Bytes of the header in front of an inode's extended attributes.
pub(super) const XATTR_HEADER_BYTES: u32 = 12;

impl InodeHead {
    pub fn encode(&self) -> [u8; INODE_BYTES as usize] {
        let layout: u16 = match self.layout {
            DataLayout::Plain => 0,
            DataLayout::Inline => 2,
            DataLayout::Chunks => 4,
        };
        let xattr_count = match self.xattr_bytes {
            0 => 0,
            n => (n - XATTR_HEADER_BYTES) / 4 + 1,
        };
        let xattr_count = u16::try_from(xattr_count).expect("bounded by XATTRS_BYTES");
        let mut b = [0; INODE_BYTES as usize];
        put(&mut b, 0, &(FORMAT_EXTENDED | layout << 1).to_le_bytes());
        put(&mut b, 2, &xattr_count.to_le_bytes());
        put(&mut b, 4, &self.mode.to_le_bytes());
        put(&mut b, 8, &self.size.to_le_bytes());
        put(&mut b, 16, &self.union.to_le_bytes());
        put(&mut b, 20, &self.ino.to_le_bytes());
        put(&mut b, 24, &self.uid.to_le_bytes());
        put(&mut b, 28, &self.gid.to_le_bytes());
        put(&mut b, 32, &self.mtime.sec.to_le_bytes());
        put(&mut b, 40, &self.mtime.nsec.to_le_bytes());
        put(&mut b, 44, &self.nlink.to_le_bytes());
        b
    }

    pub fn decode(b: &[u8; INODE_BYTES as usize]) -> Result<Self, &'static str> {
        let format = le16(b, 0);
        if format & FORMAT_EXTENDED == 0 {
            return Err("not an extended inode");
        }
        let layout = match format >> 1 {
            0 => DataLayout::Plain,
            2 => DataLayout::Inline,
            4 => DataLayout::Chunks,
            _ => return Err("unknown inode format"),
        };
        let xattr_bytes = match u32::from(le16(b, 2)) {
            0 => 0,
            1 => return Err("extended attributes without an entry"),
            n => XATTR_HEADER_BYTES + (n - 1) * 4,
        };
        if le16(b, 6) != 0 {
            return Err("unknown inode field");
        }
        let mtime = Mtime {
            sec: le64(b, 32).cast_signed(),
            nsec: le32(b, 40),
        };
        if mtime.nsec >= 1_000_000_000 {
            return Err("nanoseconds of a second or more");
        }
        Ok(Self {
            layout,
            xattr_bytes,
            mode: le16(b, 4),
            size: le64(b, 8),
            union: le32(b, 16),
            ino: le32(b, 20),
            uid: le32(b, 24),
            gid: le32(b, 28),
            mtime,
            nlink: le32(b, 44),
        })
    }
}

/// The chunk format of a file whose chunks have 2^`bits` bytes, `bits` from 12 to 43.
pub(super) fn encode_chunk_format(bits: u32) -> u32 {
    debug_assert!((u32::from(BLOCK_BITS)..=HOLE_CHUNK_MAX_BITS).contains(&bits));
    (bits - u32::from(BLOCK_BITS)) | u32::from(CHUNK_FORMAT_INDEXES)
}

/// The bits of a chunk's size; `None` for formats outside the subset.
pub(super) fn decode_chunk_format(union: u32) -> Option<u32> {
    let bits = union & u32::from(CHUNK_BITS_MASK);
    (union == bits | u32::from(CHUNK_FORMAT_INDEXES)).then_some(bits + u32::from(BLOCK_BITS))
}

/// The smallest chunk size, as bits, that holds `size` bytes, but at most `max_bits`.
pub(super) fn chunk_bits(size: u64, max_bits: u32) -> u32 {
    let needed = u64::BITS - size.saturating_sub(1).leading_zeros();
    needed.clamp(u32::from(BLOCK_BITS), max_bits)
}

/// An index of one chunk: its device and first block; `None` is a hole.
pub(super) fn encode_chunk_index(block: Option<u32>) -> [u8; CHUNK_INDEX_BYTES as usize] {
    let mut b = [0; CHUNK_INDEX_BYTES as usize];
    let device = if block.is_some() { DATA_DEVICE } else { 0 };
    put(&mut b, 2, &device.to_le_bytes());
    put(&mut b, 4, &block.unwrap_or(NULL_BLOCK).to_le_bytes());
    b
}

/// The first block of a chunk in the data space; `None` is a hole.
pub(super) fn decode_chunk_index(
    b: &[u8; CHUNK_INDEX_BYTES as usize],
) -> Result<Option<u32>, &'static str> {
    let block = le32(b, 4);
    if block == NULL_BLOCK {
        return Ok(None);
    }
    if le16(b, 0) != 0 || le16(b, 2) != DATA_DEVICE {
        return Err("a chunk that is not in the data device");
    }
    Ok(Some(block))
}

/// Device numbers as the kernel's `new_encode_dev` has them: 12 bits major, 20 bits minor. `None`
/// when the number is larger.
pub(super) fn encode_rdev(rdev: Rdev) -> Option<u32> {
    let Rdev { major, minor } = rdev;
    (major < 1 << 12 && minor < 1 << 20)
        .then_some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// The inverse of [`encode_rdev`].
pub(super) fn decode_rdev(rdev: u32) -> Rdev {
    Rdev {
        major: (rdev >> 8) & 0xfff,
        minor: (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00),
    }
}
