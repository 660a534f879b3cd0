//! Asking an image's tiers, nearest first, until every chunk has come or every tier has failed.
//!
//! What a tier does not have is asked of the next one while the first is still delivering the rest:
//! failures gather for a moment, and go on in one request.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use lazyimg_convergent::ChunkId;
use tokio::sync::mpsc;

use super::Image;
use super::read::Patience;
use crate::{ChunkRef, Delivery, FetchError, Offer, Tier, TierFailure};

/// Deliveries that may wait for their check. More would only lie in memory.
const DELIVERIES: usize = 8;
/// Chunks that a tier failed to give go on to the next when nothing more has come for this long,
const GATHER: Duration = Duration::from_millis(1);
/// or when they have waited for this long.
const LONGEST_GATHER: Duration = Duration::from_millis(50);
/// Requests under way to one tier in one walk.
const ROUNDS: usize = 4;

/// What happens to chunks while tiers are asked. Indices are into the chunks of [`walk`].
pub trait Progress: Send {
    /// `tier` is asked for this chunk.
    fn asking(&mut self, index: usize, tier: &str);
    /// `tier` gave it: its length and its id are right. Last call for this chunk.
    fn arrived(&mut self, index: usize, bytes: Bytes, tier: &str);
    /// `tier` did not give it.
    fn failed(&mut self, index: usize, failure: TierFailure);
    /// Whether nearer tiers are offered what arrives, for this reason. Always the same.
    fn offers(&self, _why: Offer) -> bool {
        true
    }
}

/// Asks the tiers of `image` for `chunks`, for as long as a fetch may take.
pub async fn walk(
    image: &Image,
    chunks: &[ChunkRef],
    patience: Patience,
    progress: &mut dyn Progress,
) {
    if chunks.is_empty() || image.tiers.is_empty() {
        return;
    }
    let (events, mut inbox) = mpsc::channel(DELIVERIES);
    let mut walk = Walk {
        image,
        chunks,
        deadline: Instant::now() + patience.fetch,
        reader: patience.wait,
        progress,
        waiting: image.tiers.iter().map(|_| Waiting::default()).collect(),
        running: vec![0; image.tiers.len()],
        rounds: Vec::new(),
        wishes: chunks.iter().map(|_| Vec::new()).collect(),
    };
    walk.waiting[0].chunks = (0..chunks.len()).collect();
    let mut fetching = FuturesUnordered::new();
    let mut idle = false;
    loop {
        for position in 0..image.tiers.len() {
            if walk.may_ask(position, idle) {
                let (round, wanted, limit) = walk.ask(position);
                let tier = image.tiers[position].0.as_ref();
                let brings = walk.progress.offers(Offer::Missing);
                fetching.push(run(tier, wanted, brings, limit, round, events.clone()));
            }
        }
        if walk.running.iter().all(|n| *n == 0) {
            return;
        }
        let gathering = walk.waiting.iter().any(|w| !w.chunks.is_empty());
        // In this order: only when nothing can be done at once does the pause begin.
        tokio::select! {
            biased;
            Some(event) = inbox.recv() => {
                idle = false;
                walk.take(event);
            }
            Some(()) = fetching.next() => {}
            () = tokio::time::sleep(GATHER), if gathering && !idle => idle = true,
        }
    }
}

/// What one request to a tier says.
enum Event {
    /// A delivery of this round.
    Delivery(usize, Delivery),
    /// The round is over; in time or not.
    Ended(usize, bool),
}

/// One request to one tier. `brings`: it is offered what it lacks.
async fn run(
    tier: &dyn Tier,
    wanted: Vec<ChunkRef>,
    brings: bool,
    limit: Duration,
    round: usize,
    events: mpsc::Sender<Event>,
) {
    let (sink, mut deliveries) = mpsc::channel(DELIVERIES);
    let fetching = async {
        match brings {
            true => tier.fetch(&wanted, sink).await,
            false => tier.look(&wanted, sink).await,
        }
    };
    let passing_on = async {
        while let Some(delivery) = deliveries.recv().await {
            // The walk outlives its rounds.
            let _ = events.send(Event::Delivery(round, delivery)).await;
        }
    };
    let both = async {
        tokio::join!(fetching, passing_on);
    };
    let in_time = tokio::time::timeout(limit, both).await.is_ok();
    let _ = events.send(Event::Ended(round, in_time)).await;
}

struct Walk<'a> {
    image: &'a Image,
    chunks: &'a [ChunkRef],
    deadline: Instant,
    /// How long a reader waits.
    reader: Duration,
    progress: &'a mut dyn Progress,
    /// For each tier, what it has still to be asked for.
    waiting: Vec<Waiting>,
    /// For each tier, the requests under way.
    running: Vec<usize>,
    rounds: Vec<Round>,
    /// For each chunk, the tiers that would like to have it.
    wishes: Vec<Vec<(usize, Offer)>>,
}

/// Chunks for the next request to a tier.
#[derive(Default)]
struct Waiting {
    chunks: Vec<usize>,
    since: Option<Instant>,
}

struct Round {
    position: usize,
    /// What was asked for, as indices into the walk's chunks.
    asked: Vec<usize>,
    settled: Vec<bool>,
    begun: Instant,
    limit: Duration,
}

impl Walk<'_> {
    fn may_ask(&self, position: usize, idle: bool) -> bool {
        let waiting = &self.waiting[position];
        if waiting.chunks.is_empty() || self.running[position] >= ROUNDS {
            return false;
        }
        let more_may_come = (0..position)
            .any(|nearer| self.running[nearer] > 0 || !self.waiting[nearer].chunks.is_empty());
        let long = waiting
            .since
            .is_some_and(|since| since.elapsed() >= LONGEST_GATHER);
        !more_may_come || idle || long
    }

    /// Begins a round with all that waits for a tier.
    fn ask(&mut self, position: usize) -> (usize, Vec<ChunkRef>, Duration) {
        let asked = std::mem::take(&mut self.waiting[position]).chunks;
        let (tier, stats) = &self.image.tiers[position];
        for index in &asked {
            self.progress.asking(*index, tier.name());
        }
        stats.requests.fetch_add(1, Relaxed);
        self.running[position] += 1;
        // A tier that hangs must leave time for those behind it, within the time of the reader: that
        // is half of the fetch's, which goes on for the reader's next attempt, or less: a fetch may
        // outlive a reader of little patience.
        let tiers_left = (self.image.tiers.len() - position) as u32;
        let now = Instant::now();
        let left = self.deadline.saturating_duration_since(now);
        let share = match tiers_left {
            1 => left,
            more => (left / (2 * more)).min(self.reader / more),
        };
        let limit = tier.deadline().map_or(share, |own| own.min(share));
        let wanted = asked.iter().map(|index| self.chunks[*index]).collect();
        self.rounds.push(Round {
            position,
            settled: vec![false; asked.len()],
            asked,
            begun: now,
            limit,
        });
        (self.rounds.len() - 1, wanted, limit)
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Delivery(round, (at, result)) => self.delivered(round, at, result),
            Event::Ended(round, in_time) => {
                for at in 0..self.rounds[round].asked.len() {
                    let error = if in_time {
                        FetchError::NotFound("the tier sent nothing for it".to_owned())
                    } else {
                        FetchError::TimedOut(self.rounds[round].limit)
                    };
                    self.delivered(round, at, Err(error));
                }
                self.running[self.rounds[round].position] -= 1;
            }
        }
    }

    fn delivered(&mut self, round: usize, at: usize, result: Result<Bytes, FetchError>) {
        let round = &mut self.rounds[round];
        // A tier that answers twice, or what nobody asked for, is not listened to.
        if round.settled.get(at).is_none_or(|settled| *settled) {
            return;
        }
        round.settled[at] = true;
        let (index, position, waited) = (round.asked[at], round.position, round.begun.elapsed());
        let chunk = &self.chunks[index];
        match result.and_then(|bytes| check(chunk, bytes)) {
            Ok(bytes) => self.arrived(index, position, bytes, waited),
            Err(error) => self.failed(index, position, error),
        }
    }

    fn arrived(&mut self, index: usize, position: usize, bytes: Bytes, waited: Duration) {
        let (tier, stats) = &self.image.tiers[position];
        stats.delivered.add(bytes.len());
        stats.latency.add(waited);
        for (nearer, why) in std::mem::take(&mut self.wishes[index]) {
            if self.progress.offers(why) {
                let (tier, _) = &self.image.tiers[nearer];
                tier.offer(&self.chunks[index].id, &bytes, why);
            }
        }
        self.progress.arrived(index, bytes, tier.name());
    }

    fn failed(&mut self, index: usize, position: usize, error: FetchError) {
        let (tier, stats) = &self.image.tiers[position];
        stats.failed(&error);
        match error.root() {
            FetchError::NotFound(_) => self.wishes[index].push((position, Offer::Missing)),
            FetchError::Corrupt(_) => {
                self.wishes[index].push((position, Offer::WasWrong));
                if !stats.corruption_logged.swap(true, Relaxed) {
                    let chunk = &self.chunks[index].id;
                    tracing::error!(tier = tier.name(), %chunk, %error, "a tier gave wrong bytes; they were thrown away (logged once for each tier of a mount)");
                }
            }
            _ => {}
        }
        let failure = TierFailure {
            tier: tier.name().to_owned(),
            error: Arc::new(error),
        };
        self.progress.failed(index, failure);
        if let Some(next) = self.waiting.get_mut(position + 1) {
            next.chunks.push(index);
            next.since.get_or_insert_with(Instant::now);
        }
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
