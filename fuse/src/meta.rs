//! The metadata of a mount while it arrives.
//!
//! Chunks of the metadata come front first and stay in memory, never on disk in plaintext. A
//! reader that is ahead of the loader fetches what it needs itself; the store makes one request
//! of the two. So there is nothing to wake and nothing to forget: a chunk that failed is asked for
//! again by the next reader, and by the loader after a pause.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use lazyimg_chunkstore::{ChunkSpec, ImageStore, ReadError};
use lazyimg_image::erofs::{MetaError, MetaSource};

use crate::view::Extent;

/// Bytes kept on either side of a chunk border, so that a read across it can be lent in one piece:
/// an inode with all attributes that EROFS allows (64 KiB) fits.
const SEAM: usize = 128 << 10;

/// Chunks in the loader's first requests; all of these are under way at once. The first chunk
/// answers `ls /` and travels alone.
const FIRST_BATCHES: [usize; 3] = [1, 3, 8];

/// Chunks in each further request: 8 MiB of metadata, some 80,000 inodes.
const BATCH: usize = 16;

/// The loader's pauses after a failure.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(30);

/// Metadata that is on its way.
pub struct Metadata {
    store: ImageStore,
    chunks: Vec<Slot>,
    /// `seams[i]`: around the border between chunk `i` and chunk `i + 1`.
    seams: Vec<OnceLock<Box<[u8]>>>,
    /// All of it in one piece, made only when a read fits nowhere else.
    whole: OnceLock<Box<[u8]>>,
    len: u64,
    arrived: AtomicUsize,
    read_timeout: Duration,
}

struct Slot {
    start: u64,
    spec: ChunkSpec,
    bytes: OnceLock<Bytes>,
}

impl Metadata {
    /// Metadata of the given extents, which [`crate::view::ImageView`] has checked. Nothing is
    /// fetched yet. A read waits at most `read_timeout` for each chunk.
    pub fn new(extents: &[Extent], store: ImageStore, read_timeout: Duration) -> Self {
        let chunks: Vec<_> = extents
            .iter()
            .filter_map(|e| {
                let spec = e.spec.clone()?;
                Some(Slot {
                    start: e.start,
                    spec,
                    bytes: OnceLock::new(),
                })
            })
            .collect();
        Self {
            store,
            seams: chunks.iter().skip(1).map(|_| OnceLock::new()).collect(),
            whole: OnceLock::new(),
            len: extents.last().map_or(0, |e| e.start + e.len),
            chunks,
            arrived: AtomicUsize::new(0),
            read_timeout,
        }
    }

    /// Whether everything is here, so that no read waits.
    pub fn is_complete(&self) -> bool {
        self.arrived.load(Ordering::Acquire) == self.chunks.len()
    }

    /// Fetches everything, front first, and tries again what fails until it is here. Drop the
    /// future to stop.
    pub async fn load(&self) {
        let mut pause = RETRY_FIRST;
        while !self.is_complete() {
            if let Err(error) = self.load_once().await {
                tracing::warn!("metadata is incomplete, next try in {pause:?}: {error}");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_LAST);
            }
        }
    }

    async fn load_once(&self) -> Result<(), ReadError> {
        let missing: Vec<usize> = (0..self.chunks.len())
            .filter(|&i| self.chunks[i].bytes.get().is_none())
            .collect();
        let mut rest = missing.as_slice();
        let mut next = |max: usize| {
            let (batch, after) = rest.split_at(max.min(rest.len()));
            rest = after;
            batch
        };
        let [a, b, c] = FIRST_BATCHES.map(&mut next);
        let (a, b, c) = tokio::join!(self.load_batch(a), self.load_batch(b), self.load_batch(c));
        a.and(b).and(c)?;
        loop {
            let (a, b) = (next(BATCH), next(BATCH));
            if a.is_empty() {
                return Ok(());
            }
            let (a, b) = tokio::join!(self.load_batch(a), self.load_batch(b));
            a.and(b)?;
        }
    }

    async fn load_batch(&self, indexes: &[usize]) -> Result<(), ReadError> {
        let mut outcome = Ok(());
        match *indexes {
            [] => {}
            [one] => {
                outcome = self
                    .store
                    .read(&self.chunks[one].spec)
                    .await
                    .map(|bytes| self.keep(one, bytes))
            }
            _ => {
                let specs: Vec<_> = indexes
                    .iter()
                    .map(|&i| self.chunks[i].spec.clone())
                    .collect();
                for (&i, result) in indexes.iter().zip(self.store.read_many(&specs).await) {
                    match result {
                        Ok(bytes) => self.keep(i, bytes),
                        Err(error) => outcome = Err(error),
                    }
                }
            }
        }
        outcome
    }

    fn keep(&self, index: usize, bytes: Bytes) {
        if self.chunks[index].bytes.set(bytes).is_ok() {
            self.arrived.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// The bytes of a chunk, fetched if need be.
    fn chunk(&self, index: usize) -> Result<&Bytes, ReadError> {
        let slot = &self.chunks[index];
        if slot.bytes.get().is_none() {
            let bytes = self.store.read_blocking(&slot.spec, self.read_timeout)?;
            self.keep(index, bytes);
        }
        Ok(slot.bytes.get().expect("it was set above"))
    }

    /// The bytes around the border behind chunk `index`, and where they begin.
    fn seam(&self, index: usize) -> Result<(u64, &[u8]), ReadError> {
        let (before, after) = (self.chunk(index)?, self.chunk(index + 1)?);
        let head = &before[before.len().saturating_sub(SEAM)..];
        let bytes = self.seams[index]
            .get_or_init(|| [head, &after[..after.len().min(SEAM)]].concat().into());
        Ok((self.chunks[index + 1].start - head.len() as u64, bytes))
    }

    fn whole(&self) -> Result<&[u8], ReadError> {
        for index in 0..self.chunks.len() {
            self.chunk(index)?;
        }
        let parts = self.chunks.iter().filter_map(|slot| slot.bytes.get());
        Ok(self
            .whole
            .get_or_init(|| parts.flat_map(|b| b.iter().copied()).collect()))
    }

    fn lend(&self, offset: u64, end: u64) -> Result<&[u8], ReadError> {
        let index = self.chunks.partition_point(|slot| slot.start <= offset) - 1;
        let part = |start: u64, bytes: &'_ [u8]| {
            (offset - start) as usize..((end - start) as usize).min(bytes.len())
        };
        let chunk_end = self
            .chunks
            .get(index + 1)
            .map_or(self.len, |next| next.start);
        if end <= chunk_end {
            let bytes = self.chunk(index)?;
            return Ok(&bytes[part(self.chunks[index].start, bytes)]);
        }
        let (start, bytes) = self.seam(index)?;
        if offset >= start && end <= start + bytes.len() as u64 {
            return Ok(&bytes[part(start, bytes)]);
        }
        Ok(&self.whole()?[offset as usize..end as usize])
    }
}

impl MetaSource for Metadata {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, len: usize) -> Result<&[u8], MetaError> {
        let end = offset
            .checked_add(len as u64)
            .filter(|&end| end <= self.len);
        let Some(end) = end else {
            return Err(MetaError::OutOfRange {
                offset,
                len,
                end: self.len,
            });
        };
        if len == 0 {
            return Ok(&[]);
        }
        self.lend(offset, end)
            .map_err(|error| MetaError::Unavailable {
                offset,
                len,
                cause: Box::new(error),
            })
    }
}
