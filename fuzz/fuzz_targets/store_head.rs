//! Requests for one chunk: what is taken for one is one, whole, and the same however it arrives.
#![no_main]

// Compiled in alone: the store is not needed for it.
#[allow(dead_code)]
#[path = "../../chunkstore/service/src/direct/head.rs"]
mod head;

use head::Read;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| match head::read(data) {
    Read::Chunk(wanted, len) => {
        let taken = &data[..len];
        let begin = format!("GET {} HTTP/1.1", wanted.path());
        assert!(taken.starts_with(begin.as_bytes()) && taken.ends_with(b"\n"));
        for body in ["content-length", "transfer-encoding"] {
            assert!(!wanted.headers.contains_key(body));
        }
        // Without what follows it is the same, and without its last byte not there yet.
        match head::read(taken) {
            Read::Chunk(again, same) => assert_eq!((again, same), (wanted, len)),
            other => panic!("{other:?}"),
        }
        assert!(matches!(head::read(&taken[..len - 1]), Read::Partial));
    }
    Read::Partial => {
        assert!(data.len() < head::MAX_HEAD);
        // No part of it was of another request.
        assert!(matches!(head::read(&data[..data.len() / 2]), Read::Partial));
    }
    Read::Other => {}
});
