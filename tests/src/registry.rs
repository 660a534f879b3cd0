//! A real registry (Debian's `docker-registry`) on loopback, with its storage at hand.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::Layout;
use crate::process::{self, run};

/// User and password of a registry that asks for them.
pub const CREDENTIALS: (&str, &str) = ("alice", "correct horse");

/// bcrypt of the password above, cost 4, as the registry's htpasswd file wants it.
const HTPASSWD: &str = "$2b$04$DcqlRADY6npXfSmge3pu2eLbWDvAPn5J8kr9odJRVbNfhEXTEzEKu";

/// The password after [`Registry::change_password`].
pub const CHANGED_PASSWORD: &str = "battery staple 2";

/// Its bcrypt.
const CHANGED_HTPASSWD: &str = "$2b$04$p.in1dz3wmBpd8RO7TBZJuPbcLogq0KNUrTDLTSAvDKRQMfcRK7yu";

/// A registry process. Ends when dropped.
#[derive(Debug)]
pub struct Registry {
    dir: PathBuf,
    port: u16,
    child: Option<Child>,
}

impl Registry {
    /// Starts one that keeps everything below `dir`.
    #[track_caller]
    pub fn start(dir: impl Into<PathBuf>) -> Self {
        Self::start_with(dir.into(), "")
    }

    /// Starts one that asks for [`CREDENTIALS`].
    #[track_caller]
    pub fn start_with_password(dir: impl Into<PathBuf>) -> Self {
        let dir = dir.into();
        fs::create_dir_all(&dir).expect("a test may write to its own directory");
        let file = dir.join("htpasswd");
        fs::write(&file, format!("{}:{HTPASSWD}\n", CREDENTIALS.0))
            .expect("a test may write there");
        Self::start_with(
            dir,
            &format!(
                "auth: {{htpasswd: {{realm: test, path: {}}}}}\n",
                file.display()
            ),
        )
    }

    /// Starts one that deletes nothing, as many do.
    #[track_caller]
    pub fn start_without_deletion(dir: impl Into<PathBuf>) -> Self {
        Self::start_as(dir.into(), false, "")
    }

    #[track_caller]
    fn start_with(dir: PathBuf, more: &str) -> Self {
        Self::start_as(dir, true, more)
    }

    #[track_caller]
    fn start_as(dir: PathBuf, deletes: bool, more: &str) -> Self {
        fs::create_dir_all(&dir).expect("a test may write to its own directory");
        let mut registry = Self {
            dir,
            port: 0,
            child: None,
        };
        for _ in 0..10 {
            registry.port = free_port();
            let storage = registry.dir.join("storage");
            let config = format!(
                "version: 0.1\nlog: {{level: info, accesslog: {{disabled: true}}}}\n\
                 storage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: {deletes}}}\n\
                 http: {{addr: \"127.0.0.1:{}\", secret: test}}\n{more}",
                storage.display(),
                registry.port
            );
            fs::write(registry.dir.join("config.yml"), config).expect("a test may write there");
            if registry.try_start() {
                return registry;
            }
        }
        panic!("docker-registry does not start: {}", registry.log());
    }

    /// Whether it listens. It does not when somebody else took the port meanwhile.
    fn try_start(&mut self) -> bool {
        let log = fs::File::create(self.dir.join("log")).expect("a test may write there");
        let copy = log.try_clone().expect("descriptors can be copied");
        // Killed with the thread that started it: none survives a test, however that ends.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "docker-registry", "serve"])
            .arg(self.dir.join("config.yml"))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(copy)
            .spawn()
            .expect("host::require has found setpriv");
        let child = self.child.insert(child);
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(20) {
            let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            if log.contains(&format!("listening on 127.0.0.1:{}", self.port)) {
                return true;
            }
            if matches!(child.try_wait(), Ok(Some(_)) | Err(_)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.stop();
        false
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A reference to `name` (`repository:tag`) in it.
    pub fn reference(&self, name: &str) -> String {
        format!("127.0.0.1:{}/{name}", self.port)
    }

    /// The user gets [`CHANGED_PASSWORD`], and the old one is no good any more.
    #[track_caller]
    pub fn change_password(&mut self) {
        fs::write(
            self.dir.join("htpasswd"),
            format!("{}:{CHANGED_HTPASSWD}\n", CREDENTIALS.0),
        )
        .expect("a test may write there");
        self.restart();
    }

    /// Ends the process; connections are refused from now on.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            process::kill(&mut child);
        }
    }

    /// Starts the process again, on the same port with the same storage.
    #[track_caller]
    pub fn restart(&mut self) {
        self.stop();
        assert!(
            self.try_start(),
            "docker-registry does not start again: {}",
            self.log()
        );
    }

    /// Stops the process in its tracks: connections are accepted, nothing is answered.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets a frozen process go on.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("it runs");
        let pid = Pid::from_child(child);
        kill_process(pid, signal).expect("it is our child");
    }

    /// Copies an image from a layout to `name` (`repository:tag`), bit for bit, all its platforms.
    #[track_caller]
    pub fn push(&self, layout: &Layout, tag: &str, name: &str) -> String {
        let to = format!("docker://{}", self.reference(name));
        let credentials = format!("{}:{}", CREDENTIALS.0, CREDENTIALS.1);
        let mut copy = Command::new("skopeo");
        copy.args([
            "--insecure-policy",
            "copy",
            "--quiet",
            "--all",
            "--preserve-digests",
            "--dest-tls-verify=false",
        ]);
        if self.dir.join("htpasswd").exists() {
            copy.args(["--dest-creds", &credentials]);
        }
        run(copy.args([&layout.reference(tag), &to])).ok();
        self.reference(name)
    }

    /// The directory of the blobs.
    fn blobs_dir(&self) -> PathBuf {
        self.dir.join("storage/docker/registry/v2/blobs/sha256")
    }

    /// Digests of all blobs in the storage, manifests included.
    pub fn blobs(&self) -> BTreeSet<String> {
        let names = |dir: &Path| -> Vec<String> {
            let entries = fs::read_dir(dir)
                .map(|list| list.flatten().collect::<Vec<_>>())
                .unwrap_or_default();
            entries
                .iter()
                .map(|e| e.file_name().to_string_lossy().into_owned())
                .collect()
        };
        let root = self.blobs_dir();
        let prefixes = names(&root);
        prefixes
            .iter()
            .flat_map(|p| names(&root.join(p)))
            .map(|hex| format!("sha256:{hex}"))
            .collect()
    }

    /// The file that holds a blob.
    pub fn blob_path(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        self.blobs_dir().join(&hex[..2]).join(hex).join("data")
    }

    /// The bytes of a blob.
    #[track_caller]
    pub fn blob(&self, digest: &str) -> Vec<u8> {
        let path = self.blob_path(digest);
        fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A loopback port on which nobody listens right now.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    listener.local_addr().expect("it is bound").port()
}
