//! What is in the store and who may read it: grants, live images, roots and their garbage.
//!
//! The engine keeps bytes; everything that has a meaning is decided here. `docs/store.md` has the
//! rules. Any number of instances may share an engine: they talk through its documents only.

mod cached;
mod chunks;
mod error;
mod gc;
mod grants;
mod images;
mod locks;
mod look;
mod names;
mod profiles;
mod recount;
mod refs;
mod roots;
mod stats;
#[cfg(test)]
mod tests;
mod types;
mod usage;

use std::fmt;
use std::future::Future;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use lazyimg_convergent::Digest;
use lru::LruCache;
use parking_lot::Mutex;

use crate::engine::{Engine, When};

use grants::Grants;
use locks::Locks;
use roots::Roots;
use usage::Usage;

pub use error::{BadManifest, CatalogError};
pub use types::{
    Alarm, Condition, GcOptions, GcReport, GcRoot, ManifestInfo, ManifestPut, ParseTenantError,
    Put, Reference, RootInfo, RootState, RootStats, Stats, Stuck, TenantName, TenantStats,
};

/// The longest manifest, in bytes.
pub const MAX_MANIFEST: usize = 64 << 20;
/// The longest profile, in bytes.
pub const MAX_PROFILE: usize = 1 << 20;
/// Profiles of one image, at most.
pub const MAX_PROFILES: usize = 16;
/// The longest reference, in bytes.
pub const MAX_REFERENCE: usize = 1024;
/// References of one tenant, at most: they lie in no root, and no quota counts them.
pub const MAX_REFERENCES: usize = 10_000;
/// Roots that are there at once, at most: each costs a read that finds nothing some time.
pub const MAX_ROOTS: usize = 16;
/// Chunks that a manifest lacks are not looked for any more when there are more than so many.
pub const MAX_MISSING: usize = 10_000;
/// Chunks or manifests of a root that [`Catalog::stats`] counts, at most.
pub const MAX_COUNTED: u64 = 1_000_000;
/// How long an expired root is kept if nobody says otherwise.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(7 * 24 * 3600);

/// What `meta/format` says.
const FORMAT: &[u8] = b"lazyimg store 1";
/// Images of which it is remembered that they were noted as used today.
const USED_DAYS: NonZeroUsize = NonZeroUsize::new(1 << 14).expect("not zero");

/// What time it is.
pub trait Clock: Send + Sync {
    /// Now. Instances that share an engine must agree to well within [`CatalogOptions::settle`].
    fn now(&self) -> SystemTime;
}

/// The clock of the machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// How a catalog is opened.
#[derive(Clone)]
pub struct CatalogOptions {
    /// The name of this instance: 1 to 64 of `a-z`, `0-9`, `-` and `_`, the same after a restart, and
    /// no other instance's.
    pub instance: String,
    /// How long this instance trusts what it knows of the roots. [`Duration::MAX`]: nobody else has
    /// the engine.
    pub roots_ttl: Duration,
    /// What must pass between a change of a root's state and acting on it; more than `roots_ttl`, by
    /// more than the clocks of instances differ.
    pub settle: Duration,
    /// Grants that are remembered for each root.
    pub grants_remembered: usize,
    /// What time it is.
    pub clock: Arc<dyn Clock>,
}

impl CatalogOptions {
    /// For an engine that this process has for itself.
    pub fn exclusive(instance: impl Into<String>) -> Self {
        Self {
            instance: instance.into(),
            roots_ttl: Duration::MAX,
            settle: Duration::from_secs(5),
            grants_remembered: 1 << 18,
            clock: Arc::new(SystemClock),
        }
    }

    /// For an engine that several instances share.
    pub fn shared(instance: impl Into<String>) -> Self {
        Self {
            roots_ttl: Duration::from_secs(5),
            settle: Duration::from_secs(60),
            ..Self::exclusive(instance)
        }
    }
}

impl fmt::Debug for CatalogOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CatalogOptions")
            .field("instance", &self.instance)
            .field("roots_ttl", &self.roots_ttl)
            .field("settle", &self.settle)
            .finish_non_exhaustive()
    }
}

/// The catalog of a store. Clones are the same catalog.
#[derive(Clone)]
pub struct Catalog {
    engine: Arc<dyn Engine>,
    options: Arc<CatalogOptions>,
    roots: Arc<Roots>,
    grants: Arc<Grants>,
    usage: Arc<Usage>,
    /// Held, by its document's name, by who changes a reference.
    references: Arc<Locks<String>>,
    /// Held by who adds or takes away documents of an image, and counts their bytes.
    images: Arc<Locks<(TenantName, Digest)>>,
    /// Held by a pass of garbage collection.
    gc_pass: Arc<tokio::sync::Mutex<()>>,
    nonces: Arc<AtomicU64>,
    /// The days on which images were noted as used.
    used_days: Arc<Mutex<LruCache<(TenantName, Digest), u64>>>,
}

impl Catalog {
    /// Opens the catalog of an engine; makes one in an engine that is empty.
    ///
    /// # Errors
    /// [`CatalogError::Setup`] for options that can't be and for an engine that holds something else;
    /// [`CatalogError::Engine`].
    pub async fn open(
        engine: Arc<dyn Engine>,
        options: CatalogOptions,
    ) -> Result<Self, CatalogError> {
        check_options(&options)?;
        let catalog = Self {
            roots: Arc::default(),
            grants: Arc::new(Grants::new(options.grants_remembered)),
            usage: Arc::default(),
            references: Arc::default(),
            images: Arc::default(),
            gc_pass: Arc::default(),
            nonces: Arc::default(),
            used_days: Arc::new(Mutex::new(LruCache::new(USED_DAYS))),
            engine,
            options: Arc::new(options),
        };
        catalog.check_format().await?;
        catalog.open_roots().await?;
        Ok(catalog)
    }

    /// Does what must not be broken off when whoever asked for it goes away: what is written is
    /// counted too.
    async fn unbroken<T, F>(&self, act: impl FnOnce(Self) -> F) -> Result<T, CatalogError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, CatalogError>> + Send + 'static,
    {
        match tokio::spawn(act(self.clone())).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(CatalogError::Setup("the store is ending".to_owned())),
            },
        }
    }

    async fn check_format(&self) -> Result<(), CatalogError> {
        let engine = &self.engine;
        let format = Bytes::from_static(FORMAT);
        if engine.put_doc(names::FORMAT, format, When::Absent).await? {
            return Ok(());
        }
        match engine.get_doc(names::FORMAT).await? {
            Some(found) if found == FORMAT => Ok(()),
            found => Err(CatalogError::Setup(format!(
                "the engine holds {:?}, this lazyimg reads {:?}: use the lazyimg that wrote it, or \
                 another place",
                String::from_utf8_lossy(found.as_deref().unwrap_or_default()),
                String::from_utf8_lossy(FORMAT),
            ))),
        }
    }

    /// Whether the store can take and give now. Cheap.
    ///
    /// # Errors
    /// [`CatalogError::Engine`].
    pub async fn check(&self) -> Result<(), CatalogError> {
        Ok(self.engine.check().await?)
    }
}

fn check_options(options: &CatalogOptions) -> Result<(), CatalogError> {
    if !types::is_plain_name(&options.instance) {
        return Err(CatalogError::BadName {
            what: "name of an instance",
            text: options.instance.chars().take(80).collect(),
            rule: "1 to 64 of a-z, 0-9, - and _",
        });
    }
    if options.roots_ttl != Duration::MAX && options.settle <= options.roots_ttl {
        return Err(CatalogError::Setup(format!(
            "settle ({:?}) must be longer than roots_ttl ({:?}): an instance would act on a root while \
             others do not know its state yet",
            options.settle, options.roots_ttl,
        )));
    }
    Ok(())
}
