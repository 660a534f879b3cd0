//! The bytes of segment files and of index entries. `docs/store-engine.md` is the specification.
//!
//! Pure: no I/O here. The fuzz target `store_record` compiles this file alone.

use lazyimg_convergent::{ChunkId, MAX_STORED_LEN};

/// First bytes of a segment file.
pub const SEGMENT_MAGIC: [u8; 8] = *b"LZSTORSG";
/// First bytes of a record.
pub const RECORD_MAGIC: [u8; 4] = *b"LZSR";
/// Version of both, and of the index entries.
pub const VERSION: u8 = 1;
/// Length of a segment's header, in bytes.
pub const SEGMENT_HEADER: u64 = 32;
/// Length of a record's header, in bytes.
pub const RECORD_HEADER: usize = 52;
/// Length of the longest record, in bytes.
pub const MAX_RECORD: usize = RECORD_HEADER + MAX_STORED_LEN;

/// Which segment: the number of its root, and its own within the root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId {
    /// The number of the root.
    pub root: u32,
    /// The number of the segment, from 1.
    pub number: u32,
}

/// Where a record lies within its root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Location {
    /// Number of the segment.
    pub segment: u32,
    /// Where the record's header begins, in bytes from the start of the segment.
    pub offset: u64,
    /// Length of the chunk behind the header, in bytes.
    pub len: u32,
}

impl Location {
    /// The first byte behind the record; `None` when no file is that long.
    pub fn end(&self) -> Option<u64> {
        self.offset
            .checked_add(RECORD_HEADER as u64)?
            .checked_add(u64::from(self.len))
    }
}

/// What the header of a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Which chunk.
    pub id: ChunkId,
    /// Its length, in bytes.
    pub len: u32,
    /// CRC-32C of the chunk.
    pub body_crc: u32,
}

/// The header of a segment.
pub fn segment_header(of: SegmentId) -> [u8; SEGMENT_HEADER as usize] {
    let mut out = [0; SEGMENT_HEADER as usize];
    out[..8].copy_from_slice(&SEGMENT_MAGIC);
    out[8..12].copy_from_slice(&u32::from(VERSION).to_le_bytes());
    out[12..16].copy_from_slice(&of.root.to_le_bytes());
    out[16..20].copy_from_slice(&of.number.to_le_bytes());
    let crc = crc32c::crc32c(&out[..28]);
    out[28..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// The header of `record` at `offset` of a segment.
pub fn record_header(at: SegmentId, offset: u64, record: &Record) -> [u8; RECORD_HEADER] {
    let mut out = [0; RECORD_HEADER];
    out[..4].copy_from_slice(&RECORD_MAGIC);
    out[4..6].copy_from_slice(&u16::from(VERSION).to_le_bytes());
    out[8..12].copy_from_slice(&record.len.to_le_bytes());
    out[12..44].copy_from_slice(&record.id.0);
    out[44..48].copy_from_slice(&record.body_crc.to_le_bytes());
    let crc = header_crc(at, offset, &out[..48]);
    out[48..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Reads the header of a record that begins at `offset` of a segment; bytes behind it are ignored.
/// `None` when it is not a record written there in a version that can be read.
pub fn parse_record_header(at: SegmentId, offset: u64, bytes: &[u8]) -> Option<Record> {
    let bytes: &[u8; RECORD_HEADER] = bytes.first_chunk()?;
    let (head, crc) = bytes.split_at(48);
    if head[..4] != RECORD_MAGIC
        || head[4..6] != u16::from(VERSION).to_le_bytes()
        || head[6..8] != [0, 0]
        || crc != header_crc(at, offset, head).to_le_bytes()
    {
        return None;
    }
    let len = u32::from_le_bytes(head[8..12].try_into().ok()?);
    is_stored_len(len).then_some(Record {
        id: ChunkId(head[12..44].try_into().ok()?),
        len,
        body_crc: u32::from_le_bytes(head[44..48].try_into().ok()?),
    })
}

/// Reads a whole record, header and chunk. `None` when the header is no header (see
/// [`parse_record_header`]), or the chunk is cut off or not what was written.
pub fn parse_record(at: SegmentId, offset: u64, bytes: &[u8]) -> Option<(Record, &[u8])> {
    let record = parse_record_header(at, offset, bytes)?;
    let body = bytes[RECORD_HEADER..].get(..record.len as usize)?;
    (crc32c::crc32c(body) == record.body_crc).then_some((record, body))
}

/// The first place in `bytes`, which lie at `offset` of a segment, where a record's header is; and
/// that header. Only headers that lie in `bytes` as a whole are found.
pub fn find_record(at: SegmentId, offset: u64, bytes: &[u8]) -> Option<(u64, Record)> {
    let last = bytes.len().checked_sub(RECORD_HEADER)?;
    (0..=last)
        .filter(|i| bytes[*i..].starts_with(&RECORD_MAGIC))
        .find_map(|i| {
            let here = offset.checked_add(i as u64)?;
            Some((here, parse_record_header(at, here, &bytes[i..])?))
        })
}

/// Whether a chunk can have this length.
pub fn is_stored_len(len: u32) -> bool {
    (1..=MAX_STORED_LEN as u32).contains(&len)
}

/// The file name of segment `number`.
pub fn segment_name(number: u32) -> String {
    format!("{number:06}.seg")
}

/// The number of the segment in the file `name`.
pub fn parse_segment_name(name: &str) -> Option<u32> {
    let number = name.strip_suffix(".seg")?.parse().ok()?;
    (number > 0 && name == segment_name(number)).then_some(number)
}

/// Index key: where a chunk is. Big endian, so that the chunks of a root are neighbours.
pub fn chunk_key(root: u32, id: &ChunkId) -> [u8; 37] {
    let mut out = [b'c'; 37];
    out[1..5].copy_from_slice(&root.to_be_bytes());
    out[5..].copy_from_slice(&id.0);
    out
}

/// Reads [`chunk_key`].
pub fn parse_chunk_key(key: &[u8]) -> Option<(u32, ChunkId)> {
    let key: &[u8; 37] = key.try_into().ok()?;
    let root = u32::from_be_bytes(key[1..5].try_into().ok()?);
    (key[0] == b'c').then_some((root, ChunkId(key[5..].try_into().ok()?)))
}

/// Index value under [`chunk_key`].
pub fn location_value(at: Location) -> [u8; 17] {
    let mut out = [VERSION; 17];
    out[1..5].copy_from_slice(&at.segment.to_le_bytes());
    out[5..13].copy_from_slice(&at.offset.to_le_bytes());
    out[13..].copy_from_slice(&at.len.to_le_bytes());
    out
}

/// Reads [`location_value`]; `None` for another version or impossible lengths.
pub fn parse_location(value: &[u8]) -> Option<Location> {
    let value: &[u8; 17] = value.try_into().ok()?;
    let at = Location {
        segment: u32::from_le_bytes(value[1..5].try_into().ok()?),
        offset: u64::from_le_bytes(value[5..13].try_into().ok()?),
        len: u32::from_le_bytes(value[13..].try_into().ok()?),
    };
    let fits = is_stored_len(at.len) && at.offset >= SEGMENT_HEADER && at.end().is_some();
    (value[0] == VERSION && fits).then_some(at)
}

/// Index key: up to where a segment's records are in the index.
pub fn tail_key(of: SegmentId) -> [u8; 9] {
    let mut out = [b't'; 9];
    out[1..5].copy_from_slice(&of.root.to_be_bytes());
    out[5..].copy_from_slice(&of.number.to_be_bytes());
    out
}

/// Reads [`tail_key`].
pub fn parse_tail_key(key: &[u8]) -> Option<SegmentId> {
    let key: &[u8; 9] = key.try_into().ok()?;
    let id = SegmentId {
        root: u32::from_be_bytes(key[1..5].try_into().ok()?),
        number: u32::from_be_bytes(key[5..].try_into().ok()?),
    };
    (key[0] == b't').then_some(id)
}

/// Index value under [`tail_key`].
pub fn tail_value(end: u64) -> [u8; 9] {
    let mut out = [VERSION; 9];
    out[1..].copy_from_slice(&end.to_le_bytes());
    out
}

/// Reads [`tail_value`].
pub fn parse_tail(value: &[u8]) -> Option<u64> {
    let value: &[u8; 9] = value.try_into().ok()?;
    (value[0] == VERSION).then(|| u64::from_le_bytes(value[1..].try_into().unwrap_or_default()))
}

fn header_crc(at: SegmentId, offset: u64, head: &[u8]) -> u32 {
    let mut place = [0; 16];
    place[..4].copy_from_slice(&at.root.to_le_bytes());
    place[4..8].copy_from_slice(&at.number.to_le_bytes());
    place[8..].copy_from_slice(&offset.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c(&place), head)
}
