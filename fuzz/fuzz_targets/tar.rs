//! The tar reader: whatever the bytes, it ends, in bounds, and bodies stay within their sizes.
#![no_main]

use std::convert::Infallible;

use lazyimg_fuzz::limits;
use lazyimg_image::tar::{EntryKind, Reader};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut reader = Reader::new(data, &limits());
    while let Ok(Some(entry)) = reader.next_entry() {
        let EntryKind::File(size) = entry.kind else {
            continue;
        };
        let mut end = 0;
        let body = reader.body(|offset, bytes| {
            assert!(offset >= end, "slices overlap");
            end = offset + bytes.len() as u64;
            assert!(end <= size, "a body beyond its size");
            Ok::<(), Infallible>(())
        });
        if body.is_err() {
            return;
        }
    }
    assert!(
        matches!(reader.next_entry(), Ok(None)),
        "after the end comes nothing"
    );
});
