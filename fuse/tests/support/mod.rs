//! Small images made by hand, an origin whose health the test decides, and real mounts of both.

#![allow(dead_code)]

pub mod image;
pub mod origin;
pub mod place;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lazyimg_chunkstore::{
    CacheOptions, HostCache, ImageStore, MountStats, OriginOptions, PackOrigin, Store, StoreOptions,
};
use lazyimg_fuse::faults::Faults;
use lazyimg_fuse::meta::Metadata;
use lazyimg_fuse::mount::{MountFlags, TreeMount};
use lazyimg_fuse::mountpoint::{Unmount, unmount};
use lazyimg_fuse::tree::{TreeFs, TreeOptions};

pub use image::{BuiltImage, ImageBuilder};
pub use origin::{Health, Origin};

/// These tests mount: they need root and /dev/fuse, and say so instead of passing without.
pub fn need_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test mounts file systems: run it as root"
    );
    assert!(Path::new("/dev/fuse").exists(), "this test needs /dev/fuse");
}

/// A mounted image with its own host cache. Unmounts when dropped.
pub struct Mounted {
    pub mount: TreeMount,
    pub store: ImageStore,
    pub host: Store,
    pub origin: Arc<Origin>,
    pub metadata: Arc<Metadata>,
    /// Holds the mount point and the cache.
    pub scratch: tempfile::TempDir,
    runtime: Option<tokio::runtime::Runtime>,
}

/// What differs between mounts.
#[derive(Clone)]
pub struct Options {
    pub tree: TreeOptions,
    pub hot_bytes: usize,
    /// [`StoreOptions::fetch_deadline`].
    pub fetch_deadline: Duration,
    pub flags: MountFlags,
    pub health: Health,
    /// Whether metadata is fetched before anybody asks.
    pub load: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            tree: TreeOptions {
                read_timeout: Duration::from_secs(10),
                ..TreeOptions::default()
            },
            hot_bytes: 16 << 20,
            fetch_deadline: Duration::from_secs(30),
            flags: MountFlags::default(),
            health: Health::Good,
            load: true,
        }
    }
}

impl Mounted {
    pub fn new(image: &BuiltImage) -> Self {
        Self::with(image, &Options::default())
    }

    pub fn with(image: &BuiltImage, options: &Options) -> Self {
        need_root();
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("mnt");
        std::fs::create_dir(&dir).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let cache =
            HostCache::open(&scratch.path().join("cache"), CacheOptions::new(4 << 30)).unwrap();
        let store_options = StoreOptions {
            hot_bytes: options.hot_bytes,
            fetch_deadline: options.fetch_deadline,
            ..StoreOptions::default()
        };
        let host = Store::new(Some(cache), store_options, runtime.handle().clone());
        let origin = Arc::new(Origin::new(image.packs.clone()));
        let patience = OriginOptions {
            max_attempts: 1,
            ..OriginOptions::default()
        };
        let tier = PackOrigin::new("registry", origin.clone(), patience);
        let store = host.image(vec![Arc::new(tier)], Arc::new(MountStats::new()));
        let view = Arc::new(image.view.clone());
        let metadata = Arc::new(Metadata::new(
            view.meta(),
            store.clone(),
            options.tree.read_timeout,
            Arc::new(Faults::new("test")),
        ));
        if options.load {
            let loading = metadata.clone();
            runtime.spawn(async move { loading.load().await });
        }
        let tree = TreeFs::open(
            metadata.clone(),
            view,
            store.clone(),
            options.tree.clone(),
            runtime.handle().clone(),
        )
        .unwrap();
        let mount = TreeMount::start(tree, &dir, "test", &options.flags, || {}).unwrap();
        origin.set(options.health);
        Self {
            mount,
            store,
            host,
            origin,
            metadata,
            scratch,
            runtime: Some(runtime),
        }
    }

    pub fn dir(&self) -> &Path {
        self.mount.dir()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// Waits until nothing is missing from the metadata.
    pub fn wait_for_metadata(&self) {
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while !self.metadata.is_complete() {
            assert!(
                std::time::Instant::now() < deadline,
                "the metadata does not arrive"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.origin.set(Health::Good);
        let _ = unmount(self.mount.dir(), Unmount::Clean)
            .or_else(|_| unmount(self.mount.dir(), Unmount::Lazy));
        self.mount.wait(Duration::from_secs(10));
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        // Tasks that are left may hold the store a little longer than this process lives.
        self.host.close();
    }
}

/// Drops what the kernel remembers of names, attributes and pages.
pub fn drop_caches() {
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// Bytes that do not compress and differ from file to file.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Bytes that compress about as well as programs do.
pub fn text(seed: u64, len: usize) -> Vec<u8> {
    let mut out = noise(seed, len);
    for (i, byte) in out.iter_mut().enumerate() {
        if i % 4 != 0 {
            *byte = b'a' + (i % 7) as u8;
        }
    }
    out
}
