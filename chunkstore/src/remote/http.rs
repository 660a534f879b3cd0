//! HTTP clients that are alike, and the authorities that they trust.

use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use reqwest::{Certificate, Client, Url};

use super::error::StoreError;
use super::settings::{Http2, StoreSettings};

/// How long an idle connection is kept.
const POOL_IDLE: Duration = Duration::from_secs(60);
/// HTTP/2: bytes under way in one answer, and on one connection.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Length of the longest file of authorities, in bytes. A system's own has some 250 KiB.
const MAX_AUTHORITIES: u64 = 4 << 20;

/// The clients of one instance.
#[derive(Clone)]
pub(super) struct Clients {
    pub http: Client,
    /// For a hedge to the same instance: other connections.
    pub hedge: Client,
}

/// Makes HTTP clients that are alike. All of it takes some 30 ms where TLS is spoken: not for
/// threads that serve others.
pub(super) struct MakeClient {
    http2: Http2,
    connect_timeout: Duration,
    ca_file: Option<PathBuf>,
    authorities: Mutex<Authorities>,
    loopback: bool,
}

struct Authorities {
    certificates: Vec<Certificate>,
    /// Of the content that was read last, good or not.
    stamp: Option<Stamp>,
}

/// What tells one content of a file from another.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    len: u64,
    inode: u64,
}

impl MakeClient {
    pub fn new(settings: &StoreSettings) -> Result<Self, StoreError> {
        let mut authorities = Authorities {
            certificates: Vec::new(),
            stamp: None,
        };
        if let Some(path) = &settings.ca_file {
            let (read, stamp) = read(path, None);
            let read = read.map_err(|text| StoreError::Setup(text.into()))?;
            authorities.certificates = read.unwrap_or_default();
            authorities.stamp = stamp;
        }
        let local = ["127.0.0.1", "[::1]", "localhost"];
        Ok(Self {
            http2: settings.http2,
            connect_timeout: settings.connect_timeout,
            ca_file: settings.ca_file.clone(),
            authorities: Mutex::new(authorities),
            loopback: settings
                .urls
                .iter()
                .all(|url| local.iter().any(|host| url.contains(&format!("//{host}")))),
        })
    }

    /// The file of authorities, if there is one.
    pub fn ca_file(&self) -> Option<&Path> {
        self.ca_file.as_deref()
    }

    /// Looks at the file of authorities; whether there are others now. A file that cannot be used
    /// leaves them as they were.
    pub fn reread(&self) -> bool {
        let Some(path) = &self.ca_file else {
            return false;
        };
        let known = self.authorities.lock().stamp;
        let (read, stamp) = read(path, known);
        let mut authorities = self.authorities.lock();
        authorities.stamp = stamp.or(authorities.stamp);
        match read {
            Ok(Some(certificates)) => {
                authorities.certificates = certificates;
                true
            }
            Ok(None) => false,
            Err(error) => {
                tracing::warn!(%error, "going on with the authorities that were known; correct the file given with --store-ca");
                false
            }
        }
    }

    /// Clients for `url`, whose name has this address where one is given.
    pub fn clients(&self, url: &Url, at: Option<SocketAddr>) -> Result<Clients, StoreError> {
        let at = url.host_str().zip(at);
        let tls = url.scheme() == "https";
        Ok(Clients {
            http: self.client(tls, at)?,
            hedge: self.client(tls, at)?,
        })
    }

    fn client(&self, tls: bool, at: Option<(&str, SocketAddr)>) -> Result<Client, StoreError> {
        let mut builder = Client::builder()
            .user_agent(concat!("lazyimg/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            // What may be tried again, and where, is decided here.
            .retry(reqwest::retry::never())
            .connect_timeout(self.connect_timeout)
            .pool_idle_timeout(POOL_IDLE)
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(30))
            .http2_initial_stream_window_size(STREAM_WINDOW)
            .http2_initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(Duration::from_secs(15))
            .http2_keep_alive_timeout(Duration::from_secs(5))
            .referer(false);
        builder = match self.http2 {
            Http2::Negotiated => builder,
            Http2::Always => builder.http2_prior_knowledge(),
            Http2::Never => builder.http1_only(),
        };
        if self.loopback {
            builder = builder.no_proxy();
        }
        if tls {
            let authorities = self.authorities.lock().certificates.clone();
            if !authorities.is_empty() {
                builder = builder.tls_certs_merge(authorities);
            }
        } else {
            // The system's certificates take some 30 ms to load.
            builder = builder.tls_certs_only([]);
        }
        if let Some((host, address)) = at {
            builder = builder.resolve(host, address);
        }
        builder.build().map_err(|e| StoreError::Setup(Box::new(e)))
    }
}

/// The certificates of a file, unless it has the stamp that is known; and its stamp.
fn read(
    path: &Path,
    known: Option<Stamp>,
) -> (Result<Option<Vec<Certificate>>, String>, Option<Stamp>) {
    use std::os::unix::fs::MetadataExt;

    let cannot = |e: std::io::Error| format!("cannot read {}: {e}", path.display());
    let opened = std::fs::File::open(path).and_then(|file| Ok((file.metadata()?, file)));
    let (metadata, file) = match opened {
        Ok(opened) => opened,
        Err(e) => return (Err(cannot(e)), None),
    };
    let stamp = Some(Stamp {
        modified: metadata.modified().ok(),
        len: metadata.len(),
        inode: metadata.ino(),
    });
    if stamp == known {
        return (Ok(None), stamp);
    }
    let mut pem = Vec::new();
    let certificates = file
        .take(MAX_AUTHORITIES + 1)
        .read_to_end(&mut pem)
        .map_err(cannot)
        .and_then(|_| parse(path, &pem).map(Some));
    (certificates, stamp)
}

fn parse(path: &Path, pem: &[u8]) -> Result<Vec<Certificate>, String> {
    let path = path.display();
    if pem.len() as u64 > MAX_AUTHORITIES {
        return Err(format!("{path} is longer than {MAX_AUTHORITIES} bytes"));
    }
    let found = Certificate::from_pem_bundle(pem).map_err(|e| format!("{path} is not PEM: {e}"))?;
    match found.is_empty() {
        true => Err(format!("{path} has no certificate")),
        false => Ok(found),
    }
}
