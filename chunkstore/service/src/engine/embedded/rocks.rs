//! What the index and the documents have in common: how RocksDB is opened, and what its errors mean.

use rocksdb::{BlockBasedOptions, LogLevel, Options};

use crate::engine::EngineError;

/// Key and value.
pub type Entry = (Box<[u8]>, Box<[u8]>);

/// Options for a database with few files in little memory.
pub fn options(
    block_cache_bytes: usize,
    write_buffer_bytes: usize,
    max_open_files: i32,
) -> Options {
    let mut table = BlockBasedOptions::default();
    if let Ok(cache) = rocksdb::Cache::new_lru_cache(block_cache_bytes) {
        table.set_block_cache(&cache);
    }
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    table.set_bloom_filter(10.0, false);
    table.set_format_version(5);
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&table);
    options.set_write_buffer_size(write_buffer_bytes);
    options.set_max_write_buffer_number(2);
    options.set_max_open_files(max_open_files);
    options.set_max_background_jobs(2);
    options.set_skip_stats_update_on_db_open(true);
    // RocksDB's own log: Debian's build has assertions on, and one of them ends the process when
    // two lines in a row meet a full disk. Only the header that every open writes is left.
    options.set_log_level(LogLevel::Fatal);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(256 << 10);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    options.set_manifest_preallocation_size(64 << 10);
    options.set_max_manifest_file_size(4 << 20);
    options
}

/// Whether the disk is in trouble, and not the files damaged.
pub fn is_disk_trouble(e: &rocksdb::Error) -> bool {
    let trouble = [
        "No space left",
        "Disk quota",
        "Read-only file system",
        "Input/output error",
        "Too many open files",
        "Cannot allocate memory",
        "While lock file",
    ];
    trouble.iter().any(|t| e.as_ref().contains(t))
}

/// What an error of RocksDB means for the engine.
pub fn error(what: &str, e: &rocksdb::Error) -> EngineError {
    let text = format!("{what}: {e}");
    if e.as_ref().contains("No space left") || e.as_ref().contains("Disk quota") {
        EngineError::Full(text)
    } else if is_disk_trouble(e) {
        EngineError::Unavailable(text)
    } else {
        EngineError::Damaged(text)
    }
}
