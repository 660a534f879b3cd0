//! The promises of the host cache. `full_disk` mounts a filesystem and needs root.

mod bounds;
mod crash;
mod damage;
mod full_disk;
mod model;
mod upkeep;

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::*;
use crate::testing::noise;

/// Small segments, so that little data makes many.
fn small() -> CacheOptions {
    CacheOptions {
        segment_bytes: Some(2 << 20),
        min_free_bytes: Some(0),
        rest: Duration::from_millis(50),
        ..CacheOptions::new(MIN_CACHE_BYTES)
    }
}

/// A ciphertext and its id.
fn stored(seed: u64, len: usize) -> (ChunkId, Bytes) {
    let bytes = noise(seed, len);
    (ChunkId::of(&bytes), bytes.into())
}

/// Puts for certain: waits while the queue is full.
fn put(cache: &HostCache, id: &ChunkId, bytes: &Bytes) {
    if !cache.put(id, bytes.clone()) {
        cache.flush();
        assert!(cache.put(id, bytes.clone()), "{:?}", cache.stats());
    }
}

/// Gets the right bytes, or none: what fails its check is removed as readers do it.
fn get_checked(cache: &HostCache, id: &ChunkId) -> Option<Bytes> {
    let bytes = cache.get(id)?;
    if ChunkId::of(&bytes) == *id {
        return Some(bytes);
    }
    cache.remove(id);
    None
}

fn segment_files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(dir.join("segments"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    files.sort();
    files
}

/// Disk used by everything in `dir`, in bytes.
fn disk_usage(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::read_dir(dir)
        .unwrap()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            // RocksDB may delete a file while we look.
            let meta = entry.metadata().ok()?;
            Some(if meta.is_dir() {
                disk_usage(&entry.path())
            } else {
                meta.blocks() * 512
            })
        })
        .sum()
}

#[test]
fn whoever_closes_it_finds_it_closed() {
    let dir = tempfile::tempdir().unwrap();
    let cache = HostCache::open(dir.path(), CacheOptions::new(1 << 30)).unwrap();
    let (id, bytes) = stored(1, 1000);
    put(&cache, &id, &bytes);
    cache.flush();
    // Work that keeps the first one busy.
    for n in 2..70 {
        let (id, bytes) = stored(n, 100_000);
        put(&cache, &id, &bytes);
    }
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                cache.close();
                // A process may end now.
                assert!(cache.shared.index.read().is_none());
            });
        }
    });
    assert!(cache.get(&id).is_none() && !cache.put(&id, bytes.clone()));
}

#[test]
fn what_was_put_is_there_at_once_and_after_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let cache = HostCache::open(dir.path(), small()).unwrap();
    let chunks: Vec<_> = (0..50).map(|n| stored(n, 1000 * n as usize + 1)).collect();
    for (id, bytes) in &chunks {
        assert!(!cache.contains(id));
        put(&cache, id, bytes);
        assert!(cache.get(id).as_ref() == Some(bytes), "queued or written");
    }
    drop(cache);
    for _ in 0..3 {
        let cache = HostCache::open(dir.path(), small()).unwrap();
        for (id, bytes) in &chunks {
            assert!(cache.get(id).as_ref() == Some(bytes));
        }
        assert_eq!(cache.stats().index_rebuilds, 0);
        assert_eq!(
            segment_files(dir.path()).len(),
            1,
            "the last one is continued"
        );
    }
}

#[test]
fn what_is_removed_is_gone_and_can_be_put_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = HostCache::open(dir.path(), small()).unwrap();
    let (id, bytes) = stored(1, 5000);
    put(&cache, &id, &bytes);
    cache.flush();
    assert!(cache.remove(&id));
    assert!(!cache.remove(&id));
    assert_eq!(cache.get(&id), None);
    put(&cache, &id, &bytes);
    cache.flush();
    assert!(cache.get(&id) == Some(bytes));
}

#[test]
fn a_chunk_put_twice_is_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let cache = HostCache::open(dir.path(), small()).unwrap();
    let (id, bytes) = stored(1, 5000);
    for _ in 0..3 {
        put(&cache, &id, &bytes);
        cache.flush();
    }
    assert_eq!(cache.stats().written, 1);
}

#[test]
fn lengths_beyond_the_format_are_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let cache = HostCache::open(dir.path(), small()).unwrap();
    for len in [0, lazyimg_convergent::MAX_STORED_LEN + 1] {
        let (id, bytes) = stored(1, len);
        assert!(!cache.put(&id, bytes));
    }
    let (id, bytes) = stored(2, lazyimg_convergent::MAX_STORED_LEN);
    put(&cache, &id, &bytes);
    cache.flush();
    assert!(cache.get(&id) == Some(bytes));
}

#[test]
fn a_full_queue_drops_the_caching_and_never_blocks_the_reader() {
    let dir = tempfile::tempdir().unwrap();
    let cache = HostCache::open(dir.path(), small()).unwrap();
    let hold = cache.shared.index.write();
    let begun = Instant::now();
    let taken = (0..40)
        .filter(|n| {
            let (id, bytes) = stored(*n, 1_000_000);
            cache.put(&id, bytes)
        })
        .count();
    assert_eq!(taken, 8, "8 MiB wait, no more");
    drop(hold);
    assert!(begun.elapsed() < Duration::from_secs(5));
    cache.flush();
    assert_eq!(cache.stats().dropped, 32);
    assert_eq!(cache.stats().written, 8);
}

#[test]
fn a_cache_too_small_to_be_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        HostCache::open(dir.path(), CacheOptions::new(1000)),
        Err(CacheError::TooSmall { .. })
    ));
}

#[test]
fn a_closed_cache_keeps_nothing_more_and_has_written_what_was_queued() {
    let dir = tempfile::tempdir().unwrap();
    let cache = HostCache::open(dir.path(), small()).unwrap();
    let (id, bytes) = stored(1, 5000);
    put(&cache, &id, &bytes);
    cache.close();
    cache.close();
    let (later, more) = stored(2, 5000);
    assert!(!cache.put(&later, more));
    assert!(!cache.contains(&later));
    assert!(cache.get(&id).is_none(), "the index is closed");
    // Another may have the directory although the first still exists.
    let again = HostCache::open(dir.path(), small()).unwrap();
    assert_eq!(again.get(&id), Some(bytes));
}

#[test]
fn chunks_put_while_a_new_cache_makes_its_index_are_there_at_once_and_stay() {
    for round in 0..5 {
        let dir = tempfile::tempdir().unwrap();
        let cache = HostCache::open(dir.path(), small()).unwrap();
        let chunks: Vec<_> = (0..20).map(|n| stored(100 * round + n, 20_000)).collect();
        for (id, bytes) in &chunks {
            assert!(cache.put(id, bytes.clone()));
            assert_eq!(cache.get(id).as_ref(), Some(bytes));
        }
        drop(cache);
        let cache = HostCache::open(dir.path(), small()).unwrap();
        for (id, bytes) in &chunks {
            assert_eq!(cache.get(id).as_ref(), Some(bytes));
        }
    }
}
