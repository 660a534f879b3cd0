//! Prefetch: chunks into the host cache before anybody asks, behind everybody who does.
//!
//! A chunk's flight begins when its batch is sent, not when it is queued, and few batches are
//! under way at once: a reader either overtakes prefetch or waits for one batch at most.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;

use super::Image;
use super::read::{Patience, Wanted, fetch};
use crate::flight::Owner;
use crate::{ChunkRef, ChunkSpec};

/// Batches under way at once, over all images of a host. With [`crate::OriginOptions`]' defaults
/// they take 12 of an origin's 16 places at most.
pub const CONCURRENCY: usize = 2;
/// Ciphertext of one batch, in bytes: one long request, and 0.4 s on a 10 MB/s link for a reader
/// who waits for its last chunk.
const BATCH_BYTES: u64 = 4 << 20;
/// Chunks of one batch; small ones lie anywhere.
const BATCH_CHUNKS: usize = 64;
/// Chunks looked at in one go; each is a look into the index, and others want the thread.
const LOOKS: usize = 256;
/// Chunks that may wait: 32 GiB of an image, 5 MB of memory.
const MAX_QUEUED: usize = 65_536;
/// While reads in flight are slow, prefetch looks this often whether they still are.
const YIELD: Duration = Duration::from_millis(200);
/// The pause after a batch of which nothing came: a tier in trouble needs no prefetch.
const PAUSE: Duration = Duration::from_secs(1);

/// What an image has still to prefetch.
#[derive(Default)]
pub struct Queue {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<ChunkRef>,
    /// Whether a task is working on it.
    worked: bool,
}

impl Queue {
    /// Chunks waiting.
    pub fn len(&self) -> usize {
        self.state.lock().waiting.len()
    }

    /// The next chunk; `None` tells the task to end.
    fn next(&self) -> Option<ChunkRef> {
        let mut state = self.state.lock();
        let next = state.waiting.pop_front();
        state.worked = next.is_some();
        next
    }

    fn put_back(&self, chunk: ChunkRef) {
        self.state.lock().waiting.push_front(chunk);
    }
}

/// Queues chunks and sees that a task works on them.
pub fn begin(image: &Arc<Image>, mounted: &Arc<()>, specs: Vec<ChunkSpec>) -> usize {
    if image.host.cache.is_none() {
        return 0;
    }
    let mut state = image.prefetch.state.lock();
    let room = MAX_QUEUED.saturating_sub(state.waiting.len());
    let queued = specs.len().min(room);
    let over = (specs.len() - queued) as u64;
    image.stats.prefetch_failed.fetch_add(over, Relaxed);
    state
        .waiting
        .extend(specs.into_iter().take(queued).map(|s| s.chunk));
    if queued > 0 && !std::mem::replace(&mut state.worked, true) {
        image
            .host
            .runtime
            .spawn(work(Arc::clone(image), Arc::downgrade(mounted)));
    }
    queued
}

/// Sends batch after batch until the queue is empty or nobody has the image mounted.
async fn work(image: Arc<Image>, mounted: Weak<()>) {
    loop {
        let places = Arc::clone(&image.host.prefetching);
        // The semaphore is never closed.
        let Ok(place) = places.acquire_owned().await else {
            return;
        };
        if mounted.strong_count() == 0 {
            return;
        }
        if image.host.admission.overload(Instant::now()).is_some() {
            drop(place);
            tokio::time::sleep(YIELD).await;
            continue;
        }
        let Some(batch) = next_batch(&image) else {
            return;
        };
        if batch.is_empty() {
            drop(place);
            tokio::task::yield_now().await;
            continue;
        }
        let sending = send(Arc::clone(&image), batch, place);
        image.host.runtime.spawn(sending);
    }
}

/// The next chunks that are neither here nor on their way; perhaps none of those looked at.
/// `None`: the queue is empty.
fn next_batch(image: &Image) -> Option<Vec<Wanted>> {
    let cache = image.host.cache.as_ref()?;
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for look in 0..LOOKS {
        let Some(chunk) = image.prefetch.next() else {
            if look == 0 {
                return None;
            }
            break;
        };
        let len = u64::from(chunk.stored_len);
        if batch.len() >= BATCH_CHUNKS || (bytes > 0 && bytes + len > BATCH_BYTES) {
            image.prefetch.put_back(chunk);
            break;
        }
        if cache.contains(&chunk.id) {
            continue;
        }
        let (_, ticket) = image.host.flights.join(&chunk.id, Owner::Prefetch);
        if ticket.is_some() {
            bytes += len;
            batch.push(Wanted {
                chunk,
                ticket,
                failures: Vec::new(),
            });
        }
    }
    Some(batch)
}

async fn send(image: Arc<Image>, batch: Vec<Wanted>, place: OwnedSemaphorePermit) {
    let patience = Patience::of_store(&image.host.options);
    let fetched = fetch(&image, batch, patience).await;
    for len in &fetched.arrived {
        image.stats.prefetched.add(*len);
    }
    let failed = fetched.failed as u64;
    image.stats.prefetch_failed.fetch_add(failed, Relaxed);
    // Readers pass on what the cache has no place for; prefetch is here to fill it, and waits.
    if let Some(cache) = &image.host.cache {
        for (id, bytes) in fetched.uncached {
            if !cache.put_waiting(&id, bytes).await {
                image.stats.uncached.fetch_add(1, Relaxed);
            }
        }
    }
    drop(image);
    if failed > 0 && fetched.arrived.is_empty() {
        tokio::time::sleep(PAUSE).await;
    }
    drop(place);
}
