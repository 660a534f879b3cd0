//! Decoded chunks in memory, least recently used out first.

use bytes::Bytes;
use lazyimg_convergent::{ChunkId, ChunkKey};
use lru::LruCache;
use parking_lot::Mutex;

use crate::ChunkSpec;

/// What an entry costs beside its plaintext, in bytes: key, id, links, allocator.
const ENTRY_OVERHEAD: usize = 256;

/// An LRU of plaintexts, bounded in bytes, shared by all mounts of a process.
///
/// A hit needs the chunk's key, not only its id: ids stand in clear in chunk tables, and a tenant
/// who forges a manifest with another tenant's ids must get nothing here that it could not decrypt.
pub struct HotCache {
    max_bytes: usize,
    inner: Mutex<Inner>,
}

struct Inner {
    entries: LruCache<ChunkId, Entry>,
    bytes: usize,
}

struct Entry {
    key: ChunkKey,
    plain: Bytes,
}

impl HotCache {
    /// A cache of at most `max_bytes` (plaintext and overhead); 0 keeps nothing.
    pub fn new(max_bytes: usize) -> Self {
        Self {
            max_bytes,
            inner: Mutex::new(Inner {
                entries: LruCache::unbounded(),
                bytes: 0,
            }),
        }
    }

    /// The plaintext, if it is here and was made with the same key and length.
    pub fn get(&self, spec: &ChunkSpec) -> Option<Bytes> {
        if self.max_bytes == 0 {
            return None;
        }
        let mut inner = self.inner.lock();
        let entry = inner.entries.get(spec.id())?;
        (entry.plain.len() == spec.plain_len as usize && entry.key == spec.key)
            .then(|| entry.plain.clone())
    }

    /// Keeps a plaintext that has passed its GCM check under `spec`'s key.
    pub fn put(&self, spec: &ChunkSpec, plain: Bytes) {
        let cost = plain.len() + ENTRY_OVERHEAD;
        if cost > self.max_bytes {
            return;
        }
        // Dropped after the lock: freeing half a megabyte may unmap it.
        let mut out = Vec::new();
        let mut inner = self.inner.lock();
        let entry = Entry {
            key: spec.key.clone(),
            plain,
        };
        inner.bytes += cost;
        if let Some(old) = inner.entries.put(*spec.id(), entry) {
            inner.bytes -= old.plain.len() + ENTRY_OVERHEAD;
            out.push(old);
        }
        while inner.bytes > self.max_bytes
            && let Some((_, old)) = inner.entries.pop_lru()
        {
            inner.bytes -= old.plain.len() + ENTRY_OVERHEAD;
            out.push(old);
        }
        drop(inner);
    }

    /// What is held now, in bytes, overhead included; at most `max_bytes` of [`HotCache::new`].
    pub fn bytes(&self) -> usize {
        self.inner.lock().bytes
    }

    /// Whether it keeps anything at all.
    pub(crate) fn is_enabled(&self) -> bool {
        self.max_bytes > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lazyimg_convergent::Digest;

    fn spec(n: u8, plain_len: usize) -> ChunkSpec {
        ChunkSpec {
            chunk: crate::ChunkRef {
                id: ChunkId([n; 32]),
                stored_len: plain_len as u32 + 17,
                at: Some(crate::PackRange {
                    pack: Digest::default(),
                    offset: 0,
                }),
            },
            key: ChunkKey::from_bytes([n; 32]),
            plain_len: plain_len as u32,
        }
    }

    #[test]
    fn it_never_holds_more_than_its_bound() {
        let hot = HotCache::new(10_000);
        for round in 0..1_000u32 {
            let len = (round as usize * 37) % 3_000 + 1;
            hot.put(&spec(round as u8, len), vec![0; len].into());
            assert!(hot.bytes() <= 10_000);
        }
        assert!(hot.bytes() > 5_000, "and uses it");
    }

    #[test]
    fn what_was_used_last_stays_longest() {
        let hot = HotCache::new(3 * (1000 + ENTRY_OVERHEAD));
        for n in 0..3 {
            hot.put(&spec(n, 1000), vec![n; 1000].into());
        }
        assert!(hot.get(&spec(0, 1000)).is_some());
        hot.put(&spec(3, 1000), vec![3; 1000].into());
        assert!(hot.get(&spec(0, 1000)).is_some());
        assert!(hot.get(&spec(1, 1000)).is_none());
    }

    #[test]
    fn an_id_without_its_key_hits_nothing() {
        let hot = HotCache::new(10_000);
        hot.put(&spec(1, 100), vec![1; 100].into());
        let mut forged = spec(1, 100);
        forged.key = ChunkKey::from_bytes([2; 32]);
        assert!(hot.get(&forged).is_none());
        let mut shorter = spec(1, 100);
        shorter.plain_len = 99;
        assert!(hot.get(&shorter).is_none());
    }

    #[test]
    fn a_cache_of_no_bytes_keeps_nothing() {
        let hot = HotCache::new(0);
        hot.put(&spec(1, 100), vec![1; 100].into());
        assert!(hot.get(&spec(1, 100)).is_none());
        assert_eq!(hot.bytes(), 0);
    }
}
