//! Directory blocks: an array of entries and behind it their names, sorted as byte strings.

use super::disk::{BLOCK_BYTES, DIRENT_BYTES, FileType, NAME_BYTES, le16, le64, put};

/// How the entries of a directory fill blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packing {
    /// Blocks, the last one included.
    pub blocks: u64,
    /// Bytes used of the last block.
    pub last_bytes: u64,
}

impl Packing {
    /// The directory's `i_size`.
    pub fn size(&self) -> u64 {
        (self.blocks - 1) * BLOCK_BYTES + self.last_bytes
    }
}

/// Cuts entries, of which only the lengths of the names matter, into blocks: a block takes entries
/// until the next one does not fit. Calls `block` with the number of entries of each.
fn cut(name_bytes: impl Iterator<Item = usize>, mut block: impl FnMut(usize)) -> Packing {
    let (mut blocks, mut used, mut count) = (1, 0, 0);
    for len in name_bytes {
        let needs = (DIRENT_BYTES + len) as u64;
        if used + needs > BLOCK_BYTES {
            block(count);
            blocks += 1;
            (used, count) = (0, 0);
        }
        used += needs;
        count += 1;
    }
    block(count);
    Packing {
        blocks,
        last_bytes: used,
    }
}

/// The room that a directory takes, given its names in order.
pub(super) fn measure(name_bytes: impl Iterator<Item = usize>) -> Packing {
    cut(name_bytes, |_| ())
}

/// One entry to write.
pub(super) struct Entry<'a> {
    pub name: &'a [u8],
    pub nid: u64,
    pub file_type: FileType,
}

/// The directory's bytes; `entries` are sorted by name, and `.` and `..` are among them. As long as
/// [`Packing::size`] says.
pub(super) fn encode(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut counts = Vec::new();
    let packing = cut(entries.iter().map(|e| e.name.len()), |n| counts.push(n));
    let mut bytes = vec![0; usize::try_from(packing.size()).expect("the names are in memory")];
    let mut rest = entries;
    for (block, &count) in bytes.chunks_mut(BLOCK_BYTES as usize).zip(&counts) {
        let (here, later) = rest.split_at(count);
        rest = later;
        let mut name_at = count * DIRENT_BYTES;
        for (i, entry) in here.iter().enumerate() {
            let at = i * DIRENT_BYTES;
            let name_offset = u16::try_from(name_at).expect("within a block");
            put(block, at, &entry.nid.to_le_bytes());
            put(block, at + 8, &name_offset.to_le_bytes());
            block[at + 10] = entry.file_type as u8;
            put(block, name_at, entry.name);
            name_at += entry.name.len();
        }
    }
    bytes
}

/// A directory block to read. All offsets in it are checked before they are used.
pub(super) struct Block<'a> {
    bytes: &'a [u8],
    count: usize,
}

impl<'a> Block<'a> {
    pub fn parse(bytes: &'a [u8]) -> Result<Self, &'static str> {
        if bytes.len() < DIRENT_BYTES {
            return Err("a directory block without an entry");
        }
        let names_at = usize::from(le16(bytes, 8));
        if names_at < DIRENT_BYTES || names_at % DIRENT_BYTES != 0 || names_at > bytes.len() {
            return Err("a directory block whose names begin nowhere");
        }
        Ok(Self {
            bytes,
            count: names_at / DIRENT_BYTES,
        })
    }

    /// Entries in the block, at least 1.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The name of entry `i`, `i < count`. The last name of a block ends at a zero byte or with the
    /// block.
    pub fn name(&self, i: usize) -> Result<&'a [u8], &'static str> {
        let from = usize::from(le16(self.bytes, i * DIRENT_BYTES + 8));
        let last = i + 1 == self.count;
        let to = if last {
            self.bytes.len()
        } else {
            usize::from(le16(self.bytes, (i + 1) * DIRENT_BYTES + 8))
        };
        if from < self.count * DIRENT_BYTES {
            return Err("a name inside the array of entries");
        }
        let name = self
            .bytes
            .get(from..to)
            .ok_or("a name outside of its block")?;
        let name = match name.iter().position(|&b| b == 0) {
            None => name,
            Some(end) if last => &name[..end],
            Some(_) => return Err("a zero byte in a name"),
        };
        if name.is_empty() || name.len() > NAME_BYTES || name.contains(&b'/') {
            return Err("a name that no file can have");
        }
        Ok(name)
    }

    /// The inode number of entry `i`, `i < count`.
    pub fn nid(&self, i: usize) -> u64 {
        le64(self.bytes, i * DIRENT_BYTES)
    }

    /// The type of entry `i`, `i < count`.
    pub fn file_type(&self, i: usize) -> Result<FileType, &'static str> {
        FileType::from_dirent(self.bytes[i * DIRENT_BYTES + 10])
            .ok_or("an entry of an unknown type")
    }
}
