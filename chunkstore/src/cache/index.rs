//! Which chunk lies where: RocksDB, in little memory.
//!
//! No write-ahead log: the segments are the log. What a crash takes from the index is read again
//! from the segments that carry no seal; RocksDB flushes its writes in order, so that a seal on
//! disk means that every entry before it is on disk.

use std::path::Path;

use lazyimg_convergent::ChunkId;
use rocksdb::{
    BlockBasedOptions, DB, DBCompressionType, Direction, FlushOptions, IteratorMode, LogLevel,
    Options, ReadOptions, WriteBatch, WriteOptions,
};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::record::{self, Location};

/// Uncompressed index blocks in memory, in bytes: about 40,000 entries, 20 GB of chunks.
const BLOCK_CACHE_BYTES: usize = 4 << 20;
/// Entries not yet flushed, in bytes; RocksDB may hold two of these.
const WRITE_BUFFER_BYTES: usize = 2 << 20;
/// Index files open at once. Far above what an index of millions of chunks has.
const MAX_OPEN_FILES: i32 = 64;
/// Disk that opening takes at most, in bytes: log header, manifest, a flush of recovered entries.
const OPEN_BYTES: u64 = 4 << 20;
/// Entries deleted in one batch.
const PURGE_BATCH: usize = 1_000;
/// Key of the index's own version.
const VERSION_KEY: &[u8] = b"v";

/// Key and value.
type Entry = (Box<[u8]>, Box<[u8]>);

/// The index is broken: what the caller does about it depends on [`IndexError::is_damage`].
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// RocksDB refused.
    #[error("index: {0}")]
    Rocks(#[from] rocksdb::Error),
    /// There is no room to open it.
    #[error("index: no room for its files: {0}")]
    NoRoom(#[source] std::io::Error),
    /// Its entries are of another version.
    #[error("index has another version")]
    Version,
}

impl IndexError {
    /// Whether the files are damaged, so that only building the index anew helps. Otherwise the
    /// disk is in trouble and the same index may work later.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Version => true,
            Self::NoRoom(_) => false,
            Self::Rocks(e) => {
                let text = e.as_ref();
                let disk = [
                    "No space left",
                    "Disk quota",
                    "Read-only file system",
                    "Input/output error",
                    "Too many open files",
                    "Cannot allocate memory",
                    "While lock file",
                ];
                !disk.iter().any(|d| text.contains(d))
            }
        }
    }
}

/// An open index.
pub struct Index {
    db: DB,
    unlogged: WriteOptions,
}

impl Index {
    /// Opens or makes the index in `dir`.
    pub fn open(dir: &Path) -> Result<Self, IndexError> {
        probe_room(dir).map_err(IndexError::NoRoom)?;
        let db = DB::open(&options(), dir)?;
        let mut unlogged = WriteOptions::default();
        unlogged.disable_wal(true);
        let index = Self { db, unlogged };
        match index.db.get_pinned(VERSION_KEY)? {
            Some(v) if v.as_ref() == [record::VERSION] => {}
            Some(_) => return Err(IndexError::Version),
            None => index
                .db
                .put_opt(VERSION_KEY, [record::VERSION], &index.unlogged)?,
        }
        Ok(index)
    }

    /// Where `id` is. An entry that cannot be read counts as none.
    pub fn get(&self, id: &ChunkId) -> Result<Option<Location>, IndexError> {
        let value = self.db.get_pinned(record::chunk_key(id))?;
        Ok(value.and_then(|v| record::parse_location(&v)))
    }

    /// Notes that `id` is at `at`.
    pub fn put(&self, id: &ChunkId, at: Location) -> Result<(), IndexError> {
        let mut batch = WriteBatch::default();
        batch.put(record::chunk_key(id), record::location_value(at));
        batch.put(
            record::record_key(at.segment, at.offset),
            record::record_value(id),
        );
        Ok(self.db.write_opt(batch, &self.unlogged)?)
    }

    /// Forgets `id` if it is still at `at`; whether it was.
    pub fn remove(&self, id: &ChunkId, at: Location) -> Result<bool, IndexError> {
        if self.get(id)? != Some(at) {
            return Ok(false);
        }
        let mut batch = WriteBatch::default();
        batch.delete(record::chunk_key(id));
        batch.delete(record::record_key(at.segment, at.offset));
        self.db.write_opt(batch, &self.unlogged)?;
        Ok(true)
    }

    /// Notes that `segment` is complete: it has `len` bytes and `records` records, all of them put.
    pub fn seal(&self, segment: u64, len: u64, records: u32) -> Result<(), IndexError> {
        let value = record::seal_value(len, records);
        Ok(self
            .db
            .put_opt(record::seal_key(segment), value, &self.unlogged)?)
    }

    /// The seal of `segment`: its length in bytes and its number of records.
    pub fn sealed(&self, segment: u64) -> Result<Option<(u64, u32)>, IndexError> {
        let value = self.db.get_pinned(record::seal_key(segment))?;
        Ok(value.and_then(|v| record::parse_seal(&v)))
    }

    /// Forgets everything that lies in `segment`.
    pub fn purge(&self, segment: u64) -> Result<(), IndexError> {
        let mut batch = WriteBatch::default();
        for item in self.records_from(segment, Some(segment)) {
            let (key, value) = item?;
            if let Some(id) = record::parse_record_value(&value)
                && let Some(at) = self.get(&id)?
                && at.segment == segment
            {
                batch.delete(record::chunk_key(&id));
            }
            batch.delete(key);
            if batch.len() >= PURGE_BATCH {
                self.db
                    .write_opt(std::mem::take(&mut batch), &self.unlogged)?;
            }
        }
        batch.delete(record::seal_key(segment));
        Ok(self.db.write_opt(batch, &self.unlogged)?)
    }

    /// The number of the first segment at or after `from` that the index knows records of.
    pub fn next_segment(&self, from: u64) -> Result<Option<u64>, IndexError> {
        match self.records_from(from, None).next() {
            None => Ok(None),
            Some(item) => Ok(record::parse_record_key(&item?.0).map(|(segment, _)| segment)),
        }
    }

    /// Puts what is in memory on disk. With `wait` false it only begins.
    pub fn flush(&self, wait: bool) -> Result<(), IndexError> {
        let mut how = FlushOptions::default();
        how.set_wait(wait);
        Ok(self.db.flush_opt(&how)?)
    }

    /// Clears away deleted entries, waiting for it.
    pub fn compact(&self) {
        self.db.compact_range(None::<&[u8]>, None::<&[u8]>);
    }

    /// The entries of records in segments `from` to `to` (to the last one for `None`).
    fn records_from(
        &self,
        from: u64,
        to: Option<u64>,
    ) -> impl Iterator<Item = Result<Entry, rocksdb::Error>> + '_ {
        let mut read = ReadOptions::default();
        let end = match to.and_then(|t| t.checked_add(1)) {
            Some(end) => record::record_key(end, 0).to_vec(),
            None => vec![b's' + 1],
        };
        read.set_iterate_upper_bound(end);
        let start = record::record_key(from, 0);
        self.db
            .iterator_opt(IteratorMode::From(&start, Direction::Forward), read)
    }
}

/// Fails when RocksDB could not write what it writes when it is opened: it must not find out
/// itself (see [`options`]).
fn probe_room(dir: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let path = dir.join("room.probe");
    let file = std::fs::File::create(&path)?;
    let probed = match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, OPEN_BYTES) {
        // Filesystems that cannot reserve: write.
        Err(Errno::OPNOTSUPP) => std::io::copy(
            &mut std::io::Read::take(std::io::repeat(1), OPEN_BYTES),
            &mut &file,
        )
        .map(|_| ()),
        other => other.map_err(Into::into),
    };
    let removed = std::fs::remove_file(&path);
    probed.and(removed)
}

fn options() -> Options {
    let mut table = BlockBasedOptions::default();
    if let Ok(cache) = rocksdb::Cache::new_lru_cache(BLOCK_CACHE_BYTES) {
        table.set_block_cache(&cache);
    }
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    table.set_bloom_filter(10.0, false);
    table.set_format_version(5);
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&table);
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_max_write_buffer_number(2);
    options.set_max_open_files(MAX_OPEN_FILES);
    options.set_max_file_opening_threads(1);
    options.set_table_cache_num_shard_bits(2);
    // Ids are random: nothing to compress.
    options.set_compression_type(DBCompressionType::None);
    options.set_target_file_size_base(8 << 20);
    options.set_max_bytes_for_level_base(16 << 20);
    options.set_max_background_jobs(2);
    options.set_skip_stats_update_on_db_open(true);
    // RocksDB's own log: Debian's build has assertions on, and one of them ends the process when
    // two lines in a row meet a full disk. Only the header that every open writes is left, and
    // `Index::open` sees to it that there is room for that.
    options.set_log_level(LogLevel::Fatal);
    // What is written beside the entries counts against the cache's bound: keep it small.
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(256 << 10);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    options.set_manifest_preallocation_size(64 << 10);
    options.set_max_manifest_file_size(1 << 20);
    options
}
