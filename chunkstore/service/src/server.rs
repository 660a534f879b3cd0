//! The store as a process: it listens, serves, and ends without cutting anybody off.

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Version};
use bytes::BytesMut;
use hyper::body::Incoming;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use crate::activity::{Activity, Patience, Shared, Socket, Verdict};
use crate::audit::Act;
use crate::direct::{self, Ended};
use crate::http::{self, App, Parts};
use crate::tls::{Tls, TlsError};

/// How often files are looked at for changes.
const LOOK: Duration = Duration::from_secs(2);

/// How often what tenants use is written down.
const FLUSH: Duration = Duration::from_secs(30);

/// Bytes of one connection's buffer. A head of a request must fit.
const BUFFER: usize = 128 << 10;

/// Requests of one HTTP/2 connection at a time.
const MAX_STREAMS: u32 = 100;

/// How a store listens and ends.
#[derive(Debug)]
pub struct ServerOptions {
    /// Address and port; port 0 for any. More than one address may stand behind a name: the first that
    /// can be had is taken.
    pub listen: String,
    /// TLS, if it speaks that.
    pub tls: Option<Tls>,
    /// Open connections; what is above waits to be accepted.
    pub max_connections: usize,
    /// How long connections may do nothing.
    pub patience: Patience,
    /// How long requests under way may go on when the store ends.
    pub drain: Duration,
}

impl ServerOptions {
    /// The defaults, at an address.
    pub fn at(listen: impl Into<String>) -> Self {
        Self {
            listen: listen.into(),
            tls: None,
            max_connections: 4096,
            patience: Patience::default(),
            drain: Duration::from_secs(30),
        }
    }
}

/// Why a store does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address can't be had.
    #[error("can't listen at {listen}: {cause}")]
    Listen {
        /// As it was given.
        listen: String,
        /// Why.
        cause: io::Error,
    },
    /// Everybody could do everything, from anywhere.
    #[error(
        "without tenants a store listens on loopback only, and {addr} is not: name the tenants with \
         --tenants FILE, or listen at 127.0.0.1 or [::1]"
    )]
    NotLoopback {
        /// The address.
        addr: SocketAddr,
    },
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Something of its own.
    #[error("the store can't start: {0}")]
    Setup(String),
}

/// A store that listens.
#[derive(Debug)]
pub struct Server {
    app: Arc<App>,
    listener: TcpListener,
    addr: SocketAddr,
    tls: Option<Arc<Tls>>,
    config: Option<Arc<ServerConfig>>,
    options: Arc<ServerOptions>,
    abort: CancellationToken,
}

/// Tells a server what to do.
#[derive(Debug, Clone)]
pub struct Handle {
    app: Arc<App>,
    tls: Option<Arc<Tls>>,
    abort: CancellationToken,
}

impl Handle {
    /// To end: no new connections, and those requests that are under way.
    pub fn drain(&self) {
        self.app.draining.cancel();
    }

    /// To end at once.
    pub fn abort(&self) {
        self.app.draining.cancel();
        self.abort.cancel();
    }

    /// To read tenants and certificates again, whether or not they look changed.
    pub async fn reload(&self) {
        reload(&self.app, self.tls.as_ref(), true).await;
    }
}

impl Server {
    /// Listens: from here on connections are taken by the kernel, and answered when it runs.
    ///
    /// # Errors
    /// [`ServeError`].
    pub async fn bind(parts: Parts, mut options: ServerOptions) -> Result<Self, ServeError> {
        let local_only = !parts.tenants.need_tokens();
        let listener = listen(&options.listen, local_only).await?;
        let failed = |cause| ServeError::Listen {
            listen: options.listen.clone(),
            cause,
        };
        let addr = listener.local_addr().map_err(failed)?;
        let app = App::new(parts).map_err(ServeError::Setup)?;
        let tls = options.tls.take().map(Arc::new);
        let config = tls.as_ref().map(|tls| tls.config()).transpose()?;
        Ok(Self {
            app: Arc::new(app),
            listener,
            addr,
            tls,
            config,
            options: Arc::new(options),
            abort: CancellationToken::new(),
        })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What tells it to end.
    pub fn handle(&self) -> Handle {
        Handle {
            app: Arc::clone(&self.app),
            tls: self.tls.clone(),
            abort: self.abort.clone(),
        }
    }

    /// Serves until it is told to end, and everybody was served or the time for that is over. True when
    /// nobody was cut off.
    pub async fn run(self) -> bool {
        let Self {
            app,
            listener,
            config,
            options,
            abort,
            tls,
            ..
        } = self;
        let upkeep = tokio::spawn(upkeep(Arc::clone(&app), tls));
        let connections = Connections {
            router: http::router(Arc::clone(&app)),
            app: Arc::clone(&app),
            acceptor: config.map(TlsAcceptor::from),
            options: Arc::clone(&options),
        };
        let mut tasks = JoinSet::new();
        accept(&listener, connections, &mut tasks).await;
        // From here on the kernel refuses connections: whoever asks goes to another instance.
        drop(listener);
        let drained = async {
            while tasks.join_next().await.is_some() {}
            app.idle().await;
        };
        let clean = tokio::select! {
            done = tokio::time::timeout(options.drain, drained) => done.is_ok(),
            () = abort.cancelled() => false,
        };
        upkeep.abort();
        tasks.shutdown().await;
        if let Err(error) = app.catalog.flush_usage().await {
            tracing::warn!("what tenants use was not written down at the end: {error}");
        }
        clean
    }
}

/// Listens at the first address that can be had. None may be another machine's way in, if `local_only`.
async fn listen(listen: &str, local_only: bool) -> Result<TcpListener, ServeError> {
    let failed = |cause| ServeError::Listen {
        listen: listen.to_owned(),
        cause,
    };
    let addrs: Vec<SocketAddr> = tokio::net::lookup_host(listen)
        .await
        .map_err(failed)?
        .collect();
    let outside = |addr: &&SocketAddr| !addr.ip().to_canonical().is_loopback();
    if local_only && let Some(addr) = addrs.iter().find(outside) {
        return Err(ServeError::NotLoopback { addr: *addr });
    }
    TcpListener::bind(&addrs[..]).await.map_err(failed)
}

/// Takes connections until the store is told to end.
async fn accept(listener: &TcpListener, connections: Connections, tasks: &mut JoinSet<()>) {
    let draining = connections.app.draining.clone();
    // More than tokio's semaphores have are no bound.
    let most = connections
        .options
        .max_connections
        .min(Semaphore::MAX_PERMITS);
    let room = Arc::new(Semaphore::new(most));
    let connections = Arc::new(connections);
    loop {
        let next = async {
            // Before it is accepted: what has no room waits in the kernel.
            let permit = Arc::clone(&room).acquire_owned().await;
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            () = draining.cancelled() => return,
            Some(_) = tasks.join_next() => continue,
            next = next => next,
        };
        match accepted {
            Ok((stream, peer)) => {
                let connections = Arc::clone(&connections);
                tasks.spawn(async move {
                    connections.serve(stream, peer).await;
                    drop(permit);
                });
            }
            // One that broke off before it was accepted is nobody's trouble; the others are a lack of
            // files or memory, and pass.
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!("accepting a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Why a connection is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    /// The store ends.
    Draining,
    /// It is not used.
    Idle,
}

/// What every connection is served with.
struct Connections {
    router: Router,
    app: Arc<App>,
    acceptor: Option<TlsAcceptor>,
    options: Arc<ServerOptions>,
}

impl Connections {
    async fn serve(&self, stream: TcpStream, peer: SocketAddr) {
        self.app.metrics.connections.inc();
        self.speak(stream, peer).await;
        self.app.metrics.connections.dec();
    }

    async fn speak(&self, stream: TcpStream, peer: SocketAddr) {
        // Without it the end of an answer may wait for an acknowledgement.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, "TCP_NODELAY: {error}");
        }
        let Some(acceptor) = &self.acceptor else {
            return self.speak_plain(stream, peer).await;
        };
        let patience = self.options.patience.head;
        match tokio::time::timeout(patience, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => {
                let activity = Activity::new();
                self.talk(stream, BytesMut::new(), activity, peer).await;
            }
            Ok(Err(error)) => {
                self.app.metrics.handshakes_failed.inc();
                tracing::debug!(%peer, "TLS handshake: {error}");
            }
            Err(_) => self.app.metrics.handshakes_failed.inc(),
        }
    }

    /// Begins with requests for chunks, which need no HTTP library.
    async fn speak_plain(&self, stream: TcpStream, peer: SocketAddr) {
        let activity = Activity::new();
        let ended = {
            let mut direct = pin!(direct::serve(&self.app, &stream, &activity));
            // It sees for itself when the store ends.
            let end = |_: Pin<&mut _>, why| why == Why::Draining;
            self.watch(direct.as_mut(), &activity, peer, end).await
        };
        match ended {
            Some(Ok(Ended::Other(before))) => self.talk(stream, before, activity, peer).await,
            Some(Err(error)) => tracing::debug!(%peer, "connection: {error}"),
            Some(Ok(Ended::Closed)) | None => {}
        }
    }

    async fn talk<S>(&self, stream: S, before: BytesMut, activity: Arc<Activity>, peer: SocketAddr)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let socket = TokioIo::new(Socket::new(stream, before, Arc::clone(&activity)));
        let router = TowerToHyperService::new(self.router.clone());
        let seen = Arc::clone(&activity);
        let service = service_fn(move |request| router.call(watched(&seen, request)));
        let builder = builder();
        let mut connection = pin!(builder.serve_connection(socket, service));
        let end = |connection: Pin<&mut auto::Connection<'_, _, _, _>>, _| {
            connection.graceful_shutdown();
            true
        };
        let done = self.watch(connection.as_mut(), &activity, peer, end).await;
        if let Some(Err(error)) = done {
            tracing::debug!(%peer, "connection: {error}");
        }
    }

    /// Has a connection served until it ends, and none that does not move. `end` asks it to end, once,
    /// and says whether to wait for that.
    async fn watch<C: Future>(
        &self,
        mut connection: Pin<&mut C>,
        activity: &Activity,
        peer: SocketAddr,
        end: impl Fn(Pin<&mut C>, Why) -> bool,
    ) -> Option<C::Output> {
        let patience = &self.options.patience;
        let shortest = patience.head.min(patience.idle).min(patience.stall);
        let mut ticks = tokio::time::interval((shortest / 4).max(Duration::from_millis(10)));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut ending = false;
        loop {
            tokio::select! {
                done = connection.as_mut() => return Some(done),
                () = self.app.draining.cancelled(), if !ending => {
                    ending = true;
                    if !end(connection.as_mut(), Why::Draining) {
                        return None;
                    }
                }
                _ = ticks.tick() => match activity.verdict(patience) {
                    Verdict::Fine => {}
                    Verdict::Idle if !ending => {
                        ending = true;
                        if !end(connection.as_mut(), Why::Idle) {
                            return None;
                        }
                    }
                    Verdict::Idle => {}
                    Verdict::Stalled(why) => {
                        self.app.metrics.stalled.inc();
                        tracing::debug!(%peer, "connection closed: {why}");
                        return None;
                    }
                }
            }
        }
    }
}

/// The request, with the one who watches that it moves.
fn watched(activity: &Arc<Activity>, request: Request<Incoming>) -> Request<Body> {
    let under_way = activity.request(request.version() == Version::HTTP_2);
    let mut request = request.map(Body::new);
    request.extensions_mut().insert(Shared::new(under_way));
    request
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        // Heads are bounded in time by `Activity`: this bound would also end connections that rest.
        .header_read_timeout(None)
        .max_buf_size(BUFFER);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(32 << 10)
        // A chunk comes without waiting for room.
        .initial_stream_window_size((1 << 20) + (64 << 10))
        .initial_connection_window_size(4 << 20)
        .max_send_buf_size(1 << 20)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20));
    builder
}

/// What has to be done now and then.
async fn upkeep(app: Arc<App>, tls: Option<Arc<Tls>>) {
    let look = async {
        let mut looks = tokio::time::interval(LOOK);
        loop {
            looks.tick().await;
            reload(&app, tls.as_ref(), false).await;
        }
    };
    let flush = async {
        let mut flushes = tokio::time::interval(FLUSH);
        loop {
            flushes.tick().await;
            if let Err(error) = app.catalog.flush_usage().await {
                tracing::warn!("what tenants use was not written down: {error}");
            }
        }
    };
    // Side by side: a token that was taken back is not to work until a slow engine has answered.
    tokio::join!(look, flush);
}

/// Reads tenants and certificates again: what looks changed, or everything.
async fn reload(app: &Arc<App>, tls: Option<&Arc<Tls>>, everything: bool) {
    let tenants = Arc::clone(&app.tenants);
    let tls = tls.cloned();
    let read = move || {
        let tenants = match everything {
            true => tenants.reload(),
            false => tenants.reload_if_changed(),
        };
        let tls = tls.map(|tls| match everything {
            true => tls.reload().map(|()| true),
            false => tls.reload_if_changed(),
        });
        (tenants, tls)
    };
    let Ok((tenants, tls)) = tokio::task::spawn_blocking(read).await else {
        return;
    };
    let failed = |error: &dyn std::error::Error| {
        app.metrics.reloads_failed.inc();
        tracing::error!("{error}; what was in force before stays in force");
    };
    match tls {
        Some(Ok(true)) => tracing::info!("the certificate was read again"),
        Some(Err(error)) => failed(&error),
        Some(Ok(false)) | None => {}
    }
    let outcome = match tenants {
        Ok(false) => return,
        Ok(true) => {
            tracing::info!("the tenants were read again: {}", app.tenants.count());
            "done"
        }
        Err(error) => {
            failed(&error);
            "failed"
        }
    };
    let act = Act {
        who: if everything { "signal" } else { "file" }.to_owned(),
        what: "reload-tenants",
        on: None,
        request: None,
        outcome,
    };
    app.audit.record(act).await;
}
