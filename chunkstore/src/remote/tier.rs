//! The store as a tier.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_convergent::ChunkId;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::client::{Got, StoreClient};
use super::fetch::Effort;
use super::write_back::WriteBack;
use crate::{ChunkRef, Delivery, FetchError, MAX_FETCH, Offer, Tier, TierHealth};

/// The name of the store among the tiers.
pub const STORE_TIER: &str = "store";

/// Answers under way from the client to the caller.
const ANSWERS: usize = 8;

/// How long a busy host may take to bring what it was told to before others fetch it too: half of a
/// lease. Who waits for a host that has died waits in vain, but once only.
const LEASE_WAIT: Duration = Duration::from_secs(5);

/// How long one that rests is waited for by who only looks, one batch of chunks after another.
const LOOK_PATIENCE: Duration = Duration::from_secs(3);

/// How a [`StoreTier`] behaves.
#[derive(Debug, Clone)]
pub struct StoreTierOptions {
    /// Whether another tier is asked for what this one does not have or cannot give: then it gives
    /// up soon. Else it tries as long as the reader waits.
    pub tier_behind: bool,
    /// How long a chunk that another host is bringing is waited for, where there is a tier behind.
    /// Zero: not at all, and no lease is taken.
    pub lease_wait: Duration,
    /// The longest that one fetch may take, where there is a tier behind and that is less than the
    /// fetch's share of the reader's time.
    pub deadline: Duration,
    /// Whether chunks of the tiers behind are put into the store.
    pub write_back: bool,
    /// Bytes that may wait to be put. Further ones are dropped: the next host brings them.
    pub write_back_bytes: usize,
    /// Chunks being put at once.
    pub write_back_requests: usize,
    /// How long nothing is put after the store refused to take a chunk: no right, no quota, no room.
    pub write_back_rest: Duration,
}

impl Default for StoreTierOptions {
    fn default() -> Self {
        Self {
            tier_behind: true,
            lease_wait: LEASE_WAIT,
            deadline: Duration::from_secs(10),
            write_back: true,
            write_back_bytes: 32 << 20,
            write_back_requests: 4,
            write_back_rest: Duration::from_secs(60),
        }
    }
}

/// The store as a tier, shared by all mounts that use it with the same token.
pub struct StoreTier {
    client: StoreClient,
    options: StoreTierOptions,
    write_back: Option<WriteBack>,
}

impl StoreTier {
    /// Over `client`; what is written back is put by tasks of `runtime`.
    pub fn new(client: StoreClient, options: StoreTierOptions, runtime: &Handle) -> Self {
        let write_back = options.write_back.then(|| {
            WriteBack::new(
                client.clone(),
                options.write_back_bytes,
                options.write_back_requests,
                options.write_back_rest,
                runtime,
            )
        });
        Self {
            client,
            options,
            write_back,
        }
    }

    /// The client.
    pub fn client(&self) -> &StoreClient {
        &self.client
    }

    /// Waits until what was offered so far is in the store, or was given up.
    pub async fn settle(&self) {
        if let Some(write_back) = &self.write_back {
            write_back.settle().await;
        }
    }

    /// How long to wait for chunks that others bring, and of how many bytes we could bring chunks
    /// ourselves; `None` when we would not bring any.
    fn lease_wait(&self) -> Option<(Duration, u64)> {
        let write_back = self.write_back.as_ref().filter(|w| !w.is_resting())?;
        let wait = self.options.lease_wait;
        (self.options.tier_behind && !wait.is_zero()).then(|| (wait, write_back.room()))
    }

    /// How hard to try for chunks that are waited for so long.
    fn effort(&self, patience: Duration) -> Effort {
        match self.options.tier_behind {
            true => Effort::Brief,
            false => Effort::Patient(patience),
        }
    }

    /// Asks for `ids`; gives back the places in it of those that are missing, or, with a wait of
    /// zero, of those that somebody else brings.
    async fn ask(
        &self,
        asked: &[(usize, ChunkId)],
        wait: Option<Duration>,
        effort: Effort,
        sink: &mpsc::Sender<Delivery>,
    ) -> Vec<(usize, ChunkId)> {
        let waits = wait.is_some_and(|wait| !wait.is_zero());
        let ids: Vec<ChunkId> = asked.iter().map(|(_, id)| *id).collect();
        let (answers, mut inbox) = mpsc::channel(ANSWERS);
        let asking = async move {
            self.client.get_many(&ids, wait, effort, &answers).await;
        };
        // At its end `inbox` is dropped: nobody wants the rest.
        let receiving = async move {
            let mut missing = Vec::new();
            while let Some((at, got)) = inbox.recv().await {
                let index = asked[at].0;
                let delivery = match got {
                    Got::Chunk(bytes) => Ok(bytes),
                    Got::Missing => {
                        missing.push(asked[at]);
                        continue;
                    }
                    Got::Coming if !waits => {
                        missing.push(asked[at]);
                        continue;
                    }
                    Got::Yours => Err(FetchError::NotFound(
                        "the store does not have it and waits for it".to_owned(),
                    )),
                    Got::Coming => Err(FetchError::NotFound(
                        "another host brings it to the store, and it has not come yet".to_owned(),
                    )),
                    Got::Damaged => Err(FetchError::Corrupt(
                        "the store found its own copy damaged".to_owned(),
                    )),
                    Got::Failed(error) => Err(error.to_fetch()),
                };
                if sink.send((index, delivery)).await.is_err() {
                    break;
                }
            }
            missing
        };
        tokio::join!(asking, receiving).1
    }
}

/// How many of `missing`, places in `chunks`, are not longer than `room` together, in bytes.
fn fitting(chunks: &[ChunkRef], missing: &[(usize, ChunkId)], room: u64) -> usize {
    let mut left = room;
    let fits = missing.iter().take_while(|(at, _)| {
        let rest = left.checked_sub(u64::from(chunks[*at].stored_len));
        left = rest.unwrap_or(0);
        rest.is_some()
    });
    fits.count()
}

/// Sends that these are missing; false when nobody wants to know.
async fn tell_missing(missing: Vec<(usize, ChunkId)>, sink: &mpsc::Sender<Delivery>) -> bool {
    for (index, _) in missing {
        let error = FetchError::NotFound("the store does not have it".to_owned());
        if sink.send((index, Err(error))).await.is_err() {
            return false;
        }
    }
    true
}

#[async_trait]
impl Tier for StoreTier {
    fn name(&self) -> &str {
        STORE_TIER
    }

    /// First all that is there, without waiting for anything; then, where a tier behind this one may
    /// have the rest, who is to bring it; at last what others bring.
    ///
    /// Two requests for the last two: answers come in the order asked, and that a chunk is ours to
    /// bring must not stand behind the wait for another one. Two hosts that hold what the other waits
    /// for would wait in vain.
    async fn fetch(&self, chunks: &[ChunkRef], sink: mpsc::Sender<Delivery>) {
        let all: Vec<_> = chunks.iter().map(|chunk| chunk.id).enumerate().collect();
        // The caller ends it when the reader's time is over.
        let effort = self.effort(MAX_FETCH);
        let mut missing = self.ask(&all, None, effort, &sink).await;
        if let Some((wait, room)) = self.lease_wait() {
            // A lease on what we could not keep until it is put would only hold others up.
            let fits = fitting(chunks, &missing, room);
            let beyond = missing.split_off(fits);
            if !tell_missing(beyond, &sink).await {
                return;
            }
            for wait in [Duration::ZERO, wait] {
                if !missing.is_empty() && !sink.is_closed() {
                    missing = self.ask(&missing, Some(wait), effort, &sink).await;
                }
            }
        }
        tell_missing(missing, &sink).await;
    }

    /// No lease, since nobody would bring the chunk.
    async fn look(&self, chunks: &[ChunkRef], sink: mpsc::Sender<Delivery>) {
        let all: Vec<_> = chunks.iter().map(|chunk| chunk.id).enumerate().collect();
        let effort = self.effort(LOOK_PATIENCE);
        let missing = self.ask(&all, None, effort, &sink).await;
        tell_missing(missing, &sink).await;
    }

    fn offer(&self, id: &ChunkId, bytes: &Bytes, why: Offer) {
        if let Some(write_back) = &self.write_back {
            write_back.offer(id, bytes, why);
        }
    }

    fn origin(&self) -> Option<&str> {
        Some(self.client.origin())
    }

    fn deadline(&self) -> Option<Duration> {
        self.options.tier_behind.then_some(self.options.deadline)
    }

    fn health(&self) -> TierHealth {
        TierHealth {
            write_back: self
                .write_back
                .as_ref()
                .map(WriteBack::snapshot)
                .unwrap_or_default(),
            ..self.client.health()
        }
    }
}
