//! The segment files: names, open handles, reading, scanning, appending.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::num::NonZeroUsize;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use lazyimg_convergent::ChunkId;
use lru::LruCache;
use parking_lot::Mutex;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::pool::Pool;
use super::record::{self, Location, MAX_RECORD, RECORD_HEADER, Record, SEGMENT_HEADER, SegmentId};
use crate::engine::RootId;

/// Segment files open at once: RLIMIT_NOFILE may be 1,024 and belongs to the whole process.
const MAX_OPEN: NonZeroUsize = NonZeroUsize::new(128).expect("128 is not zero");
/// How much is read at once when the next record is searched behind damage.
const SEARCH_BYTES: usize = 1 << 20;
/// What the name of a root's folder ends with once the root is deleted.
const GONE: &str = ".gone";

/// What a look into a segment found.
pub enum Found {
    /// The chunk; its checksum is right.
    Chunk(Bytes),
    /// The segment is gone.
    Gone,
    /// Something else is there, or the disk cannot read it.
    Bad(String),
    /// It may be there: this process could not look.
    Trouble(String),
}

/// What a failure to open or read means. A lack of files or of memory says nothing of the chunk.
fn failed(e: &io::Error, what: String) -> Found {
    let of_the_file = [
        Errno::IO,
        Errno::NODATA,
        Errno::UCLEAN,
        Errno::BADMSG,
        Errno::NXIO,
        Errno::LOOP,
    ];
    let bad = e.kind() == io::ErrorKind::UnexpectedEof
        || Errno::from_io_error(e).is_some_and(|e| of_the_file.contains(&e));
    match bad {
        true => Found::Bad(what),
        false => Found::Trouble(what),
    }
}

/// The segment files of a store.
pub struct Segments {
    dir: PathBuf,
    files: Mutex<LruCache<SegmentId, Arc<File>>>,
    pool: Pool,
}

impl Segments {
    /// The segments below `dir`.
    pub fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            files: Mutex::new(LruCache::new(MAX_OPEN)),
            pool: Pool::default(),
        }
    }

    /// Reads the record of `id` at `at`, checksum included.
    pub fn read(&self, root: u32, id: &ChunkId, at: Location) -> Found {
        let segment = SegmentId {
            root,
            number: at.segment,
        };
        let file = match self.file(segment) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Found::Gone,
            Err(e) => return failed(&e, format!("cannot open segment {segment:?}: {e}")),
        };
        let len = RECORD_HEADER + at.len as usize;
        let read = self
            .pool
            .read(len, |buffer| file.read_exact_at(buffer, at.offset));
        let bytes = match read {
            Ok(bytes) => bytes,
            Err(e) => return failed(&e, format!("cannot read {segment:?} at {}: {e}", at.offset)),
        };
        match record::parse_record(segment, at.offset, &bytes) {
            Some((record, _)) if record.id == *id && record.len == at.len => {
                Found::Chunk(bytes.slice(RECORD_HEADER..))
            }
            _ => Found::Bad(format!(
                "{segment:?} has no intact record of this chunk at {}",
                at.offset
            )),
        }
    }

    /// The roots that have a folder. Folders of deleted roots are cleared away.
    pub fn roots(&self) -> io::Result<Vec<u32>> {
        let mut roots = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.strip_suffix(GONE).and_then(parse_root).is_some() {
                fs::remove_dir_all(entry.path())?;
            } else if let Some(root) = parse_root(name) {
                roots.push(root);
            }
        }
        roots.sort_unstable();
        Ok(roots)
    }

    /// The segments of a root, in their order.
    pub fn list(&self, root: u32) -> io::Result<Vec<SegmentId>> {
        let entries = match fs::read_dir(self.folder(root)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            if let Some(number) = name.to_str().and_then(record::parse_segment_name) {
                found.push(SegmentId { root, number });
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Makes the file of a new segment; it is on disk, header and name, when this returns.
    pub fn create(&self, id: SegmentId) -> io::Result<Arc<File>> {
        let folder = self.folder(id.root);
        match fs::DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => sync_dir(&self.dir)?,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
        let path = self.path(id);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        let made = file
            .write_all_at(&record::segment_header(id), 0)
            .and_then(|()| file.sync_all())
            .and_then(|()| sync_dir(&folder));
        if let Err(e) = made {
            let _ = fs::remove_file(&path);
            return Err(e);
        }
        let file = Arc::new(file);
        self.remember(id, &file);
        Ok(file)
    }

    /// The open file of a segment.
    pub fn file(&self, id: SegmentId) -> io::Result<Arc<File>> {
        if let Some(file) = self.files.lock().get(&id) {
            return Ok(Arc::clone(file));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(self.path(id))?;
        let file = Arc::new(file);
        self.remember(id, &file);
        Ok(file)
    }

    /// The file of a segment, if it is open already.
    pub fn open_file(&self, root: u32, number: u32) -> Option<Arc<File>> {
        let id = SegmentId { root, number };
        self.files.lock().get(&id).map(Arc::clone)
    }

    /// Deletes one segment file.
    pub fn delete(&self, id: SegmentId) -> io::Result<()> {
        fs::remove_file(self.path(id))?;
        let file = self.files.lock().pop(&id);
        drop(file);
        Ok(())
    }

    /// Takes the folder of a root away, at once and for good. The room comes back with
    /// [`Segments::clear_removed`].
    pub fn remove_root(&self, root: u32) -> io::Result<()> {
        let gone = self.gone(root);
        // One may be left of an earlier attempt.
        ignore_missing(fs::remove_dir_all(&gone))?;
        ignore_missing(fs::rename(self.folder(root), &gone))?;
        sync_dir(&self.dir)
    }

    /// Deletes the files of a root that was taken away.
    pub fn clear_removed(&self, root: u32) -> io::Result<()> {
        ignore_missing(fs::remove_dir_all(self.gone(root)))?;
        let mut files = self.files.lock();
        let open: Vec<SegmentId> = files.iter().map(|(id, _)| *id).collect();
        let closed: Vec<_> = open
            .iter()
            .filter(|id| id.root == root)
            .map(|id| files.pop(id))
            .collect();
        drop(files);
        drop(closed);
        Ok(())
    }

    fn remember(&self, id: SegmentId, file: &Arc<File>) {
        // Dropped outside the lock: closing may block.
        let out = self.files.lock().push(id, Arc::clone(file));
        drop(out);
    }

    fn folder(&self, root: u32) -> PathBuf {
        self.dir.join(root_name(root))
    }

    fn gone(&self, root: u32) -> PathBuf {
        self.dir.join(root_name(root) + GONE)
    }

    fn path(&self, id: SegmentId) -> PathBuf {
        self.folder(id.root).join(record::segment_name(id.number))
    }
}

/// The records of one segment from an offset on, one after another. What is no record is skipped.
pub struct Scan<'a> {
    file: &'a File,
    id: SegmentId,
    at: u64,
    len: u64,
    /// Whether chunks are read and checked, and not the headers only.
    bodies: bool,
    buffer: Vec<u8>,
}

impl<'a> Scan<'a> {
    /// Begins at `from`; the file has `len` bytes.
    pub fn new(file: &'a File, id: SegmentId, from: u64, len: u64, bodies: bool) -> Self {
        Self {
            file,
            id,
            at: from,
            len,
            bodies,
            buffer: Vec::new(),
        }
    }

    /// The next record; `None` when there is none any more.
    pub fn next(&mut self) -> io::Result<Option<(ChunkId, Location)>> {
        while self.at < self.len {
            if let Some((id, at)) = self.record_here()? {
                self.at = at.end().unwrap_or(self.len);
                return Ok(Some((id, at)));
            }
            match self.search(self.at + 1)? {
                Some(at) => self.at = at,
                None => break,
            }
        }
        Ok(None)
    }

    fn record_here(&mut self) -> io::Result<Option<(ChunkId, Location)>> {
        let left = self.len - self.at;
        let want = if self.bodies {
            MAX_RECORD
        } else {
            RECORD_HEADER
        };
        let want = want.min(usize::try_from(left).unwrap_or(want));
        self.buffer.resize(want, 0);
        self.file.read_exact_at(&mut self.buffer, self.at)?;
        let record: Option<Record> = if self.bodies {
            record::parse_record(self.id, self.at, &self.buffer).map(|(record, _)| record)
        } else {
            record::parse_record_header(self.id, self.at, &self.buffer)
        };
        let found = record.map(|record| {
            let at = Location {
                segment: self.id.number,
                offset: self.at,
                len: record.len,
            };
            (record.id, at)
        });
        Ok(found.filter(|(_, at)| at.end().is_some_and(|end| end <= self.len)))
    }

    /// Where the next header is, from `from` on.
    fn search(&mut self, mut from: u64) -> io::Result<Option<u64>> {
        while from + (RECORD_HEADER as u64) <= self.len {
            let left = usize::try_from(self.len - from).unwrap_or(SEARCH_BYTES);
            let want = left.min(SEARCH_BYTES);
            self.buffer.resize(want, 0);
            self.file.read_exact_at(&mut self.buffer, from)?;
            if let Some((at, _)) = record::find_record(self.id, from, &self.buffer) {
                return Ok(Some(at));
            }
            // A header may begin in this block and end in the next.
            from += (want - RECORD_HEADER + 1) as u64;
        }
        Ok(None)
    }
}

/// Appends a record at `offset`; it is on disk after the next sync.
pub fn append(
    file: &File,
    at: SegmentId,
    offset: u64,
    id: &ChunkId,
    bytes: &[u8],
) -> io::Result<Location> {
    let record = Record {
        id: *id,
        len: u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        body_crc: crc32c::crc32c(bytes),
    };
    let header = record::record_header(at, offset, &record);
    let written = loop {
        match rustix::io::pwritev(file, &[IoSlice::new(&header), IoSlice::new(bytes)], offset) {
            Ok(n) => break n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    };
    // A short write is rare (a signal, the end of the disk): the rest by the usual way.
    if written < RECORD_HEADER {
        file.write_all_at(&header[written..], offset + written as u64)?;
    }
    let done = written.saturating_sub(RECORD_HEADER);
    if done < bytes.len() {
        file.write_all_at(&bytes[done..], offset + (RECORD_HEADER + done) as u64)?;
    }
    Ok(Location {
        segment: at.number,
        offset,
        len: record.len,
    })
}

/// Whether the file begins with the header of this segment.
pub fn has_header(file: &File, id: SegmentId) -> io::Result<bool> {
    let mut header = [0; SEGMENT_HEADER as usize];
    match file.read_exact_at(&mut header, 0) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        other => other.map(|()| header == record::segment_header(id)),
    }
}

fn root_name(root: u32) -> String {
    format!("r{root:08}")
}

fn parse_root(name: &str) -> Option<u32> {
    name.parse::<RootId>().ok().map(|root| root.0.get())
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
