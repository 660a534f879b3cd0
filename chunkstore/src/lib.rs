//! Chunks on this host: the host cache, the tiers below it, and the readers above.
//!
//! A [`Store`] exists once per host cache and serves every mount of it. [`Store::image`] binds it
//! to the tiers of one image; its [`ImageStore`] answers reads: from memory ([`HotCache`]), from
//! disk ([`HostCache`]), or from the image's [`Tier`]s, with one fetch for one chunk however many
//! readers wait. A tier is the registry ([`PackOrigin`]) or a regional store ([`remote::StoreTier`]);
//! a [`Guard`] protects the servers behind it. A byte reaches a reader only through the chunk's GCM
//! tag, and the cache only through the chunk's id.
//!
//! `docs/cache.md` has the bytes of the host cache.

mod error;
mod spec;
mod stats;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod tier;
pub mod wire;

mod cache;
mod flight;
mod guard;
mod hot;
mod latency;
mod origin;
pub mod remote;
mod store;

pub use cache::{CacheError, CacheOptions, CacheStats, HostCache, MIN_CACHE_BYTES, Scrubbed};
pub use error::{ErrorKind, FetchError, ReadError, Source, TierFailure};
pub use guard::{BreakerOptions, BreakerState, Guard, Guards, OriginHealth};
pub use hot::HotCache;
pub use latency::LatencySnapshot;
pub use origin::{OriginOptions, PackOrigin};
pub use spec::{ChunkRef, ChunkSpec, PackRange};
pub use stats::{
    ErrorCounts, HitsSnapshot, MountStats, StatsSnapshot, TierHealth, TierSnapshot,
    WriteBackSnapshot,
};
pub use store::{
    AdmissionOptions, Admitted, CopyPlace, ImageStore, MAX_FETCH, Overloaded, Store, StoreOptions,
    Verified, VerifyScope,
};
pub use tier::{BlobRanges, Delivery, Offer, Tier};
