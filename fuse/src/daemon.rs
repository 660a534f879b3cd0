//! The mount daemon: one process for each cache directory, serving all of its mounts.
//!
//! It begins with a client's first mount and ends a moment after the last one is gone. Whoever
//! talks to it does so in the words of [`crate::protocol`].

mod connection;
mod mounts;
mod requests;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lazyimg_chunkstore::{CacheError, CacheOptions, HostCache, Store, StoreOptions};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, OnceCell};
use tokio::task::JoinError;

use crate::opener::ImageOpener;
use crate::protocol::{ErrorCode, MountRequest, Reply};
use crate::rendezvous::{self, DaemonLock};
use mounts::Mounts;

/// Another daemon that ends gives its lock free within this time, or does not end.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// How often the lock is tried meanwhile.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// At the end, sessions of detached mounts get so long to finish the reads under way.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// Connections served at once; more wait in the socket's queue. A client needs one.
const MAX_CONNECTIONS: usize = 64;

/// Threads of the runtime: replies of fetched reads and the network's bookkeeping. Reads of what is
/// on this host have their own threads.
const RUNTIME_THREADS: usize = 2;

/// What a daemon is for.
#[derive(Clone)]
pub struct DaemonOptions {
    /// The cache directory: host cache, socket, lock and log. Made if need be.
    pub cache_dir: PathBuf,
    /// How the host cache behaves.
    pub cache: CacheOptions,
    /// How reads behave.
    pub store: StoreOptions,
    /// How long it stays when there is nothing to do.
    pub linger: Duration,
    /// Finds images.
    pub opener: Arc<dyn ImageOpener>,
}

/// How a daemon process begins.
pub enum Start {
    /// In the background: standard input is a connection to the client that wants it.
    Inherited,
    /// In the foreground with one mount; ends with it.
    Foreground {
        /// What to mount.
        request: Box<MountRequest>,
        /// Called with the mount's [`Reply::Mounted`] when it can be used.
        ready: Box<dyn FnOnce(Reply) + Send>,
    },
    /// Waiting for clients.
    Listening,
}

/// Why a daemon could not run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The cache directory can't be used.
    #[error("cannot use the cache directory {}: {cause}", dir.display())]
    Directory {
        /// Which.
        dir: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// There is another one.
    #[error("a daemon serves the cache {} already: mount without --foreground, or choose another --cache-dir", dir.display())]
    Taken {
        /// The cache directory.
        dir: PathBuf,
    },
    /// The runtime or a signal handler could not be set up.
    #[error("cannot start: {0}")]
    Setup(#[source] io::Error),
    /// In the foreground: the mount failed.
    #[error("{message}")]
    Mount {
        /// For programs.
        code: ErrorCode,
        /// For people.
        message: String,
    },
}

/// Why there is no store.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// The host cache can't be opened.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// Opening it ended abnormally.
    #[error("opening the host cache ended abnormally")]
    Task(#[from] JoinError),
    /// It is late for opening one.
    #[error("this daemon is about to end")]
    Ending,
}

/// A running daemon, shared by its connections.
pub(crate) struct Daemon {
    options: DaemonOptions,
    runtime: Handle,
    store: OnceCell<Store>,
    mounts: Mounts,
    namespace: String,
    started: Instant,
    /// Connections and requests under way.
    busy: AtomicUsize,
    stopping: AtomicBool,
    /// Something changed that may be the end.
    changed: Notify,
}

/// Runs a daemon until it has nothing to do, is told to stop, or gets SIGTERM or SIGINT. All of its
/// mounts are off their directories then.
///
/// # Errors
/// See [`DaemonError`].
pub fn run(options: DaemonOptions, start: Start) -> Result<(), DaemonError> {
    give_memory_back();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .thread_name("lazyimg-io")
        .enable_all()
        .build()
        .map_err(DaemonError::Setup)?;
    let outcome = runtime.block_on(run_in(options, start));
    // Threads that wait for a network that does not answer are not worth waiting for.
    runtime.shutdown_background();
    outcome
}

/// Keeps glibc from holding on to the buffers of chunks. By default each thread keeps an arena, and
/// thresholds grow with use: twice the memory at the peak for an image of 40,000 files (measured by
/// `lazyimg-bench --only memory`). Buffers of chunks stay on the heap, though: a mapping for each means
/// page faults for every page of every chunk.
fn give_memory_back() {
    for (parameter, value) in [
        (libc::M_ARENA_MAX, 2),
        (libc::M_MMAP_THRESHOLD, 2 << 20),
        (libc::M_TRIM_THRESHOLD, 1 << 20),
    ] {
        // SAFETY: mallopt takes two integers and keeps no reference; a parameter it does not know
        // is refused with 0, and then nothing changes.
        #[allow(unsafe_code)]
        unsafe {
            libc::mallopt(parameter, value);
        }
    }
}

async fn run_in(mut options: DaemonOptions, start: Start) -> Result<(), DaemonError> {
    let directory = |dir: &Path| {
        let dir = dir.to_owned();
        move |cause| DaemonError::Directory { dir, cause }
    };
    let cache_dir = options.cache_dir.clone();
    rendezvous::make_dir(&cache_dir).map_err(directory(&cache_dir))?;
    let first = match &start {
        Start::Inherited => Some(take_stdin().map_err(DaemonError::Setup)?),
        Start::Foreground { .. } | Start::Listening => None,
    };
    if let Start::Foreground { .. } = start {
        options.linger = Duration::ZERO;
    }
    let Some(lock) = take_lock(&cache_dir, first.is_some())
        .await
        .map_err(directory(&cache_dir))?
    else {
        let Some(first) = first else {
            return Err(DaemonError::Taken { dir: cache_dir });
        };
        let message = "another daemon of this cache was faster".to_owned();
        let _ = connection::refuse(
            first,
            Reply::Error {
                code: ErrorCode::Again,
                message,
            },
        )
        .await;
        return Ok(());
    };
    let listener = lock.listen(&cache_dir).map_err(directory(&cache_dir))?;
    listener.set_nonblocking(true).map_err(DaemonError::Setup)?;
    let listener = UnixListener::from_std(listener).map_err(DaemonError::Setup)?;
    let daemon = Arc::new(Daemon {
        options,
        runtime: Handle::current(),
        store: OnceCell::new(),
        mounts: Mounts::default(),
        namespace: crate::mountpoint::namespace().map_err(DaemonError::Setup)?,
        started: Instant::now(),
        busy: AtomicUsize::new(0),
        stopping: AtomicBool::new(false),
        changed: Notify::new(),
    });
    // The cache opens while the image is looked up.
    let early = Arc::clone(&daemon);
    tokio::spawn(async move {
        let _ = early.store().await;
    });
    let mut failed = None;
    match start {
        Start::Inherited => {
            if let Some(first) = first {
                daemon.clone().accept(first);
            }
        }
        Start::Foreground { request, ready } => match daemon.mount(*request).await {
            Ok(mounted) => ready(mounted),
            Err(error) => {
                failed = Some(DaemonError::Mount {
                    code: error.code,
                    message: error.message,
                })
            }
        },
        Start::Listening => {}
    }
    let served = match failed {
        None => serve(&daemon, &listener).await,
        Some(error) => Err(error),
    };
    // From here on nobody finds us: who waits in the queue is cut off and comes again, as a client
    // of the next daemon, which waits for the lock.
    daemon.stopping.store(true, Ordering::SeqCst);
    let removed = lock.remove_socket(&cache_dir);
    drop(listener);
    daemon.stop_all().await;
    daemon.close_store().await;
    if let Err(error) = removed {
        tracing::warn!("the control socket could not be removed: {error}");
    }
    served
}

async fn serve(daemon: &Arc<Daemon>, listener: &UnixListener) -> Result<(), DaemonError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(DaemonError::Setup)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DaemonError::Setup)?;
    loop {
        let lingering = async {
            if daemon.is_idle() {
                tokio::time::sleep(daemon.options.linger).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            // A client that is there comes before the end.
            biased;
            accepted = listener.accept(), if daemon.busy.load(Ordering::SeqCst) < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => daemon.clone().accept(stream),
                Err(error) => {
                    tracing::warn!("a connection could not be accepted: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            () = daemon.changed.notified() => {
                if daemon.stopping.load(Ordering::SeqCst) {
                    return Ok(());
                }
            }
            () = lingering => {
                if daemon.is_idle() {
                    return Ok(());
                }
            }
        }
    }
}

impl Daemon {
    /// Serves a connection in a task of its own.
    fn accept(self: Arc<Self>, stream: UnixStream) {
        self.busy.fetch_add(1, Ordering::SeqCst);
        tokio::spawn(async move {
            if let Err(error) = connection::serve(&self, stream).await {
                tracing::debug!("a connection ended: {error}");
            }
            self.busy.fetch_sub(1, Ordering::SeqCst);
            self.changed.notify_one();
        });
    }

    fn is_idle(&self) -> bool {
        self.busy.load(Ordering::SeqCst) == 0 && self.mounts.is_empty()
    }

    /// The store over the host cache, opened at the first call; not when the daemon is stopping.
    async fn store(&self) -> Result<&Store, StoreError> {
        self.store
            .get_or_try_init(|| async {
                if self.stopping.load(Ordering::SeqCst) {
                    return Err(StoreError::Ending);
                }
                let (dir, cache) = (self.options.cache_dir.clone(), self.options.cache.clone());
                let opened =
                    tokio::task::spawn_blocking(move || HostCache::open(&dir, cache)).await;
                Ok(Store::new(
                    Some(opened??),
                    self.options.store.clone(),
                    self.runtime.clone(),
                ))
            })
            .await
    }

    /// Closes the host cache, which must not be open when the process ends. It may be opening: then
    /// this waits for it. Once the daemon is stopping nobody opens it again.
    async fn close_store(&self) {
        if let Ok(store) = self.store().await.cloned() {
            let _ = tokio::task::spawn_blocking(move || store.close()).await;
        }
    }

    /// Takes every mount off its directory; waits a moment for reads under way.
    async fn stop_all(&self) {
        let all = self.mounts.all();
        let ended = tokio::task::spawn_blocking(move || {
            for mounted in &all {
                mounted.take_off();
            }
            let deadline = Instant::now() + STOP_PATIENCE;
            all.iter().all(|m| {
                m.mount()
                    .wait(deadline.saturating_duration_since(Instant::now()))
            })
        });
        if !ended.await.unwrap_or(false) {
            tracing::warn!("files of a mount are still open; reading them fails from now on");
        }
    }
}

/// The lock of the cache directory; `None` when another daemon has it and keeps it. `patient`: waits
/// for a daemon that is about to end.
async fn take_lock(cache_dir: &Path, patient: bool) -> io::Result<Option<DaemonLock>> {
    let deadline = Instant::now()
        + if patient {
            LOCK_PATIENCE
        } else {
            Duration::ZERO
        };
    loop {
        match DaemonLock::take(cache_dir) {
            Ok(lock) => return Ok(Some(lock)),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            // Whoever listens serves.
            Err(_) if Instant::now() >= deadline || rendezvous::connect(cache_dir)?.is_some() => {
                return Ok(None);
            }
            Err(_) => tokio::time::sleep(LOCK_PAUSE).await,
        }
    }
}

/// Standard input as the connection it was made to be; in its place comes /dev/null.
fn take_stdin() -> io::Result<UnixStream> {
    let stream = StdStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let null = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    // No longer a part of the client's terminal and its signals. It fails for a process group's
    // leader, which is on its own already.
    let _ = rustix::process::setsid();
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}
