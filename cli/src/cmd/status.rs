//! `lazyimg status`.

use std::collections::BTreeMap;

use lazyimg_chunkstore::{
    BreakerState, CacheStats, ErrorCounts, HitsSnapshot, LatencySnapshot, StatsSnapshot, TierHealth,
};
use lazyimg_fuse::protocol::{MountStatus, Resident, StatusReport};
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
    /// Chunks of all mounts in the cache: as often as images name them, and once.
    resident: Resident,
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
    /// Of chunks that came, from asking for them on.
    latency: LatencySnapshot,
    /// Failures by kind.
    errors: ErrorCounts,
    /// Requests sent, hedges, circuit breakers, what was written back.
    health: TierHealth,
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
            resident: Resident::default(),
            mounts: Vec::new(),
        },
        Some(s) => Report {
            cache_dir,
            pid: Some(s.pid),
            version: Some(s.version),
            uptime_seconds: s.uptime_ms as f64 / 1000.0,
            cache: s.cache,
            resident: s.resident,
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
            latency: t.latency,
            errors: t.errors,
            health: t.health.clone(),
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
    if report.mounts.len() > 1 {
        let r = &report.resident;
        out += &format!(
            "shared     {} mounts have {} in it, kept as {} in {} chunks\n",
            report.mounts.len(),
            bytes(r.named_bytes),
            bytes(r.bytes),
            r.chunks
        );
    }
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
            out += &details(t);
        }
        out += &format!(
            "hits       {} in memory, {} on disk; {} bad copies dropped, {} healed\n",
            m.hits.memory.chunks, m.hits.cache.chunks, m.stats.bad_local_copies, m.stats.healed
        );
        out += &format!("errors     {}\n", m.errors);
    }
    out
}

/// How a tier is doing, where there is something to tell.
fn details(tier: &Tier) -> String {
    let mut out = String::new();
    let millis = |us: u64| format!("{:.1}", us as f64 / 1000.0);
    let l = &tier.latency;
    if l.count > 0 {
        out += &format!(
            "           ms to a chunk: p50 {}, p99 {}, p99.9 {}, at most {}\n",
            millis(l.p50_us),
            millis(l.p99_us),
            millis(l.p999_us),
            millis(l.max_us)
        );
    }
    let h = &tier.health;
    if h.retries + h.hedges > 0 {
        out += &format!(
            "           {} requests sent, {} of them again, {} hedged\n",
            h.sent, h.retries, h.hedges
        );
    }
    for origin in h
        .origins
        .iter()
        .filter(|o| o.breaker != BreakerState::Closed)
    {
        let why = origin
            .last_failure
            .as_deref()
            .unwrap_or("it failed too often");
        out += &format!("           {} is not asked for now: {why}\n", origin.origin);
    }
    let w = &h.write_back;
    if w.put.chunks + w.failed + w.dropped + w.queued > 0 {
        out += &format!(
            "           {} chunks ({}) brought into it, {} waiting, {} failed, {} dropped\n",
            w.put.chunks,
            bytes(w.put.bytes),
            w.queued,
            w.failed,
            w.dropped
        );
    }
    if let Some(why) = &w.resting {
        out += &format!("           nothing is brought into it now: {why}\n");
    }
    out
}
