//! Write-back: chunks that came from a tier behind the store are put into it, beside the reads.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use lazyimg_convergent::ChunkId;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};

use super::client::{PutOutcome, StoreClient};
use super::error::{StoreError, StoreErrorCode};
use crate::stats::Hits;
use crate::{HitsSnapshot, Offer, WriteBackSnapshot};

/// How long nothing is written after a failure that may pass soon.
const SHORT_REST: Duration = Duration::from_secs(1);
/// The longest wish of a store that is respected.
const LONGEST_REST: Duration = Duration::from_secs(60);

/// Chunks on their way into the store. Dropped, what still waits is given up.
pub(super) struct WriteBack {
    shared: Arc<Shared>,
    room: Arc<Semaphore>,
    jobs: mpsc::UnboundedSender<Job>,
}

struct Job {
    id: ChunkId,
    bytes: Bytes,
    why: Offer,
    /// Its place in the queue; the queue is bounded by these.
    _room: OwnedSemaphorePermit,
}

struct Shared {
    client: StoreClient,
    /// How long nothing is written when the store does not take it.
    rest: Duration,
    resting: Mutex<Option<(Instant, String)>>,
    /// Queued or being put.
    pending: Mutex<HashSet<ChunkId>>,
    settled: Notify,
    put: Hits,
    repaired: AtomicU64,
    had: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
}

impl WriteBack {
    /// With `room` bytes of queue and so many requests at once.
    pub fn new(
        client: StoreClient,
        room: usize,
        requests: usize,
        rest: Duration,
        runtime: &Handle,
    ) -> Self {
        let (jobs, mut queue) = mpsc::unbounded_channel::<Job>();
        let shared = Arc::new(Shared {
            client,
            rest,
            resting: Mutex::default(),
            pending: Mutex::default(),
            settled: Notify::new(),
            put: Hits::default(),
            repaired: AtomicU64::new(0),
            had: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        });
        let worker = Arc::clone(&shared);
        // It ends when the queue is closed and empty.
        runtime.spawn(async move {
            futures_util::stream::poll_fn(|cx| queue.poll_recv(cx))
                .for_each_concurrent(requests.max(1), |job| worker.work(job))
                .await;
        });
        Self {
            shared,
            room: Arc::new(Semaphore::new(room.min(Semaphore::MAX_PERMITS))),
            jobs,
        }
    }

    /// Queues a verified chunk, or drops it. Never waits.
    pub fn offer(&self, id: &ChunkId, bytes: &Bytes, why: Offer) {
        if self.is_resting() {
            self.shared.dropped.fetch_add(1, Relaxed);
            return;
        }
        let permits = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let Ok(room) = Arc::clone(&self.room).try_acquire_many_owned(permits) else {
            self.shared.dropped.fetch_add(1, Relaxed);
            return;
        };
        if !self.shared.pending.lock().insert(*id) {
            return;
        }
        let job = Job {
            id: *id,
            bytes: bytes.clone(),
            why,
            _room: room,
        };
        if self.jobs.send(job).is_err() {
            // The runtime has ended.
            self.shared.done(id);
            self.shared.dropped.fetch_add(1, Relaxed);
        }
    }

    /// Whether the store does not take chunks now.
    pub fn is_resting(&self) -> bool {
        self.shared.is_resting()
    }

    /// Bytes that may still be queued now.
    pub fn room(&self) -> u64 {
        self.room.available_permits() as u64
    }

    /// Waits until nothing is queued or being put.
    pub async fn settle(&self) {
        loop {
            let mut settled = std::pin::pin!(self.shared.settled.notified());
            settled.as_mut().enable();
            if self.shared.pending.lock().is_empty() {
                return;
            }
            settled.await;
        }
    }

    pub fn snapshot(&self) -> WriteBackSnapshot {
        let s = &self.shared;
        let put: HitsSnapshot = s.put.snapshot();
        let resting = s.resting.lock();
        WriteBackSnapshot {
            put,
            repaired: s.repaired.load(Relaxed),
            had: s.had.load(Relaxed),
            dropped: s.dropped.load(Relaxed),
            failed: s.failed.load(Relaxed),
            queued: s.pending.lock().len() as u64,
            resting: resting
                .as_ref()
                .filter(|(until, _)| Instant::now() < *until)
                .map(|(_, why)| why.clone()),
        }
    }
}

impl Shared {
    fn is_resting(&self) -> bool {
        matches!(&*self.resting.lock(), Some((until, _)) if Instant::now() < *until)
    }

    async fn work(&self, job: Job) {
        if self.is_resting() {
            self.dropped.fetch_add(1, Relaxed);
        } else {
            self.put(&job).await;
        }
        self.done(&job.id);
    }

    async fn put(&self, job: &Job) {
        if job.why == Offer::Unasked
            && let Ok(has) = self.client.has(&[job.id]).await
            && has == [true]
        {
            self.had.fetch_add(1, Relaxed);
            return;
        }
        let repair = job.why == Offer::WasWrong;
        match self.client.put(&job.id, job.bytes.clone(), repair).await {
            Ok(outcome) => {
                if repair {
                    self.repaired.fetch_add(1, Relaxed);
                }
                if repair || outcome == PutOutcome::Put {
                    self.put.add(job.bytes.len());
                } else {
                    self.had.fetch_add(1, Relaxed);
                }
            }
            Err(error) => {
                self.failed.fetch_add(1, Relaxed);
                self.rest_for(&error);
            }
        }
    }

    fn done(&self, id: &ChunkId) {
        let mut pending = self.pending.lock();
        pending.remove(id);
        if pending.is_empty() {
            self.settled.notify_waiters();
        }
    }

    fn rest_for(&self, error: &StoreError) {
        use StoreErrorCode as Code;
        let rest = match error {
            StoreError::Refused {
                code: Code::Unauthorized | Code::Forbidden | Code::Quota | Code::Full,
                ..
            }
            | StoreError::Token { .. } => self.rest,
            StoreError::Refused {
                code: Code::Busy | Code::Unavailable,
                retry_after,
                ..
            } => retry_after.map_or(SHORT_REST, |wish| wish.min(LONGEST_REST)),
            error if error.is_passing() => SHORT_REST,
            // This chunk only.
            _ => return,
        };
        let why = error.to_string();
        let mut resting = self.resting.lock();
        let now = Instant::now();
        let news = resting.as_ref().is_none_or(|(_, last)| *last != why);
        if resting
            .as_ref()
            .is_none_or(|(until, _)| *until < now + rest)
        {
            *resting = Some((now + rest, why.clone()));
        }
        drop(resting);
        if rest >= self.rest && news {
            tracing::warn!(
                error = why,
                "the store takes no chunks; those of other tiers are not written back for {rest:?}, then it is tried again"
            );
        } else {
            tracing::debug!(error = why, "a chunk was not written back");
        }
    }
}
