//! A store of a test, in this process, and clients of it.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lazyimg_convergent::{ChunkId, ChunkKey, Digest, KeyId, TenantKey};
use lazyimg_image::manifest::{BLOCK, Entry, Header, Manifest, Pack, Stored};
use lazyimg_store::audit::Audit;
use lazyimg_store::catalog::{Catalog, CatalogOptions};
use lazyimg_store::engine::Engine;
use lazyimg_store::engine::config::EngineSettings;
use lazyimg_store::http::{Limits, Parts};
use lazyimg_store::server::{Handle, Server, ServerOptions};
use lazyimg_store::tenants::Tenants;
use lazyimg_store::tls::Tls;
use reqwest::{Client, Method, RequestBuilder, Response};
use serde_json::Value;
use tokio::task::JoinHandle;

/// No condition of these tests takes that long, however busy the machine is.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Tokens of the tenants in [`Setup::tenants`].
pub const ALPHA: &str = "alpha-token-of-a-test";
pub const BETA: &str = "beta-token-of-a-test";
pub const READER: &str = "reader-token-of-a-test";
pub const OBSERVER: &str = "observer-token-of-a-test";
pub const ADMIN: &str = "admin-token-of-a-test";

/// What a test wants of its store.
pub struct Setup {
    pub dir: tempfile::TempDir,
    pub limits: Limits,
    pub options: ServerOptions,
    pub tenants: Option<String>,
    pub audit: Audit,
    pub engine: Option<Arc<dyn Engine>>,
}

impl Setup {
    /// No tenants, defaults otherwise.
    pub fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            limits: Limits::default(),
            options: ServerOptions::at("127.0.0.1:0"),
            tenants: None,
            audit: Audit::to_log(),
            engine: None,
        }
    }

    /// Tenants alpha and beta, who read and write; reader; admin, who has 1,000 bytes.
    pub fn with_tenants() -> Self {
        let mut setup = Self::new();
        for (name, token) in [
            ("alpha", ALPHA),
            ("beta", BETA),
            ("reader", READER),
            ("admin", ADMIN),
            ("observer", OBSERVER),
        ] {
            write_secret(&setup.path(name), token);
        }
        setup.tenants = Some(
            r#"
            [tenants.alpha]
            token-files = ["alpha"]
            rights = ["read", "write"]
            [tenants.beta]
            token-files = ["beta"]
            rights = ["read", "write"]
            quota = 1000
            [tenants.reader]
            token-files = ["reader"]
            rights = ["read"]
            [tenants.admin]
            token-files = ["admin"]
            rights = ["administer"]
            [tenants.observer]
            token-files = ["observer"]
            rights = ["observe"]
            "#
            .to_owned(),
        );
        setup
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub async fn start(self) -> World {
        let engine = match self.engine {
            Some(engine) => engine,
            None => {
                let settings = EngineSettings::embedded(self.dir.path().join("data"));
                settings.open().await.unwrap().engine
            }
        };
        let options = CatalogOptions::exclusive("test");
        let catalog = Catalog::open(Arc::clone(&engine), options).await.unwrap();
        let tenants = match &self.tenants {
            Some(text) => {
                let path = self.dir.path().join("tenants.toml");
                fs::write(&path, text).unwrap();
                Tenants::load(&path).unwrap()
            }
            None => Tenants::local(),
        };
        let parts = Parts {
            catalog: Arc::new(catalog),
            engine: Arc::clone(&engine),
            tenants: Arc::new(tenants),
            audit: self.audit,
            limits: self.limits,
            hot: None,
        };
        let scheme = if self.options.tls.is_some() {
            "https"
        } else {
            "http"
        };
        let server = Server::bind(parts, self.options).await.unwrap();
        let (addr, handle) = (server.addr(), server.handle());
        World {
            base: format!("{scheme}://{addr}"),
            addr,
            handle,
            engine,
            client: Client::new(),
            running: tokio::spawn(server.run()),
            dir: self.dir,
        }
    }
}

/// A store that serves.
pub struct World {
    pub base: String,
    pub addr: SocketAddr,
    pub handle: Handle,
    pub engine: Arc<dyn Engine>,
    pub client: Client,
    pub running: JoinHandle<bool>,
    pub dir: tempfile::TempDir,
}

impl World {
    /// With no tenants.
    pub async fn start() -> Self {
        Setup::new().start().await
    }

    /// A request without a token.
    pub fn ask(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.base))
    }

    /// `GET` with a token.
    pub async fn get(&self, token: &str, path: &str) -> Response {
        let request = self.ask(Method::GET, path).bearer_auth(token);
        request.send().await.unwrap()
    }

    /// `PUT` with a token.
    pub async fn put(&self, token: &str, path: &str, body: impl Into<reqwest::Body>) -> Response {
        let request = self.ask(Method::PUT, path).bearer_auth(token).body(body);
        request.send().await.unwrap()
    }

    /// `POST` with a token.
    pub async fn post(&self, token: &str, path: &str, body: impl Into<reqwest::Body>) -> Response {
        let request = self.ask(Method::POST, path).bearer_auth(token).body(body);
        request.send().await.unwrap()
    }

    /// Puts a chunk; it must be new to the tenant.
    pub async fn put_chunk(&self, token: &str, bytes: &[u8]) -> ChunkId {
        let id = ChunkId::of(bytes);
        let done = self
            .put(token, &format!("/v1/chunks/{id}"), bytes.to_vec())
            .await;
        assert_eq!(done.status(), 201, "{}", done.text().await.unwrap());
        id
    }

    /// Ends it as a signal does; true when nobody was cut off.
    pub async fn stop(self) -> bool {
        self.handle.drain();
        // Or idle connections of the client keep it from ending.
        drop(self.client);
        let clean = tokio::time::timeout(PATIENCE, self.running).await;
        self.engine.close().await;
        clean.expect("it ends").unwrap()
    }

    /// A metric's value.
    pub async fn metric(&self, token: &str, name: &str) -> f64 {
        let text = self.get(token, "/metrics").await.text().await.unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
            .parse()
            .unwrap()
    }
}

/// The error's status and code; panics if the answer is none in the protocol's form.
pub async fn refused(response: Response) -> (u16, String) {
    let status = response.status().as_u16();
    assert!(response.headers().contains_key("lazyimg-request-id"));
    let text = response.text().await.unwrap();
    let error: Value =
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{status} {text}: {e}"));
    assert!(!error["message"].as_str().unwrap().is_empty());
    (status, error["error"].as_str().unwrap().to_owned())
}

/// A file that only its owner may read.
pub fn write_secret(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(new, path).unwrap();
}

/// Waits until something holds.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < PATIENCE, "not so in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Bytes of a chunk, others for each number.
pub fn chunk(n: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| n ^ (i as u8) ^ ((i >> 8) as u8)).collect()
}

pub fn key() -> KeyId {
    TenantKey::from_bytes([5; 32]).id()
}

/// The manifest of an image that consists of these chunks.
pub fn manifest(image: Digest, chunks: &[Vec<u8>]) -> Vec<u8> {
    let entry = |bytes: &Vec<u8>| Entry {
        blocks: 1,
        stored: Some(Stored {
            id: ChunkId::of(bytes),
            len: bytes.len() as u32,
            pack: 0,
            offset: 0,
        }),
    };
    let entries: Vec<Entry> = chunks.iter().map(entry).collect();
    let mut manifest = Manifest {
        header: Header {
            meta_len: BLOCK,
            data_len: BLOCK * (entries.len() as u64 - 1),
            image,
            has_xattrs: false,
            files: 1,
            file_bytes: 1,
            salt_id: [0; 16],
            epoch: 1,
            domain: "default".to_owned(),
        },
        meta: entries[..1].to_vec(),
        data: entries[1..].to_vec(),
        packs: vec![Pack {
            digest: Digest([7; 32]),
            len: 1 << 30,
        }],
        sealed_keys: Vec::new(),
    };
    let keys = vec![ChunkKey::from_bytes([1; 32]); chunks.len()];
    manifest.seal_keys(&TenantKey::from_bytes([5; 32]), keys.iter());
    manifest.to_bytes()
}

/// A certificate for 127.0.0.1 in two files, and itself.
pub fn certificate(dir: &Path) -> (PathBuf, PathBuf, reqwest::Certificate) {
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    fs::write(&cert, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let trusted = reqwest::Certificate::from_pem(made.cert.pem().as_bytes()).unwrap();
    (cert, key, trusted)
}

pub fn tls(dir: &Path) -> (Tls, reqwest::Certificate) {
    let (cert, key, trusted) = certificate(dir);
    (Tls::load(&cert, &key).unwrap(), trusted)
}
