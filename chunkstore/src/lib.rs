//! Chunks on this host: the host cache, the tiers below it, and the readers above.
//!
//! A [`Store`] exists once per host cache and serves every mount of it. [`Store::image`] binds it
//! to the tiers of one image; its [`ImageStore`] answers reads: from memory ([`HotCache`]), from
//! disk ([`HostCache`]), or from the image's [`Tier`]s, with one fetch for one chunk however many
//! readers wait. A byte reaches a reader only through the chunk's GCM tag, and the cache only
//! through the chunk's id.
//!
//! `docs/cache.md` has the bytes of the host cache.

mod error;
mod spec;
mod stats;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod tier;

mod cache;
mod flight;
mod hot;
mod origin;
mod retry;
mod store;

pub use cache::{CacheError, CacheOptions, CacheStats, HostCache, MIN_CACHE_BYTES};
pub use error::{FetchError, ReadError, Source, TierFailure};
pub use hot::HotCache;
pub use origin::{OriginOptions, PackOrigin};
pub use spec::{ChunkRef, ChunkSpec, PackRange};
pub use stats::{HitsSnapshot, MountStats, StatsSnapshot, TierSnapshot};
pub use store::{CopyPlace, ImageStore, MAX_FETCH, Store, StoreOptions, Verified, VerifyScope};
pub use tier::{BlobRanges, Delivery, Tier};
