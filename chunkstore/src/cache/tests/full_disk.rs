//! A filesystem without room, or read-only. Mounts small filesystems: needs root.

use std::fs;
use std::process::Command;

use super::*;

/// A small tmpfs, unmounted when dropped.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    fn new(bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={bytes},mode=0700");
        run(
            "mount",
            &["-t", "tmpfs", "-o", &options, "chunkstore-full-disk"],
            dir.path(),
        );
        Self { dir }
    }

    fn remount(&self, option: &str) {
        run(
            "mount",
            &["-o", &format!("remount,{option}")],
            self.dir.path(),
        );
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    /// Takes all room that is left; the file that holds it.
    fn fill(&self) -> PathBuf {
        let path = self.dir.path().join("ballast");
        let mut file = fs::File::create(&path).unwrap();
        while std::io::Write::write_all(&mut file, &[1; 65_536]).is_ok() {}
        while std::io::Write::write_all(&mut file, &[1; 512]).is_ok() {}
        path
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.dir.path()).status();
    }
}

fn run(program: &str, args: &[&str], last: &Path) {
    let status = Command::new(program).args(args).arg(last).status();
    assert!(
        status.is_ok_and(|s| s.success()),
        "{program} {args:?} failed: this test needs root"
    );
}

/// Puts chunks until one is cached again.
fn caches_again(cache: &HostCache, first: u64) {
    let begun = Instant::now();
    for n in first.. {
        let (id, bytes) = stored(n, 100_000);
        cache.put(&id, bytes.clone());
        cache.flush();
        if cache.get(&id).is_some() {
            return;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{:?}",
            cache.stats()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_disk_that_others_fill_ends_the_caching_and_not_the_reads() {
    let disk = Disk::new(40 << 20);
    let cache = HostCache::open(&disk.path(), small()).unwrap();
    let chunks: Vec<_> = (0..60).map(|n| stored(n, 100_000)).collect();
    for (id, bytes) in &chunks {
        put(&cache, id, bytes);
    }
    cache.flush();
    let ballast = disk.fill();
    for n in 100..400 {
        let (id, bytes) = stored(n, 100_000);
        cache.put(&id, bytes);
        if n % 20 == 0 {
            cache.flush();
        }
    }
    cache.flush();
    // It gave way where that helped; whatever it still says it has is right.
    for n in (0..60).chain(100..400) {
        let (id, bytes) = stored(n, 100_000);
        assert!(cache.get(&id).is_none_or(|got| got == bytes));
    }
    fs::remove_file(ballast).unwrap();
    caches_again(&cache, 1000);
    assert_eq!(cache.stats().resting, None);
}

#[test]
fn a_filesystem_smaller_than_the_bound_is_no_trouble() {
    let disk = Disk::new(12 << 20);
    let options = CacheOptions {
        max_bytes: 1 << 30,
        min_free_bytes: None,
        ..small()
    };
    let cache = HostCache::open(&disk.path(), options).unwrap();
    for n in 0..400 {
        let (id, bytes) = stored(n, 100_000);
        cache.put(&id, bytes);
        if n % 20 == 0 {
            cache.flush();
        }
    }
    cache.flush();
    assert_eq!(
        cache.stats().resting,
        None,
        "it evicts before the disk is full"
    );
    assert!(cache.stats().evicted_segments > 0);
    let room = rustix::fs::statvfs(disk.path()).unwrap();
    assert!(room.f_bavail > 0);
    let kept = (0..400)
        .filter(|n| cache.contains(&stored(*n, 100_000).0))
        .count();
    assert!(kept > 20, "{kept}");
}

#[test]
fn a_cache_opened_on_a_full_disk_works_once_there_is_room() {
    let disk = Disk::new(24 << 20);
    fs::create_dir(disk.path()).unwrap();
    fs::write(disk.path().join("LOCK"), "").unwrap();
    let ballast = disk.fill();
    let cache = HostCache::open(&disk.path(), small()).unwrap();
    let (id, bytes) = stored(1, 100_000);
    cache.put(&id, bytes);
    cache.flush();
    assert_eq!(cache.get(&id), None);
    assert!(cache.stats().resting.is_some());
    fs::remove_file(ballast).unwrap();
    caches_again(&cache, 1000);
}

#[test]
fn an_index_that_could_not_flush_works_again_and_forgets_nothing_it_need_not() {
    let disk = Disk::new(40 << 20);
    let cache = HostCache::open(&disk.path(), small()).unwrap();
    // Tiny chunks: more index than data, so that the index is flushed again and again.
    let tiny = |n: u64| {
        let id = ChunkId::of(&n.to_le_bytes());
        (id, Bytes::copy_from_slice(&n.to_le_bytes()))
    };
    for n in 0..5_000 {
        let (id, bytes) = tiny(n);
        put(&cache, &id, &bytes);
    }
    cache.flush();
    let ballast = disk.fill();
    for n in 5_000..60_000 {
        let (id, bytes) = tiny(n);
        cache.put(&id, bytes);
        if n % 1000 == 0 {
            cache.flush();
        }
    }
    // RocksDB, too, must find that there is no room.
    if let Some(index) = &*cache.shared.index.read() {
        assert!(
            index.flush(true).is_err(),
            "the index was flushed to a full disk"
        );
    }
    cache.flush();
    fs::remove_file(ballast).unwrap();
    caches_again(&cache, 100_000);
    drop(cache);
    let cache = HostCache::open(&disk.path(), small()).unwrap();
    cache.flush();
    for n in 0..60_000 {
        let (id, bytes) = tiny(n);
        assert!(cache.get(&id).is_none_or(|got| got == bytes));
    }
    caches_again(&cache, 200_000);
}

#[test]
fn a_cache_on_a_read_only_disk_opens_and_reads_go_on_without_it() {
    let disk = Disk::new(40 << 20);
    let (id, bytes) = stored(1, 100_000);
    {
        let cache = HostCache::open(&disk.path(), small()).unwrap();
        put(&cache, &id, &bytes);
    }
    disk.remount("ro");
    match HostCache::open(&disk.path(), small()) {
        // The lock cannot be taken for writing: the mount goes on without a cache.
        Err(e) => assert!(e.to_string().contains("mount without a cache"), "{e}"),
        Ok(_) => panic!("opened for writing"),
    }
    disk.remount("rw");
    let cache = HostCache::open(&disk.path(), small()).unwrap();
    assert!(cache.get(&id) == Some(bytes));
}
