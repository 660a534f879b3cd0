//! kill -9, again and again. The child is this test binary, run again.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::*;

const TASK: &str = "LAZYIMG_TEST_CACHE_TASK";
const DIR: &str = "LAZYIMG_TEST_CACHE_DIR";
const FIRST: &str = "LAZYIMG_TEST_CACHE_FIRST";

/// This binary as a child that does `task` in `dir`.
pub fn child(task: &str, dir: &Path, env: &[(&str, String)]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "cache::tests::crash::the_child", "--nocapture"])
        .env(TASK, task)
        .env(DIR, dir)
        .envs(env.iter().map(|(k, v)| (k, v)));
    command
}

/// Does nothing unless [`child`] started it.
#[test]
fn the_child() {
    let Ok(task) = std::env::var(TASK) else {
        return;
    };
    let dir = PathBuf::from(std::env::var_os(DIR).unwrap());
    match (task.as_str(), HostCache::open(&dir, small())) {
        (_, Err(CacheError::Locked { pid, .. })) => println!("LOCKED by {}", pid.unwrap()),
        ("open", Ok(_)) => println!("OPENED"),
        ("write", Ok(cache)) => {
            println!("OPENED");
            let first: u64 = std::env::var(FIRST).unwrap().parse().unwrap();
            for n in first.. {
                let (id, bytes) = chunk(n);
                put(&cache, &id, &bytes);
                get_checked(&cache, &chunk(n / 2).0);
            }
        }
        (task, _) => panic!("{task} failed"),
    }
}

fn chunk(n: u64) -> (ChunkId, Bytes) {
    stored(n, (n as usize * 7919) % 60_000 + 1)
}

#[test]
fn a_kill_during_writes_costs_no_byte_and_little_of_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let mut kept = 0;
    for round in 0..30u64 {
        let first = round * 100_000;
        let mut writer = child("write", dir.path(), &[(FIRST, first.to_string())])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(writer.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("OPENED")));
        std::thread::sleep(Duration::from_millis(10 + round * 13 % 150));
        writer.kill().unwrap();
        writer.wait().unwrap();

        let cache = HostCache::open(dir.path(), small()).unwrap();
        cache.flush();
        assert_eq!(cache.stats().index_rebuilds, 0, "a crash is no damage");
        for n in (0..=round).flat_map(|r| r * 100_000..r * 100_000 + 300) {
            let (id, bytes) = chunk(n);
            // Unchecked on purpose: after a kill (not a power cut) even unverified bytes are right.
            if let Some(found) = cache.get(&id) {
                assert!(found == bytes);
                kept += 1;
            }
        }
        assert!(cache.stats().used_bytes <= MIN_CACHE_BYTES);
    }
    assert!(kept > 300, "it remembers something: {kept}");
}
