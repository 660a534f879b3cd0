//! The registry as a tier: packs read by ranges.

mod plan;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::{Semaphore, mpsc};

use crate::retry::{self, RetryBudget};
use crate::tier::Delivery;
use crate::{BlobRanges, ChunkRef, FetchError, Tier};
use plan::Run;

/// The slowest link on which an attempt may still finish, in bytes per second: an attempt's time
/// grows with its length by this.
const SLOWEST_LINK: u64 = 128 << 10;

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
}

impl Default for OriginOptions {
    fn default() -> Self {
        Self {
            concurrency: 16,
            concurrency_per_fetch: 6,
            attempt_timeout: Duration::from_secs(10),
            max_attempts: 4,
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
    budget: RetryBudget,
}

impl PackOrigin {
    /// The tier `name` over `blobs`.
    pub fn new(name: &str, blobs: Arc<dyn BlobRanges>, options: OriginOptions) -> Self {
        Self {
            name: name.to_owned(),
            blobs,
            places: Semaphore::new(options.concurrency.max(1)),
            options,
            budget: RetryBudget::new(),
        }
    }

    /// One request and what becomes of its chunks.
    async fn serve(&self, run: Run, sink: &mpsc::Sender<Delivery>) {
        // The semaphore is never closed.
        let Ok(_place) = self.places.acquire().await else {
            return;
        };
        let answer = self.ask(&run).await.map_err(Arc::new);
        for member in &run.members {
            let result = match &answer {
                Ok(bytes) => Ok(bytes.slice(member.start..member.start + member.len)),
                Err(e) => Err(FetchError::Shared(Arc::clone(e))),
            };
            if sink.send((member.index, result)).await.is_err() {
                return;
            }
        }
    }

    /// The bytes of a run, tried a few times.
    async fn ask(&self, run: &Run) -> Result<Bytes, FetchError> {
        let mut attempt = 1;
        loop {
            let error = match self.attempt(run).await {
                Ok(bytes) => {
                    self.budget.put_back();
                    return Ok(bytes);
                }
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
                pause.filter(|_| attempt < self.options.max_attempts && self.budget.take())
            else {
                return Err(match attempt {
                    1 => error,
                    attempts => FetchError::GaveUp {
                        attempts,
                        last: Box::new(error),
                    },
                });
            };
            tracing::debug!(tier = self.name, pack = %run.pack, attempt, %error, "trying again in {pause:?}");
            tokio::time::sleep(pause).await;
            attempt += 1;
        }
    }

    async fn attempt(&self, run: &Run) -> Result<Bytes, FetchError> {
        let limit =
            self.options.attempt_timeout + Duration::from_secs(run.len.div_ceil(SLOWEST_LINK));
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

#[async_trait]
impl Tier for PackOrigin {
    fn name(&self) -> &str {
        &self.name
    }

    async fn fetch(&self, chunks: &[ChunkRef], sink: mpsc::Sender<Delivery>) {
        let (runs, refused) = plan::plan(chunks);
        for (index, error) in refused {
            if sink.send((index, Err(error))).await.is_err() {
                return;
            }
        }
        let all = futures_util::stream::iter(runs)
            .for_each_concurrent(self.options.concurrency_per_fetch.max(1), |run| {
                self.serve(run, &sink)
            });
        let all = std::pin::pin!(all);
        tokio::select! {
            () = all => {}
            () = sink.closed() => {}
        }
    }
}
