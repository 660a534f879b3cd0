//! What the tests of sources share: a real registry, a proxy that fails on demand, small images.
// Every test binary uses a part of it; a helper that fails has to fail its test.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

pub mod proxy;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use lazyimg_convergent::Digest;
use lazyimg_image::reference::{ImageRef, ManifestRef};
use lazyimg_image::source::{Repository, RetryPolicy, SourceError, SourceOptions};
use serde_json::{Value, json};

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// The one user of a registry with passwords; the password has a colon and a space on purpose.
pub const USER: &str = "alice";
pub const PASSWORD: &str = "s3cret pass:word";
const HTPASSWD: &str = "alice:$2y$05$abcdefghijklmnopqrstuuWqE.ZbojV4lW1JhHwMXr3EQklLDUc6y\n";

/// A real docker-registry on a loopback port of its own choice; it ends with the value.
pub struct RegistryServer {
    child: Child,
    pub address: String,
    pub dir: tempfile::TempDir,
}

impl RegistryServer {
    /// One without authentication.
    pub fn start() -> Self {
        Self::start_with(|_| String::new())
    }

    /// One that wants [`USER`] and [`PASSWORD`].
    pub fn with_password() -> Self {
        Self::start_with(|dir| {
            let path = dir.join("htpasswd");
            std::fs::write(&path, HTPASSWD).unwrap();
            format!(
                "auth:\n  htpasswd:\n    realm: test\n    path: {}\n",
                path.display()
            )
        })
    }

    /// One with more configuration (YAML at the top level), which may put files into the directory.
    pub fn start_with(extra: impl FnOnce(&Path) -> String) -> Self {
        Self::start_at("127.0.0.1", "", extra)
    }

    /// As [`Self::start_with`], on another address than 127.0.0.1, with more lines below `http:`.
    pub fn start_at(address: &str, http: &str, extra: impl FnOnce(&Path) -> String) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let storage = dir.path().join("storage");
        let config = format!(
            "version: 0.1\nlog:\n  level: info\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    rootdirectory: {}\n  \
             delete:\n    enabled: true\nhttp:\n  addr: {address}:0\n{http}{}",
            storage.display(),
            extra(dir.path())
        );
        let file = dir.path().join("config.yml");
        std::fs::write(&file, config).unwrap();
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .env("OTEL_TRACES_EXPORTER", "none")
            .spawn()
            .expect("docker-registry must be installed (Debian package docker-registry)");
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut seen = String::new();
        let address = loop {
            let mut line = String::new();
            if log.read_line(&mut line).unwrap() == 0 {
                panic!("docker-registry ended early:\n{seen}");
            }
            seen.push_str(&line);
            if let Some((_, rest)) = line.split_once("listening on ") {
                break rest
                    .split(|c: char| c == '"' || c == ',' || c.is_whitespace())
                    .next()
                    .unwrap()
                    .to_owned();
            }
        };
        // Whoever does not read a pipe blocks its writer.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Self {
            child,
            address,
            dir,
        }
    }

    /// `oci:`-less reference text of a repository and tag here.
    pub fn reference(&self, rest: &str) -> String {
        format!("{}/{rest}", self.address)
    }
}

impl Drop for RegistryServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Options that find no credentials of whoever runs the tests, and retry fast.
pub fn options() -> SourceOptions {
    SourceOptions {
        docker_config: Some(PathBuf::from("/nonexistent/lazyimg-tests/config.json")),
        retry: RetryPolicy {
            base: Duration::from_millis(10),
            cap: Duration::from_millis(50),
            ..RetryPolicy::default()
        },
        ..SourceOptions::default()
    }
}

/// A repository by its reference.
pub fn repository(reference: &str, options: &SourceOptions) -> Repository {
    Repository::open(&reference.parse::<ImageRef>().unwrap(), options).unwrap()
}

/// A docker configuration with these contents; the directory keeps it alive.
pub fn docker_config(value: &Value) -> (tempfile::TempDir, SourceOptions) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), value.to_string()).unwrap();
    let options = SourceOptions {
        docker_config: Some(dir.path().to_owned()),
        ..options()
    };
    (dir, options)
}

/// `auths` with [`USER`] and a password for one registry.
pub fn auths(registry: &str, password: &str) -> Value {
    let auth = credentials(password);
    json!({"auths": {registry: {"auth": auth}}})
}

/// Bytes that no compression shortens, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out.into()
}

/// A pushed image of layers that are not really tars: for what does not unpack.
pub struct FakeImage {
    pub digest: Digest,
    pub manifest: Bytes,
    pub config: Digest,
    pub layers: Vec<Digest>,
}

/// Pushes an image with noise for layers, under a tag.
pub async fn push_fake_image(
    repository: &Repository,
    tag: &str,
    layers: &[Bytes],
    architecture: &str,
) -> FakeImage {
    let mut descriptors = Vec::new();
    let mut digests = Vec::new();
    for layer in layers {
        let digest = Digest::of(layer);
        repository
            .push_blob_bytes(&digest, layer.clone())
            .await
            .unwrap();
        descriptors.push(json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": layer.len()}));
        digests.push(digest);
    }
    let config = json!({"os": "linux", "architecture": architecture, "rootfs": {"type": "layers", "diff_ids": digests}, "config": {"Cmd": ["/x"]}});
    let config = Bytes::from(config.to_string());
    let config_digest = Digest::of(&config);
    repository
        .push_blob_bytes(&config_digest, config.clone())
        .await
        .unwrap();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": descriptors,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config.len()},
    });
    let manifest = Bytes::from(manifest.to_string());
    let reference = lazyimg_image::reference::ManifestRef::Tag(tag.into());
    let pushed = repository
        .push_manifest(reference, OCI_MANIFEST, manifest.clone())
        .await
        .unwrap();
    FakeImage {
        digest: pushed.digest,
        manifest,
        config: config_digest,
        layers: digests,
    }
}

/// Pushes an artifact that refers to `subject`, and returns its descriptor.
pub async fn push_artifact(
    repository: &Repository,
    subject: &Digest,
    kind: &str,
    note: &str,
) -> lazyimg_image::source::Descriptor {
    let empty = Bytes::from_static(b"{}");
    repository
        .push_blob_bytes(&Digest::of(&empty), empty.clone())
        .await
        .unwrap();
    let none = json!({"mediaType": "application/vnd.oci.empty.v1+json", "digest": Digest::of(&empty), "size": 2});
    let manifest = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": kind, "config": none, "layers": [none],
        "subject": {"mediaType": OCI_MANIFEST, "digest": subject, "size": 1}, "annotations": {"note": note},
    });
    let bytes = Bytes::from(manifest.to_string());
    let digest = Digest::of(&bytes);
    repository
        .push_manifest(digest, OCI_MANIFEST, bytes.clone())
        .await
        .unwrap();
    let mut descriptor =
        lazyimg_image::source::Descriptor::new(OCI_MANIFEST, digest, bytes.len() as u64);
    descriptor.artifact_type = Some(kind.into());
    descriptor.annotations.insert("note".into(), note.into());
    descriptor
}

/// Runs a program that must succeed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("{program} must be installed: {e}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An OCI layout `DIR:v1` with a real image of one layer, made by umoci; returns `DIR`.
pub fn umoci_layout(dir: &Path) -> PathBuf {
    let layout = dir.join("layout");
    let image = format!("{}:v1", layout.display());
    run("umoci", &["init", "--layout", layout.to_str().unwrap()]);
    run("umoci", &["new", "--image", &image]);
    let root = dir.join("root");
    std::fs::create_dir(&root).unwrap();
    std::fs::File::create(root.join("hello"))
        .unwrap()
        .write_all(b"hello, world\n")
        .unwrap();
    run(
        "umoci",
        &["insert", "--image", &image, root.to_str().unwrap(), "/srv"],
    );
    layout
}

/// The message and all its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    text
}

/// Runs the calling test again in a process of its own, with these environment variables (edition
/// 2024 rightly forbids to change one's own) and behind this command, if any. True inside that process: go on with the
/// test. False outside, after it passed: return.
pub fn in_child(test: &str, environment: &[(&str, &str)], wrapper: &[&str]) -> bool {
    if std::env::var_os("LAZYIMG_TEST_CHILD").is_some() {
        return true;
    }
    let this = std::env::current_exe().unwrap();
    let mut words: Vec<&std::ffi::OsStr> = wrapper.iter().map(std::ffi::OsStr::new).collect();
    words.push(this.as_os_str());
    let output = Command::new(words[0])
        .args(&words[1..])
        .args(["--exact", test, "--nocapture"])
        .env("LAZYIMG_TEST_CHILD", "1")
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
    false
}

pub fn v1() -> ManifestRef {
    ManifestRef::Tag("v1".into())
}

/// User and password as HTTP's basic scheme and docker's configuration have them.
fn credentials(password: &str) -> String {
    STANDARD.encode(format!("{USER}:{password}"))
}

/// The `Authorization` of [`USER`].
pub fn basic(password: &str) -> String {
    format!("Basic {}", credentials(password))
}

/// The texts of an error that must be "unauthorized".
pub fn unauthorized(error: &SourceError) -> String {
    let text = format!("{} {error:?}", chain(error));
    assert!(matches!(error, SourceError::Unauthorized { .. }), "{text}");
    text
}
