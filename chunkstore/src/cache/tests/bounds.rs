//! Bytes, recency, and who else has the directory.

use super::*;

#[test]
fn the_disk_used_stays_below_the_bound() {
    let dir = tempfile::tempdir().unwrap();
    let options = CacheOptions {
        max_bytes: 24 << 20,
        ..small()
    };
    let cache = HostCache::open(dir.path(), options).unwrap();
    // From tiny to large records: the index's share differs.
    for (round, len) in [300, 30_000, 700_000, 300].into_iter().enumerate() {
        for n in 0..(40 << 20) / (len as u64 + 1000) {
            let (id, bytes) = stored(n << 8 | round as u64, len);
            put(&cache, &id, &bytes);
            if n % 500 == 0 {
                cache.flush();
                let used = cache.stats().used_bytes;
                assert!(used <= 24 << 20, "{used}");
            }
        }
        cache.flush();
        let (told, real) = (cache.stats().used_bytes, disk_usage(dir.path()));
        assert!(real <= 24 << 20, "{len}: told {told}, really {real}");
        assert!(told > 12 << 20, "{len}: it uses what it may: {told}");
    }
    assert!(cache.stats().evicted_segments > 10);
}

#[test]
fn tiny_chunks_that_come_and_go_stay_below_the_bound_with_their_index() {
    let dir = tempfile::tempdir().unwrap();
    let cache = HostCache::open(dir.path(), CacheOptions::new(24 << 20)).unwrap();
    let body = Bytes::from(vec![7; 300]);
    for n in 0..250_000u64 {
        put(&cache, &ChunkId::of(&n.to_le_bytes()), &body);
        if n % 10_000 == 0 {
            cache.flush();
            let real = disk_usage(dir.path());
            assert!(real <= 24 << 20, "{real} after {n}");
        }
    }
}

#[test]
fn a_smaller_bound_holds_from_the_next_open_on() {
    let dir = tempfile::tempdir().unwrap();
    let big = CacheOptions {
        max_bytes: 64 << 20,
        ..small()
    };
    let cache = HostCache::open(dir.path(), big).unwrap();
    let chunks: Vec<_> = (0..100).map(|n| stored(n, 500_000)).collect();
    for (id, bytes) in &chunks {
        put(&cache, id, bytes);
    }
    drop(cache);
    let cache = HostCache::open(dir.path(), small()).unwrap();
    assert!(cache.stats().used_bytes <= MIN_CACHE_BYTES);
    cache.flush();
    let kept = chunks.iter().filter(|(id, _)| cache.contains(id)).count();
    assert!((10..30).contains(&kept), "{kept}");
    assert!(cache.contains(&chunks[99].0), "the youngest stay");
}

#[test]
fn what_is_read_again_survives_a_pass_over_many_new_chunks() {
    let dir = tempfile::tempdir().unwrap();
    let cache = HostCache::open(dir.path(), small()).unwrap();
    let hot: Vec<_> = (0..6).map(|n| stored(n, 500_000)).collect();
    for (id, bytes) in &hot {
        put(&cache, id, bytes);
    }
    cache.flush();
    for (id, _) in &hot {
        assert!(cache.get(id).is_some());
    }
    // Five times what fits, and nobody reads the hot ones meanwhile.
    for n in 100..220 {
        let (id, bytes) = stored(n, 500_000);
        put(&cache, &id, &bytes);
    }
    cache.flush();
    let kept = hot.iter().filter(|(id, _)| cache.contains(id)).count();
    assert_eq!(kept, 6);
    let (last, _) = stored(219, 500_000);
    assert!(cache.contains(&last), "and the new ones have a place too");
}

#[test]
fn the_order_of_use_survives_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let options = CacheOptions {
        max_bytes: 32 << 20,
        ..small()
    };
    let cache = HostCache::open(dir.path(), options.clone()).unwrap();
    let chunks: Vec<_> = (0..30).map(|n| stored(n, 500_000)).collect();
    for (id, bytes) in &chunks {
        put(&cache, id, bytes);
    }
    cache.flush();
    cache.get(&chunks[0].0).unwrap();
    drop(cache);
    let cache = HostCache::open(dir.path(), small()).unwrap();
    cache.flush();
    assert!(cache.contains(&chunks[0].0), "read last, so kept");
    assert!(!cache.contains(&chunks[6].0), "older, so gone");
}

#[test]
fn open_files_stay_few() {
    let dir = tempfile::tempdir().unwrap();
    let options = CacheOptions {
        max_bytes: 600 << 20,
        ..small()
    };
    let cache = HostCache::open(dir.path(), options).unwrap();
    let chunks: Vec<_> = (0..500).map(|n| stored(n, 1_000_000)).collect();
    for (id, bytes) in &chunks {
        put(&cache, id, bytes);
    }
    cache.flush();
    assert!(cache.stats().segments > 200);
    for (id, bytes) in &chunks {
        assert!(cache.get(id).as_ref() == Some(bytes));
    }
    let ours = dir.path().join("segments");
    let open = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
        .filter(|path| path.starts_with(&ours))
        .count();
    assert!((1..=129).contains(&open), "{open}");
}

#[test]
fn another_process_is_refused_and_learns_our_pid() {
    let dir = tempfile::tempdir().unwrap();
    let cache = HostCache::open(dir.path(), small()).unwrap();
    let told = crash::child("open", dir.path(), &[]).output().unwrap();
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(
        told.contains(&format!("LOCKED by {}", std::process::id())),
        "{told}"
    );
    drop(cache);
    let told = crash::child("open", dir.path(), &[]).output().unwrap();
    assert!(String::from_utf8_lossy(&told.stdout).contains("OPENED"));
}
