//! What a hit in the host cache costs: for each chunk, and for each read of 4 KiB and 128 KiB through a
//! mount; beside the same read of a plain file.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use lazyimg_chunkstore::{
    CacheOptions, ChunkRef, ChunkSpec, HostCache, ImageStore, MountStats, Store, StoreOptions,
};
use lazyimg_convergent::payload::{self, Encoder};
use lazyimg_convergent::{DomainSecret, Salt, chunk};

use crate::error::{BenchError, at, io};
use crate::host;
use crate::loops;
use crate::process;
use crate::report::{Report, Row};
use crate::setup::oci::Compression;
use crate::setup::registry::Registry;
use crate::setup::workload::{LARGE_FILE, Random};
use crate::stats::Samples;
use crate::suite::Bench;

const BENCH: &str = "hits in the host cache";

/// Length of a chunk, in bytes.
const CHUNK: usize = 512 << 10;

/// Reads in a run of each length, and how much of the file they spread over when its chunks are decoded
/// already: less than a daemon keeps (`--hot-bytes`, 16 MiB).
const READS: [(usize, u64); 2] = [(4 << 10, 2000), (128 << 10, 400)];
const HOT_SPAN: u64 = 8 << 20;
const HOT_READS: [(usize, u64); 2] = [(4 << 10, 500), (128 << 10, 40)];

/// Runs the bench.
pub fn run(bench: &Bench) -> Result<Report, BenchError> {
    let mut report = per_chunk(bench)?;
    report.extend(per_read(bench)?);
    Ok(report)
}

/// Microseconds of each of `count` things.
fn micros_each(
    count: u64,
    mut f: impl FnMut(u64) -> Result<(), BenchError>,
) -> Result<f64, BenchError> {
    let started = Instant::now();
    for n in 0..count {
        f(n)?;
    }
    Ok(started.elapsed().as_secs_f64() * 1e6 / count as f64)
}

/// The cache is called as a library: looked up, read, decrypted, authenticated, decompressed.
fn per_chunk(bench: &Bench) -> Result<Report, BenchError> {
    let plain = bench
        .workloads
        .corpus
        .sample(CHUNK, if bench.quick { 64 } else { 256 })?;
    let dir = bench.dir.join("hits");
    std::fs::create_dir_all(&dir).map_err(at(&dir))?;
    let path = dir.join("plain");
    std::fs::write(&path, &plain).map_err(at(&path))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(io("starting threads"))?;
    let options = CacheOptions {
        min_free_bytes: Some(0),
        ..CacheOptions::new(1 << 30)
    };
    let cache = HostCache::open(&dir.join("cache"), options)
        .map_err(|e| BenchError::Setup(format!("the host cache: {e}")))?;
    let specs = fill(&cache, &plain)?;
    let options = StoreOptions {
        // Every read decodes.
        hot_bytes: 0,
        ..StoreOptions::default()
    };
    let store = Store::new(Some(cache), options, runtime.handle().clone());
    let image = store.image(Vec::new(), Arc::new(MountStats::default()));
    let file = File::open(&path).map_err(at(&path))?;
    let mut rows = Vec::new();
    for (what, cold) in [("page cache warm", false), ("page cache cold", true)] {
        let (mut ours, mut peer) = <(Samples, Samples)>::default();
        for _ in 0..bench.runs {
            let prepare = |f: &dyn Fn() -> Result<f64, BenchError>| {
                match cold {
                    true => host::drop_caches()?,
                    false => drop(f()?),
                }
                f()
            };
            ours.push(prepare(&|| hits(&image, &specs))?);
            peer.push(prepare(&|| preads(&file, &path, specs.len() as u64))?);
        }
        let name = host::filesystem(&dir)?;
        rows.push(
            Row::new(BENCH, format!("a chunk of 512 KiB, {what}"), "µs", &ours)
                .peer(format!("pread of {name}"), &peer)
                .note("looked up, read, decrypted, authenticated, decompressed; one thread"),
        );
    }
    store.close();
    std::fs::remove_dir_all(&dir).map_err(at(&dir))?;
    Ok(Report {
        rows,
        ..Report::default()
    })
}

/// Puts all chunks into the cache.
fn fill(cache: &HostCache, plain: &[u8]) -> Result<Vec<ChunkSpec>, BenchError> {
    let salt = Salt::derive(&DomainSecret::from_bytes([7; 32]), "bench", 1);
    let mut encoder = Encoder::new(payload::DEFAULT_LEVEL).map_err(io("a zstd context"))?;
    let mut specs = Vec::new();
    for plain in plain.chunks_exact(CHUNK) {
        let sealed = chunk::seal(&salt, encoder.encode(plain));
        specs.push(ChunkSpec {
            chunk: ChunkRef {
                id: sealed.id,
                stored_len: sealed.ciphertext.len() as u32,
                at: None,
            },
            key: sealed.key,
            plain_len: CHUNK as u32,
        });
        if !cache.put(&sealed.id, sealed.ciphertext.into()) {
            return Err(BenchError::Setup("the host cache takes no chunk".into()));
        }
        cache.flush();
    }
    Ok(specs)
}

fn hits(image: &ImageStore, specs: &[ChunkSpec]) -> Result<f64, BenchError> {
    micros_each(specs.len() as u64, |n| {
        let plain = image.try_read_local(&specs[n as usize]);
        black_box(plain)
            .map(drop)
            .ok_or_else(|| BenchError::Setup("a chunk is not in the host cache".into()))
    })
}

fn preads(file: &File, path: &Path, count: u64) -> Result<f64, BenchError> {
    let mut buffer = vec![0; CHUNK];
    micros_each(count, |n| {
        file.read_exact_at(&mut buffer, n * CHUNK as u64)
            .map_err(at(path))?;
        black_box(&buffer);
        Ok(())
    })
}

/// Through a mount whose registry is gone: a byte that is not in the cache would be an error.
fn per_read(bench: &Bench) -> Result<Report, BenchError> {
    let image = bench.workloads.mixed()?;
    let plain = bench.dir.join("hits-plain");
    std::fs::create_dir_all(&plain).map_err(at(&plain))?;
    for tar in &image.tars {
        process::run(
            Command::new("tar")
                .arg("-xf")
                .arg(&tar.path)
                .arg("-C")
                .arg(&plain)
                .arg(LARGE_FILE),
        )?;
    }
    let registry = Registry::on_loopback(&bench.dir.join("hits-registry"))?;
    registry.push(&image.layout(Compression::Gzip)?, "mixed")?;
    let reference = registry.reference("mixed");
    bench.lazyimg.convert(&reference, &[])?;
    let (dir, cache) = (bench.dir.join("mnt"), bench.dir.join("cache"));
    let (mounted, _) = bench.lazyimg.mount(&reference, &dir, &cache, &[])?;
    let (ours, theirs) = (dir.join(LARGE_FILE), plain.join(LARGE_FILE));
    loops::read_sequentially(&ours)?;
    drop(registry);
    let name = host::filesystem(&plain)?;
    let mut rows = Vec::new();
    for (hot, reads) in [(false, READS), (true, HOT_READS)] {
        for (len, count) in reads {
            let (mut a, mut b) = <(Samples, Samples)>::default();
            for run in 0..bench.runs {
                for (path, samples) in [(&ours, &mut a), (&theirs, &mut b)] {
                    samples.push(random_reads(path, len, count, hot, run as u64)?);
                }
            }
            let kib = len >> 10;
            let chunk = match hot {
                true => "its chunk decoded already",
                false => "its chunk anywhere in the cache",
            };
            rows.push(
                Row::new(
                    BENCH,
                    format!("a random read of {kib} KiB, {chunk}"),
                    "µs",
                    &a,
                )
                .peer(format!("pread of {name}"), &b)
                .note(
                    "mean of a run, reads that were read ahead included; page cache dropped before",
                ),
            );
        }
    }
    mounted.end()?;
    for d in [plain, cache] {
        std::fs::remove_dir_all(&d).map_err(at(&d))?;
    }
    Ok(Report {
        facts: vec![image.fact()],
        rows,
        ..Report::default()
    })
}

/// Microseconds of each read, at random places of the file or of its beginning.
fn random_reads(
    path: &Path,
    len: usize,
    count: u64,
    hot: bool,
    seed: u64,
) -> Result<f64, BenchError> {
    let file = File::open(path).map_err(at(path))?;
    let mut span = file.metadata().map_err(at(path))?.len();
    let mut buffer = vec![0; len];
    if hot {
        span = HOT_SPAN;
        // The kernel keeps nothing of what is read here; the daemon keeps what it decoded.
        for chunk in (0..span).step_by(CHUNK) {
            file.read_exact_at(&mut buffer, chunk).map_err(at(path))?;
        }
    }
    host::drop_caches()?;
    let mut random = Random(seed * 7919 + 1);
    micros_each(count, |_| {
        let at_place = random.draw() % (span / len as u64) * len as u64;
        file.read_exact_at(&mut buffer, at_place)
            .map_err(at(path))?;
        black_box(&buffer);
        Ok(())
    })
}
