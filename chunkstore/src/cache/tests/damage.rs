//! Flipped bits and cut files, in segments and in the index.

use std::fs;
use std::os::unix::fs::FileExt;

use super::*;

fn filled(dir: &Path) -> Vec<(ChunkId, Bytes)> {
    let cache = HostCache::open(dir, small()).unwrap();
    let chunks: Vec<_> = (0..120).map(|n| stored(n, 40_000)).collect();
    for (id, bytes) in &chunks {
        put(&cache, id, bytes);
    }
    chunks
}

fn flip(path: &Path, at: u64, bit: u8) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0] ^= 1 << bit;
    file.write_all_at(&byte, at).unwrap();
}

/// Reads all, checking as readers do, and puts back what is gone. How many were there.
fn read_and_heal(cache: &HostCache, chunks: &[(ChunkId, Bytes)]) -> usize {
    let mut found = 0;
    for (id, bytes) in chunks {
        match get_checked(cache, id) {
            Some(got) => {
                assert!(got == *bytes);
                found += 1;
            }
            None => put(cache, id, bytes),
        }
    }
    cache.flush();
    found
}

#[test]
fn a_flipped_bit_in_a_cached_segment_costs_one_chunk_and_is_healed() {
    let dir = tempfile::tempdir().unwrap();
    let chunks = filled(dir.path());
    let files = segment_files(dir.path());
    let len = fs::metadata(&files[0]).unwrap().len();
    for round in 0..40u64 {
        // Headers, ciphertexts and the segment's own header.
        let at = if round < 10 {
            round * 11
        } else {
            round * 99_991 % len
        };
        flip(&files[0], at, (round % 8) as u8);
        let cache = HostCache::open(dir.path(), small()).unwrap();
        cache.flush();
        let found = read_and_heal(&cache, &chunks);
        assert!(found >= chunks.len() - 1, "round {round}: {found}");
        assert_eq!(read_and_heal(&cache, &chunks), chunks.len(), "healed");
    }
}

#[test]
fn a_cut_segment_costs_what_was_cut() {
    let dir = tempfile::tempdir().unwrap();
    let chunks = filled(dir.path());
    for file in segment_files(dir.path()) {
        let len = fs::metadata(&file).unwrap().len();
        fs::File::options()
            .write(true)
            .open(&file)
            .unwrap()
            .set_len(len / 2)
            .unwrap();
    }
    let cache = HostCache::open(dir.path(), small()).unwrap();
    let found = read_and_heal(&cache, &chunks);
    assert!((55..=60).contains(&found), "{found}");
    assert_eq!(read_and_heal(&cache, &chunks), chunks.len());
}

#[test]
fn lost_segments_and_foreign_files_are_no_trouble() {
    let dir = tempfile::tempdir().unwrap();
    let chunks = filled(dir.path());
    let files = segment_files(dir.path());
    fs::remove_file(&files[0]).unwrap();
    fs::write(dir.path().join("segments/notes.txt"), "mine").unwrap();
    fs::write(
        dir.path().join("segments/00000000000000ff.seg"),
        "no segment",
    )
    .unwrap();
    fs::create_dir(dir.path().join("segments/00000000000000fe.seg")).unwrap();
    let cache = HostCache::open(dir.path(), small()).unwrap();
    cache.flush();
    let found = read_and_heal(&cache, &chunks);
    assert!((40..100).contains(&found), "{found}");
    assert_eq!(read_and_heal(&cache, &chunks), chunks.len());
    assert!(dir.path().join("segments/notes.txt").exists());
}

#[test]
fn a_lost_index_is_rebuilt_from_the_segments() {
    let dir = tempfile::tempdir().unwrap();
    let chunks = filled(dir.path());
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    let cache = HostCache::open(dir.path(), small()).unwrap();
    cache.flush();
    assert_eq!(read_and_heal(&cache, &chunks), chunks.len());
}

#[test]
fn any_damaged_index_file_is_found_out_and_the_index_rebuilt() {
    let dir = tempfile::tempdir().unwrap();
    let chunks = filled(dir.path());
    let index = dir.path().join("index");
    let (mut rebuilt, mut rounds) = (0, 0);
    for round in 0..60u64 {
        let mut files: Vec<_> = fs::read_dir(&index)
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|path| {
                let name = path.file_name().unwrap().to_str().unwrap();
                // The others are read by nobody (LOG, IDENTITY, OPTIONS) or empty.
                (name.ends_with(".sst") || name.starts_with("MANIFEST") || name == "CURRENT")
                    && fs::metadata(path).unwrap().len() > 0
            })
            .collect();
        files.sort();
        let file = &files[round as usize % files.len()];
        let len = fs::metadata(file).unwrap().len();
        match round % 4 {
            0 => fs::File::options()
                .write(true)
                .open(file)
                .unwrap()
                .set_len(len / 2)
                .unwrap(),
            1 => fs::remove_file(file).unwrap(),
            2 => flip(file, round * 7919 % len, (round % 8) as u8),
            _ => fs::write(file, noise(round, len as usize)).unwrap(),
        }
        rounds += 1;
        let cache = HostCache::open(dir.path(), small())
            .unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        cache.flush();
        read_and_heal(&cache, &chunks);
        // A damage found while reading is repaired in the background.
        cache.flush();
        assert_eq!(
            read_and_heal(&cache, &chunks),
            chunks.len(),
            "{}",
            file.display()
        );
        rebuilt += cache.stats().index_rebuilds;
    }
    assert!(
        rebuilt > rounds / 2,
        "{rebuilt} rebuilds in {rounds} rounds"
    );
    let left: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("index"))
        .collect();
    assert!(left.len() <= 2, "one damaged index is kept: {left:?}");
}

#[test]
fn an_index_of_another_version_is_rebuilt() {
    let dir = tempfile::tempdir().unwrap();
    let chunks = filled(dir.path());
    {
        let db = rocksdb::DB::open_default(dir.path().join("index")).unwrap();
        db.put(b"v", [99]).unwrap();
    }
    let cache = HostCache::open(dir.path(), small()).unwrap();
    cache.flush();
    assert_eq!(cache.stats().index_rebuilds, 1);
    assert_eq!(read_and_heal(&cache, &chunks), chunks.len());
}

#[test]
fn an_index_that_points_to_another_chunk_gives_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let chunks = filled(dir.path());
    let cache = HostCache::open(dir.path(), small()).unwrap();
    cache.flush();
    let wrong = cache.locate(&chunks[1].0).unwrap();
    {
        let index = cache.shared.index.read();
        index.as_ref().unwrap().put(&chunks[0].0, wrong).unwrap();
    }
    assert_eq!(cache.get(&chunks[0].0), None);
    assert_eq!(cache.stats().bad, 1);
    assert_eq!(read_and_heal(&cache, &chunks), chunks.len() - 1);
    assert_eq!(read_and_heal(&cache, &chunks), chunks.len());
}
