//! Measures the local read path against its parts: `cargo run --release --example measure -- DIR`.
//!
//! Prints MB/s of plaintext for one thread (MB = 10^6 bytes), medians of five runs.
#![allow(clippy::print_stdout, clippy::unwrap_used)] // a tool for developers, not a library

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lazyimg_chunkstore::{
    CacheOptions, ChunkRef, ChunkSpec, HostCache, MountStats, Store, StoreOptions,
};
use lazyimg_convergent::{ChunkId, ChunkKey, Salt, chunk, payload};

const CHUNK: usize = 512 << 10;
const RUNS: usize = 5;

fn main() {
    let mut args = std::env::args().skip(1);
    if let [Some(what), Some(path)] = [args.next(), args.next()]
        && what == "rss"
    {
        return memory(Path::new(&path));
    }
    if std::env::args().nth(2).as_deref() == Some("churn") {
        return churn(Path::new(&std::env::args().nth(1).unwrap_or_default()));
    }
    let dir = std::env::args()
        .nth(1)
        .expect("a directory to measure in, and to leave empty");
    let dir = Path::new(&dir);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let chunks = chunks_of_binaries();
    let plain_bytes: usize = chunks.iter().map(|(s, _)| s.plain_len as usize).sum();
    let stored_bytes: usize = chunks.iter().map(|(_, c)| c.len()).sum();
    println!(
        "{} chunks of {CHUNK} bytes, ratio {:.2}",
        chunks.len(),
        plain_bytes as f64 / stored_bytes as f64
    );
    let mbs = |time: Duration, bytes: usize| bytes as f64 / 1e6 / time.as_secs_f64();

    // The parts.
    let file = dir.join("parts");
    let all: Vec<u8> = chunks.iter().flat_map(|(_, c)| c.to_vec()).collect();
    std::fs::write(&file, &all).unwrap();
    let file = File::open(&file).unwrap();
    let pread = median(|| {
        let mut at = 0;
        for (_, c) in &chunks {
            let mut buffer = vec![0; c.len()];
            file.read_exact_at(&mut buffer, at).unwrap();
            at += c.len() as u64;
            std::hint::black_box(buffer);
        }
    });
    let gcm = median(|| {
        for (s, c) in &chunks {
            std::hint::black_box(chunk::open_payload(&s.key, c.to_vec()).unwrap());
        }
    });
    let payloads: Vec<_> = chunks
        .iter()
        .map(|(s, c)| chunk::open_payload(&s.key, c.to_vec()).unwrap())
        .collect();
    let decode = median(|| {
        for (p, (s, _)) in payloads.iter().zip(&chunks) {
            std::hint::black_box(payload::decode(p, s.plain_len as usize).unwrap());
        }
    });
    let hash = median(|| {
        for (_, c) in &chunks {
            std::hint::black_box(ChunkId::of(c));
        }
    });
    println!(
        "pread                 {:6.0} MB/s of plaintext",
        mbs(pread, plain_bytes)
    );
    println!("GCM open (and a copy) {:6.0}", mbs(gcm, plain_bytes));
    println!("decode                {:6.0}", mbs(decode, plain_bytes));
    let parts = pread + gcm + decode;
    println!("the three together    {:6.0}", mbs(parts, plain_bytes));
    println!(
        "SHA-256 of ciphertext {:6.0} (only when fetched)",
        mbs(hash, plain_bytes)
    );

    // The whole.
    let cache = HostCache::open(&dir.join("cache"), CacheOptions::new(4 << 30)).unwrap();
    let begun = Instant::now();
    for (s, c) in &chunks {
        while !cache.put(s.id(), c.clone()) {
            cache.flush();
        }
    }
    cache.flush();
    println!(
        "put                   {:6.0} MB/s of ciphertext",
        mbs(begun.elapsed(), stored_bytes)
    );
    let get = median(|| {
        for (s, _) in &chunks {
            std::hint::black_box(cache.get(s.id()).unwrap());
        }
    });
    println!(
        "cache.get             {:6.0} MB/s of plaintext",
        mbs(get, plain_bytes)
    );
    let options = StoreOptions {
        hot_bytes: 0,
        ..StoreOptions::default()
    };
    let store = Store::new(Some(cache), options, runtime.handle().clone());
    let image = store.image(Vec::new(), Arc::new(MountStats::new()));
    let whole = median(|| {
        for (s, _) in &chunks {
            std::hint::black_box(image.try_read_local(s).unwrap());
        }
    });
    println!(
        "read, cache full      {:6.0}: {:.0} % of its parts",
        mbs(whole, plain_bytes),
        100.0 * parts.as_secs_f64() / whole.as_secs_f64()
    );
    drop((image, store));
    std::fs::remove_dir_all(dir.join("cache")).unwrap();
    std::fs::remove_file(dir.join("parts")).unwrap();

    many_chunks(dir);
}

/// Open time and memory with 100,000 small chunks.
fn many_chunks(dir: &Path) {
    let path = dir.join("many");
    let options = || CacheOptions::new(4 << 30);
    let cache = HostCache::open(&path, options()).unwrap();
    let ids: Vec<_> = (0..100_000u64)
        .map(|n| ChunkId::of(&n.to_le_bytes()))
        .collect();
    let body = Bytes::from(vec![7; 8_000]);
    let begun = Instant::now();
    for id in &ids {
        while !cache.put(id, body.clone()) {
            cache.flush();
        }
    }
    cache.flush();
    println!("100,000 puts of 8 kB  {:6.0} ms", ms(begun.elapsed()));
    drop(cache);
    println!(
        "index                 {:6.0} bytes a record",
        disk(&path.join("index")) as f64 / ids.len() as f64
    );
    let me = std::env::current_exe().unwrap();
    let child = std::process::Command::new(me)
        .arg("rss")
        .arg(&path)
        .status();
    assert!(child.unwrap().success());
    for how in ["open, closed well", "open again"] {
        let begun = Instant::now();
        let cache = HostCache::open(&path, options()).unwrap();
        let open = begun.elapsed();
        assert!(cache.get(&ids[50_000]).is_some());
        cache.flush();
        let ready = begun.elapsed();
        let begun = Instant::now();
        for id in &ids {
            assert!(cache.contains(id));
        }
        println!(
            "{how:21} {:6.1} ms, writable after {:.1} ms; a look {:.2} us",
            ms(open),
            ms(ready),
            begun.elapsed().as_secs_f64() * 10.0
        );
    }
    std::fs::remove_dir_all(path.join("index")).unwrap();
    let begun = Instant::now();
    let cache = HostCache::open(&path, options()).unwrap();
    let open = begun.elapsed();
    cache.flush();
    println!(
        "open, index lost      {:6.1} ms, all found again after {:.0} ms",
        ms(open),
        ms(begun.elapsed())
    );
    assert!(ids.iter().all(|id| cache.contains(id)));
    drop(cache);
    std::fs::remove_dir_all(path).unwrap();
    churn(dir);
}

/// The index's disk when tiny chunks come and go.
fn churn(dir: &Path) {
    let path = dir.join("churn");
    let cache = HostCache::open(&path, CacheOptions::new(64 << 20)).unwrap();
    let body = Bytes::from(vec![7; 300]);
    let (mut worst, mut most) = (0.0f64, 0);
    for n in 0..1_500_000u64 {
        let id = ChunkId::of(&n.to_le_bytes());
        while !cache.put(&id, body.clone()) {
            cache.flush();
        }
        if n > 200_000 && n % 20_000 == 0 {
            cache.flush();
            let segments = disk(&path.join("segments"));
            let records = segments as f64 / 348.0;
            let index = disk(&path.join("index")) as f64 - (6 << 20) as f64;
            worst = worst.max(index / records);
            let all = disk(&path);
            most = most.max(all);
        }
    }
    println!(
        "index under churn     {worst:6.0} bytes a record at worst, beyond the fixed 6 MiB; {:.1} of 64 MiB on disk",
        most as f64 / (1u64 << 20) as f64
    );
    drop(cache);
    std::fs::remove_dir_all(path).unwrap();
}

/// Opens the cache of [`many_chunks`] in a process of its own and looks at its memory.
fn memory(path: &Path) {
    let before = rss_kib();
    let cache = HostCache::open(path, CacheOptions::new(4 << 30)).unwrap();
    cache.flush();
    let opened = rss_kib();
    for n in 0..100_000u64 {
        std::hint::black_box(cache.get(&ChunkId::of(&n.to_le_bytes())).unwrap());
    }
    println!(
        "RSS                   {before} KiB before, {opened} open, {} after 100,000 gets",
        rss_kib()
    );
}

/// Disk used in `dir`, in bytes.
fn disk(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::read_dir(dir)
        .unwrap()
        .filter_map(|entry| {
            // RocksDB may delete a file while we look.
            let entry = entry.ok()?;
            let meta = entry.metadata().ok()?;
            Some(if meta.is_dir() {
                disk(&entry.path())
            } else {
                meta.blocks() * 512
            })
        })
        .sum()
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn median(mut run: impl FnMut()) -> Duration {
    let mut times: Vec<_> = (0..RUNS)
        .map(|_| {
            let begun = Instant::now();
            run();
            begun.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[RUNS / 2]
}

/// 200 chunks of shared libraries.
fn chunks_of_binaries() -> Vec<(ChunkSpec, Bytes)> {
    let mut files: Vec<_> = std::fs::read_dir("/usr/lib/x86_64-linux-gnu")
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| {
            p.metadata()
                .is_ok_and(|m| m.is_file() && m.len() > CHUNK as u64)
        })
        .collect();
    files.sort();
    let salt = Salt::from_bytes([1; 32]);
    files
        .iter()
        .flat_map(|p| {
            std::fs::read(p)
                .unwrap()
                .chunks_exact(CHUNK)
                .map(<[u8]>::to_vec)
                .collect::<Vec<_>>()
        })
        .take(200)
        .map(|plain| {
            let sealed = chunk::seal(&salt, payload::encode(&plain, payload::DEFAULT_LEVEL));
            let key: ChunkKey = sealed.key;
            let spec = ChunkSpec {
                chunk: ChunkRef {
                    id: sealed.id,
                    stored_len: sealed.ciphertext.len() as u32,
                    at: None,
                },
                key,
                plain_len: plain.len() as u32,
            };
            (spec, sealed.ciphertext.into())
        })
        .collect()
}

fn rss_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
