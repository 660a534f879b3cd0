//! Real servers for the engines' tests: Redis and Garage (S3), on loopback or a socket, each ended with
//! the value that started it.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lazyimg_store::engine::config::{RedisSettings, S3Settings};

/// How long a server may take to begin answering.
const START: Duration = Duration::from_secs(60);

/// A child process that ends with this value.
struct Server {
    child: Child,
    log: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(mut command: Command, log: PathBuf, advice: &str) -> Self {
        let file = fs::File::create(&log).unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn();
        match child {
            Ok(child) => Self { child, log },
            Err(e) => panic!("cannot start {:?}: {e}\n{advice}", command.get_program()),
        }
    }

    /// Waits until `ready`; false when the process has ended before.
    fn wait(&mut self, mut ready: impl FnMut() -> bool) -> bool {
        let end = Instant::now() + START;
        while !ready() {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(
                Instant::now() < end,
                "it does not answer: {}",
                self.logged()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        true
    }

    fn logged(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// A Redis server on a socket of its own.
pub struct Redis {
    server: Server,
    socket: PathBuf,
    dir: tempfile::TempDir,
}

impl Redis {
    /// Starts one with room for `megabytes`; `more`: lines of its configuration.
    pub fn start(megabytes: u32, more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("redis.sock");
        let config = dir.path().join("redis.conf");
        let text = format!(
            "port 0\nunixsocket {}\ndir {}\nsave \"\"\nappendonly no\nmaxmemory {megabytes}mb\n{more}\n",
            socket.display(),
            dir.path().display()
        );
        fs::write(&config, text).unwrap();
        let mut command = Command::new("redis-server");
        command.arg(&config);
        let advice = "this test needs a Redis server: run scripts/install-deps test";
        let mut server = Server::start(command, dir.path().join("log"), advice);
        if !server.wait(|| ping(&socket)) {
            panic!("redis-server has ended: {}", server.logged());
        }
        Self {
            server,
            socket,
            dir,
        }
    }

    /// Settings for it; keys begin with `prefix`.
    pub fn settings(&self, prefix: &str) -> RedisSettings {
        RedisSettings {
            endpoint: format!("unix://{}", self.socket.display()),
            username: None,
            password_file: None,
            prefix: prefix.to_owned(),
            ttl_seconds: 3600,
            deadline_ms: 200,
        }
    }

    /// A file beside its data.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// Stops it in the midst of everything, or lets it go on.
    pub fn freeze(&self, frozen: bool) {
        use rustix::process::{Pid, Signal, kill_process};
        let signal = if frozen { Signal::STOP } else { Signal::CONT };
        kill_process(Pid::from_child(&self.server.child), signal).unwrap();
    }

    /// Ends it.
    pub fn kill(&mut self) {
        self.server.child.kill().unwrap();
        self.server.child.wait().unwrap();
    }

    /// Runs a command without arguments' lengths: words without spaces.
    pub fn command(&self, words: &str) -> String {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.write_all(format!("{words}\r\n").as_bytes()).unwrap();
        let mut answer = vec![0; 1 << 16];
        let n = stream.read(&mut answer).unwrap();
        String::from_utf8_lossy(&answer[..n]).into_owned()
    }
}

fn ping(socket: &Path) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket) else {
        return false;
    };
    let mut answer = [0; 1];
    stream.write_all(b"PING\r\n").is_ok() && stream.read_exact(&mut answer).is_ok()
}

/// A Garage server, which speaks S3, with one bucket.
pub struct Garage {
    _server: Server,
    endpoint: String,
    dir: tempfile::TempDir,
}

const BUCKET: &str = "lazyimg";
const ACCESS_KEY: &str = "GK31c2f218a2e44f485b94239e";
const SECRET_KEY: &str = "b892c0665f0ada8a4755dae98baa3b133590e11dae3bcc1f9d769d67f16c3835";

impl Garage {
    /// Starts one.
    pub fn start() -> Self {
        // Another process may take a port between the look and the bind.
        for _ in 0..5 {
            if let Some(garage) = Self::try_start() {
                return garage;
            }
        }
        panic!("garage does not start");
    }

    fn try_start() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let [rpc, s3] = free_ports();
        let config = dir.path().join("garage.toml");
        let text = format!(
            r#"metadata_dir = "{dir}/meta"
data_dir = "{dir}/data"
db_engine = "lmdb"
replication_factor = 1
rpc_bind_addr = "127.0.0.1:{rpc}"
rpc_public_addr = "127.0.0.1:{rpc}"
rpc_secret = "{SECRET_KEY}"
[s3_api]
s3_region = "garage"
api_bind_addr = "127.0.0.1:{s3}"
"#,
            dir = dir.path().display()
        );
        fs::write(&config, text).unwrap();
        let mut command = Command::new(garage_binary());
        command
            .arg("-c")
            .arg(&config)
            .args(["server", "--single-node", "--default-bucket"])
            .env("GARAGE_DEFAULT_ACCESS_KEY", ACCESS_KEY)
            .env("GARAGE_DEFAULT_SECRET_KEY", SECRET_KEY)
            .env("GARAGE_DEFAULT_BUCKET", BUCKET)
            .env("RUST_LOG", "garage=warn");
        let advice = "this test needs Garage, an S3 server: scripts/test installs it below \
                      ~/.cache/lazyimg/tools; or name one with LAZYIMG_TEST_GARAGE";
        let mut server = Server::start(command, dir.path().join("log"), advice);
        let ready = server.wait(|| TcpStream::connect(("127.0.0.1", s3)).is_ok());
        ready.then(|| Self {
            _server: server,
            endpoint: format!("http://127.0.0.1:{s3}"),
            dir,
        })
    }

    /// Settings for it; keys begin with `prefix`.
    pub fn settings(&self, prefix: &str) -> S3Settings {
        let file = |name: &str, text: &str| {
            let path = self.dir.path().join(name);
            fs::write(&path, format!("{text}\n")).unwrap();
            Some(path)
        };
        S3Settings {
            endpoint: Some(self.endpoint.clone()),
            bucket: BUCKET.to_owned(),
            region: "garage".to_owned(),
            prefix: prefix.to_owned(),
            access_key_id_file: file("id", ACCESS_KEY),
            secret_access_key_file: file("secret", SECRET_KEY),
            virtual_host_style: false,
        }
    }
}

/// `LAZYIMG_TEST_GARAGE`, or where scripts/test has put it.
fn garage_binary() -> PathBuf {
    if let Some(path) = std::env::var_os("LAZYIMG_TEST_GARAGE") {
        return path.into();
    }
    let work = match (
        std::env::var_os("LAZYIMG_DEV_DIR"),
        std::env::var_os("XDG_CACHE_HOME"),
    ) {
        (Some(dir), _) => PathBuf::from(dir),
        (None, Some(cache)) => PathBuf::from(cache).join("lazyimg"),
        (None, None) => {
            let home = std::env::var_os("HOME").expect("HOME is set");
            PathBuf::from(home).join(".cache/lazyimg")
        }
    };
    let ours = work.join("tools/bin/garage");
    if ours.exists() { ours } else { "garage".into() }
}

fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}
