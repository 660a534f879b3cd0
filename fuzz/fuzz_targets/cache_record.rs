//! The host cache's records and index entries: what is read is what was written, and nothing else is.
#![no_main]

// Private to the cache; compiled in rather than made public for one target.
#[allow(dead_code)]
#[path = "../../chunkstore/src/cache/record.rs"]
mod record;

use libfuzzer_sys::fuzz_target;
use record::{RECORD_HEADER, SEGMENT_HEADER};

fuzz_target!(|data: &[u8]| {
    let Some((place, rest)) = data.split_first_chunk::<16>() else {
        return;
    };
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
    let (segment, offset) = (number(&place[..8]), number(&place[8..]));
    if let Some(header) = rest.first_chunk::<RECORD_HEADER>()
        && let Some((id, at)) = record::parse_record_header(segment, offset, header)
    {
        assert_eq!((at.segment, at.offset), (segment, offset));
        assert_eq!(&record::record_header(at, &id), header);
        let _ = at.end();
    }
    if let Some(header) = rest.first_chunk::<{ SEGMENT_HEADER as usize }>()
        && record::is_segment_header(header, segment)
    {
        assert_eq!(&record::segment_header(segment), header);
    }
    if let Some(at) = record::parse_location(rest) {
        assert_eq!(record::location_value(at), rest);
    }
    if let Some((segment, offset)) = record::parse_record_key(rest) {
        assert_eq!(record::record_key(segment, offset), rest);
    }
    if let Some(id) = record::parse_record_value(rest) {
        assert_eq!(record::record_value(&id), rest);
    }
    if let Some((len, records)) = record::parse_seal(rest) {
        assert_eq!(record::seal_value(len, records), rest);
    }
    if let Ok(name) = std::str::from_utf8(rest)
        && let Some(number) = record::parse_segment_name(name)
    {
        assert_eq!(record::segment_name(number), name);
    }
});
