//! Chunks and tiers for tests: among them faults that a real tier cannot be told to have.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_convergent::{Digest, Salt, chunk, payload};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::tier::Delivery;
use crate::{BlobRanges, ChunkRef, ChunkSpec, FetchError, PackRange, Tier};

/// A chunk with all its forms.
#[derive(Clone)]
pub struct TestChunk {
    /// What a reader holds.
    pub spec: ChunkSpec,
    /// What stores hold.
    pub stored: Bytes,
    /// What readers get.
    pub plain: Vec<u8>,
}

/// `len` bytes that do not compress, other ones for each `seed`.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            // xorshift64* (Vigna 2016)
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
        })
        .collect()
}

/// A chunk of `len` incompressible bytes.
pub fn test_chunk(seed: u64, len: usize) -> TestChunk {
    chunk_of(noise(seed, len))
}

/// A chunk of these bytes.
pub fn chunk_of(plain: Vec<u8>) -> TestChunk {
    let sealed = chunk::seal(&Salt::from_bytes([7; 32]), payload::encode(&plain, 3));
    TestChunk {
        spec: ChunkSpec {
            chunk: ChunkRef {
                id: sealed.id,
                stored_len: sealed.ciphertext.len() as u32,
                at: None,
            },
            key: sealed.key,
            plain_len: plain.len() as u32,
        },
        stored: sealed.ciphertext.into(),
        plain,
    }
}

/// Lays chunks one behind another in a pack; they know their places then.
pub fn pack(chunks: &mut [TestChunk]) -> (Digest, Bytes) {
    let bytes: Vec<u8> = chunks.iter().flat_map(|c| c.stored.to_vec()).collect();
    let pack = Digest::of(&bytes);
    let mut offset = 0;
    for chunk in chunks {
        chunk.spec.chunk.at = Some(PackRange { pack, offset });
        offset += chunk.stored.len() as u64;
    }
    (pack, bytes.into())
}

/// What is wrong with a tier.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Every delivery has a flipped bit.
    WrongBytes,
    /// Every delivery lacks its last byte.
    ShortBytes,
    /// The last chunk comes first.
    Backwards,
    /// Nothing comes, and it never ends.
    Hang,
    /// It ends without having sent anything.
    Silent,
    /// Each chunk fails so often, then comes.
    Fails(usize),
    /// It panics.
    Panics,
}

/// A tier in memory that has the faults it is told to have, and counts.
pub struct FaultyTier {
    name: String,
    chunks: HashMap<lazyimg_convergent::ChunkId, Bytes>,
    fault: Mutex<Fault>,
    delay: Mutex<Duration>,
    requests: AtomicUsize,
    asked: Mutex<Vec<lazyimg_convergent::ChunkId>>,
}

impl FaultyTier {
    /// A tier that has `chunks`.
    pub fn new(name: &str, chunks: &[TestChunk], fault: Fault) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            chunks: chunks
                .iter()
                .map(|c| (c.spec.chunk.id, c.stored.clone()))
                .collect(),
            fault: Mutex::new(fault),
            delay: Mutex::default(),
            requests: AtomicUsize::new(0),
            asked: Mutex::default(),
        })
    }

    /// From now on it has this fault.
    pub fn set_fault(&self, fault: Fault) {
        *self.fault.lock() = fault;
    }

    /// From now on each request takes at least so long.
    pub fn set_delay(&self, delay: Duration) {
        *self.delay.lock() = delay;
    }

    /// Calls of [`Tier::fetch`].
    pub fn requests(&self) -> usize {
        self.requests.load(Relaxed)
    }

    /// Chunks asked for, in order.
    pub fn asked(&self) -> Vec<lazyimg_convergent::ChunkId> {
        self.asked.lock().clone()
    }

    fn answer(&self, chunk: &ChunkRef) -> Result<Bytes, FetchError> {
        let mut fault = self.fault.lock();
        if let Fault::Fails(times) = &mut *fault
            && *times > 0
        {
            *times -= 1;
            return Err(FetchError::unavailable("told to fail"));
        }
        let bytes = self
            .chunks
            .get(&chunk.id)
            .ok_or_else(|| FetchError::NotFound(chunk.id.to_string()))?;
        Ok(match *fault {
            Fault::WrongBytes => flipped(bytes),
            Fault::ShortBytes => bytes.slice(..bytes.len() - 1),
            _ => bytes.clone(),
        })
    }
}

/// `bytes` with one bit flipped in the middle.
pub fn flipped(bytes: &[u8]) -> Bytes {
    let mut bytes = bytes.to_vec();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    bytes.into()
}

#[async_trait]
impl Tier for FaultyTier {
    fn name(&self) -> &str {
        &self.name
    }

    async fn fetch(&self, chunks: &[ChunkRef], sink: mpsc::Sender<Delivery>) {
        self.requests.fetch_add(1, Relaxed);
        self.asked.lock().extend(chunks.iter().map(|c| c.id));
        let delay = *self.delay.lock();
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let fault = self.fault.lock().clone();
        match fault {
            Fault::Hang => std::future::pending().await,
            Fault::Silent => return,
            Fault::Panics => panic!("told to panic"),
            _ => {}
        }
        let mut order: Vec<usize> = (0..chunks.len()).collect();
        if fault == Fault::Backwards {
            order.reverse();
        }
        for index in order {
            if sink
                .send((index, self.answer(&chunks[index])))
                .await
                .is_err()
            {
                return;
            }
        }
    }
}

/// Blobs in memory, with counters and a fault for the first requests.
#[derive(Default)]
pub struct MemoryBlobs {
    /// The blobs.
    pub blobs: HashMap<Digest, Bytes>,
    /// Each request takes so long.
    pub delay: Duration,
    /// So many requests fail first.
    pub fail_first: AtomicUsize,
    /// So many requests give one byte too few first.
    pub short_first: AtomicUsize,
    /// So many requests hang first.
    pub hang_first: AtomicUsize,
    /// Requests made: offset and length in bytes.
    pub requests: Mutex<Vec<(u64, u64)>>,
    /// Requests under way, and the most there ever were.
    pub under_way: Mutex<(usize, usize)>,
}

fn one_of(counter: &AtomicUsize) -> bool {
    counter
        .fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1))
        .is_ok()
}

#[async_trait]
impl BlobRanges for MemoryBlobs {
    async fn read_range(&self, blob: &Digest, offset: u64, len: u64) -> Result<Bytes, FetchError> {
        self.requests.lock().push((offset, len));
        {
            let mut under_way = self.under_way.lock();
            under_way.0 += 1;
            under_way.1 = under_way.1.max(under_way.0);
        }
        tokio::time::sleep(self.delay).await;
        self.under_way.lock().0 -= 1;
        if one_of(&self.hang_first) {
            std::future::pending::<()>().await;
        }
        if one_of(&self.fail_first) {
            return Err(FetchError::unavailable("told to fail"));
        }
        let short = usize::from(one_of(&self.short_first));
        let bytes = self
            .blobs
            .get(blob)
            .ok_or_else(|| FetchError::NotFound(blob.to_string()))?;
        Ok(bytes.slice(offset as usize..(offset + len) as usize - short))
    }
}
