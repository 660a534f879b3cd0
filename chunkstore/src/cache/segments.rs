//! The segment files: which there are, how recently they were used, and reading from them.

use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use lazyimg_convergent::ChunkId;
use lru::LruCache;
use parking_lot::{Mutex, RwLock};

use super::record::{self, Location, RECORD_HEADER, SEGMENT_HEADER};

/// Segment files open at once: RLIMIT_NOFILE may be 1,024 and belongs to the whole process.
const MAX_OPEN: NonZeroUsize = NonZeroUsize::new(128).expect("128 is not zero");

/// Disk kept for the index of one record, in bytes. `examples/measure.rs` measures 114 when nothing
/// is ever deleted and about 300 when tiny chunks come and go without end; twice that, because a
/// compaction holds the old files and the new ones. 0.1 % of a chunk of the usual size.
pub const INDEX_BYTES_PER_RECORD: u64 = 640;

/// A segment is *reused* when reads have hit it at least records/16 times since it was opened.
const REUSED_SHARE: u64 = 16;

/// One segment file.
pub struct Segment {
    /// Its number; files are never renamed.
    pub number: u64,
    len: AtomicU64,
    records: AtomicU32,
    used: AtomicU64,
    hits: AtomicU64,
    used_since_noted: AtomicBool,
}

impl Segment {
    /// Bytes that count: header and whole records.
    pub fn len(&self) -> u64 {
        self.len.load(Relaxed)
    }

    /// Records in it, dead ones included.
    pub fn records(&self) -> u32 {
        self.records.load(Relaxed)
    }

    /// Tells what is in it now.
    pub fn set(&self, len: u64, records: u32) {
        self.len.store(len, Relaxed);
        self.records.store(records, Relaxed);
    }

    /// Disk it needs, its index entries included, in bytes.
    pub fn cost(&self) -> u64 {
        self.len() + u64::from(self.records()) * INDEX_BYTES_PER_RECORD
    }

    fn is_reused(&self) -> bool {
        let hits = self.hits.load(Relaxed);
        hits > 0 && hits * REUSED_SHARE >= u64::from(self.records())
    }
}

/// What a look into a segment found.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// The ciphertext, unverified.
    Bytes(Vec<u8>),
    /// The segment is gone: evicted, or never there.
    Gone,
    /// Something else is there, or the disk cannot read it.
    Bad,
}

/// All segments of a cache.
pub struct Segments {
    dir: PathBuf,
    all: RwLock<BTreeMap<u64, Arc<Segment>>>,
    files: Mutex<LruCache<u64, Arc<File>>>,
    clock: AtomicU64,
    next_number: AtomicU64,
}

impl Segments {
    /// The segments in `dir`, in the order of their last use. What is no segment file is let be.
    pub fn list(dir: PathBuf) -> Self {
        let mut found = Vec::new();
        match fs::read_dir(&dir) {
            Ok(entries) => {
                for entry in entries.flatten() {
                    let number = entry
                        .file_name()
                        .to_str()
                        .and_then(record::parse_segment_name);
                    if let (Some(number), Ok(meta)) = (number, entry.metadata())
                        && meta.is_file()
                    {
                        let used = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                        found.push((used, number, meta.len()));
                    }
                }
            }
            Err(e) => {
                tracing::warn!(path = %dir.display(), error = %e, "cannot list the cache's segments");
            }
        }
        found.sort_unstable();
        let highest = found.iter().map(|(_, number, _)| *number).max();
        let clock = found.len() as u64;
        let all = found
            .into_iter()
            .zip(0..)
            .map(|((_, number, len), used)| (number, Arc::new(segment(number, len, used))))
            .collect();
        Self {
            dir,
            all: RwLock::new(all),
            files: Mutex::new(LruCache::new(MAX_OPEN)),
            clock: AtomicU64::new(clock),
            next_number: AtomicU64::new(highest.map_or(1, |n| n.saturating_add(1))),
        }
    }

    /// The segments by number.
    pub fn all(&self) -> Vec<Arc<Segment>> {
        self.all.read().values().cloned().collect()
    }

    /// The segment `number`.
    pub fn get(&self, number: u64) -> Option<Arc<Segment>> {
        self.all.read().get(&number).cloned()
    }

    /// Disk needed by all, in bytes, and their number.
    pub fn cost(&self) -> (u64, usize) {
        let all = self.all.read();
        (all.values().map(|s| s.cost()).sum(), all.len())
    }

    /// Disk that the index may need for all records, in bytes.
    pub fn index_cost(&self) -> u64 {
        let all = self.all.read();
        let records: u64 = all.values().map(|s| u64::from(s.records())).sum();
        records * INDEX_BYTES_PER_RECORD
    }

    /// A number that no segment has had since the cache was opened: a reader that still holds the
    /// place of an evicted record finds nothing there, not something else.
    pub fn next_number(&self) -> u64 {
        self.next_number.fetch_add(1, Relaxed)
    }

    /// Reads the record of `id` at `at`, and notes that its segment was used. Only its header is
    /// checked: whoever opens the chunk checks the bytes.
    pub fn read(&self, id: &ChunkId, at: Location) -> Found {
        let found = self.peek(id, at);
        if let Found::Bytes(_) = found
            && let Some(segment) = self.get(at.segment)
        {
            let tick = self.clock.fetch_add(1, Relaxed);
            segment.used.store(tick, Relaxed);
            segment.hits.fetch_add(1, Relaxed);
            segment.used_since_noted.store(true, Relaxed);
        }
        found
    }

    /// [`Segments::read`] by somebody who is no reader: it does not count as use.
    pub fn peek(&self, id: &ChunkId, at: Location) -> Found {
        if self.get(at.segment).is_none() {
            return Found::Gone;
        }
        let file = match self.file(at.segment) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Found::Gone,
            Err(e) => {
                tracing::debug!(segment = at.segment, error = %e, "cannot open a segment");
                return Found::Gone;
            }
        };
        match read_record(&file, id, at) {
            Ok(Some(bytes)) => Found::Bytes(bytes),
            Ok(None) => Found::Bad,
            Err(e) => {
                tracing::warn!(segment = at.segment, offset = at.offset, error = %e, "cannot read a cached chunk");
                Found::Bad
            }
        }
    }

    /// Makes the file of a new segment, its header written.
    pub fn create(&self, number: u64) -> io::Result<(Arc<Segment>, Arc<File>)> {
        let path = self.path(number);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        if let Err(e) = file.write_all_at(&record::segment_header(number), 0) {
            let _ = fs::remove_file(&path);
            return Err(e);
        }
        let tick = self.clock.fetch_add(1, Relaxed);
        let segment = Arc::new(segment(number, SEGMENT_HEADER, tick));
        let file = Arc::new(file);
        self.all.write().insert(number, Arc::clone(&segment));
        self.files.lock().put(number, Arc::clone(&file));
        Ok((segment, file))
    }

    /// The open file of a segment.
    pub fn file(&self, number: u64) -> io::Result<Arc<File>> {
        if let Some(file) = self.files.lock().get(&number) {
            return Ok(Arc::clone(file));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(self.path(number))?;
        let file = Arc::new(file);
        // Dropped outside the lock: closing may block.
        let out = self.files.lock().push(number, Arc::clone(&file));
        drop(out);
        // Deleted since it was opened: kept open, its disk would not become free. Either this or
        // [`Segments::delete`], which takes the segment out of the list first, sees the other.
        if self.get(number).is_none() {
            let stale = self.files.lock().pop(&number);
            drop(stale);
        }
        Ok(file)
    }

    /// Deletes a segment.
    pub fn delete(&self, number: u64) -> io::Result<()> {
        match fs::remove_file(self.path(number)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        self.all.write().remove(&number);
        let file = self.files.lock().pop(&number);
        drop(file);
        Ok(())
    }

    /// The segment to give up next, other than `keep`: the least recently used of those that
    /// nobody has read again; of all, once those make up less than a quarter. So one pass over
    /// many new chunks pushes out itself, not what is read again and again.
    pub fn victim(&self, keep: Option<u64>) -> Option<u64> {
        let all = self.all.read();
        let total: u64 = all.values().map(|s| s.cost()).sum();
        let candidates = || all.values().filter(|s| Some(s.number) != keep);
        let once = || candidates().filter(|s| !s.is_reused());
        let oldest = |segments: &mut dyn Iterator<Item = &Arc<Segment>>| {
            segments
                .min_by_key(|s| s.used.load(Relaxed))
                .map(|s| s.number)
        };
        if once().map(|s| s.cost()).sum::<u64>() * 4 >= total
            && let Some(number) = oldest(&mut once())
        {
            return Some(number);
        }
        oldest(&mut candidates())
    }

    /// Writes the order of last use into the files' modification times, where the next open finds
    /// it.
    pub fn note_use(&self) {
        let mut used: Vec<_> = self
            .all()
            .into_iter()
            .filter(|s| s.used_since_noted.swap(false, Relaxed))
            .collect();
        used.sort_unstable_by_key(|s| s.used.load(Relaxed));
        let now = SystemTime::now();
        for (segment, age) in used.iter().rev().zip(0u64..) {
            let at = now - Duration::from_micros(age);
            let noted = self
                .file(segment.number)
                .and_then(|f| f.set_times(FileTimes::new().set_modified(at)));
            if let Err(e) = noted {
                tracing::debug!(segment = segment.number, error = %e, "cannot note a segment's use");
            }
        }
    }

    /// Reads the headers of the records of a segment one after another, up to the first that is
    /// none. Returns where that is, and how many there were.
    pub fn scan(
        &self,
        number: u64,
        mut each: impl FnMut(ChunkId, Location),
    ) -> io::Result<(u64, u32)> {
        let file = self.file(number)?;
        let len = file.metadata()?.len();
        let mut header = [0; SEGMENT_HEADER as usize];
        if len < SEGMENT_HEADER
            || file.read_exact_at(&mut header, 0).is_err()
            || !record::is_segment_header(&header, number)
        {
            return Ok((0, 0));
        }
        let (mut offset, mut records) = (SEGMENT_HEADER, 0);
        let mut header = [0; RECORD_HEADER];
        while len.saturating_sub(offset) > RECORD_HEADER as u64 {
            file.read_exact_at(&mut header, offset)?;
            let Some((id, at)) = record::parse_record_header(number, offset, &header) else {
                break;
            };
            let Some(end) = at.end().filter(|end| *end <= len) else {
                break;
            };
            each(id, at);
            offset = end;
            records += 1;
        }
        Ok((offset, records))
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(record::segment_name(number))
    }
}

fn segment(number: u64, len: u64, used: u64) -> Segment {
    Segment {
        number,
        len: AtomicU64::new(len),
        records: AtomicU32::new(0),
        used: AtomicU64::new(used),
        hits: AtomicU64::new(0),
        used_since_noted: AtomicBool::new(false),
    }
}

/// The ciphertext of `id` at `at`; `None` when the header there is not its own or the file ends.
fn read_record(file: &File, id: &ChunkId, at: Location) -> io::Result<Option<Vec<u8>>> {
    let mut header = [0; RECORD_HEADER];
    match file.read_exact_at(&mut header, at.offset) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    if record::parse_record_header(at.segment, at.offset, &header) != Some((*id, at)) {
        return Ok(None);
    }
    let len = at.len as usize;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let from = at.offset + (RECORD_HEADER + bytes.len()) as u64;
        let missing = len - bytes.len();
        // Reads into spare capacity: half a megabyte of zeros would be written for nothing.
        let read = rustix::io::pread(file, rustix::buffer::spare_capacity(&mut bytes), from);
        match read {
            Ok(0) => return Ok(None),
            // The allocator may have given more than was asked for.
            Ok(n) if n > missing => bytes.truncate(len),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_that_is_deleted_while_a_reader_opens_it_is_not_kept_open() {
        let dir = tempfile::tempdir().unwrap();
        let segments = Segments::list(dir.path().to_owned());
        let number = segments.next_number();
        drop(segments.create(number).unwrap());
        segments.files.lock().clear();
        // What `delete` leaves behind for a reader that has opened the file just before.
        segments.all.write().remove(&number);
        let file = segments.file(number).unwrap();
        assert!(!segments.files.lock().contains(&number));
        // The reader still has it, and nobody else.
        assert_eq!(Arc::strong_count(&file), 1);
    }
}
