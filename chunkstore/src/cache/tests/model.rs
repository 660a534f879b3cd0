//! Random operations against a map: the cache may forget, never lie.

use std::fs;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Op {
    Put(u8),
    Get(u8),
    Remove(u8),
    Flush,
    Reopen,
    /// Cuts so many thousandths off a segment.
    Cut(u8, u16),
    /// Flips a bit of a segment.
    Flip(u8, u32),
    /// Deletes a segment.
    Lose(u8),
    /// Deletes the index, or puts an old one in its place.
    LoseIndex,
    SaveIndex,
    OldIndex,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        20 => any::<u8>().prop_map(Op::Put),
        20 => any::<u8>().prop_map(Op::Get),
        3 => any::<u8>().prop_map(Op::Remove),
        2 => Just(Op::Flush),
        2 => Just(Op::Reopen),
        1 => (any::<u8>(), 0u16..1000).prop_map(|(n, cut)| Op::Cut(n, cut)),
        2 => (any::<u8>(), any::<u32>()).prop_map(|(n, at)| Op::Flip(n, at)),
        1 => any::<u8>().prop_map(Op::Lose),
        1 => Just(Op::LoseIndex),
        1 => Just(Op::SaveIndex),
        1 => Just(Op::OldIndex),
    ]
}

fn chunk(n: u8) -> (ChunkId, Bytes) {
    stored(u64::from(n), usize::from(n) * 2_000 + 1)
}

fn copy_dir(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Damages the cache's files while it is closed, as a crash or a bad disk would.
fn damage(op: &Op, dir: &Path, saved: &Path) {
    let files = segment_files(dir);
    let pick = |n: u8| files.get(usize::from(n) % files.len().max(1));
    let open = |path: &PathBuf| {
        fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
    };
    match op {
        Op::Cut(n, cut) => {
            if let Some(path) = pick(*n) {
                let len = fs::metadata(path).unwrap().len();
                open(path).set_len(len * u64::from(*cut) / 1000).unwrap();
            }
        }
        Op::Flip(n, at) => {
            if let Some(path) = pick(*n)
                && let len @ 1.. = fs::metadata(path).unwrap().len()
            {
                let (file, mut byte) = (open(path), [0]);
                let at = u64::from(*at) % (len * 8);
                file.read_exact_at(&mut byte, at / 8).unwrap();
                byte[0] ^= 1 << (at % 8);
                file.write_all_at(&byte, at / 8).unwrap();
            }
        }
        Op::Lose(n) => {
            if let Some(path) = pick(*n) {
                fs::remove_file(path).unwrap();
            }
        }
        Op::LoseIndex => fs::remove_dir_all(dir.join("index")).unwrap(),
        Op::SaveIndex => copy_dir(&dir.join("index"), saved),
        Op::OldIndex if saved.exists() => copy_dir(saved, &dir.join("index")),
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn it_may_forget_but_never_lies(ops in prop::collection::vec(op(), 1..80)) {
        let dir = tempfile::tempdir().unwrap();
        let aside = tempfile::tempdir().unwrap();
        let saved = aside.path().join("saved");
        let mut cache = Some(HostCache::open(dir.path(), small()).unwrap());
        // Undamaged and never evicted (all fits), what was put must be found.
        let mut certain = std::collections::HashSet::new();
        for op in &ops {
            let open = cache.as_ref().unwrap();
            match op {
                Op::Put(n) => {
                    let (id, bytes) = chunk(*n);
                    put(open, &id, &bytes);
                    certain.insert(*n);
                }
                Op::Get(n) => {
                    let (id, bytes) = chunk(*n);
                    match get_checked(open, &id) {
                        Some(got) => prop_assert!(got == bytes),
                        None => prop_assert!(!certain.contains(n), "forgot {} without a reason", n),
                    }
                }
                Op::Remove(n) => {
                    open.flush();
                    open.remove(&chunk(*n).0);
                    certain.remove(n);
                }
                Op::Flush => open.flush(),
                op => {
                    drop(cache.take());
                    damage(op, dir.path(), &saved);
                    cache = Some(HostCache::open(dir.path(), small()).unwrap());
                    cache.as_ref().unwrap().flush();
                    if !matches!(op, Op::Reopen | Op::LoseIndex | Op::SaveIndex) {
                        certain.clear();
                    }
                }
            }
            let stats = cache.as_ref().unwrap().stats();
            prop_assert!(stats.used_bytes <= stats.max_bytes);
            if stats.evicted_segments > 0 {
                certain.clear();
            }
        }
    }
}
