//! `lazyimg store serve`.

use std::io::IsTerminal;
use std::sync::Arc;

use lazyimg_store::audit::Audit;
use lazyimg_store::catalog::{Catalog, CatalogOptions};
use lazyimg_store::engine::config::EngineSettings;
use lazyimg_store::http::{Limits, Parts};
use lazyimg_store::server::{Handle, Server, ServerOptions};
use lazyimg_store::tenants::Tenants;
use lazyimg_store::tls::Tls;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::args::{Global, LogForm, StoreServe};
use crate::config;
use crate::exit::Error;
use crate::output;

/// Files that are open beside the connections: segments, RocksDB's, the log.
const FILES: u64 = 1024;

/// What `--json` prints once the store serves.
#[derive(Debug, Serialize)]
struct Started {
    /// Address and port.
    listen: String,
    /// As clients name it.
    url: String,
    engine: String,
    /// How many; absent when no token is needed.
    tenants: Option<usize>,
    version: &'static str,
}

/// Runs the command until a signal ends it.
pub fn run(global: &Global, args: &StoreServe) -> Result<(), Error> {
    log(global, args.log);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Error::io("starting threads"))?;
    let result = runtime.block_on(serve(global, args));
    // Blocking tasks that nobody waits for any more must not hold up the exit.
    runtime.shutdown_background();
    result
}

/// Allows as many open files as this process may: the usual bound of 1,024 is less than the connections.
fn allow_files(connections: u32) {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    let allowed = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    let needed = u64::from(connections) + FILES;
    if let Some(allowed) = allowed.filter(|allowed| *allowed < needed) {
        tracing::warn!(
            "{allowed} files may be open and up to {needed} are needed: raise the limit (LimitNOFILE=, \
             ulimit -n), or lower --max-connections"
        );
    }
}

async fn serve(global: &Global, args: &StoreServe) -> Result<(), Error> {
    // First what costs nothing and may fail.
    let tenants = match &args.tenants {
        Some(path) => Tenants::load(path).map_err(|e| Error::Usage(e.to_string()))?,
        None => Tenants::local(),
    };
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(cert), Some(key)) => {
            Some(Tls::load(cert, key).map_err(|e| Error::Usage(e.to_string()))?)
        }
        (None, None) => None,
        _ => {
            return Err(Error::Usage(
                "--tls-cert and --tls-key go together: give both".into(),
            ));
        }
    };
    let audit = match &args.audit_log {
        Some(path) => Audit::to_file(path).map_err(Error::io(path.display().to_string()))?,
        None => Audit::to_log(),
    };
    allow_files(args.limits.max_connections);
    let mut signals = Signals::new().map_err(Error::io("signals"))?;
    let settings = engine(args)?;
    let shared = settings.embedded.is_none();
    let opened = settings
        .open()
        .await
        .map_err(|e| Error::Other(e.to_string()))?;
    let engine = opened.engine;
    let options = match shared {
        true => CatalogOptions::shared(instance(args)?),
        false => CatalogOptions::exclusive(args.instance.as_deref().unwrap_or("store")),
    };
    let catalog = Catalog::open(Arc::clone(&engine), options).await;
    let parts = Parts {
        catalog: Arc::new(catalog.map_err(|e| Error::Other(e.to_string()))?),
        engine: Arc::clone(&engine),
        tenants: Arc::new(tenants),
        audit,
        limits: Limits {
            max_requests: args.limits.max_requests as usize,
            max_memory: args.limits.max_memory,
            ..Limits::default()
        },
        hot: opened.hot,
    };
    let tenants = Arc::clone(&parts.tenants);
    let secure = tls.is_some();
    let options = ServerOptions {
        tls,
        max_connections: args.limits.max_connections as usize,
        drain: args.limits.drain_timeout,
        ..ServerOptions::at(&args.listen)
    };
    let server = Server::bind(parts, options).await.map_err(refused)?;
    let handle = server.handle();
    let addr = server.addr();
    let mut serving = tokio::spawn(server.run());
    let started = Started {
        listen: addr.to_string(),
        url: format!("{}://{addr}", if secure { "https" } else { "http" }),
        engine: engine.name().to_owned(),
        tenants: tenants.need_tokens().then(|| tenants.count()),
        version: env!("CARGO_PKG_VERSION"),
    };
    tell(global, args, &started)?;
    let clean = loop {
        tokio::select! {
            done = &mut serving => break done.unwrap_or(false),
            () = signals.next(&handle) => {}
        }
    };
    engine.close().await;
    match clean {
        true => Ok(()),
        false => Err(Error::Other(
            "requests under way were cut off: give more time with --drain-timeout".into(),
        )),
    }
}

/// Where the store keeps what it holds.
fn engine(args: &StoreServe) -> Result<EngineSettings, Error> {
    let section = config::engine()?;
    match (&args.data, section) {
        (Some(_), Some(settings)) if settings.s3.is_some() => Err(Error::Usage(
            "--data and [engine.s3] of the configuration file exclude each other: keep one of them"
                .into(),
        )),
        (Some(dir), section) => Ok(EngineSettings {
            hot: section.and_then(|settings| settings.hot),
            ..EngineSettings::embedded(dir)
        }),
        (None, Some(settings)) => Ok(settings),
        (None, None) => Err(Error::Usage(
            "say where the store keeps what it holds: --data DIR, or [engine] in the configuration file"
                .into(),
        )),
    }
}

/// The name of this instance among those that share an engine.
fn instance(args: &StoreServe) -> Result<String, Error> {
    if let Some(name) = &args.instance {
        return Ok(name.clone());
    }
    let system = rustix::system::uname();
    let name = system.nodename().to_string_lossy().to_ascii_lowercase();
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let name: String = name.chars().map(plain).take(64).collect();
    match name.trim_matches('-').is_empty() {
        true => Err(Error::Usage(
            "this machine has no name: name the instance with --instance".into(),
        )),
        false => Ok(name),
    }
}

fn refused(error: lazyimg_store::server::ServeError) -> Error {
    use lazyimg_store::server::ServeError;
    match error {
        ServeError::NotLoopback { .. } | ServeError::Tls(_) => Error::Usage(error.to_string()),
        ServeError::Listen { .. } | ServeError::Setup(_) => Error::Other(error.to_string()),
    }
}

/// Says that it serves, and what everybody may do.
fn tell(global: &Global, args: &StoreServe, started: &Started) -> Result<(), Error> {
    let who = match started.tenants {
        Some(count) => format!("{count} tenants"),
        None => {
            "no tenants: everybody on this machine may do everything (--tenants FILE)".to_owned()
        }
    };
    tracing::info!(listen = %started.listen, engine = %started.engine, "{who}");
    if started.tenants.is_none() {
        output::say(global, &format!("lazyimg store: {who}"));
    }
    match args.json {
        true => {
            let line = serde_json::to_string(started).map_err(|e| Error::Other(e.to_string()))?;
            output::data(&line)
        }
        false => output::data(&format!("serving {} ({})", started.url, started.engine)),
    }
}

/// What the system tells a store.
struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
    ending: bool,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            hup: signal(SignalKind::hangup())?,
            ending: false,
        })
    }

    /// Waits for one, and does what it asks for.
    async fn next(&mut self, handle: &Handle) {
        tokio::select! {
            _ = self.hup.recv() => handle.reload().await,
            _ = self.term.recv() => self.end(handle),
            _ = self.int.recv() => self.end(handle),
        }
    }

    fn end(&mut self, handle: &Handle) {
        match self.ending {
            false => {
                tracing::info!(
                    "ending: requests under way are finished; another signal ends at once"
                );
                handle.drain();
            }
            true => handle.abort(),
        }
        self.ending = true;
    }
}

/// Logs to standard error: requests too, unless `--quiet`.
fn log(global: &Global, form: LogForm) {
    let level = match (global.quiet, global.verbose) {
        (true, _) => "error",
        (_, 0 | 1) => "warn,lazyimg=info,lazyimg_store=info",
        _ => "debug",
    };
    let filter = tracing_subscriber::EnvFilter::new(level);
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // These only fail when a subscriber is set already, which a test may have done.
    let _ = match form {
        LogForm::Json => subscriber.json().flatten_event(true).try_init(),
        LogForm::Text => subscriber.try_init(),
    };
}
