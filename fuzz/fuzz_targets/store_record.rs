//! The store's records and index entries: what is read is what was written, and nothing else is.
#![no_main]

// Compiled in alone: the store is not needed for it.
#[allow(dead_code)]
#[path = "../../chunkstore/service/src/engine/embedded/record.rs"]
mod record;

use libfuzzer_sys::fuzz_target;
use record::{RECORD_HEADER, SEGMENT_HEADER, SegmentId};

fuzz_target!(|data: &[u8]| {
    let Some((place, rest)) = data.split_first_chunk::<16>() else {
        return;
    };
    let number =
        |i: usize| u32::from_le_bytes([place[i], place[i + 1], place[i + 2], place[i + 3]]);
    let at = SegmentId {
        root: number(0),
        number: number(4),
    };
    let offset = u64::from(number(8)) | u64::from(number(12)) << 32;
    let header = record::parse_record_header(at, offset, rest);
    if let Some(record) = &header {
        let written = record::record_header(at, offset, record);
        assert_eq!(written[..], rest[..RECORD_HEADER]);
    }
    if let Some((record, body)) = record::parse_record(at, offset, rest) {
        assert_eq!(Some(record), header);
        assert_eq!(body.len(), record.len as usize);
        assert_eq!(crc32c::crc32c(body), record.body_crc);
    }
    match record::find_record(at, offset, rest) {
        Some((there, found)) => {
            let skip = usize::try_from(there - offset).expect("it lies in the input");
            assert_eq!(
                record::parse_record_header(at, there, &rest[skip..]),
                Some(found)
            );
            assert!(header.is_none() || header == Some(found));
        }
        None => assert_eq!(header, None),
    }
    if let Some(header) = rest.first_chunk::<{ SEGMENT_HEADER as usize }>() {
        let _ = record::segment_header(at) == *header;
    }
    if let Some(at) = record::parse_location(rest) {
        assert!(at.end().is_some());
        assert_eq!(record::location_value(at), rest);
    }
    if let Some((root, id)) = record::parse_chunk_key(rest) {
        assert_eq!(record::chunk_key(root, &id), rest);
    }
    if let Some(segment) = record::parse_tail_key(rest) {
        assert_eq!(record::tail_key(segment), rest);
    }
    if let Some(end) = record::parse_tail(rest) {
        assert_eq!(record::tail_value(end), rest);
    }
    if let Ok(name) = std::str::from_utf8(rest)
        && let Some(number) = record::parse_segment_name(name)
    {
        assert_eq!(record::segment_name(number), name);
    }
});
