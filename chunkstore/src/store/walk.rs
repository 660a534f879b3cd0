//! Asking an image's tiers, nearest first, until every chunk has come or every tier has failed.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lazyimg_convergent::ChunkId;
use tokio::sync::mpsc;

use super::Image;
use crate::stats::TierStats;
use crate::{ChunkRef, FetchError, Tier, TierFailure};

/// Deliveries that may wait for their check. More would only lie in memory.
const DELIVERIES: usize = 8;

/// What happens to chunks while tiers are asked. Indices are into the chunks of [`walk`].
pub trait Progress: Send {
    /// `tier` is asked for this chunk.
    fn asking(&mut self, index: usize, tier: &str);
    /// `tier` gave it: its length and its id are right. Last call for this chunk.
    fn arrived(&mut self, index: usize, bytes: Bytes, tier: &str);
    /// `tier` did not give it.
    fn failed(&mut self, index: usize, failure: TierFailure);
}

/// Asks the tiers of `image` for `chunks`, in one request each, until `deadline`.
pub async fn walk(
    image: &Image,
    chunks: &[ChunkRef],
    deadline: Instant,
    progress: &mut dyn Progress,
) {
    let mut missing: Vec<usize> = (0..chunks.len()).collect();
    for (position, (tier, stats)) in image.tiers.iter().enumerate() {
        if missing.is_empty() {
            return;
        }
        for index in &missing {
            progress.asking(*index, tier.name());
        }
        // A tier that hangs must leave time for those behind it.
        let tiers_left = (image.tiers.len() - position) as u32;
        let share = deadline.saturating_duration_since(Instant::now()) / tiers_left;
        let mut round = Round {
            tier: tier.as_ref(),
            stats,
            chunks,
            asked: &missing,
            done: vec![false; missing.len()],
            failed: vec![false; missing.len()],
            progress: &mut *progress,
        };
        round.run(share).await;
        let done = round.done;
        missing = missing
            .into_iter()
            .zip(done)
            .filter_map(|(index, done)| (!done).then_some(index))
            .collect();
    }
}

/// One request to one tier.
struct Round<'a> {
    tier: &'a dyn Tier,
    stats: &'a TierStats,
    chunks: &'a [ChunkRef],
    /// What is asked for, as indices into `chunks`; the flags go with it.
    asked: &'a [usize],
    done: Vec<bool>,
    failed: Vec<bool>,
    progress: &'a mut dyn Progress,
}

impl Round<'_> {
    async fn run(&mut self, share: Duration) {
        self.stats.requests.fetch_add(1, Relaxed);
        let wanted: Vec<ChunkRef> = self.asked.iter().map(|i| self.chunks[*i]).collect();
        let (sink, mut deliveries) = mpsc::channel(DELIVERIES);
        let tier = self.tier;
        let fetching = tier.fetch(&wanted, sink);
        let receiving = async {
            while let Some((at, result)) = deliveries.recv().await {
                self.take(at, result);
            }
        };
        let both = async {
            tokio::join!(fetching, receiving);
        };
        let in_time = tokio::time::timeout(share, both).await.is_ok();
        for at in 0..self.asked.len() {
            if !self.done[at] && !self.failed[at] {
                self.fail(
                    at,
                    if in_time {
                        FetchError::NotFound("the tier sent nothing for it".to_owned())
                    } else {
                        FetchError::TimedOut(share)
                    },
                );
            }
        }
    }

    fn take(&mut self, at: usize, result: Result<Bytes, FetchError>) {
        // A tier that answers twice, or what nobody asked for, is not listened to.
        if at >= self.asked.len() || self.done[at] || self.failed[at] {
            return;
        }
        let index = self.asked[at];
        let chunk = &self.chunks[index];
        match result.and_then(|bytes| check(chunk, bytes)) {
            Ok(bytes) => {
                self.stats.delivered.add(bytes.len());
                self.done[at] = true;
                self.progress.arrived(index, bytes, self.tier.name());
            }
            Err(error) => {
                if matches!(error, FetchError::Corrupt(_)) {
                    self.corrupt(chunk, &error);
                }
                self.fail(at, error);
            }
        }
    }

    fn corrupt(&self, chunk: &ChunkRef, error: &FetchError) {
        self.stats.corrupt.fetch_add(1, Relaxed);
        if !self.stats.corruption_logged.swap(true, Relaxed) {
            tracing::error!(tier = self.tier.name(), chunk = %chunk.id, %error, "a tier gave wrong bytes; they were thrown away (logged once for each tier of a mount)");
        }
    }

    fn fail(&mut self, at: usize, error: FetchError) {
        self.failed[at] = true;
        self.stats.failures.fetch_add(1, Relaxed);
        let failure = TierFailure {
            tier: self.tier.name().to_owned(),
            error: Arc::new(error),
        };
        self.progress.failed(self.asked[at], failure);
    }
}

/// Only bytes that pass this are kept or used.
fn check(chunk: &ChunkRef, bytes: Bytes) -> Result<Bytes, FetchError> {
    if bytes.len() != chunk.stored_len as usize {
        return Err(FetchError::Corrupt(format!(
            "{} bytes instead of {}",
            bytes.len(),
            chunk.stored_len
        )));
    }
    let actual = ChunkId::of(&bytes);
    if actual != chunk.id {
        return Err(FetchError::Corrupt(format!("their hash is {actual}")));
    }
    Ok(bytes)
}
