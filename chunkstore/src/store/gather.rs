//! Batching: what readers want while fetches of their image are under way goes together.
//!
//! A lone read goes at once. While fetches are under way, further wants gather until one of them
//! ends, about a millisecond is over, or there are enough for a request of their own.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use parking_lot::Mutex;

use super::Image;
use super::read::{Patience, Wanted, fetch};

/// How long wants gather. The runtime's clock has a grain of a millisecond.
const WINDOW: Duration = Duration::from_micros(500);
/// So many chunks are enough for a request of their own.
const ENOUGH_CHUNKS: usize = 16;
/// So many bytes are.
const ENOUGH_BYTES: u64 = 4 << 20;

/// The wants of one image that have not taken off.
#[derive(Default)]
pub struct Gather {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    under_way: usize,
    waiting: Vec<Wanted>,
    bytes: u64,
    /// How long the readers of those that wait do, and their fetch may take: all have the same.
    patience: Patience,
    /// Counts what has waited, so that a timer knows its own.
    batch: u64,
}

impl State {
    /// All that waits, to take off now.
    fn flush(&mut self, ready: &mut Vec<(Vec<Wanted>, Patience)>) {
        if !self.waiting.is_empty() {
            self.bytes = 0;
            self.batch += 1;
            self.under_way += 1;
            ready.push((std::mem::take(&mut self.waiting), self.patience));
        }
    }
}

impl Image {
    /// Begins the fetch of what we lead, at once or with what else is wanted.
    pub fn take_off(self: &Arc<Self>, led: Vec<Wanted>, patience: Patience) {
        if led.is_empty() {
            return;
        }
        let mut ready = Vec::new();
        let mut timer = None;
        {
            let mut state = self.gather.state.lock();
            if state.patience != patience {
                state.flush(&mut ready);
                state.patience = patience;
            }
            let lone = state.under_way == 0;
            let first = state.waiting.is_empty();
            state.bytes += led
                .iter()
                .map(|w| u64::from(w.chunk.stored_len))
                .sum::<u64>();
            state.waiting.extend(led);
            let enough = state.waiting.len() >= ENOUGH_CHUNKS || state.bytes >= ENOUGH_BYTES;
            if lone || enough {
                state.flush(&mut ready);
            } else if first {
                timer = Some(state.batch);
            }
        }
        self.send(ready);
        if let Some(batch) = timer {
            let image = Arc::clone(self);
            self.host.runtime.spawn(async move {
                tokio::time::sleep(WINDOW).await;
                let mut ready = Vec::new();
                {
                    let mut state = image.gather.state.lock();
                    if state.batch == batch {
                        state.flush(&mut ready);
                    }
                }
                image.send(ready);
            });
        }
    }

    /// Each batch is fetched in a task of its own: no reader that goes away ends it.
    fn send(self: &Arc<Self>, ready: Vec<(Vec<Wanted>, Patience)>) {
        for (batch, patience) in ready {
            let under_way = UnderWay(Arc::clone(self));
            let counted = self.host.admission.began();
            self.host.runtime.spawn(async move {
                let image = Arc::clone(&under_way.0);
                let fetched = fetch(&image, batch, patience).await;
                let uncached = fetched.uncached.len() as u64;
                image.stats.uncached.fetch_add(uncached, Relaxed);
                drop(counted);
                drop(under_way);
            });
        }
    }
}

/// A fetch of an image under way. However it ends, what waits for that goes.
struct UnderWay(Arc<Image>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut ready = Vec::new();
        {
            let mut state = self.0.gather.state.lock();
            state.under_way -= 1;
            state.flush(&mut ready);
        }
        self.0.send(ready);
    }
}
