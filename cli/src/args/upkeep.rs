//! `lazyimg cache`.

use clap::{Args, Subcommand};

use super::Cache;

/// `lazyimg cache`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lazyimg cache stat
  lazyimg cache trim --to 5000000000
  lazyimg cache verify --json

The host cache holds ciphertext only, and may be deleted whenever nothing is mounted: it is filled
again as images are read.")]
pub struct CacheUpkeep {
    /// What to do.
    #[command(subcommand)]
    pub command: CacheCommand,
}

/// What to do with the host cache.
#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// Show what it holds and how it has done.
    Stat(CacheStat),
    /// Give up the least useful chunks.
    Trim(CacheTrim),
    /// Read every chunk, compare it with its id, and forget those that are bad.
    Verify(CacheVerify),
}

/// `lazyimg cache stat`.
#[derive(Debug, Args)]
pub struct CacheStat {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// The host cache.
    pub cache: Cache,
}

/// `lazyimg cache trim`.
#[derive(Debug, Args)]
pub struct CacheTrim {
    /// Bytes of disk that it may use afterwards; 0 empties it.
    #[arg(long, value_name = "BYTES")]
    pub to: u64,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// The host cache.
    pub cache: Cache,
}

/// `lazyimg cache verify`.
#[derive(Debug, Args)]
pub struct CacheVerify {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// The host cache.
    pub cache: Cache,
}
