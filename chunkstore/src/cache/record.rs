//! The bytes of segment files and of index entries. `docs/cache.md` is the specification.
//!
//! Pure: no I/O here.

use lazyimg_convergent::{ChunkId, MAX_STORED_LEN};
use sha2::{Digest as _, Sha256};

/// First bytes of a segment file.
pub const SEGMENT_MAGIC: [u8; 8] = *b"LZIMGSEG";
/// First bytes of a record.
pub const RECORD_MAGIC: [u8; 4] = *b"LZCR";
/// Version of both, and of the index entries.
pub const VERSION: u8 = 1;
/// Length of a segment's header, in bytes.
pub const SEGMENT_HEADER: u64 = 32;
/// Length of a record's header, in bytes.
pub const RECORD_HEADER: usize = 48;

/// Where a record lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Location {
    /// Number of the segment.
    pub segment: u64,
    /// Where the record's header begins, in bytes from the start of the segment.
    pub offset: u64,
    /// Length of the ciphertext behind the header, in bytes.
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

/// The header of segment `number`.
pub fn segment_header(number: u64) -> [u8; SEGMENT_HEADER as usize] {
    let mut out = [0; SEGMENT_HEADER as usize];
    out[..8].copy_from_slice(&SEGMENT_MAGIC);
    out[8..12].copy_from_slice(&u32::from(VERSION).to_le_bytes());
    out[12..20].copy_from_slice(&number.to_le_bytes());
    let check = check(&[&out[..28]]);
    out[28..].copy_from_slice(&check);
    out
}

/// Whether `bytes` is the header of segment `number` in a version that can be read.
pub fn is_segment_header(bytes: &[u8], number: u64) -> bool {
    bytes == segment_header(number)
}

/// The header of a record at `at` that holds the chunk `id`.
pub fn record_header(at: Location, id: &ChunkId) -> [u8; RECORD_HEADER] {
    let mut out = [0; RECORD_HEADER];
    out[..4].copy_from_slice(&RECORD_MAGIC);
    out[4..6].copy_from_slice(&u16::from(VERSION).to_le_bytes());
    out[8..12].copy_from_slice(&at.len.to_le_bytes());
    out[12..44].copy_from_slice(&id.0);
    let check = record_check(at.segment, at.offset, &out[..44]);
    out[44..].copy_from_slice(&check);
    out
}

/// What the header at `offset` of `segment` says: which chunk, of what length. `None` when it is
/// not a record written there in a version that can be read.
pub fn parse_record_header(
    segment: u64,
    offset: u64,
    bytes: &[u8; RECORD_HEADER],
) -> Option<(ChunkId, Location)> {
    let (head, tail) = bytes.split_at(44);
    if head[..4] != RECORD_MAGIC
        || head[4..6] != u16::from(VERSION).to_le_bytes()
        || head[6..8] != [0, 0]
        || tail != record_check(segment, offset, head)
    {
        return None;
    }
    let len = u32::from_le_bytes(head[8..12].try_into().ok()?);
    if !is_stored_len(len) {
        return None;
    }
    let id = ChunkId(head[12..44].try_into().ok()?);
    let at = Location {
        segment,
        offset,
        len,
    };
    Some((id, at))
}

/// Whether a ciphertext can have this length.
pub fn is_stored_len(len: u32) -> bool {
    (1..=MAX_STORED_LEN as u32).contains(&len)
}

/// The file name of segment `number`.
pub fn segment_name(number: u64) -> String {
    format!("{number:016x}.seg")
}

/// The number of the segment in the file `name`.
pub fn parse_segment_name(name: &str) -> Option<u64> {
    let number = u64::from_str_radix(name.strip_suffix(".seg")?, 16).ok()?;
    (name == segment_name(number)).then_some(number)
}

/// Index key: where a chunk is.
pub fn chunk_key(id: &ChunkId) -> [u8; 33] {
    let mut out = [b'c'; 33];
    out[1..].copy_from_slice(&id.0);
    out
}

/// Index value under [`chunk_key`].
pub fn location_value(at: Location) -> [u8; 21] {
    let mut out = [VERSION; 21];
    out[1..9].copy_from_slice(&at.segment.to_le_bytes());
    out[9..17].copy_from_slice(&at.offset.to_le_bytes());
    out[17..].copy_from_slice(&at.len.to_le_bytes());
    out
}

/// Reads [`location_value`]; `None` for another version or impossible lengths.
pub fn parse_location(value: &[u8]) -> Option<Location> {
    let value: &[u8; 21] = value.try_into().ok()?;
    if value[0] != VERSION {
        return None;
    }
    let at = Location {
        segment: u64::from_le_bytes(value[1..9].try_into().ok()?),
        offset: u64::from_le_bytes(value[9..17].try_into().ok()?),
        len: u32::from_le_bytes(value[17..].try_into().ok()?),
    };
    (is_stored_len(at.len) && at.offset >= SEGMENT_HEADER && at.end().is_some()).then_some(at)
}

/// Index key: which chunk a record holds. Big endian, so that a segment's records are neighbours.
pub fn record_key(segment: u64, offset: u64) -> [u8; 17] {
    let mut out = [b's'; 17];
    out[1..9].copy_from_slice(&segment.to_be_bytes());
    out[9..].copy_from_slice(&offset.to_be_bytes());
    out
}

/// Reads [`record_key`].
pub fn parse_record_key(key: &[u8]) -> Option<(u64, u64)> {
    let key: &[u8; 17] = key.try_into().ok()?;
    let segment = u64::from_be_bytes(key[1..9].try_into().ok()?);
    let offset = u64::from_be_bytes(key[9..].try_into().ok()?);
    (key[0] == b's').then_some((segment, offset))
}

/// Index value under [`record_key`].
pub fn record_value(id: &ChunkId) -> [u8; 33] {
    let mut out = [VERSION; 33];
    out[1..].copy_from_slice(&id.0);
    out
}

/// Reads [`record_value`].
pub fn parse_record_value(value: &[u8]) -> Option<ChunkId> {
    let value: &[u8; 33] = value.try_into().ok()?;
    (value[0] == VERSION).then_some(ChunkId(value[1..].try_into().ok()?))
}

/// Index key: the segment is complete and all its records are indexed.
pub fn seal_key(segment: u64) -> [u8; 9] {
    let mut out = [b'm'; 9];
    out[1..].copy_from_slice(&segment.to_be_bytes());
    out
}

/// Index value under [`seal_key`]: the segment's length in bytes and its number of records.
pub fn seal_value(len: u64, records: u32) -> [u8; 13] {
    let mut out = [VERSION; 13];
    out[1..9].copy_from_slice(&len.to_le_bytes());
    out[9..].copy_from_slice(&records.to_le_bytes());
    out
}

/// Reads [`seal_value`].
pub fn parse_seal(value: &[u8]) -> Option<(u64, u32)> {
    let value: &[u8; 13] = value.try_into().ok()?;
    let len = u64::from_le_bytes(value[1..9].try_into().ok()?);
    let records = u32::from_le_bytes(value[9..].try_into().ok()?);
    (value[0] == VERSION).then_some((len, records))
}

fn record_check(segment: u64, offset: u64, head: &[u8]) -> [u8; 4] {
    check(&[&segment.to_le_bytes(), &offset.to_le_bytes(), head])
}

/// The first four bytes of the SHA-256 of `parts`.
pub fn check(parts: &[&[u8]]) -> [u8; 4] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part);
    }
    let hash = hash.finalize();
    [hash[0], hash[1], hash[2], hash[3]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// docs/cache.md has the same numbers; computed independently with Python's hashlib.
    #[test]
    fn the_format_is_pinned_by_golden_vectors() {
        let at = Location {
            segment: 7,
            offset: 32,
            len: 5,
        };
        let id = ChunkId([0x11; 32]);
        assert_eq!(hex(&segment_header(7)), GOLDEN_SEGMENT_HEADER);
        assert_eq!(hex(&record_header(at, &id)), GOLDEN_RECORD_HEADER);
        assert_eq!(
            hex(&location_value(at)),
            "010700000000000000200000000000000005000000"
        );
        assert_eq!(
            hex(&record_key(7, 32)),
            "7300000000000000070000000000000020"
        );
        assert_eq!(hex(&record_value(&id)), format!("01{}", "11".repeat(32)));
        assert_eq!(hex(&chunk_key(&id)), format!("63{}", "11".repeat(32)));
        assert_eq!(hex(&seal_key(7)), "6d0000000000000007");
        assert_eq!(hex(&seal_value(85, 1)), "01550000000000000001000000");
        assert_eq!(segment_name(7), "0000000000000007.seg");
    }
    const GOLDEN_SEGMENT_HEADER: &str =
        "4c5a494d4753454701000000070000000000000000000000000000006663014e";
    const GOLDEN_RECORD_HEADER: &str = "4c5a43520100000005000000111111111111111111111111111111111111111111111111111111111111111103ca17b7";

    #[test]
    fn names_that_are_not_segments_are_not_read_as_such() {
        assert_eq!(parse_segment_name("0000000000000007.seg"), Some(7));
        for name in [
            "7.seg",
            "000000000000000A.seg",
            "+000000000000007.seg",
            "0000000000000007.tmp",
            ".seg",
        ] {
            assert_eq!(parse_segment_name(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn a_header_reads_back_only_where_it_was_written(segment: u64, offset: u64, len in 1..=MAX_STORED_LEN as u32, id: [u8; 32], elsewhere: u64) {
            let at = Location { segment, offset, len };
            let header = record_header(at, &ChunkId(id));
            prop_assert_eq!(parse_record_header(segment, offset, &header), Some((ChunkId(id), at)));
            if elsewhere != offset {
                prop_assert_eq!(parse_record_header(segment, elsewhere, &header), None);
            }
            prop_assert!(segment == elsewhere || parse_record_header(elsewhere, offset, &header).is_none());
        }

        #[test]
        fn a_header_with_a_flipped_bit_is_none(bit in 0usize..RECORD_HEADER * 8, id: [u8; 32], len in 1u32..1000) {
            let mut header = record_header(Location { segment: 3, offset: 99, len }, &ChunkId(id));
            header[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(parse_record_header(3, 99, &header), None);
        }

        #[test]
        fn index_values_read_back_and_garbage_does_not_panic(garbage in prop::collection::vec(any::<u8>(), 0..40), segment: u64, records: u32, len in 1..=MAX_STORED_LEN as u32) {
            let _ = (parse_location(&garbage), parse_record_key(&garbage), parse_record_value(&garbage), parse_seal(&garbage));
            let at = Location { segment, offset: 32, len };
            prop_assert_eq!(parse_location(&location_value(at)), Some(at));
            prop_assert_eq!(parse_record_key(&record_key(segment, 5)), Some((segment, 5)));
            prop_assert_eq!(parse_seal(&seal_value(segment, records)), Some((segment, records)));
        }
    }
}
