//! Reading metadata that nobody vouches for: every offset is checked, nothing recurses, and the
//! look-ups that FUSE asks for all day do not allocate.

use std::ops::ControlFlow;

use super::dirent::Block;
use super::disk::{
    BLOCK_BYTES, CHUNK_INDEX_BYTES, DATA_CHUNK_MAX_BITS, DEVICE_SLOT, DEVICE_SLOT_BYTES,
    DIRENT_BYTES, DataLayout, FileType, HOLE_CHUNK_MAX_BITS, INODE_BYTES, InodeHead, SLOT_BYTES,
    SUPER_BYTES, SUPER_OFFSET, SYMLINK_BYTES, SuperBlock, checksum_is_right, chunk_bits,
    decode_chunk_format, decode_chunk_index, decode_device_slot, decode_rdev,
};
use super::source::{MetaError, MetaSource};
use super::xattr;
use crate::tree::{Mtime, Rdev, Xattr};

/// The number of an inode: where it lies in the metadata, in units of 32 bytes. What `stat` shows.
pub type Nid = u64;

/// Why metadata can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The superblock is not one of ours.
    #[error("not the metadata of an image ({what}); convert the image with this version")]
    Unsupported {
        /// What is different.
        what: &'static str,
    },
    /// The bytes contradict themselves.
    #[error(
        "the metadata is corrupt: {what}, in the structure at byte {at}; run `verify` on the image"
    )]
    Corrupt {
        /// Where the structure begins that is wrong.
        at: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The inode is not of the kind that the question is about.
    #[error("inode {nid} is not a {wanted}")]
    WrongType {
        /// The inode.
        nid: Nid,
        /// What it should be.
        wanted: &'static str,
    },
    /// The bytes can't be had.
    #[error(transparent)]
    Meta(#[from] MetaError),
}

/// Where the bytes of an inode lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataPlace {
    /// There are none: an empty file, a device, a fifo.
    Empty,
    /// All of the file is zeros and lies nowhere.
    Hole,
    /// In the data space, from this byte on, without a gap.
    Data(u64),
    /// In the metadata: directories and symbolic links.
    Meta,
}

/// The attributes of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InodeInfo {
    /// Its number.
    pub nid: Nid,
    /// What it is.
    pub file_type: FileType,
    /// Type and permission bits, as in `st_mode`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Link count.
    pub nlink: u32,
    /// Size in bytes: of a directory, the bytes of its entries; of a symbolic link, of its target.
    pub size: u64,
    /// Modification time, which serves as access and change time too.
    pub mtime: Mtime,
    /// Device number; 0:0 except for devices.
    pub rdev: Rdev,
    /// Where its bytes are.
    pub data: DataPlace,
    /// Whether it has extended attributes.
    pub has_xattrs: bool,
    layout: DataLayout,
    first_block: u32,
    xattr_bytes: u32,
}

impl InodeInfo {
    /// Where its bytes start in the data space; `None` for a hole and for whatever has no bytes
    /// there.
    pub fn data_start(&self) -> Option<u64> {
        match self.data {
            DataPlace::Data(offset) => Some(offset),
            DataPlace::Empty | DataPlace::Hole | DataPlace::Meta => None,
        }
    }

    fn at(&self) -> u64 {
        self.nid.wrapping_mul(SLOT_BYTES)
    }

    /// Where what follows the inode and its extended attributes begins.
    fn body_at(&self) -> u64 {
        self.at() + INODE_BYTES + u64::from(self.xattr_bytes)
    }

    fn corrupt(&self, what: &'static str) -> ReadError {
        corrupt(self.at())(what)
    }
}

/// One name of a directory, lent for the time of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Where a listing goes on behind this entry.
    pub cookie_after: u64,
    /// The inode.
    pub nid: Nid,
    /// What the inode is.
    pub file_type: FileType,
    /// The name: not empty, no slash, no zero byte. `.` and `..` come too.
    pub name: &'a [u8],
}

/// What `statfs` wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// Inodes.
    pub inodes: u64,
    /// Blocks of [`BLOCK_BYTES`] in the data space.
    pub data_blocks: u64,
    /// Blocks of [`BLOCK_BYTES`] in the metadata.
    pub meta_blocks: u64,
}

/// The metadata of one image. Cheap to share: all methods take `&self`, nothing is cached.
#[derive(Debug)]
pub struct Reader<M: MetaSource> {
    source: M,
    root: Nid,
    totals: Totals,
    has_xattrs: bool,
}

fn corrupt(at: u64) -> impl Fn(&'static str) -> ReadError {
    move |what| ReadError::Corrupt { at, what }
}

impl<M: MetaSource> Reader<M> {
    /// Reads the superblock, which takes the first 4 KiB.
    ///
    /// # Errors
    /// When they can't be had, fail their checksum, or describe anything but the subset of
    /// `docs/erofs.md`.
    pub fn open(source: M) -> Result<Self, ReadError> {
        let unsupported = |what| ReadError::Unsupported { what };
        if source.len() < BLOCK_BYTES {
            return Err(unsupported("shorter than a superblock"));
        }
        let first: &[u8; BLOCK_BYTES as usize] = array(&source, 0)?;
        let block: &[u8; SUPER_BYTES] = first[SUPER_OFFSET..SUPER_OFFSET + SUPER_BYTES]
            .try_into()
            .expect("a superblock's length");
        let superblock = SuperBlock::decode(block).map_err(unsupported)?;
        if !checksum_is_right(first) {
            return Err(corrupt(SUPER_OFFSET as u64)("the superblock's checksum"));
        }
        let meta_blocks = u64::from(superblock.meta_blocks);
        if meta_blocks * BLOCK_BYTES != source.len() {
            return Err(corrupt(SUPER_OFFSET as u64)(
                "another length than it says of itself",
            ));
        }
        let slot_at = usize::from(DEVICE_SLOT) * DEVICE_SLOT_BYTES;
        let slot: &[u8; DEVICE_SLOT_BYTES] = first[slot_at..slot_at + DEVICE_SLOT_BYTES]
            .try_into()
            .expect("a slot's length");
        let totals = Totals {
            inodes: superblock.inodes,
            data_blocks: u64::from(decode_device_slot(slot)),
            meta_blocks,
        };
        let reader = Self {
            source,
            root: u64::from(superblock.root_nid),
            totals,
            has_xattrs: superblock.has_xattrs,
        };
        reader.directory(reader.root)?;
        Ok(reader)
    }

    /// The inode number of the root directory.
    pub fn root(&self) -> Nid {
        self.root
    }

    /// Counts for `statfs`.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// False when no inode at all has extended attributes.
    pub fn has_xattrs(&self) -> bool {
        self.has_xattrs
    }

    /// The source of the bytes.
    pub fn source(&self) -> &M {
        &self.source
    }

    /// The attributes of an inode.
    ///
    /// # Errors
    /// When there is no proper inode at this number.
    pub fn inode(&self, nid: Nid) -> Result<InodeInfo, ReadError> {
        let at = nid
            .checked_mul(SLOT_BYTES)
            .filter(|&at| at < self.source.len())
            .ok_or(ReadError::Corrupt {
                at: nid,
                what: "an inode number beyond the end",
            })?;
        let bytes: &[u8; INODE_BYTES as usize] = array(&self.source, at)?;
        let head = InodeHead::decode(bytes).map_err(corrupt(at))?;
        let file_type = FileType::from_mode(head.mode)
            .ok_or_else(|| corrupt(at)("a mode without a file type"))?;
        let mut info = InodeInfo {
            nid,
            file_type,
            mode: head.mode,
            uid: head.uid,
            gid: head.gid,
            nlink: head.nlink,
            size: head.size,
            mtime: head.mtime,
            rdev: Rdev { major: 0, minor: 0 },
            data: DataPlace::Empty,
            has_xattrs: head.xattr_bytes > 0,
            layout: head.layout,
            first_block: head.union,
            xattr_bytes: head.xattr_bytes,
        };
        match (file_type, head.layout) {
            (FileType::Regular, DataLayout::Plain) if head.size == 0 => (),
            (FileType::Regular, DataLayout::Chunks) => {
                info.data = self.data_place(&info, head.union)?;
            }
            (FileType::Directory | FileType::Symlink, DataLayout::Plain | DataLayout::Inline) => {
                if head.size > self.source.len() {
                    return Err(info.corrupt("more data than there is metadata"));
                }
                info.data = DataPlace::Meta;
            }
            (FileType::CharDevice | FileType::BlockDevice, DataLayout::Plain) if head.size == 0 => {
                info.rdev = decode_rdev(head.union);
            }
            (FileType::Fifo | FileType::Socket, DataLayout::Plain) if head.size == 0 => (),
            _ => return Err(info.corrupt("an inode whose data layout does not fit its type")),
        }
        Ok(info)
    }

    /// Where the data of a file with chunks is. Chunks have the size that the writer chooses, follow
    /// one another, and end within the data space; anything else is refused.
    fn data_place(&self, info: &InodeInfo, format: u32) -> Result<DataPlace, ReadError> {
        if info.size == 0 || info.size > i64::MAX.unsigned_abs() {
            return Err(info.corrupt("chunks of a file of an impossible size"));
        }
        let bits =
            decode_chunk_format(format).ok_or_else(|| info.corrupt("an unknown chunk format"))?;
        let indexes_at = info.body_at().next_multiple_of(CHUNK_INDEX_BYTES);
        let first = self.chunk_index(indexes_at)?;
        let max_bits = match first {
            Some(_) => DATA_CHUNK_MAX_BITS,
            None => HOLE_CHUNK_MAX_BITS,
        };
        if bits != chunk_bits(info.size, max_bits) {
            return Err(info.corrupt("a chunk size that is not the file's"));
        }
        let end = first.map_or(0, |block| {
            u64::from(block) + info.size.div_ceil(BLOCK_BYTES)
        });
        if end > self.totals.data_blocks {
            return Err(info.corrupt("data beyond the end of the data space"));
        }
        let chunks = info.size.div_ceil(1 << bits);
        let chunk_blocks = 1u64 << (bits - BLOCK_BYTES.trailing_zeros());
        for i in 1..chunks {
            let expected = first.map(|block| u64::from(block) + i * chunk_blocks);
            if self
                .chunk_index(indexes_at + i * CHUNK_INDEX_BYTES)?
                .map(u64::from)
                != expected
            {
                return Err(info.corrupt("chunks that do not follow one another"));
            }
        }
        Ok(match first {
            Some(first) => DataPlace::Data(u64::from(first) * BLOCK_BYTES),
            None => DataPlace::Hole,
        })
    }

    fn chunk_index(&self, at: u64) -> Result<Option<u32>, ReadError> {
        decode_chunk_index(array(&self.source, at)?).map_err(corrupt(at))
    }

    /// Where a file's bytes start in the data space; `None` for a hole, for an empty file, and for
    /// whatever is not a file.
    ///
    /// # Errors
    /// As [`Reader::inode`], which gives the same in [`InodeInfo::data`].
    pub fn data_start(&self, nid: Nid) -> Result<Option<u64>, ReadError> {
        Ok(self.inode(nid)?.data_start())
    }

    /// Finds a name in a directory, in time logarithmic in its entries. `..` is found as well.
    ///
    /// # Errors
    /// [`ReadError::WrongType`] when `dir` is no directory; otherwise as for every read.
    pub fn lookup(&self, dir: Nid, name: &[u8]) -> Result<Option<Nid>, ReadError> {
        let dir = self.directory(dir)?;
        let bad = corrupt(dir.at());
        // The last block whose first name is not behind the wanted one.
        let (mut low, mut high) = (0, dir.size.div_ceil(BLOCK_BYTES));
        while low < high {
            let middle = low + (high - low) / 2;
            if self.dir_block(&dir, middle)?.name(0).map_err(&bad)? <= name {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let Some(index) = low.checked_sub(1) else {
            return Ok(None);
        };
        let block = self.dir_block(&dir, index)?;
        let (mut low, mut high) = (0, block.count());
        while low < high {
            let middle = low + (high - low) / 2;
            match block.name(middle).map_err(&bad)?.cmp(name) {
                std::cmp::Ordering::Equal => return Ok(Some(block.nid(middle))),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    /// Lists a directory from `cookie` on (0 is the start, otherwise
    /// [`DirEntry::cookie_after`] of the last entry that was taken), in byte order of the names,
    /// until `f` breaks or the end.
    ///
    /// # Errors
    /// [`ReadError::WrongType`] when `dir` is no directory; otherwise as for every read.
    pub fn read_dir(
        &self,
        dir: Nid,
        cookie: u64,
        f: &mut dyn FnMut(DirEntry<'_>) -> ControlFlow<()>,
    ) -> Result<(), ReadError> {
        let dir = self.directory(dir)?;
        let bad = corrupt(dir.at());
        let mut skip = usize::try_from(cookie % BLOCK_BYTES)
            .expect("less than a block")
            .div_ceil(DIRENT_BYTES);
        for index in cookie / BLOCK_BYTES..dir.size.div_ceil(BLOCK_BYTES) {
            let block = self.dir_block(&dir, index)?;
            for i in skip..block.count() {
                let cookie_after = if i + 1 < block.count() {
                    index * BLOCK_BYTES + ((i + 1) * DIRENT_BYTES) as u64
                } else {
                    (index + 1) * BLOCK_BYTES
                };
                let entry = DirEntry {
                    cookie_after,
                    nid: block.nid(i),
                    file_type: block.file_type(i).map_err(&bad)?,
                    name: block.name(i).map_err(&bad)?,
                };
                if f(entry).is_break() {
                    return Ok(());
                }
            }
            skip = 0;
        }
        Ok(())
    }

    /// The target of a symbolic link, at most [`SYMLINK_BYTES`].
    ///
    /// # Errors
    /// [`ReadError::WrongType`] when it is none; otherwise as for every read.
    pub fn read_link(&self, nid: Nid) -> Result<Vec<u8>, ReadError> {
        let info = self.inode(nid)?;
        if info.file_type != FileType::Symlink {
            return Err(ReadError::WrongType {
                nid,
                wanted: "symbolic link",
            });
        }
        if info.size == 0 || info.size > SYMLINK_BYTES as u64 {
            return Err(info.corrupt("a symbolic link of an impossible length"));
        }
        let target = self.meta_block(&info, 0)?;
        if target.contains(&0) {
            return Err(info.corrupt("a zero byte in a symbolic link"));
        }
        Ok(target.to_vec())
    }

    /// All extended attributes of an inode, in the order in which they are stored: by name.
    ///
    /// # Errors
    /// As for every read.
    pub fn xattrs(&self, nid: Nid) -> Result<Vec<Xattr>, ReadError> {
        let mut all = Vec::new();
        self.each_xattr(nid, &mut |x| {
            all.push(([x.prefix, x.rest].concat(), x.value.to_vec()));
            ControlFlow::Continue(())
        })?;
        Ok(all)
    }

    /// One extended attribute by its full name.
    ///
    /// # Errors
    /// As for every read.
    pub fn xattr(&self, nid: Nid, name: &[u8]) -> Result<Option<Vec<u8>>, ReadError> {
        let mut found = None;
        self.each_xattr(nid, &mut |x| {
            if x.is_named(name) {
                found = Some(x.value.to_vec());
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })?;
        Ok(found)
    }

    fn each_xattr(
        &self,
        nid: Nid,
        f: &mut dyn FnMut(xattr::Read<'_>) -> ControlFlow<()>,
    ) -> Result<(), ReadError> {
        let info = self.inode(nid)?;
        if info.xattr_bytes == 0 {
            return Ok(());
        }
        let bytes = self
            .source
            .read(info.at() + INODE_BYTES, info.xattr_bytes as usize)?;
        for one in xattr::decode(bytes) {
            if f(one.map_err(corrupt(info.at()))?).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn directory(&self, nid: Nid) -> Result<InodeInfo, ReadError> {
        let info = self.inode(nid)?;
        if info.file_type != FileType::Directory {
            return Err(ReadError::WrongType {
                nid,
                wanted: "directory",
            });
        }
        Ok(info)
    }

    fn dir_block(&self, dir: &InodeInfo, index: u64) -> Result<Block<'_>, ReadError> {
        Block::parse(self.meta_block(dir, index)?).map_err(corrupt(dir.at()))
    }

    /// The bytes of block `index` of an inode whose data is in the metadata; the last block ends
    /// with the data.
    fn meta_block(&self, info: &InodeInfo, index: u64) -> Result<&[u8], ReadError> {
        let offset = index * BLOCK_BYTES;
        let left = info.size.saturating_sub(offset);
        let len = usize::try_from(left.min(BLOCK_BYTES)).expect("at most a block");
        if info.layout == DataLayout::Inline && left <= BLOCK_BYTES {
            let at = info.body_at();
            if at % BLOCK_BYTES + left > BLOCK_BYTES {
                return Err(info.corrupt("inline data across blocks"));
            }
            return Ok(self.source.read(at, len)?);
        }
        let at = u64::from(info.first_block)
            .checked_add(index)
            .and_then(|block| block.checked_mul(BLOCK_BYTES))
            .ok_or_else(|| info.corrupt("blocks beyond all addresses"))?;
        Ok(self.source.read(at, len)?)
    }
}

fn array<M: MetaSource, const N: usize>(source: &M, at: u64) -> Result<&[u8; N], MetaError> {
    let bytes = source.read(at, N)?;
    bytes.try_into().map_err(|_| MetaError::OutOfRange {
        offset: at,
        len: N,
        end: source.len(),
    })
}
