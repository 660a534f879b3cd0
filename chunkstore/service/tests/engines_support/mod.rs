//! What the tests of the engines share.
#![allow(dead_code, clippy::unwrap_used)] // Not every test file uses all of it; these are tests.

pub mod conformance;
pub mod servers;

use std::time::{Duration, Instant};

use bytes::Bytes;
use lazyimg_convergent::ChunkId;
use lazyimg_store::engine::RootId;

/// Root `n`.
pub fn root(n: u32) -> RootId {
    RootId(n.try_into().expect("a root's number is not 0"))
}

/// Bytes that look random and are the same for the same seed.
pub fn bytes(seed: u64, len: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out.into()
}

/// A chunk and its id.
pub fn chunk(seed: u64, len: usize) -> (ChunkId, Bytes) {
    let bytes = bytes(seed, len);
    (ChunkId::of(&bytes), bytes)
}

/// Waits until `condition` holds.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
