//! The store of a host, and each image's view of it.

mod admission;
mod gather;
mod local;
mod prefetch;
mod read;
mod verify;
mod walk;

#[cfg(test)]
mod flow_tests;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use lazyimg_convergent::ChunkId;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::flight::{Flights, Owner};
use crate::stats::TierStats;
use crate::{ChunkSpec, HostCache, HotCache, MountStats, Offer, ReadError, Tier};

use admission::Admission;
use read::Patience;

pub use admission::{AdmissionOptions, Admitted, Overloaded};

pub use verify::{CopyPlace, Verified, VerifyScope};

/// Locks that keep two threads from decoding one chunk at the same time. More than there are
/// threads to hold them.
const DECODE_LOCKS: usize = 64;
/// Ids of bad copies remembered until their replacement has come, to count it.
const MAX_WOUNDED: usize = 4_096;

/// The longest that one fetch may take, however patient its reader is.
pub const MAX_FETCH: Duration = Duration::from_secs(3600);

/// How a [`Store`] behaves.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Bound of the LRU of decoded chunks, in bytes. 0: every read decodes again.
    pub hot_bytes: usize,
    /// How long one fetch may take over all tiers, unless a reader who begins it has more patience
    /// ([`ImageStore::read_within`]). Each tier gets an equal share of what is left when its turn
    /// comes, or less where [`Tier::deadline`] says so.
    pub fetch_deadline: Duration,
    /// When new mounts wait: [`Store::admit`].
    pub admission: AdmissionOptions,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            hot_bytes: 16 << 20,
            fetch_deadline: Duration::from_secs(30),
            admission: AdmissionOptions::default(),
        }
    }
}

/// One per host cache; serves all mounts of it. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    host: Arc<Host>,
}

/// What all images of a host share.
struct Host {
    cache: Option<HostCache>,
    hot: HotCache,
    flights: Arc<Flights>,
    decoding: Vec<Mutex<()>>,
    /// Chunks whose cached copy was bad and has not been replaced yet.
    wounded: Mutex<std::collections::HashSet<ChunkId>>,
    prefetching: Arc<Semaphore>,
    admission: Arc<Admission>,
    options: StoreOptions,
    runtime: Handle,
    images: AtomicU64,
}

/// The chunks of one mounted image. Cheap to clone; dropping the last clone ends its prefetch.
#[derive(Clone)]
pub struct ImageStore {
    image: Arc<Image>,
    /// Lives as long as somebody holds an `ImageStore`; fetches under way hold only `image`.
    mounted: Arc<()>,
}

/// One image: where its chunks come from, and what has been done for it.
struct Image {
    host: Arc<Host>,
    number: u64,
    /// [`Owner::Image`].
    servers: Option<Arc<str>>,
    tiers: Vec<(Arc<dyn Tier>, Arc<TierStats>)>,
    stats: Arc<MountStats>,
    prefetch: prefetch::Queue,
    gather: gather::Gather,
}

impl Store {
    /// A store over `cache` (`None`: nothing is kept on disk). Fetches run on `runtime`, which
    /// must be a multi-threaded one, or driven by somebody while reads wait.
    pub fn new(cache: Option<HostCache>, options: StoreOptions, runtime: Handle) -> Self {
        Self {
            host: Arc::new(Host {
                cache,
                hot: HotCache::new(options.hot_bytes),
                flights: Arc::default(),
                decoding: (0..DECODE_LOCKS).map(|_| Mutex::new(())).collect(),
                wounded: Mutex::default(),
                prefetching: Arc::new(Semaphore::new(prefetch::CONCURRENCY)),
                admission: Arc::new(Admission::new(options.admission.clone())),
                options,
                runtime,
                images: AtomicU64::new(0),
            }),
        }
    }

    /// The chunks of one image through its tiers, nearest first. No tiers: only what is here.
    pub fn image(&self, tiers: Vec<Arc<dyn Tier>>, stats: Arc<MountStats>) -> ImageStore {
        let servers = servers(&tiers);
        let tiers = tiers
            .into_iter()
            .map(|tier| {
                let counters = stats.tier(tier.name());
                counters.attach(&tier);
                (tier, counters)
            })
            .collect();
        ImageStore {
            image: Arc::new(Image {
                host: Arc::clone(&self.host),
                number: self.host.images.fetch_add(1, Relaxed),
                servers,
                tiers,
                stats,
                prefetch: prefetch::Queue::default(),
                gather: gather::Gather::default(),
            }),
            mounted: Arc::new(()),
        }
    }

    /// The host cache, if there is one.
    pub fn cache(&self) -> Option<&HostCache> {
        self.host.cache.as_ref()
    }

    /// The decoded chunks in memory.
    pub fn hot(&self) -> &HotCache {
        &self.host.hot
    }

    /// Waits until what is queued for the host cache is written, or was dropped.
    pub fn flush(&self) {
        if let Some(cache) = &self.host.cache {
            cache.flush();
        }
    }

    /// Closes the host cache ([`HostCache::close`]), whoever still holds this store.
    pub fn close(&self) {
        if let Some(cache) = &self.host.cache {
            cache.close();
        }
    }
}

impl ImageStore {
    /// The plaintext of a chunk, from the nearest place that has it. Fails within the store's
    /// fetch deadline. Nothing is remembered of a failure: the next read asks again.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn read(&self, spec: &ChunkSpec) -> Result<Bytes, ReadError> {
        read::read(&self.image, spec, self.own_patience()).await
    }

    /// [`ImageStore::read`] for several chunks: what is not on this host is asked for in one
    /// request to each tier. Results in the order of `specs`.
    pub async fn read_many(&self, specs: &[ChunkSpec]) -> Vec<Result<Bytes, ReadError>> {
        read::read_many(&self.image, specs, self.own_patience()).await
    }

    /// [`ImageStore::read`] that waits at most `limit`, which may be more than the store's fetch
    /// deadline. A fetch that it begins may take twice as long (at most [`MAX_FETCH`]): a reader who
    /// gives up comes again, as the kernel does, and then finds it under way.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn read_within(&self, spec: &ChunkSpec, limit: Duration) -> Result<Bytes, ReadError> {
        let patience = Patience::of_reader(limit, &self.image.host.options);
        read::read(&self.image, spec, patience).await
    }

    /// [`ImageStore::read_many`] with the patience of [`ImageStore::read_within`].
    pub async fn read_many_within(
        &self,
        specs: &[ChunkSpec],
        limit: Duration,
    ) -> Vec<Result<Bytes, ReadError>> {
        let patience = Patience::of_reader(limit, &self.image.host.options);
        read::read_many(&self.image, specs, patience).await
    }

    /// The plaintext if it is on this host. Never waits for a network; may read the disk.
    pub fn try_read_local(&self, spec: &ChunkSpec) -> Option<Bytes> {
        read::try_local(&self.image, spec)
    }

    /// [`ImageStore::read_within`] for threads outside the runtime. Returns within `deadline`,
    /// whatever the runtime does.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_blocking(&self, spec: &ChunkSpec, deadline: Duration) -> Result<Bytes, ReadError> {
        read::read_blocking(&self.image, spec, deadline)
    }

    /// [`ImageStore::read_many_within`] for threads outside the runtime. Returns within `deadline`.
    pub fn read_many_blocking(
        &self,
        specs: &[ChunkSpec],
        deadline: Duration,
    ) -> Vec<Result<Bytes, ReadError>> {
        read::read_many_blocking(&self.image, specs, deadline)
    }

    /// Brings chunks into the host cache in the background, in this order, in few large requests;
    /// what is there already is passed over. Readers overtake it. Returns how many were queued:
    /// none without a host cache, and fewer than asked when very many wait already.
    pub fn prefetch(&self, specs: Vec<ChunkSpec>) -> usize {
        prefetch::begin(&self.image, &self.mounted, specs)
    }

    /// Chunks of this image that prefetch has still to look at.
    pub fn prefetch_pending(&self) -> usize {
        self.image.prefetch.len()
    }

    /// Whether the host cache has the chunk, as far as its index knows: for `status`.
    pub fn is_cached(&self, id: &ChunkId) -> bool {
        self.image
            .host
            .cache
            .as_ref()
            .is_some_and(|cache| cache.contains(id))
    }

    /// Keeps chunks that came along with something else (the head of a pack with the manifest),
    /// counts them as the last tier's, and offers them to those before it. Those that are here
    /// already, and those whose bytes are not the id's, are dropped.
    pub fn accept(&self, chunks: Vec<(ChunkId, Bytes)>) {
        if let Some((tier, _)) = self.image.tiers.last() {
            let name = tier.name().to_owned();
            self.accept_from(&name, chunks);
        }
    }

    /// [`ImageStore::accept`] of chunks that the tier `name` gave.
    pub fn accept_from(&self, name: &str, chunks: Vec<(ChunkId, Bytes)>) {
        let Some(cache) = &self.image.host.cache else {
            return;
        };
        let tiers = &self.image.tiers;
        let from = tiers.iter().position(|(tier, _)| tier.name() == name);
        for (id, ciphertext) in chunks {
            if cache.contains(&id) || ChunkId::of(&ciphertext) != id {
                continue;
            }
            if let Some(from) = from {
                tiers[from].1.delivered.add(ciphertext.len());
                for (nearer, _) in &tiers[..from] {
                    nearer.offer(&id, &ciphertext, Offer::Unasked);
                }
            }
            cache.put(&id, ciphertext);
        }
    }

    /// Checks copies of chunks: the id against the bytes, the plaintext through the key. Results in
    /// the order of `specs`; what is asked of tiers is one request, so pass some MiB at a time.
    /// Nothing is kept but replacements of bad copies.
    pub async fn verify(
        &self,
        specs: &[ChunkSpec],
        scope: VerifyScope,
    ) -> Vec<Result<Verified, ReadError>> {
        verify::verify(&self.image, specs, scope).await
    }

    /// This mount's counters.
    pub fn stats(&self) -> &Arc<MountStats> {
        &self.image.stats
    }
}

impl ImageStore {
    fn own_patience(&self) -> Patience {
        Patience::of_store(&self.image.host.options)
    }
}

impl Image {
    /// In whose name this image's readers fetch.
    fn owner(&self) -> Owner {
        Owner::Image {
            number: self.number,
            servers: self.servers.clone(),
        }
    }
}

/// What names the servers behind tiers; `None` when one does not tell.
fn servers(tiers: &[Arc<dyn Tier>]) -> Option<Arc<str>> {
    let mut names = String::new();
    for tier in tiers {
        names.push_str(tier.name());
        names.push('\t');
        names.push_str(tier.origin()?);
        names.push('\n');
    }
    Some(names.into())
}

impl Host {
    /// Notes that the cached copy of `id` was bad.
    fn wound(&self, id: &ChunkId) {
        let mut wounded = self.wounded.lock();
        if wounded.len() < MAX_WOUNDED {
            wounded.insert(*id);
        }
    }

    /// Whether `id`'s cached copy was bad and is replaced now, for the first time.
    fn heal(&self, id: &ChunkId) -> bool {
        self.wounded.lock().remove(id)
    }
}
