//! Reading all of the cache, to find what went bad before a reader does.

use lazyimg_convergent::ChunkId;
use serde::{Deserialize, Serialize};

use super::{CopyAt, HostCache};
use crate::cache::segments::Found;

/// What [`HostCache::scrub`] found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrubbed {
    /// Chunks that were read and are what their ids say.
    pub good: u64,
    /// Their ciphertext, in bytes.
    pub good_bytes: u64,
    /// Chunks that were not, or could not be read; the cache has forgotten them.
    pub bad: u64,
}

impl HostCache {
    /// Reads every chunk, compares it with its id, and forgets those that are bad. `progress` hears
    /// bytes read and bytes in all, and ends it by returning false. Readers and the writer go on
    /// meanwhile; what is evicted under it is passed over.
    pub fn scrub(&self, progress: &mut dyn FnMut(u64, u64) -> bool) -> Scrubbed {
        self.flush();
        let scrubbed = self.read_all(progress);
        if scrubbed.bad > 0 {
            // The records of an open segment are noted again at the next opening, bad ones too.
            self.seal();
        }
        scrubbed
    }

    fn read_all(&self, progress: &mut dyn FnMut(u64, u64) -> bool) -> Scrubbed {
        let mut scrubbed = Scrubbed::default();
        let segments = self.shared.segments.all();
        let total = segments.iter().map(|s| s.len()).sum();
        let mut before = 0;
        for segment in segments {
            let mut records = Vec::new();
            let scanned = self
                .shared
                .segments
                .scan(segment.number, |id, at| records.push((id, at)));
            if let Err(e) = scanned {
                tracing::warn!(segment = segment.number, error = %e, "a segment cannot be read to its end");
            }
            for (id, at) in records {
                // A chunk's older copies are dead: nobody reads them.
                if self.locate(&id) != Some(at) {
                    continue;
                }
                match self.shared.segments.peek(&id, at) {
                    Found::Bytes(bytes) if ChunkId::of(&bytes) == id => {
                        scrubbed.good += 1;
                        scrubbed.good_bytes += bytes.len() as u64;
                    }
                    Found::Gone => {}
                    Found::Bytes(_) | Found::Bad => {
                        if self.forget(&id, CopyAt(at)) {
                            scrubbed.bad += 1;
                        }
                    }
                }
                if !progress(before + at.offset, total) {
                    return scrubbed;
                }
            }
            before += segment.len();
        }
        progress(total, total);
        scrubbed
    }
}
