//! Which chunk lies where: RocksDB, without a write-ahead log. The segments are the log: what a crash
//! takes from the index is read again from the segments, from the tails on that the index knows.
//!
//! RocksDB flushes its writes in order. So a tail that is on disk means that every entry before it is.

use std::path::Path;

use lazyimg_convergent::ChunkId;
use rocksdb::{
    DB, DBCompressionType, Direction, IteratorMode, Options, ReadOptions, WriteBatch, WriteOptions,
};

use super::record::{self, Location, SegmentId};
use super::rocks;

/// Blocks of the index in memory, in bytes: about 1.2 million entries, 600 GB of chunks.
const BLOCK_CACHE_BYTES: usize = 64 << 20;
/// Entries not yet flushed, in bytes; RocksDB may hold two of these.
const WRITE_BUFFER_BYTES: usize = 8 << 20;
/// Index files open at once.
const MAX_OPEN_FILES: i32 = 256;
/// Key of the index's own version.
const VERSION_KEY: &[u8] = b"v";

/// What is put into the index at once.
#[derive(Default)]
pub struct Entries {
    batch: WriteBatch,
}

impl Entries {
    /// The chunk lies there.
    pub fn put(&mut self, root: u32, id: &ChunkId, at: Location) {
        self.batch
            .put(record::chunk_key(root, id), record::location_value(at));
    }

    /// The records of the segment are known up to `end`.
    pub fn tail(&mut self, segment: SegmentId, end: u64) {
        self.batch
            .put(record::tail_key(segment), record::tail_value(end));
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.batch.len()
    }
}

/// An open index.
pub struct Index {
    db: DB,
    unlogged: WriteOptions,
}

impl Index {
    /// Opens or makes the index in `dir`; `None` when it is of another version.
    pub fn open(dir: &Path) -> Result<Option<Self>, rocksdb::Error> {
        let db = DB::open(&options(), dir)?;
        let mut unlogged = WriteOptions::default();
        unlogged.disable_wal(true);
        let index = Self { db, unlogged };
        match index.db.get_pinned(VERSION_KEY)? {
            Some(v) if v.as_ref() == [record::VERSION] => {}
            Some(_) => return Ok(None),
            None => index
                .db
                .put_opt(VERSION_KEY, [record::VERSION], &index.unlogged)?,
        }
        Ok(Some(index))
    }

    /// Where a chunk is. An entry that cannot be read counts as none.
    pub fn get(&self, root: u32, id: &ChunkId) -> Result<Option<Location>, rocksdb::Error> {
        let value = self.db.get_pinned(record::chunk_key(root, id))?;
        Ok(value.and_then(|v| record::parse_location(&v)))
    }

    /// Up to where the records of a segment are known.
    pub fn tail(&self, of: SegmentId) -> Result<Option<u64>, rocksdb::Error> {
        let value = self.db.get_pinned(record::tail_key(of))?;
        Ok(value.and_then(|v| record::parse_tail(&v)))
    }

    /// Every segment of which records are known, and up to where.
    pub fn tails(&self) -> Result<Vec<(SegmentId, u64)>, rocksdb::Error> {
        let mut tails = Vec::new();
        for item in self.range(b"t".to_vec(), b"u".to_vec()) {
            let (key, value) = item?;
            if let Some(segment) = record::parse_tail_key(&key) {
                tails.push((segment, record::parse_tail(&value).unwrap_or_default()));
            }
        }
        Ok(tails)
    }

    /// Chunks of a root in their order, from the one after `after` on.
    pub fn list(
        &self,
        root: u32,
        after: Option<&ChunkId>,
        limit: usize,
    ) -> Result<Vec<(ChunkId, u32)>, rocksdb::Error> {
        let mut start = record::chunk_key(root, after.unwrap_or(&ChunkId::default())).to_vec();
        if after.is_some() {
            // The first key behind it.
            start.push(0);
        }
        let mut end = record::chunk_key(root, &ChunkId([0xff; 32])).to_vec();
        end.push(0);
        let mut listed = Vec::new();
        for item in self.range(start, end) {
            if listed.len() >= limit {
                break;
            }
            let (key, value) = item?;
            let id = record::parse_chunk_key(&key).map(|(_, id)| id);
            if let (Some(id), Some(at)) = (id, record::parse_location(&value)) {
                listed.push((id, at.len));
            }
        }
        Ok(listed)
    }

    /// Writes entries; they are on disk after the next flush.
    pub fn write(&self, entries: Entries) -> Result<(), rocksdb::Error> {
        self.db.write_opt(entries.batch, &self.unlogged)
    }

    /// Forgets a root, on disk too when this returns.
    pub fn purge(&self, root: u32) -> Result<(), rocksdb::Error> {
        let mut batch = WriteBatch::default();
        let mut last = record::chunk_key(root, &ChunkId([0xff; 32])).to_vec();
        last.push(0);
        batch.delete_range(record::chunk_key(root, &ChunkId([0; 32])).to_vec(), last);
        for (segment, _) in self.tails()? {
            if segment.root == root {
                batch.delete(record::tail_key(segment));
            }
        }
        self.db.write_opt(batch, &self.unlogged)?;
        self.flush()
    }

    /// Puts what is in memory on disk.
    pub fn flush(&self) -> Result<(), rocksdb::Error> {
        self.db.flush()
    }

    fn range(
        &self,
        start: Vec<u8>,
        end: Vec<u8>,
    ) -> impl Iterator<Item = Result<rocks::Entry, rocksdb::Error>> + '_ {
        let mut read = ReadOptions::default();
        read.set_iterate_upper_bound(end);
        self.db
            .iterator_opt(IteratorMode::From(&start, Direction::Forward), read)
    }
}

fn options() -> Options {
    let mut options = rocks::options(BLOCK_CACHE_BYTES, WRITE_BUFFER_BYTES, MAX_OPEN_FILES);
    // Ids are random: nothing to compress.
    options.set_compression_type(DBCompressionType::None);
    options
}
