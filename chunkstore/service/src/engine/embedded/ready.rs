//! Chunks that need no thread and no copy to be sent: their record was checked since the store began, its
//! file is open, and all of it is in the page cache.
//!
//! What this process has read and found intact is remembered by its place, up to a bound. Bytes that rot
//! on the disk after that are found by who asked for them, since a chunk's name is its hash, and by the
//! repair that they ask for, which reads it all anew.

use std::fs::File;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use lazyimg_convergent::ChunkId;
use lru::LruCache;
use parking_lot::Mutex;

use super::record::{Location, RECORD_HEADER};
use crate::engine::part::{Cached, FilePart, is_cached};

/// Places that are remembered, about 100 bytes each: 32 GiB of the usual chunks.
const MOST: NonZeroUsize = NonZeroUsize::new(1 << 16).expect("not zero");

type Key = (u32, ChunkId);

/// What was read and found intact.
pub struct Ready {
    known: Arc<Known>,
    /// The kernel can't tell what is in the page cache (before Linux 6.5, or it may not be asked).
    blind: AtomicBool,
}

struct Known {
    inner: Mutex<Inner>,
}

struct Inner {
    places: LruCache<Key, Location>,
    /// How often something was replaced or removed.
    changes: u64,
}

/// When a read began: see [`Ready::intact`].
#[derive(Clone, Copy)]
pub struct Before(u64);

impl Default for Ready {
    fn default() -> Self {
        Self {
            known: Arc::new(Known {
                inner: Mutex::new(Inner {
                    places: LruCache::new(MOST),
                    changes: 0,
                }),
            }),
            blind: AtomicBool::new(false),
        }
    }
}

impl Ready {
    /// To be asked before the index is.
    pub fn before(&self) -> Before {
        Before(self.known.inner.lock().changes)
    }

    /// The record there was read and is intact. Not noted if something was replaced meanwhile: the place
    /// may be an old one.
    pub fn intact(&self, before: Before, root: u32, id: &ChunkId, at: Location) {
        let mut inner = self.known.inner.lock();
        if inner.changes == before.0 {
            inner.places.put((root, *id), at);
        }
    }

    /// The chunk lies elsewhere now, or may.
    pub fn replaced(&self, root: u32, id: &ChunkId) {
        self.known.forget(&(root, *id));
    }

    /// A root is gone.
    pub fn removed(&self, root: u32) {
        let mut inner = self.known.inner.lock();
        inner.changes += 1;
        let of_root = |key: &&Key| key.0 == root;
        let gone: Vec<Key> = inner
            .places
            .iter()
            .map(|(key, _)| key)
            .filter(of_root)
            .copied()
            .collect();
        for key in gone {
            inner.places.pop(&key);
        }
    }

    /// Where an intact record is, if there is any use in knowing.
    pub fn place(&self, root: u32, id: &ChunkId) -> Option<Location> {
        match self.blind.load(Relaxed) {
            true => None,
            false => self.known.inner.lock().places.get(&(root, *id)).copied(),
        }
    }

    /// The chunk at `at` of `file`, if it can be sent without waiting for the disk.
    pub fn part(&self, root: u32, id: &ChunkId, file: Arc<File>, at: Location) -> Option<FilePart> {
        let offset = at.offset + RECORD_HEADER as u64;
        match is_cached(&file, offset, at.len.into()) {
            Cached::Yes => {}
            Cached::No => return None,
            Cached::Unknown => {
                if !self.blind.swap(true, Relaxed) {
                    tracing::info!(
                        "this kernel does not tell what is in the page cache: every chunk is read by a thread"
                    );
                }
                return None;
            }
        }
        let (known, key) = (Arc::downgrade(&self.known), (root, *id));
        let doubt = move || {
            if let Some(known) = known.upgrade() {
                known.forget(&key);
            }
        };
        Some(FilePart::new(file, offset, at.len, doubt))
    }
}

impl Known {
    fn forget(&self, key: &Key) {
        let mut inner = self.inner.lock();
        inner.changes += 1;
        inner.places.pop(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn at(offset: u64, len: u32) -> Location {
        Location {
            segment: 1,
            offset,
            len,
        }
    }

    #[test]
    fn a_place_that_was_read_before_a_replacement_is_not_remembered_after_it() {
        let ready = Ready::default();
        let id = ChunkId([1; 32]);
        let before = ready.before();
        ready.replaced(7, &id);
        ready.intact(before, 7, &id, at(0, 9));
        assert_eq!(ready.place(7, &id), None);
        ready.intact(ready.before(), 7, &id, at(64, 9));
        assert_eq!(ready.place(7, &id), Some(at(64, 9)));
        assert_eq!(ready.place(8, &id), None);
        ready.removed(8);
        assert!(ready.place(7, &id).is_some());
        ready.removed(7);
        assert_eq!(ready.place(7, &id), None);
    }

    #[test]
    fn what_was_just_written_is_in_the_page_cache_and_a_hole_is_not() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 100_000]).unwrap();
        file.set_len(10 << 20).unwrap();
        let ready = Ready::default();
        let id = ChunkId([1; 32]);
        let file = Arc::new(file);
        let near = ready.part(7, &id, Arc::clone(&file), at(1000, 50_000));
        // A kernel that can't tell is no failure of this program.
        if ready.blind.load(Relaxed) {
            assert!(near.is_none());
            return;
        }
        assert!(near.is_some());
        assert!(
            ready
                .part(7, &id, Arc::clone(&file), at(5 << 20, 50_000))
                .is_none()
        );
    }

    #[test]
    fn a_part_that_could_not_be_sent_is_looked_at_anew() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 10_000]).unwrap();
        let ready = Ready::default();
        let id = ChunkId([1; 32]);
        ready.intact(ready.before(), 7, &id, at(0, 5000));
        if let Some(part) = ready.part(7, &id, Arc::new(file), at(0, 5000)) {
            part.doubt();
            assert_eq!(ready.place(7, &id), None);
        }
    }
}
