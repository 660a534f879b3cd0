//! Reading chunks: this host first, else a flight.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;

use super::local::{Local, check_spec};
use super::walk::{Progress, walk};
use super::{Image, MAX_FETCH, StoreOptions};
use crate::cache::Lookup;
use crate::flight::{Ticket, Waiter};
use crate::{ChunkRef, ChunkSpec, ReadError, TierFailure};
use lazyimg_convergent::ChunkId;

type Outcome = Result<Bytes, ReadError>;

/// A reader waits a little longer than the fetch that it waits for, to hear its causes.
const GRACE: Duration = Duration::from_millis(500);

/// How long a reader waits, and how long a fetch may take that it begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Patience {
    /// Of the reader.
    pub wait: Duration,
    /// Of the fetch, over all tiers.
    pub fetch: Duration,
}

impl Patience {
    /// The store's own: as long as its fetches take.
    pub fn of_store(options: &StoreOptions) -> Self {
        Self {
            wait: options.fetch_deadline + GRACE,
            fetch: options.fetch_deadline,
        }
    }

    /// A reader's who waits at most `limit`, and comes again when that was not enough.
    pub fn of_reader(limit: Duration, options: &StoreOptions) -> Self {
        let both_times = limit.saturating_mul(2).min(MAX_FETCH);
        Self {
            wait: limit,
            fetch: both_times.max(options.fetch_deadline),
        }
    }
}

/// One chunk, from this host only.
pub fn try_local(image: &Image, spec: &ChunkSpec) -> Option<Bytes> {
    match image.local(spec) {
        Local::Plain(plain) => image.counted(Ok(plain)).ok(),
        // Not counted: the caller goes on to a read that counts.
        Local::Missing | Local::Broken(_) => None,
    }
}

/// One chunk, for a thread outside the runtime.
pub fn read_blocking(image: &Arc<Image>, spec: &ChunkSpec, deadline: Duration) -> Outcome {
    match image.local(spec) {
        Local::Plain(plain) => return image.counted(Ok(plain)),
        Local::Broken(e) => return image.counted(Err(e)),
        Local::Missing => {}
    }
    let begun = Instant::now();
    let patience = Patience::of_reader(deadline, &image.host.options);
    let (done, wait) = mpsc::sync_channel(1);
    let (task_image, task_spec) = (Arc::clone(image), spec.clone());
    image.host.runtime.spawn(async move {
        let outcome = fetched(&task_image, &task_spec, begun, patience).await;
        let _ = done.send(outcome);
    });
    // The task keeps the deadline; this bounds a runtime that is stuck or gone.
    let outcome = wait
        .recv_timeout(deadline.saturating_add(GRACE))
        .unwrap_or_else(|e| {
            Err(match e {
                mpsc::RecvTimeoutError::Timeout => ReadError::TimedOut {
                    id: *spec.id(),
                    waited: begun.elapsed(),
                    failures: Vec::new(),
                },
                mpsc::RecvTimeoutError::Disconnected => ReadError::Abandoned { id: *spec.id() },
            })
        });
    image.counted(outcome)
}

/// Several chunks, for a thread outside the runtime.
pub fn read_many_blocking(
    image: &Arc<Image>,
    specs: &[ChunkSpec],
    deadline: Duration,
) -> Vec<Outcome> {
    let begun = Instant::now();
    let patience = Patience::of_reader(deadline, &image.host.options);
    let (done, wait) = mpsc::sync_channel(1);
    let (task_image, task_specs) = (Arc::clone(image), specs.to_vec());
    image.host.runtime.spawn(async move {
        let _ = done.send(read_many(&task_image, &task_specs, patience).await);
    });
    wait.recv_timeout(deadline.saturating_add(GRACE))
        .unwrap_or_else(|_| {
            specs
                .iter()
                .map(|spec| {
                    image.counted(Err(ReadError::TimedOut {
                        id: *spec.id(),
                        waited: begun.elapsed(),
                        failures: Vec::new(),
                    }))
                })
                .collect()
        })
}

/// One chunk.
pub async fn read(image: &Arc<Image>, spec: &ChunkSpec, patience: Patience) -> Outcome {
    let outcome = match image.local(spec) {
        Local::Plain(plain) => Ok(plain),
        Local::Broken(e) => Err(e),
        Local::Missing => fetched(image, spec, Instant::now(), patience).await,
    };
    image.counted(outcome)
}

/// Several chunks.
pub async fn read_many(
    image: &Arc<Image>,
    specs: &[ChunkSpec],
    patience: Patience,
) -> Vec<Outcome> {
    let begun = Instant::now();
    let mut led = Vec::new();
    // First all that is missing takes off, in one request; then everybody waits.
    let places: Vec<_> = specs
        .iter()
        .map(|spec| match image.local(spec) {
            Local::Plain(plain) => Err(Ok(plain)),
            Local::Broken(e) => Err(Err(e)),
            Local::Missing => Ok(image.join(spec, &mut led)),
        })
        .collect();
    image.take_off(led, patience);
    let outcomes = places
        .into_iter()
        .zip(specs)
        .map(|(place, spec)| async move {
            match place {
                Err(outcome) => outcome,
                Ok(waiter) => landed(image, spec, waiter, begun, patience).await,
            }
        });
    let outcomes = join_all(outcomes).await;
    outcomes.into_iter().map(|o| image.counted(o)).collect()
}

/// One chunk that is not on this host.
async fn fetched(
    image: &Arc<Image>,
    spec: &ChunkSpec,
    begun: Instant,
    patience: Patience,
) -> Outcome {
    check_spec(spec)?;
    let mut led = Vec::new();
    let waiter = image.join(spec, &mut led);
    image.take_off(led, patience);
    landed(image, spec, waiter, begun, patience).await
}

/// Waits for a flight; leads one of our own where another's failed.
async fn landed(
    image: &Arc<Image>,
    spec: &ChunkSpec,
    mut waiter: Waiter,
    begun: Instant,
    patience: Patience,
) -> Outcome {
    let us = image.owner();
    loop {
        let left = patience.wait.saturating_sub(begun.elapsed());
        let Ok(outcome) = tokio::time::timeout(left, waiter.wait()).await else {
            return Err(ReadError::TimedOut {
                id: *spec.id(),
                waited: begun.elapsed(),
                failures: waiter.failures(),
            });
        };
        match outcome {
            Some(Ok(bytes)) => return image.open_verified(spec, &bytes),
            Some(Err(e)) if waiter.owner().fails(&us, &e) => return Err(e),
            None => return Err(ReadError::Abandoned { id: *spec.id() }),
            // Another image's tiers or manifest, or prefetch: ours may do better.
            Some(Err(_)) => {
                let mut led = Vec::new();
                waiter = image.join(spec, &mut led);
                image.take_off(led, patience);
            }
        }
    }
}

impl Image {
    /// Joins the flight of a chunk; a ticket to a new one goes to `led`.
    fn join(&self, spec: &ChunkSpec, led: &mut Vec<Wanted>) -> Waiter {
        let (waiter, ticket) = self.host.flights.join(spec.id(), self.owner());
        match ticket {
            Some(ticket) => led.push(Wanted {
                chunk: spec.chunk,
                ticket: Some(ticket),
                failures: Vec::new(),
            }),
            None => {
                self.stats.joined.fetch_add(1, Relaxed);
            }
        }
        waiter
    }

    fn counted(&self, outcome: Outcome) -> Outcome {
        self.stats.reads.fetch_add(1, Relaxed);
        match &outcome {
            Ok(plain) => {
                let len = plain.len() as u64;
                self.stats.bytes_read.fetch_add(len, Relaxed);
            }
            Err(_) => {
                self.stats.errors.fetch_add(1, Relaxed);
            }
        }
        outcome
    }

    /// Queues a verified ciphertext for the host cache; false when that has no room for it now.
    pub fn keep(&self, id: &ChunkId, bytes: Bytes) -> bool {
        if self.host.heal(id) {
            self.stats.healed.fetch_add(1, Relaxed);
        }
        self.host
            .cache
            .as_ref()
            .is_none_or(|cache| cache.put(id, bytes))
    }
}

/// A chunk in a fetch.
pub struct Wanted {
    pub chunk: ChunkRef,
    /// Gone once its flight has ended.
    pub ticket: Option<Ticket>,
    pub failures: Vec<TierFailure>,
}

/// A fetch under way.
struct Fetch<'a> {
    image: &'a Image,
    wanted: Vec<Wanted>,
    /// Chunks that the cache had no place for, for callers that can wait for it.
    uncached: Vec<(ChunkId, Bytes)>,
}

/// What became of a fetch.
pub struct Fetched {
    /// Chunks that arrived while the cache's queue was full.
    pub uncached: Vec<(ChunkId, Bytes)>,
    /// The lengths of the ciphertexts that arrived, in bytes.
    pub arrived: Vec<usize>,
    /// Chunks that no tier gave.
    pub failed: usize,
}

/// Brings chunks here and ends their flights.
pub async fn fetch(image: &Image, wanted: Vec<Wanted>, patience: Patience) -> Fetched {
    let mut fetch = Fetch {
        image,
        wanted: Vec::with_capacity(wanted.len()),
        uncached: Vec::new(),
    };
    // Between its look at the cache and its ticket the leader may have missed a landing.
    for mut wanted in wanted {
        match image.landed_meanwhile(&wanted.chunk) {
            Some(bytes) => {
                if let Some(ticket) = wanted.ticket.take() {
                    ticket.end(Ok(bytes));
                }
            }
            None => fetch.wanted.push(wanted),
        }
    }
    let chunks: Vec<ChunkRef> = fetch.wanted.iter().map(|w| w.chunk).collect();
    walk(image, &chunks, patience, &mut fetch).await;
    let mut result = Fetched {
        uncached: fetch.uncached,
        arrived: Vec::new(),
        failed: 0,
    };
    for wanted in fetch.wanted {
        let Some(ticket) = wanted.ticket else {
            result.arrived.push(wanted.chunk.stored_len as usize);
            continue;
        };
        result.failed += 1;
        ticket.end(Err(ReadError::Tiers {
            id: wanted.chunk.id,
            failures: wanted.failures,
        }));
    }
    result
}

impl Image {
    /// The verified ciphertext, if the host cache got it a moment ago.
    fn landed_meanwhile(&self, chunk: &ChunkRef) -> Option<Bytes> {
        match self.host.cache.as_ref()?.peek(&chunk.id) {
            Lookup::Pending(bytes) => Some(bytes),
            Lookup::Disk(bytes, _) if ChunkId::of(&bytes) == chunk.id => Some(bytes.into()),
            _ => None,
        }
    }
}

impl Progress for Fetch<'_> {
    fn asking(&mut self, index: usize, tier: &str) {
        if let Some(ticket) = &self.wanted[index].ticket {
            ticket.asking(tier);
        }
    }

    fn arrived(&mut self, index: usize, bytes: Bytes, _tier: &str) {
        let id = self.wanted[index].chunk.id;
        // The cache first: whoever comes after the flight's end finds the chunk there.
        if !self.image.keep(&id, bytes.clone()) {
            self.uncached.push((id, bytes.clone()));
        }
        if let Some(ticket) = self.wanted[index].ticket.take() {
            ticket.end(Ok(bytes));
        }
    }

    fn failed(&mut self, index: usize, failure: TierFailure) {
        if let Some(ticket) = &self.wanted[index].ticket {
            ticket.failed(failure.clone());
        }
        self.wanted[index].failures.push(failure);
    }
}
