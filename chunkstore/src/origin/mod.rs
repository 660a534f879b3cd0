//! The registry as a tier: packs read by ranges.

mod plan;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::{Semaphore, mpsc};

use crate::guard::{Guard, retry};
use crate::tier::Delivery;
use crate::{BlobRanges, BreakerOptions, ChunkRef, FetchError, Tier, TierHealth};
use plan::Run;

/// The slowest link on which an attempt may still finish, in bytes per second: an attempt's time
/// grows with its length by this.
const SLOWEST_LINK: u64 = 128 << 10;

/// Longer requests are not asked twice at once: their time is the link's, not the server's.
const LONGEST_HEDGED: u64 = 256 << 10;

/// How [`PackOrigin`] asks.
#[derive(Debug, Clone)]
pub struct OriginOptions {
    /// Range requests under way at once, over all readers of the image.
    pub concurrency: usize,
    /// Of those, how many one [`Tier::fetch`] may have, so that one large request for many chunks
    /// leaves room for others.
    pub concurrency_per_fetch: usize,
    /// One attempt may take this long, and a second more for each 128 KiB it asks for.
    pub attempt_timeout: Duration,
    /// How often one request is made before its chunks fail.
    pub max_attempts: u32,
    /// How long after its begin a fetch waits while the circuit breaker of its registry is open. A
    /// little longer than [`BreakerOptions::longest_rest`], and every fetch either is a probe or
    /// hears of one. Zero: it fails at once.
    pub breaker_wait: Duration,
    /// A short request that has no answer when most have one, and not before this, is sent a second
    /// time, as long as such hedges are at most 5 % of the registry's requests.
    pub hedge_floor: Duration,
}

impl Default for OriginOptions {
    fn default() -> Self {
        Self {
            concurrency: 16,
            concurrency_per_fetch: 6,
            attempt_timeout: Duration::from_secs(10),
            max_attempts: 4,
            breaker_wait: Duration::from_secs(3),
            hedge_floor: Duration::from_millis(250),
        }
    }
}

/// A [`Tier`] over [`BlobRanges`]: neighbouring chunks in one request, few requests at once, a few
/// attempts for each.
pub struct PackOrigin {
    name: String,
    blobs: Arc<dyn BlobRanges>,
    options: OriginOptions,
    places: Semaphore,
    guard: Arc<Guard>,
    /// Whether others have the guard too: then its name says which servers these are.
    shared: bool,
    sent: AtomicU64,
    retries: AtomicU64,
    hedges: AtomicU64,
    hedges_won: AtomicU64,
}

impl PackOrigin {
    /// The tier `name` over `blobs`, with a guard of its own.
    pub fn new(name: &str, blobs: Arc<dyn BlobRanges>, options: OriginOptions) -> Self {
        Self {
            name: name.to_owned(),
            blobs,
            places: Semaphore::new(options.concurrency.max(1)),
            options,
            guard: Arc::new(Guard::new(name, BreakerOptions::default())),
            shared: false,
            sent: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            hedges: AtomicU64::new(0),
            hedges_won: AtomicU64::new(0),
        }
    }

    /// With the guard of its registry, [`crate::Guards::of`] its host: so retry budget, hedges and
    /// circuit breaker are those of the registry, however many images come from it.
    pub fn guarded(mut self, guard: Arc<Guard>) -> Self {
        self.guard = guard;
        self.shared = true;
        self
    }

    /// One request and what becomes of its chunks.
    async fn serve(&self, run: Run, patience: Instant, sink: &mpsc::Sender<Delivery>) {
        // The semaphore is never closed.
        let Ok(_place) = self.places.acquire().await else {
            return;
        };
        let answer = self.ask(&run, patience).await.map_err(Arc::new);
        for member in &run.members {
            let result = match &answer {
                Ok(bytes) => Ok(owned(bytes, member.start..member.start + member.len)),
                Err(e) => Err(FetchError::Shared(Arc::clone(e))),
            };
            if sink.send((member.index, result)).await.is_err() {
                return;
            }
        }
    }

    /// The bytes of a run, tried a few times. It waits for an open breaker until `patience`.
    async fn ask(&self, run: &Run, patience: Instant) -> Result<Bytes, FetchError> {
        let mut attempt = 1;
        loop {
            let pass = match self.guard.enter_until(patience).await {
                Ok(pass) => pass,
                Err(refused) => return Err(gave_up(attempt - 1, refused)),
            };
            let answer = self.hedged(run).await;
            pass.end(&answer);
            let error = match answer {
                Ok(bytes) => return Ok(bytes),
                Err(e) => e,
            };
            let pause = match &error {
                FetchError::Unavailable { retry_after, .. } => {
                    retry::pause(attempt, *retry_after, retry::random())
                }
                e if e.is_retryable() => retry::pause(attempt, None, retry::random()),
                _ => None,
            };
            let Some(pause) =
                pause.filter(|_| attempt < self.options.max_attempts && self.guard.may_retry())
            else {
                return Err(gave_up(attempt, error));
            };
            tracing::debug!(tier = self.name, pack = %run.pack, attempt, %error, "trying again in {pause:?}");
            tokio::time::sleep(pause).await;
            self.retries.fetch_add(1, Relaxed);
            attempt += 1;
        }
    }

    /// One attempt; a second one beside it when the first is slow and may be asked twice.
    async fn hedged(&self, run: &Run) -> Result<Bytes, FetchError> {
        if run.len > LONGEST_HEDGED {
            return self.attempt(run).await;
        }
        let begun = Instant::now();
        let mut first = std::pin::pin!(self.attempt(run));
        let answer = match self.guard.hedge_after(self.options.hedge_floor) {
            None => first.await,
            Some(after) => match tokio::time::timeout(after, first.as_mut()).await {
                Ok(answer) => answer,
                Err(_) if !self.guard.may_hedge() => first.await,
                Err(_) => {
                    self.hedges.fetch_add(1, Relaxed);
                    let second = std::pin::pin!(self.attempt(run));
                    let (answer, hedge_won) = first_good(first, second).await;
                    self.hedges_won.fetch_add(u64::from(hedge_won), Relaxed);
                    answer
                }
            },
        };
        if answer.is_ok() {
            self.guard.first_byte(begun.elapsed());
        }
        answer
    }

    async fn attempt(&self, run: &Run) -> Result<Bytes, FetchError> {
        let limit =
            self.options.attempt_timeout + Duration::from_secs(run.len.div_ceil(SLOWEST_LINK));
        self.sent.fetch_add(1, Relaxed);
        let read = self.blobs.read_range(&run.pack, run.offset, run.len);
        let bytes = tokio::time::timeout(limit, read)
            .await
            .map_err(|_| FetchError::TimedOut(limit))??;
        if bytes.len() as u64 != run.len {
            // A connection that ended early, most likely.
            return Err(FetchError::unavailable(format!(
                "{} bytes instead of {} from byte {} of {}",
                bytes.len(),
                run.len,
                run.offset,
                run.pack
            )));
        }
        Ok(bytes)
    }
}

/// A chunk of a run, in memory of its own: the queues behind are bounded by the lengths of chunks, and
/// a slice would keep the whole run, a hundred times longer, for as long as it waits there.
fn owned(run: &Bytes, range: std::ops::Range<usize>) -> Bytes {
    match range.len() == run.len() {
        true => run.clone(),
        false => Bytes::copy_from_slice(&run[range]),
    }
}

/// An error after so many attempts.
fn gave_up(attempts: u32, error: FetchError) -> FetchError {
    match attempts {
        0 | 1 => error,
        attempts => FetchError::GaveUp {
            attempts,
            last: Box::new(error),
        },
    }
}

/// The first good answer of two, else the first one's failure; and whether it is the second's.
async fn first_good(
    mut first: impl Future<Output = Result<Bytes, FetchError>> + Unpin,
    mut second: impl Future<Output = Result<Bytes, FetchError>> + Unpin,
) -> (Result<Bytes, FetchError>, bool) {
    tokio::select! {
        answer = &mut first => match answer {
            Ok(bytes) => (Ok(bytes), false),
            Err(error) => match second.await {
                Ok(bytes) => (Ok(bytes), true),
                Err(_) => (Err(error), false),
            },
        },
        answer = &mut second => match answer {
            Ok(bytes) => (Ok(bytes), true),
            Err(_) => (first.await, false),
        },
    }
}

#[async_trait]
impl Tier for PackOrigin {
    fn name(&self) -> &str {
        &self.name
    }

    fn origin(&self) -> Option<&str> {
        self.shared.then(|| self.guard.origin())
    }

    fn health(&self) -> TierHealth {
        TierHealth {
            sent: self.sent.load(Relaxed),
            retries: self.retries.load(Relaxed),
            hedges: self.hedges.load(Relaxed),
            hedges_won: self.hedges_won.load(Relaxed),
            origins: vec![self.guard.health()],
            ..TierHealth::default()
        }
    }

    async fn fetch(&self, chunks: &[ChunkRef], sink: mpsc::Sender<Delivery>) {
        let (runs, refused) = plan::plan(chunks);
        for (index, error) in refused {
            if sink.send((index, Err(error))).await.is_err() {
                return;
            }
        }
        let patience = Instant::now() + self.options.breaker_wait;
        let all = futures_util::stream::iter(runs)
            .for_each_concurrent(self.options.concurrency_per_fetch.max(1), |run| {
                self.serve(run, patience, &sink)
            });
        let all = std::pin::pin!(all);
        tokio::select! {
            () = all => {}
            () = sink.closed() => {}
        }
    }
}
