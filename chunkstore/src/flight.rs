//! Single flight: one fetch for one chunk, however many readers of however many mounts wait.
//!
//! The one who finds no flight becomes its leader and holds its [`Ticket`]; everybody waits on a
//! [`Waiter`]. The fetch runs in a task of its own, so a reader that goes away strands nobody; a
//! task that dies drops its tickets, and that ends their flights.
//!
//! **A failed flight fails its waiters with the same cause**: they have waited for their answer,
//! and asking again at once would only multiply the load on a tier in trouble. Exceptions, where
//! the waiter asks by itself: the flight was another image's (its tiers or its manifest may be
//! wrong, not ours), or prefetch's. But where all the servers behind the other image's tiers are in
//! trouble and ours are the same, their failure is ours: else a hundred mounts of one image
//! would ask a dead registry a hundred times, one after another.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use lazyimg_convergent::ChunkId;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{FetchError, ReadError, TierFailure};

/// Who asked: an image's readers, or its prefetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// Readers of an image.
    Image {
        /// Its number.
        number: u64,
        /// The servers behind its tiers, where all are known.
        servers: Option<Arc<str>>,
    },
    /// Somebody's prefetch.
    Prefetch,
}

impl Owner {
    /// Whether a failure of this owner's flight is one for `us` too.
    pub fn fails(&self, us: &Owner, error: &ReadError) -> bool {
        match (self, us) {
            (
                Self::Image { number, servers },
                Self::Image {
                    number: n,
                    servers: s,
                },
            ) => number == n || (servers.is_some() && servers == s && error.is_passing()),
            _ => false,
        }
    }
}

/// How a flight ended: a ciphertext whose id was verified, or why there is none.
pub type Outcome = Result<Bytes, ReadError>;

/// The flights under way.
#[derive(Default)]
pub struct Flights {
    under_way: Mutex<HashMap<ChunkId, Arc<Flight>>>,
}

struct Flight {
    owner: Owner,
    outcome: watch::Sender<Option<Outcome>>,
    progress: Mutex<Progress>,
}

/// What a waiter whose time is up can tell.
#[derive(Default)]
struct Progress {
    failures: Vec<TierFailure>,
    asking: Option<(String, Instant)>,
}

impl Flights {
    /// Joins the flight of `id`, or begins one: then there is a ticket too.
    pub fn join(self: &Arc<Self>, id: &ChunkId, owner: Owner) -> (Waiter, Option<Ticket>) {
        let mut under_way = self.under_way.lock();
        if let Some(flight) = under_way.get(id) {
            return (Waiter::new(flight), None);
        }
        let flight = Arc::new(Flight {
            owner,
            outcome: watch::channel(None).0,
            progress: Mutex::default(),
        });
        under_way.insert(*id, Arc::clone(&flight));
        drop(under_way);
        let ticket = Ticket {
            flights: Arc::clone(self),
            id: *id,
            flight: Arc::clone(&flight),
        };
        (Waiter::new(&flight), Some(ticket))
    }

    /// How many wait for the flight of `id`.
    #[cfg(test)]
    pub fn waiters(&self, id: &ChunkId) -> usize {
        let under_way = self.under_way.lock();
        under_way.get(id).map_or(0, |f| f.outcome.receiver_count())
    }

    /// How many flights are under way.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.under_way.lock().len()
    }
}

/// The duty to end a flight. Dropped without [`Ticket::end`] it ends as abandoned.
pub struct Ticket {
    flights: Arc<Flights>,
    id: ChunkId,
    flight: Arc<Flight>,
}

impl Ticket {
    /// Ends the flight. Whoever looks for the chunk from now on begins another one: put it where
    /// they find it first.
    pub fn end(self, outcome: Outcome) {
        self.finish(outcome);
    }

    /// Notes that `tier` is being asked.
    pub fn asking(&self, tier: &str) {
        self.flight.progress.lock().asking = Some((tier.to_owned(), Instant::now()));
    }

    /// Notes that a tier has failed.
    pub fn failed(&self, failure: TierFailure) {
        let mut progress = self.flight.progress.lock();
        progress.asking = None;
        progress.failures.push(failure);
    }

    fn finish(&self, outcome: Outcome) {
        self.flights.under_way.lock().remove(&self.id);
        self.flight.outcome.send_if_modified(|slot| {
            let open = slot.is_none();
            if open {
                *slot = Some(outcome);
            }
            open
        });
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.flight.outcome.borrow().is_none() {
            self.finish(Err(ReadError::Abandoned { id: self.id }));
        }
    }
}

/// A place in a flight.
pub struct Waiter {
    flight: Arc<Flight>,
    outcome: watch::Receiver<Option<Outcome>>,
}

impl Waiter {
    fn new(flight: &Arc<Flight>) -> Self {
        Self {
            flight: Arc::clone(flight),
            outcome: flight.outcome.subscribe(),
        }
    }

    /// Waits for the end. A flight always ends: see [`Ticket`].
    pub async fn wait(&mut self) -> Option<Outcome> {
        // The sender lives in `flight`, so the channel cannot close.
        let outcome = self.outcome.wait_for(Option::is_some).await.ok()?;
        outcome.clone()
    }

    /// Who began the flight.
    pub fn owner(&self) -> &Owner {
        &self.flight.owner
    }

    /// The tiers that have failed so far, and the one that has not answered.
    pub fn failures(&self) -> Vec<TierFailure> {
        let progress = self.flight.progress.lock();
        let mut failures = progress.failures.clone();
        if let Some((tier, since)) = &progress.asking {
            failures.push(TierFailure {
                tier: tier.clone(),
                error: Arc::new(FetchError::TimedOut(since.elapsed())),
            });
        }
        failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: ChunkId = ChunkId([1; 32]);
    const US: Owner = image(1, None);

    const fn image(number: u64, servers: Option<Arc<str>>) -> Owner {
        Owner::Image { number, servers }
    }

    #[tokio::test]
    async fn all_who_join_get_what_the_leader_brings() {
        let flights = Arc::new(Flights::default());
        let (mut first, ticket) = flights.join(&ID, US);
        let (mut second, none) = flights.join(&ID, image(2, None));
        assert!(none.is_none());
        assert_eq!(*second.owner(), US);
        ticket.unwrap().end(Ok(Bytes::from_static(b"x")));
        assert_eq!(first.wait().await.unwrap().unwrap(), "x");
        assert_eq!(second.wait().await.unwrap().unwrap(), "x");
        assert_eq!(flights.len(), 0);
    }

    #[tokio::test]
    async fn a_leader_that_dies_strands_nobody() {
        let flights = Arc::new(Flights::default());
        let (mut waiter, ticket) = flights.join(&ID, US);
        drop(ticket);
        assert!(matches!(
            waiter.wait().await,
            Some(Err(ReadError::Abandoned { .. }))
        ));
        assert!(flights.join(&ID, US).1.is_some(), "and the next one leads");
    }

    #[test]
    fn trouble_of_the_same_servers_is_shared_and_nothing_else() {
        let failed = |error| ReadError::Tiers {
            id: ID,
            failures: vec![TierFailure {
                tier: "t".to_owned(),
                error: Arc::new(error),
            }],
        };
        let trouble = failed(FetchError::unavailable("down"));
        let missing = failed(FetchError::NotFound("x".to_owned()));
        let here = || Some(Arc::from("here"));
        let them = image(1, here());
        assert!(them.fails(&image(1, here()), &missing), "ourselves");
        assert!(them.fails(&image(2, here()), &trouble));
        assert!(!them.fails(&image(2, here()), &missing));
        assert!(!them.fails(&image(2, Some(Arc::from("there"))), &trouble));
        assert!(!image(1, None).fails(&image(2, None), &trouble));
        assert!(!Owner::Prefetch.fails(&them, &trouble));
    }

    #[test]
    fn an_impatient_waiter_can_tell_whom_it_waited_for() {
        let flights = Arc::new(Flights::default());
        let (waiter, ticket) = flights.join(&ID, US);
        let ticket = ticket.unwrap();
        ticket.asking("near");
        ticket.failed(TierFailure {
            tier: "near".to_owned(),
            error: Arc::new(FetchError::NotFound("x".to_owned())),
        });
        ticket.asking("far");
        let told: Vec<_> = waiter.failures().into_iter().map(|f| f.tier).collect();
        assert_eq!(told, ["near", "far"]);
    }
}
