//! The metadata of a mount while it arrives.
//!
//! Chunks of the metadata come front first and stay in memory, never on disk in plaintext. A
//! reader that is ahead of the loader fetches what it needs itself; the store makes one request
//! of the two. So there is nothing to wake and nothing to forget: a chunk that failed is asked for
//! again by the next reader, and by the loader after a pause.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use lazyimg_chunkstore::{ChunkSpec, ImageStore, ReadError};
use lazyimg_image::erofs::{MetaError, MetaSource};

use crate::errno::Failure;
use crate::faults::Faults;
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

/// How long the loader waits for a batch, where readers have less patience.
const LOAD_PATIENCE: Duration = Duration::from_secs(30);

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
    faults: Arc<Faults>,
}

struct Slot {
    start: u64,
    spec: ChunkSpec,
    bytes: OnceLock<Bytes>,
}

impl Metadata {
    /// Metadata of the given extents, which [`crate::view::ImageView`] has checked. Nothing is
    /// fetched yet. A read waits at most `read_timeout` for each chunk. What fails is told to
    /// `faults`.
    pub fn new(
        extents: &[Extent],
        store: ImageStore,
        read_timeout: Duration,
        faults: Arc<Faults>,
    ) -> Self {
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
            faults,
        }
    }

    /// The mount's failures.
    pub fn faults(&self) -> &Arc<Faults> {
        &self.faults
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
                let outcome = "a part of the metadata is missing, it is asked for until it is here";
                self.faults.log("load", outcome, &Failure::Chunk(error));
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
        let patience = self.read_timeout.max(LOAD_PATIENCE);
        match *indexes {
            [] => {}
            [one] => {
                outcome = self
                    .store
                    .read_within(&self.chunks[one].spec, patience)
                    .await
                    .map(|bytes| self.keep(one, bytes))
            }
            _ => {
                let specs: Vec<_> = indexes
                    .iter()
                    .map(|&i| self.chunks[i].spec.clone())
                    .collect();
                let results = self.store.read_many_within(&specs, patience).await;
                for (&i, result) in indexes.iter().zip(results) {
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

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Mutex;

    use lazyimg_chunkstore::{ChunkRef, MountStats, Store, StoreOptions};
    use lazyimg_convergent::{Salt, chunk, payload};

    use super::*;

    /// What is logged.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn extents(count: u64) -> Vec<Extent> {
        let extent = |n: u64| {
            let plain = [n as u8; 4096];
            let sealed = chunk::seal(&Salt::from_bytes([7; 32]), payload::encode(&plain, 3));
            Extent {
                start: n * 4096,
                len: 4096,
                spec: Some(ChunkSpec {
                    chunk: ChunkRef {
                        id: sealed.id,
                        stored_len: sealed.ciphertext.len() as u32,
                        at: None,
                    },
                    key: sealed.key,
                    plain_len: 4096,
                }),
            }
        };
        (0..count).map(extent).collect()
    }

    #[test]
    fn an_outage_while_metadata_arrives_is_one_line_however_often_it_is_tried() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .finish();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        // No tiers: every fetch fails.
        let store = Store::new(None, StoreOptions::default(), runtime.handle().clone());
        let store = store.image(Vec::new(), Arc::new(MountStats::new()));
        let faults = Arc::new(Faults::new("m"));
        let patience = Duration::from_secs(5);
        let metadata = Metadata::new(&extents(20), store, patience, Arc::clone(&faults));
        tracing::subscriber::with_default(subscriber, || {
            runtime.block_on(async {
                // Tries at once, after a second, and after three.
                let loading = tokio::time::timeout(Duration::from_millis(3300), metadata.load());
                assert!(loading.await.is_err());
            });
            // The requests of programs meanwhile.
            for place in 0..20 {
                let error = metadata.read(place * 4096, 100).unwrap_err();
                let error = lazyimg_image::erofs::ReadError::from(error);
                faults.record("lookup", &error.into());
            }
        });
        let told = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        assert_eq!(told.lines().count(), 1, "{told}");
        assert!(told.contains("a part of the metadata is missing"), "{told}");
        assert_eq!(faults.total(), 20, "only requests are counted");
    }
}
