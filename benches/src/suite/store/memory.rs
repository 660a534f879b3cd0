//! Peak memory of the store under 256 clients, and of a host that reads everything through a store.

use std::net::Ipv4Addr;

use crate::error::{BenchError, at};
use crate::loops;
use crate::process::Usage;
use crate::report::Row;
use crate::setup::oci::Compression;
use crate::setup::registry::Registry;
use crate::stats::Samples;
use crate::suite::Bench;

use super::servers::{Server, Store};

const BENCH: &str = "store, memory";

/// Bound of the store: bodies (`--max-memory`, 256 MiB) and as much again as everything else may take
/// with 256 connections, in MB.
const STORE_GOAL_MB: f64 = 400.0;

/// Bound of a host: that of a mount (docs/benchmarks.md, memory), in MB.
const HOST_GOAL_MB: f64 = 64.0;

/// Of the store process, after all loads.
pub fn of_the_store(server: &Server) -> Result<Vec<Row>, BenchError> {
    let usage = server.usage()?;
    let row = |what: &str, bytes: u64| {
        let one = Samples::from_iter([bytes as f64 / 1e6]);
        Row::new(BENCH, what, "MB", &one)
    };
    Ok(vec![
        row(
            "store: peak resident, 256 clients in the worst of it",
            usage.peak_bytes,
        )
        .at_most(STORE_GOAL_MB, "")
        .note("bodies are bounded by --max-memory, 256 MiB"),
        row("store: anonymous memory at the end", usage.anonymous_bytes),
    ])
}

/// Of the daemon behind a mount that gets every byte from a store.
pub fn of_a_client(bench: &Bench) -> Result<Row, BenchError> {
    let image = bench.workloads.files40k()?;
    let registry = Registry::on_loopback(&bench.dir.join("store-registry"))?;
    registry.push(&image.layout(Compression::Gzip)?, "files40k")?;
    let reference = registry.reference("files40k");
    let dir = bench.dir.join("store-client");
    let store = Store::start(&bench.lazyimg, &dir, Ipv4Addr::LOCALHOST)?;
    let (url, token) = (store.url(), store.token_file.display().to_string());
    let flags = ["--store", &url, "--store-token-file", &token];
    bench.lazyimg.convert(&reference, &flags)?;
    let only: Vec<&str> = flags.into_iter().chain(["--store-only"]).collect();
    let mut peak = Samples::default();
    for _ in 0..bench.runs.min(super::RUNS) {
        let (mnt, cache) = (bench.dir.join("mnt"), bench.dir.join("cache"));
        let (mounted, _) = bench.lazyimg.mount(&reference, &mnt, &cache, &only)?;
        let daemon = mounted.daemon()?;
        loops::find_stat(&mnt)?;
        loops::read_files(&mnt, &[])?;
        let usage = Usage::of(daemon);
        let usage = usage.ok_or_else(|| BenchError::Setup("the daemon is gone".into()))?;
        peak.push(usage.peak_bytes as f64 / 1e6);
        mounted.end()?;
        std::fs::remove_dir_all(&cache).map_err(at(&cache))?;
    }
    drop(store);
    std::fs::remove_dir_all(&dir).map_err(at(&dir))?;
    Ok(Row::new(
        BENCH,
        "host: peak resident of the daemon, every byte of files40k through the store",
        "MB",
        &peak,
    )
    .at_most(HOST_GOAL_MB, "")
    .note("as the bench memory, with a store instead of the registry"))
}
