//! The bytes on disk against `docs/store-engine.md`, and against damage.

use lazyimg_convergent::{ChunkId, MAX_STORED_LEN};
use proptest::prelude::*;

use super::dir::{FORMAT, version_text};
use super::record::*;

const DOCUMENT: &str = include_str!("../../../../../docs/store-engine.md");

/// The golden vector `name` of `docs/store-engine.md`: the words behind the name in a `golden` block.
fn golden(name: &str) -> String {
    let mut fenced = false;
    for line in DOCUMENT.lines() {
        if line.starts_with("```") {
            fenced = line == "```golden";
        } else if fenced
            && let Some((first, rest)) = line.split_once(' ')
            && first == name
        {
            return rest.split_ascii_whitespace().collect();
        }
    }
    panic!("docs/store-engine.md has no golden vector {name}")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

const AT: SegmentId = SegmentId { root: 3, number: 7 };

fn record(len: u32, body_crc: u32) -> Record {
    Record {
        id: ChunkId([0x11; 32]),
        len,
        body_crc,
    }
}

#[test]
fn the_format_is_pinned_by_golden_vectors() {
    assert_eq!(hex(&segment_header(AT)), golden("segment-header"));
    let body = b"hello";
    let header = record_header(AT, 32, &record(5, crc32c::crc32c(body)));
    assert_eq!(
        hex(&[&header[..], body].concat()),
        golden("record-hello-at-32")
    );
    let at = Location {
        segment: 7,
        offset: 32,
        len: 5,
    };
    assert_eq!(
        hex(&chunk_key(3, &ChunkId([0x11; 32]))),
        golden("chunk-key")
    );
    assert_eq!(hex(&location_value(at)), golden("chunk-value"));
    assert_eq!(hex(&tail_key(AT)), golden("tail-key"));
    assert_eq!(hex(&tail_value(89)), golden("tail-value"));
    assert_eq!(segment_name(7), golden("segment-name"));
    assert_eq!(
        version_text(FORMAT).trim_end().replace(' ', "_"),
        golden("version-with-underscores")
    );
}

#[test]
fn names_that_are_not_segments_are_not_read_as_such() {
    assert_eq!(parse_segment_name("000007.seg"), Some(7));
    assert_eq!(parse_segment_name("1000007.seg"), Some(1_000_007));
    for name in [
        "7.seg",
        "0000007.seg",
        "000000.seg",
        "+00007.seg",
        "000007.tmp",
        ".seg",
    ] {
        assert_eq!(parse_segment_name(name), None, "{name}");
    }
}

proptest! {
    #[test]
    fn a_record_reads_back_only_where_it_was_written(root: u32, number: u32, offset: u64, id: [u8; 32], body in prop::collection::vec(any::<u8>(), 1..300), elsewhere: u64) {
        let at = SegmentId { root, number };
        let record = Record { id: ChunkId(id), len: body.len() as u32, body_crc: crc32c::crc32c(&body) };
        let bytes = [&record_header(at, offset, &record)[..], &body].concat();
        prop_assert_eq!(parse_record(at, offset, &bytes), Some((record, &body[..])));
        prop_assert!(elsewhere == offset || parse_record(at, elsewhere, &bytes).is_none());
        let other = SegmentId { root: root.wrapping_add(1), number };
        prop_assert_eq!(parse_record(other, offset, &bytes), None);
        let other = SegmentId { root, number: number.wrapping_add(1) };
        prop_assert_eq!(parse_record(other, offset, &bytes), None);
        prop_assert_eq!(parse_record(at, offset, &bytes[..bytes.len() - 1]), None);
    }

    #[test]
    fn a_record_with_a_flipped_bit_is_none(bit in 0usize..(RECORD_HEADER + 20) * 8, id: [u8; 32], body: [u8; 20]) {
        let record = Record { id: ChunkId(id), len: 20, body_crc: crc32c::crc32c(&body) };
        let mut bytes = [&record_header(AT, 99, &record)[..], &body].concat();
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert_eq!(parse_record(AT, 99, &bytes), None);
    }

    #[test]
    fn a_header_is_found_behind_any_garbage(garbage in prop::collection::vec(any::<u8>(), 0..300), offset in 0u64..1 << 40) {
        let there = offset + garbage.len() as u64;
        let bytes = [&garbage[..], &record_header(AT, there, &record(9, 1)), b"behind"].concat();
        prop_assert_eq!(find_record(AT, offset, &bytes), Some((there, record(9, 1))));
        prop_assert_eq!(find_record(AT, offset + 1, &bytes), None);
    }

    #[test]
    fn index_entries_read_back_and_garbage_does_not_panic(garbage in prop::collection::vec(any::<u8>(), 0..60), root: u32, number: u32, end: u64, id: [u8; 32], len in 1..=MAX_STORED_LEN as u32) {
        let _ = (parse_location(&garbage), parse_chunk_key(&garbage), parse_tail_key(&garbage), parse_tail(&garbage));
        let _ = (parse_record(AT, 5, &garbage), find_record(AT, u64::MAX, &garbage));
        let at = Location { segment: number, offset: 32, len };
        let segment = SegmentId { root, number };
        prop_assert_eq!(parse_location(&location_value(at)), Some(at));
        prop_assert_eq!(parse_chunk_key(&chunk_key(root, &ChunkId(id))), Some((root, ChunkId(id))));
        prop_assert_eq!(parse_tail_key(&tail_key(segment)), Some(segment));
        prop_assert_eq!(parse_tail(&tail_value(end)), Some(end));
    }
}
