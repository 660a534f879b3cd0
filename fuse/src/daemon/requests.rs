//! What a daemon does for each request.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lazyimg_chunkstore::{ChunkSpec, ErrorKind, FetchError, MountStats, ReadError, VerifyScope};

use super::connection::Progress;
use super::mounts::{Census, Mounted};
use super::{Daemon, StoreError};
use crate::errno::{causes, chain};
use crate::faults::Faults;
use crate::meta::Metadata;
use crate::mount::{MountError, TreeMount};
use crate::mountpoint::{self, MountpointError, Unmount};
use crate::opener::{OpenedImage, REGISTRY_TIER};
use crate::protocol::{
    CacheSettings, ErrorCode, MAX_FAILURES, MountRequest, Reply, Request, StatusReport, WirePath,
};
use crate::tally::Tally;
use crate::tree::{TreeFs, TreeOptions};

/// Chunks that a verification asks for at once: some 16 MiB.
const VERIFY_BATCH: usize = 64;

/// How long an unmount waits for the session's end, which nothing should delay.
const UNMOUNT_PATIENCE: Duration = Duration::from_secs(5);

/// Why a request failed.
#[derive(Debug)]
pub(super) struct Refusal {
    pub code: ErrorCode,
    pub message: String,
}

impl Refusal {
    fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    fn internal(error: impl std::error::Error + 'static) -> Self {
        Self::new(ErrorCode::Internal, chain(&error))
    }
}

impl From<MountpointError> for Refusal {
    fn from(error: MountpointError) -> Self {
        let code = match &error {
            MountpointError::Busy { .. } => ErrorCode::Busy,
            MountpointError::NotOurs { .. } => ErrorCode::NotMounted,
            _ => ErrorCode::Mount,
        };
        Self::new(code, error.to_string())
    }
}

impl From<MountError> for Refusal {
    fn from(error: MountError) -> Self {
        Self::new(ErrorCode::Mount, error.to_string())
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        let code = match &error {
            StoreError::Cache(_) => ErrorCode::Cache,
            StoreError::Task(_) => ErrorCode::Internal,
            StoreError::Ending => ErrorCode::Again,
        };
        Self::new(code, chain(&error))
    }
}

impl Daemon {
    pub(super) async fn handle(self: &Arc<Self>, request: Request, progress: Progress) -> Reply {
        let outcome = match request {
            Request::Ping => Ok(Reply::Pong {
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            }),
            Request::Mount(request) => self.mount(*request).await,
            Request::Umount {
                dir,
                how,
                namespace,
            } => self.umount(dir.0, how, &namespace).await,
            Request::Status => self.status().await,
            Request::Verify { dir, tiers } => self.verify(dir.0, tiers, progress).await,
            Request::CacheTrim { bytes } => self.cache_trim(bytes).await,
            Request::CacheVerify => self.cache_verify(progress).await,
            Request::Stop => {
                self.stopping.store(true, Ordering::SeqCst);
                self.changed.notify_one();
                Ok(Reply::Stopping)
            }
        };
        outcome.unwrap_or_else(|Refusal { code, message }| Reply::Error { code, message })
    }

    fn check_namespace(&self, theirs: &str) -> Result<(), Refusal> {
        if theirs == self.namespace {
            return Ok(());
        }
        Err(Refusal::new(
            ErrorCode::Namespace,
            format!(
                "the daemon of the cache {} lives in another mount namespace ({} instead of {theirs}), where a mount \
                 would not be seen from here: choose another --cache-dir in this namespace",
                self.options.cache_dir.display(),
                self.namespace
            ),
        ))
    }

    /// Mounts an image; [`Reply::Mounted`].
    pub(super) async fn mount(self: &Arc<Self>, request: MountRequest) -> Result<Reply, Refusal> {
        self.check_namespace(&request.namespace)?;
        if self.stopping.load(Ordering::SeqCst) {
            return Err(Refusal::new(
                ErrorCode::Again,
                "this daemon is about to end",
            ));
        }
        let wanted = request.dir.0.clone();
        let dir = blocking(move || mountpoint::resolve(&wanted)).await??;
        let _claim = self.mounts.claim(&dir).ok_or_else(|| {
            Refusal::new(
                ErrorCode::Busy,
                format!("{} is being mounted at already", dir.display()),
            )
        })?;
        // A cold region makes starts slow, and slow starts make more of them: new ones wait here.
        if let Some(store) = self.store.get() {
            let patience = TreeOptions::from(&request.tree).read_timeout;
            let admitted = store.admit(patience).await;
            let _ = admitted.map_err(|e| Refusal::new(ErrorCode::Overloaded, e.to_string()))?;
        }
        let prepared = dir.clone();
        let (prepared, opened, store) = tokio::join!(
            blocking(move || mountpoint::prepare(&prepared)),
            self.options.opener.open(&request),
            self.store(),
        );
        let notes = [prepared??, self.unlike_asked(&request.cache)];
        let OpenedImage { view, tiers, early } =
            opened.map_err(|e| Refusal::new(e.code, e.message))?;
        let store = store?.image(tiers, Arc::new(MountStats::new()));
        store.accept_from(REGISTRY_TIER, early);
        let options = TreeOptions::from(&request.tree);
        let metadata = Arc::new(Metadata::new(
            view.meta(),
            store.clone(),
            options.read_timeout,
            Arc::new(Faults::new(dir.to_string_lossy())),
        ));
        let loading = Arc::clone(&metadata);
        let loader = tokio::spawn(async move { loading.load().await }).abort_handle();
        let mounted = Arc::new(Mounted::new(
            request.image.clone(),
            dir.clone(),
            view,
            store,
            metadata,
            loader,
        ));
        let digest = mounted.view.image;
        let number = self.mounts.add(Arc::clone(&mounted));
        let (daemon, starting) = (Arc::clone(self), Arc::clone(&mounted));
        let started = blocking(move || daemon.start(&starting, number, &request, options)).await;
        if let Err(refusal) = started.and_then(|r| r) {
            self.mounts.remove(number);
            return Err(refusal);
        }
        tracing::info!(mount = %dir.display(), %digest, "mounted");
        let notes: Vec<String> = notes.into_iter().flatten().collect();
        Ok(Reply::Mounted {
            digest,
            dir: WirePath(dir),
            note: (!notes.is_empty()).then(|| notes.join("\n")),
        })
    }

    /// What to tell a client who asks for another cache than there is.
    fn unlike_asked(&self, asked: &CacheSettings) -> Option<String> {
        let cache_bytes = self.options.cache.max_bytes;
        let hot_bytes = self.options.store.hot_bytes as u64;
        let differs = |asked: Option<u64>, is| asked.is_some_and(|asked| asked != is);
        let unlike = differs(asked.cache_bytes, cache_bytes) || differs(asked.hot_bytes, hot_bytes);
        unlike.then(|| {
            format!(
                "the daemon of this cache runs with --cache-bytes {cache_bytes} --hot-bytes {hot_bytes}; \
                 unmount everything to change it"
            )
        })
    }

    /// The part of mounting that blocks.
    fn start(
        self: &Arc<Self>,
        mounted: &Arc<Mounted>,
        number: u64,
        request: &MountRequest,
        options: TreeOptions,
    ) -> Result<(), Refusal> {
        let tree = TreeFs::open(
            Arc::clone(&mounted.metadata),
            Arc::clone(&mounted.view),
            mounted.store.clone(),
            options,
            self.runtime.clone(),
        )
        .map_err(|e| {
            let words = format!("the metadata of {}: {}", request.image, chain(&e));
            Refusal::new(code_of(&e), words)
        })?;
        let daemon = Arc::clone(self);
        let at_end = move || {
            daemon.mounts.remove(number);
            daemon.changed.notify_one();
        };
        mounted.began(TreeMount::start(
            tree,
            &mounted.dir,
            &request.image,
            &request.flags,
            at_end,
        )?);
        Ok(())
    }

    async fn umount(&self, dir: PathBuf, how: Unmount, namespace: &str) -> Result<Reply, Refusal> {
        self.check_namespace(namespace)?;
        let mounted = self.mounted_at(dir).await?;
        let in_use = blocking(move || {
            mounted.unmount(how)?;
            // After a lazy one only files that are open hold it.
            let patience = if how == Unmount::Lazy {
                Duration::from_millis(50)
            } else {
                UNMOUNT_PATIENCE
            };
            Ok::<_, Refusal>(!mounted.mount().wait(patience))
        })
        .await??;
        Ok(Reply::Unmounted { in_use })
    }

    async fn mounted_at(&self, dir: PathBuf) -> Result<Arc<Mounted>, Refusal> {
        let dir = blocking(move || mountpoint::resolve(&dir)).await??;
        self.mounts.at(&dir).ok_or_else(|| {
            Refusal::new(
                ErrorCode::NotMounted,
                format!("this daemon has nothing mounted at {}", dir.display()),
            )
        })
    }

    async fn status(&self) -> Result<Reply, Refusal> {
        let mounts = self.mounts.all();
        let (mounts, resident) = blocking(move || {
            let mut census = Census::default();
            let mounts = mounts.iter().map(|m| m.status(&mut census)).collect();
            (mounts, census.counted())
        })
        .await?;
        let cache = self
            .store
            .get()
            .and_then(|store| store.cache().map(|cache| cache.stats()));
        Ok(Reply::Status(Box::new(StatusReport {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cache_dir: WirePath(self.options.cache_dir.clone()),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            cache,
            mounts,
            resident,
        })))
    }

    async fn verify(
        &self,
        dir: PathBuf,
        tiers: bool,
        progress: Progress,
    ) -> Result<Reply, Refusal> {
        let mounted = self.mounted_at(dir).await?;
        let mut seen = std::collections::HashSet::new();
        let specs: Vec<ChunkSpec> = mounted
            .view
            .specs()
            .filter(|s| seen.insert(*s.id()))
            .cloned()
            .collect();
        let scope = if tiers {
            VerifyScope::Tiers
        } else {
            VerifyScope::CacheFirst
        };
        let mut tally = Tally::new(MAX_FAILURES);
        for (i, batch) in specs.chunks(VERIFY_BATCH).enumerate() {
            // A full channel has an older step in it, which will do.
            if let Err(tokio::sync::mpsc::error::TrySendError::Closed(_)) =
                progress.try_send(((i * VERIFY_BATCH) as u64, specs.len() as u64))
            {
                return Err(Refusal::new(
                    ErrorCode::Internal,
                    "nobody waits for the result",
                ));
            }
            for outcome in mounted.store.verify(batch, scope).await {
                tally.add(outcome);
            }
        }
        Ok(Reply::Verified(tally.report()))
    }
}

impl Daemon {
    async fn cache_trim(&self, bytes: u64) -> Result<Reply, Refusal> {
        let store = self.store().await?.clone();
        let stats = blocking(move || store.cache().map(|cache| cache.trim(bytes))).await?;
        Ok(Reply::Cache(stats.ok_or_else(no_cache)?))
    }

    async fn cache_verify(&self, progress: Progress) -> Result<Reply, Refusal> {
        let store = self.store().await?.clone();
        let scrubbed = blocking(move || {
            let mut tell = |done, total| {
                // A full channel has an older step in it, which will do.
                !matches!(
                    progress.try_send((done, total)),
                    Err(tokio::sync::mpsc::error::TrySendError::Closed(_))
                )
            };
            store.cache().map(|cache| cache.scrub(&mut tell))
        })
        .await?;
        Ok(Reply::Scrubbed(scrubbed.ok_or_else(no_cache)?))
    }
}

fn no_cache() -> Refusal {
    Refusal::new(ErrorCode::Cache, "this daemon keeps nothing on disk")
}

/// Runs what blocks where it may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(Refusal::internal)
}

/// What kind of failure it is when the metadata can't be read.
fn code_of(error: &(dyn std::error::Error + 'static)) -> ErrorCode {
    match causes(error).find_map(|cause| cause.downcast_ref::<ReadError>()) {
        Some(error) if error.is_damage() => ErrorCode::Damaged,
        // That a tier does not have it says nothing where another one could not be asked. The farthest
        // that failed counts: it is the one that should have all.
        Some(ReadError::Tiers { failures, .. }) => failures
            .iter()
            .rev()
            .find_map(|failure| fetch_code(&failure.error))
            .unwrap_or(ErrorCode::Image),
        Some(ReadError::TimedOut { .. }) => ErrorCode::Unreachable,
        _ => ErrorCode::Image,
    }
}

/// What kind of outage it is; `None` when the tier could be asked.
fn fetch_code(error: &FetchError) -> Option<ErrorCode> {
    match error.kind() {
        ErrorKind::Unauthorized => Some(ErrorCode::Key),
        ErrorKind::Unavailable | ErrorKind::TimedOut => Some(ErrorCode::Unreachable),
        ErrorKind::NotFound | ErrorKind::Corrupt | ErrorKind::Invalid => None,
    }
}

#[cfg(test)]
mod tests {
    use lazyimg_chunkstore::TierFailure;
    use lazyimg_convergent::ChunkId;

    use super::*;

    fn code(errors: Vec<FetchError>) -> ErrorCode {
        let failure = |error| TierFailure {
            tier: "t".to_owned(),
            error: Arc::new(FetchError::GaveUp {
                attempts: 2,
                last: Box::new(error),
            }),
        };
        code_of(&ReadError::Tiers {
            id: ChunkId([1; 32]),
            failures: errors.into_iter().map(failure).collect(),
        })
    }

    #[test]
    fn an_outage_is_not_called_damage_because_a_near_store_lacks_the_chunk() {
        let gone = || FetchError::NotFound("x".to_owned());
        let down = || FetchError::unavailable("x");
        let refused = || FetchError::Unauthorized("x".to_owned());
        let corrupt = || FetchError::Corrupt("x".to_owned());
        for (errors, expected) in [
            (vec![gone(), down()], ErrorCode::Unreachable),
            (vec![down(), gone()], ErrorCode::Unreachable),
            (vec![gone(), refused()], ErrorCode::Key),
            (vec![down(), refused()], ErrorCode::Key),
            (vec![gone(), gone()], ErrorCode::Damaged),
            (vec![corrupt(), down()], ErrorCode::Damaged),
        ] {
            assert_eq!(code(errors), expected);
        }
        let late = ReadError::TimedOut {
            id: ChunkId([1; 32]),
            waited: Duration::from_secs(1),
            failures: Vec::new(),
        };
        assert_eq!(code_of(&late), ErrorCode::Unreachable);
    }
}
