//! The smallest program around the library: a daemon over images in plain directories, and its
//! client. The tests of the daemon run it as processes of their own; `lazyimg` is the real one.
//!
//! ```text
//! mini daemon     CACHE_DIR LINGER_MS
//! mini foreground CACHE_DIR IMAGE_DIR DIR
//! mini mount      CACHE_DIR IMAGE_DIR DIR [READ_TIMEOUT_MS]
//! mini umount     CACHE_DIR DIR clean|lazy|force
//! mini status     CACHE_DIR
//! ```
//! An image directory holds `manifest`, `tenant` (32 bytes), the packs under their hex digests, and
//! perhaps `health` with the word `down` or `silent` in it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_chunkstore::{
    BlobRanges, CacheOptions, FetchError, OriginOptions, PackOrigin, StoreOptions,
};
use lazyimg_convergent::{Digest, TenantKey};
use lazyimg_fuse::client::{Client, DaemonCommand};
use lazyimg_fuse::daemon::{DaemonOptions, Start, run};
use lazyimg_fuse::log::BoundedLog;
use lazyimg_fuse::mountpoint::{Unmount, namespace};
use lazyimg_fuse::opener::{ImageOpener, OpenError, OpenedImage};
use lazyimg_fuse::protocol::{ErrorCode, KeySource, MountRequest, TreeSettings, WirePath};
use lazyimg_fuse::rendezvous::{LOG, make_dir};
use lazyimg_fuse::view::ImageView;
use lazyimg_image::manifest::Manifest;
use lazyimg_image::reference::ImageRef;

struct Directories;

struct PackFiles(PathBuf);

#[async_trait]
impl ImageOpener for Directories {
    async fn open(&self, request: &MountRequest) -> Result<OpenedImage, OpenError> {
        let fail = |e: &dyn std::fmt::Display| OpenError {
            code: ErrorCode::Image,
            message: format!("{}: {e}", request.image),
        };
        let Ok(ImageRef::Layout { dir, .. }) = request.image.parse::<ImageRef>() else {
            return Err(OpenError {
                code: ErrorCode::Image,
                message: "write oci:DIR".to_owned(),
            });
        };
        let read = |name: &str| std::fs::read(dir.join(name)).map_err(|e| fail(&e));
        let key: [u8; 32] = read("tenant")?.try_into().map_err(|_| fail(&"bad key"))?;
        let manifest = Manifest::parse(&read("manifest")?).map_err(|e| fail(&e))?;
        let manifest = manifest
            .open(&TenantKey::from_bytes(key))
            .map_err(|e| fail(&e))?;
        let view = ImageView::of_manifest(&manifest).map_err(|e| fail(&e))?;
        let origin = OriginOptions {
            max_attempts: 1,
            ..OriginOptions::default()
        };
        Ok(OpenedImage {
            view: Arc::new(view),
            tiers: vec![Arc::new(PackOrigin::new(
                "files",
                Arc::new(PackFiles(dir)),
                origin,
            ))],
            early: Vec::new(),
        })
    }
}

#[async_trait]
impl BlobRanges for PackFiles {
    async fn read_range(&self, blob: &Digest, offset: u64, len: u64) -> Result<Bytes, FetchError> {
        use std::os::unix::fs::FileExt;
        loop {
            match std::fs::read_to_string(self.0.join("health"))
                .unwrap_or_default()
                .trim()
            {
                "down" => return Err(FetchError::unavailable("taken down")),
                "silent" => tokio::time::sleep(Duration::from_millis(10)).await,
                _ => break,
            }
        }
        let mut bytes = vec![0; len as usize];
        std::fs::File::open(self.0.join(blob.hex()))
            .and_then(|pack| pack.read_exact_at(&mut bytes, offset))
            .map_err(|e| FetchError::NotFound(e.to_string()))?;
        Ok(bytes.into())
    }
}

fn options(cache_dir: &Path, linger: Duration) -> DaemonOptions {
    DaemonOptions {
        cache_dir: cache_dir.to_owned(),
        cache: CacheOptions::new(1 << 30),
        store: StoreOptions::default(),
        linger,
        opener: Arc::new(Directories),
    }
}

fn request(image: &str, dir: &str, read_timeout_ms: u64) -> MountRequest {
    MountRequest {
        image: format!("oci:{image}"),
        dir: WirePath(dir.into()),
        namespace: namespace().expect("/proc is mounted"),
        key: KeySource::File(WirePath("/unused".into())),
        source: Default::default(),
        cache: Default::default(),
        flags: Default::default(),
        tree: TreeSettings {
            read_timeout_ms,
            ..TreeSettings::default()
        },
    }
}

fn client(cache_dir: &str) -> Client {
    let program = std::env::current_exe().expect("it runs");
    let linger = std::env::var("MINI_LINGER_MS").unwrap_or_else(|_| "1000".to_owned());
    let args = ["daemon", cache_dir, &linger].map(Into::into).to_vec();
    Client::new(Path::new(cache_dir), Some(DaemonCommand { program, args }))
        .expect("a directory to be in")
}

#[allow(clippy::print_stdout, clippy::print_stderr)]
fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome: Result<String, Box<dyn std::error::Error>> =
        match args[..] {
            ["daemon", cache_dir, linger] => {
                let cache_dir = Path::new(cache_dir);
                make_dir(cache_dir)
                    .and_then(|()| BoundedLog::new(&cache_dir.join(LOG)))
                    .map(|log| {
                        tracing_subscriber::fmt()
                            .with_writer(log)
                            .with_ansi(false)
                            .init()
                    })
                    .map_err(Into::into)
                    .and_then(|()| {
                        let linger = Duration::from_millis(linger.parse()?);
                        Ok(run(options(cache_dir, linger), Start::Inherited)
                            .map(|()| String::new())?)
                    })
            }
            ["foreground", cache_dir, image, dir] => run(
                options(Path::new(cache_dir), Duration::ZERO),
                Start::Foreground {
                    request: Box::new(request(image, dir, 10_000)),
                    ready: Box::new(|_| println!("ready")),
                },
            )
            .map(|()| "over".to_owned())
            .map_err(Into::into),
            ["mount", cache_dir, image, dir] => mount(cache_dir, request(image, dir, 10_000)),
            ["mount", cache_dir, image, dir, timeout] => mount(
                cache_dir,
                request(image, dir, timeout.parse().expect("milliseconds")),
            ),
            ["umount", cache_dir, dir, how] => {
                let how = match how {
                    "lazy" => Unmount::Lazy,
                    "force" => Unmount::Force,
                    _ => Unmount::Clean,
                };
                client(cache_dir)
                    .umount(Path::new(dir), how)
                    .map(|in_use| format!("in use: {in_use}"))
                    .map_err(Into::into)
            }
            ["status", cache_dir] => client(cache_dir)
                .status()
                .map(|s| serde_json::to_string(&s).expect("plain data"))
                .map_err(Into::into),
            _ => Err("see the head of tests/support/mini.rs".into()),
        };
    match outcome {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn mount(cache_dir: &str, request: MountRequest) -> Result<String, Box<dyn std::error::Error>> {
    let mounted = client(cache_dir).mount(request)?;
    Ok(mounted.note.unwrap_or_default())
}
