//! `lazyimg cache`: through the daemon where one has the cache, else on its own.

use lazyimg_chunkstore::{CacheOptions, CacheStats, HostCache};
use lazyimg_fuse::client::ClientError;
use serde::Serialize;

use crate::args::{Cache, CacheCommand, CacheStat, CacheTrim, CacheUpkeep, CacheVerify, Global};
use crate::exit::Error;
use crate::output::{self, bytes};

/// What `stat` and `trim` print.
#[derive(Debug, Serialize)]
struct Report {
    cache_dir: String,
    /// Whether a daemon has it; counters are its, else zero.
    in_use: bool,
    #[serde(flatten)]
    stats: CacheStats,
}

/// Runs the command.
pub fn run(global: &Global, args: &CacheUpkeep) -> Result<(), Error> {
    match &args.command {
        CacheCommand::Stat(args) => stat(args),
        CacheCommand::Trim(args) => trim(args),
        CacheCommand::Verify(args) => verify(global, args),
    }
}

fn stat(args: &CacheStat) -> Result<(), Error> {
    let status = super::mount::client(&args.cache.place)?.status()?;
    let (in_use, stats) = match status.and_then(|s| s.cache) {
        Some(stats) => (true, stats),
        None => {
            let stats = alone(&args.cache, "lazyimg cache stat", HostCache::stats);
            (false, stats?)
        }
    };
    tell(&args.cache, args.json, in_use, stats)
}

fn trim(args: &CacheTrim) -> Result<(), Error> {
    let client = super::mount::client(&args.cache.place)?;
    let (in_use, stats) = match client.cache_trim(args.to) {
        Ok(stats) => (true, stats),
        Err(ClientError::NoDaemon { .. }) => {
            let trim = |cache: &HostCache| cache.trim(args.to);
            (false, alone(&args.cache, "lazyimg cache trim", trim)?)
        }
        Err(error) => return Err(error.into()),
    };
    tell(&args.cache, args.json, in_use, stats)
}

fn verify(global: &Global, args: &CacheVerify) -> Result<(), Error> {
    let client = super::mount::client(&args.cache.place)?;
    let bar = output::byte_bar(global, 0, "verifying");
    let mut tell = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let found = match client.cache_verify(&mut tell) {
        Ok(found) => found,
        Err(ClientError::NoDaemon { .. }) => alone(&args.cache, "lazyimg cache verify", |cache| {
            cache.scrub(&mut |done, total| {
                tell(done, total);
                true
            })
        })?,
        Err(error) => return Err(error.into()),
    };
    bar.finish_and_clear();
    if args.json {
        output::json(&found)?;
    } else {
        output::data(&format!(
            "{} chunks are good, {}; {} were bad and are forgotten",
            found.good,
            bytes(found.good_bytes),
            found.bad
        ))?;
    }
    match found.bad {
        0 => Ok(()),
        n => Err(Error::Damaged(format!(
            "{n} chunks of the host cache were damaged; they are fetched again when they are read. If this \
             happens again, look at the disk"
        ))),
    }
}

/// Opens the cache, which no daemon has, and closes it again. Whoever wants to mount meanwhile is told
/// that `command` has it.
fn alone<T>(
    cache: &Cache,
    command: &'static str,
    work: impl FnOnce(&HostCache) -> T,
) -> Result<T, Error> {
    let dir = super::mount::cache_dir(&cache.place)?;
    if !dir.join("segments").exists() {
        return Err(Error::Other(format!(
            "there is no host cache in {}: nothing was mounted with it yet, or it is somewhere else (--cache-dir)",
            dir.display()
        )));
    }
    // The daemon's bound may be another one than ours: nothing is given up only for being opened.
    let options = CacheOptions {
        min_free_bytes: Some(0),
        work: Some(command),
        ..CacheOptions::new(u64::MAX / 2)
    };
    let opened = HostCache::open(&dir, options).map_err(|e| Error::Other(e.to_string()))?;
    // What waits in the opening is done first: a fresh index, segments of a crash.
    opened.flush();
    let done = work(&opened);
    opened.close();
    Ok(done)
}

fn tell(cache: &Cache, json: bool, in_use: bool, stats: CacheStats) -> Result<(), Error> {
    let dir = super::mount::cache_dir(&cache.place)?;
    let max_bytes = if in_use {
        stats.max_bytes
    } else {
        cache.cache_bytes()
    };
    let report = Report {
        cache_dir: dir.display().to_string(),
        in_use,
        stats: CacheStats { max_bytes, ..stats },
    };
    if json {
        return output::json(&report);
    }
    let s = &report.stats;
    let mut text = format!(
        "cache      {}\nused       {} of at most {}, {} segments\n",
        report.cache_dir,
        bytes(s.used_bytes),
        bytes(s.max_bytes),
        s.segments
    );
    if in_use {
        text += &format!(
            "reads      {} found, {} not found, {} bad\nwritten    {} chunks, {}; {} dropped, {} segments evicted\n",
            s.hits,
            s.misses,
            s.bad,
            s.written,
            bytes(s.written_bytes),
            s.dropped,
            s.evicted_segments
        );
    } else {
        text += "not in use: no daemon has it\n";
    }
    if let Some(why) = &s.resting {
        text += &format!("resting    {why}\n");
    }
    output::data(&text)
}
