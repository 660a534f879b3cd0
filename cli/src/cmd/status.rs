//! `lazyimg status`.

use std::collections::BTreeMap;

use lazyimg_chunkstore::{CacheStats, HitsSnapshot, StatsSnapshot};
use lazyimg_fuse::protocol::{MountStatus, StatusReport};
use serde::Serialize;

use crate::args::Status;
use crate::exit::Error;
use crate::output::{self, bytes, percent};

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// The cache's directory.
    cache_dir: String,
    /// The daemon's process id; absent when there is none.
    pid: Option<u32>,
    version: Option<String>,
    uptime_seconds: f64,
    cache: Option<CacheStats>,
    mounts: Vec<Mount>,
}

/// One mount.
#[derive(Debug, Serialize)]
struct Mount {
    image: String,
    digest: String,
    mountpoint: String,
    frontend: String,
    /// Unmounted, but files are still open.
    detached: bool,
    uptime_seconds: f64,
    /// Bytes of its files, holes included.
    file_bytes: u64,
    /// Bytes of its data and metadata spaces.
    image_bytes: u64,
    /// Ciphertext of the whole image.
    stored_bytes: u64,
    /// Of that, in the host cache.
    resident_bytes: u64,
    chunks: u64,
    resident_chunks: u64,
    /// Ciphertext fetched from all tiers since it was mounted.
    fetched_bytes: u64,
    /// Fetched from each tier: chunks, ciphertext, failures.
    tiers: BTreeMap<String, Tier>,
    /// Reads answered from memory and from the host cache.
    hits: Hits,
    /// Requests that ended in an error.
    errors: u64,
    metadata_complete: bool,
    stats: StatsSnapshot,
}

#[derive(Debug, Serialize)]
struct Tier {
    chunks: u64,
    bytes: u64,
    requests: u64,
    failures: u64,
    corrupt: u64,
}

#[derive(Debug, Serialize)]
struct Hits {
    memory: HitsSnapshot,
    cache: HitsSnapshot,
}

/// Runs the command.
pub fn run(args: &Status) -> Result<(), Error> {
    let dir = super::mount::cache_dir(&args.cache)?;
    let status = super::mount::client(&args.cache)?.status()?;
    let report = report(dir.display().to_string(), status);
    if args.json {
        output::json(&report)
    } else {
        output::data(&text(&report))
    }
}

fn report(cache_dir: String, status: Option<StatusReport>) -> Report {
    match status {
        None => Report {
            cache_dir,
            pid: None,
            version: None,
            uptime_seconds: 0.0,
            cache: None,
            mounts: Vec::new(),
        },
        Some(s) => Report {
            cache_dir,
            pid: Some(s.pid),
            version: Some(s.version),
            uptime_seconds: s.uptime_ms as f64 / 1000.0,
            cache: s.cache,
            mounts: s.mounts.into_iter().map(mount).collect(),
        },
    }
}

fn mount(m: MountStatus) -> Mount {
    let tier = |t: &lazyimg_chunkstore::TierSnapshot| {
        let tier = Tier {
            chunks: t.delivered.chunks,
            bytes: t.delivered.bytes,
            requests: t.requests,
            failures: t.failures,
            corrupt: t.corrupt,
        };
        (t.name.clone(), tier)
    };
    Mount {
        image: m.image,
        digest: m.digest.to_string(),
        mountpoint: m.dir.0.display().to_string(),
        frontend: m.frontend,
        detached: m.detached,
        uptime_seconds: m.uptime_ms as f64 / 1000.0,
        file_bytes: m.file_bytes,
        image_bytes: m.image_bytes,
        stored_bytes: m.stored_bytes,
        resident_bytes: m.resident_bytes,
        chunks: m.chunks,
        resident_chunks: m.resident_chunks,
        fetched_bytes: m.stats.fetched_bytes(),
        tiers: m.stats.tiers.iter().map(tier).collect(),
        hits: Hits {
            memory: m.stats.hot,
            cache: m.stats.cache,
        },
        errors: m.errors,
        metadata_complete: m.metadata_complete,
        stats: m.stats,
    }
}

fn text(report: &Report) -> String {
    let mut out = match (report.pid, &report.cache) {
        (None, _) => format!("cache      {}: nothing is mounted\n", report.cache_dir),
        (Some(pid), Some(c)) => format!(
            "cache      {}: {} of at most {}; daemon {pid}\n",
            report.cache_dir,
            bytes(c.used_bytes),
            bytes(c.max_bytes)
        ),
        (Some(pid), None) => format!(
            "cache      {}: not in use; daemon {pid}\n",
            report.cache_dir
        ),
    };
    for m in &report.mounts {
        out += &format!(
            "\nmount      {}{}\n",
            m.mountpoint,
            if m.detached { " (detached)" } else { "" }
        );
        out += &format!("image      {}\n           {}\n", m.image, m.digest);
        out += &format!(
            "size       {} in files, {} stored in {} chunks\n",
            bytes(m.file_bytes),
            bytes(m.stored_bytes),
            m.chunks
        );
        out += &format!(
            "resident   {} ({}), {} chunks\n",
            bytes(m.resident_bytes),
            percent(m.resident_bytes, m.stored_bytes),
            m.resident_chunks
        );
        for (name, t) in &m.tiers {
            out += &format!(
                "fetched    {} ({}) from {name}: {} chunks in {} requests, {} failed, {} corrupt\n",
                bytes(t.bytes),
                percent(t.bytes, m.stored_bytes),
                t.chunks,
                t.requests,
                t.failures,
                t.corrupt
            );
        }
        out += &format!(
            "hits       {} in memory, {} on disk; {} bad copies dropped, {} healed\n",
            m.hits.memory.chunks, m.hits.cache.chunks, m.stats.bad_local_copies, m.stats.healed
        );
        out += &format!("errors     {}\n", m.errors);
    }
    out
}
