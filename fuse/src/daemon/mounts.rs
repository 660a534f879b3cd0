//! The mounts of a daemon.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use lazyimg_chunkstore::ImageStore;
use lazyimg_convergent::ChunkId;
use parking_lot::Mutex;
use tokio::task::AbortHandle;

use crate::meta::Metadata;
use crate::mount::TreeMount;
use crate::mountpoint::{MountpointError, Unmount};
use crate::protocol::{MountStatus, Resident, WirePath};
use crate::view::ImageView;

/// What serves a mount; there will be others.
const FRONTEND: &str = "tree";

/// A mount and what it takes.
pub struct Mounted {
    /// The image, as it was asked for.
    pub image: String,
    pub dir: PathBuf,
    pub view: Arc<ImageView>,
    pub store: ImageStore,
    pub metadata: Arc<Metadata>,
    /// Fetches the metadata.
    pub loader: AbortHandle,
    pub started: Instant,
    detached: AtomicBool,
    mount: OnceLock<TreeMount>,
}

/// All mounts, by the order in which they were made.
#[derive(Default)]
pub struct Mounts {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    mounts: BTreeMap<u64, Arc<Mounted>>,
    /// Directories that somebody is about to mount at.
    starting: HashSet<PathBuf>,
    last: u64,
}

/// A directory that nobody else mounts at meanwhile.
pub struct Claim<'a> {
    mounts: &'a Mounts,
    dir: PathBuf,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.mounts.inner.lock().starting.remove(&self.dir);
    }
}

impl Mounts {
    pub fn is_empty(&self) -> bool {
        let inner = self.inner.lock();
        inner.mounts.is_empty() && inner.starting.is_empty()
    }

    /// Claims a directory; `None` when somebody is about to mount there.
    pub fn claim(&self, dir: &Path) -> Option<Claim<'_>> {
        let claimed = self.inner.lock().starting.insert(dir.to_owned());
        claimed.then(|| Claim {
            mounts: self,
            dir: dir.to_owned(),
        })
    }

    /// Adds a mount that is about to begin; its number.
    pub fn add(&self, mounted: Arc<Mounted>) -> u64 {
        let mut inner = self.inner.lock();
        inner.last += 1;
        let number = inner.last;
        inner.mounts.insert(number, mounted);
        number
    }

    /// Forgets a mount that has ended.
    pub fn remove(&self, number: u64) {
        let removed = self.inner.lock().mounts.remove(&number);
        if let Some(mounted) = removed {
            mounted.loader.abort();
        }
    }

    /// Every mount that can be used or is still in use, oldest first.
    pub fn all(&self) -> Vec<Arc<Mounted>> {
        let inner = self.inner.lock();
        inner
            .mounts
            .values()
            .filter(|m| m.mount.get().is_some())
            .cloned()
            .collect()
    }

    /// The mount at `dir`.
    pub fn at(&self, dir: &Path) -> Option<Arc<Mounted>> {
        self.all()
            .into_iter()
            .rev()
            .find(|m| m.dir == dir && !m.is_detached())
    }
}

/// Counts chunks of all mounts that are in the host cache.
#[derive(Default)]
pub struct Census {
    seen: HashSet<ChunkId>,
    counted: Resident,
}

impl Census {
    fn add(&mut self, id: &ChunkId, len: u64) {
        self.counted.named_chunks += 1;
        self.counted.named_bytes += len;
        if self.seen.insert(*id) {
            self.counted.chunks += 1;
            self.counted.bytes += len;
        }
    }

    /// What was counted.
    pub fn counted(&self) -> Resident {
        self.counted
    }
}

impl Mounted {
    pub fn new(
        image: String,
        dir: PathBuf,
        view: Arc<ImageView>,
        store: ImageStore,
        metadata: Arc<Metadata>,
        loader: AbortHandle,
    ) -> Self {
        Self {
            image,
            dir,
            view,
            store,
            metadata,
            loader,
            started: Instant::now(),
            detached: AtomicBool::new(false),
            mount: OnceLock::new(),
        }
    }

    /// Says that it can be used.
    pub fn began(&self, mount: TreeMount) {
        let _ = self.mount.set(mount);
    }

    /// The mount itself; only of those that [`Mounts`] gives out.
    pub fn mount(&self) -> &TreeMount {
        self.mount.get().expect("Mounts gives out what has begun")
    }

    pub fn is_detached(&self) -> bool {
        self.detached.load(Ordering::SeqCst)
    }

    /// Takes it off its directory.
    pub fn unmount(&self, how: Unmount) -> Result<(), MountpointError> {
        self.mount().unmount(how)?;
        self.detached.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Takes it off its directory whatever uses it, at the daemon's end.
    pub fn take_off(&self) {
        if self.is_detached() {
            return;
        }
        let outcome = self
            .unmount(Unmount::Clean)
            .or_else(|_| self.unmount(Unmount::Lazy));
        if let Err(error) = outcome {
            tracing::warn!(mount = %self.dir.display(), "{error}");
        }
    }

    /// How it is doing; what of it is in the host cache is added to `census`.
    pub fn status(&self, census: &mut Census) -> MountStatus {
        let (mut chunks, mut resident_chunks, mut resident_bytes) = (0, 0, 0);
        let mut seen = HashSet::new();
        for spec in self.view.specs().filter(|spec| seen.insert(*spec.id())) {
            chunks += 1;
            if self.store.is_cached(spec.id()) {
                let len = u64::from(spec.chunk.stored_len);
                resident_chunks += 1;
                resident_bytes += len;
                census.add(spec.id(), len);
            }
        }
        MountStatus {
            image: self.image.clone(),
            digest: self.view.image,
            dir: WirePath(self.dir.clone()),
            frontend: FRONTEND.to_owned(),
            detached: self.is_detached(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            file_bytes: self.view.file_bytes,
            image_bytes: self.view.data_len() + self.view.meta_len(),
            stored_bytes: self.view.stored_bytes,
            resident_bytes,
            chunks,
            resident_chunks,
            metadata_complete: self.metadata.is_complete(),
            errors: self.mount().errors(),
            filled_bytes: self.mount().filled_bytes(),
            stats: self.store.stats().snapshot(),
        }
    }
}
