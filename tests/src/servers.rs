//! The servers behind a region's store, as they are: Redis, and Garage for S3. On loopback or a socket, each
//! ended with the value that started it. The tests of the engines use them too.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::process::kill;
use crate::registry::free_port;

/// How long a server may take to begin answering.
const START: Duration = Duration::from_secs(60);

/// How often a server is started that has found its port taken meanwhile.
const TRIES: usize = 5;

/// A child process that ends with this value.
#[derive(Debug)]
struct Server {
    child: Child,
    log: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        kill(&mut self.child);
    }
}

impl Server {
    /// Starts `program`; `advice`: what to do if there is none.
    fn start(
        program: &Path,
        prepare: impl FnOnce(&mut Command),
        log: PathBuf,
        advice: &str,
    ) -> Self {
        let file = fs::File::create(&log).expect("a test may write to its own directory");
        let copy = file.try_clone().expect("descriptors can be copied");
        let found = match program.components().count() {
            1 => crate::host::find_program(&program.to_string_lossy()),
            _ => program.exists().then(|| program.to_owned()),
        };
        let found = found.unwrap_or_else(|| panic!("there is no {}\n{advice}", program.display()));
        // Killed with the thread that started it: none survives a test, however that ends.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(found);
        prepare(&mut command);
        let child = command
            .stdin(Stdio::null())
            .stdout(copy)
            .stderr(file)
            .spawn();
        match child {
            Ok(child) => Self { child, log },
            Err(e) => panic!("cannot start {}: {e}", program.display()),
        }
    }

    /// Waits until `ready`; false when the process has ended before.
    fn wait(&mut self, mut ready: impl FnMut() -> bool) -> bool {
        let end = Instant::now() + START;
        while !ready() {
            if self.child.try_wait().expect("it is our child").is_some() {
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

/// A Redis server on a socket of its own, and on a port of loopback where that is wanted.
#[derive(Debug)]
pub struct Redis {
    server: Option<Server>,
    socket: PathBuf,
    port: u16,
    dir: tempfile::TempDir,
}

impl Redis {
    /// Starts one with room for `megabytes`; `more`: lines of its configuration.
    pub fn start(megabytes: u32, more: &str) -> Self {
        Self::start_at(0, megabytes, more).unwrap_or_else(|log| panic!("it has ended: {log}"))
    }

    /// Starts one that listens on a port too.
    pub fn start_with_port(megabytes: u32, more: &str) -> Self {
        let mut log = String::new();
        for _ in 0..TRIES {
            match Self::start_at(free_port(), megabytes, more) {
                Ok(redis) => return redis,
                Err(said) => log = said,
            }
        }
        panic!("redis-server does not start: {log}");
    }

    fn start_at(port: u16, megabytes: u32, more: &str) -> Result<Self, String> {
        let dir = tempfile::tempdir().expect("there is a directory for temporary files");
        let socket = dir.path().join("redis.sock");
        let text = format!(
            "bind 127.0.0.1\nport {port}\nunixsocket {}\ndir {}\nsave \"\"\nappendonly no\n\
             maxmemory {megabytes}mb\n{more}\n",
            socket.display(),
            dir.path().display()
        );
        fs::write(dir.path().join("redis.conf"), text).expect("a test may write there");
        let mut redis = Self {
            server: None,
            socket,
            port,
            dir,
        };
        redis.try_start().map(|()| redis)
    }

    /// What it has said if it ended.
    fn try_start(&mut self) -> Result<(), String> {
        let dir = self.dir.path();
        let config = dir.join("redis.conf");
        let advice = "this test needs a Redis server: run scripts/install-deps test";
        let server = Server::start(
            Path::new("redis-server"),
            |command| {
                command.arg(config);
            },
            dir.join("log"),
            advice,
        );
        let server = self.server.insert(server);
        if server.wait(|| ping(&self.socket)) {
            return Ok(());
        }
        Err(server.logged())
    }

    /// Its address: the port if it has one, else the socket.
    pub fn endpoint(&self) -> String {
        match self.port {
            0 => format!("unix://{}", self.socket.display()),
            port => format!("redis://127.0.0.1:{port}/0"),
        }
    }

    /// A file beside its data.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        write(self.dir.path(), name, text)
    }

    /// Stops it in the midst of everything, or lets it go on.
    pub fn freeze(&self, frozen: bool) {
        let signal = if frozen { Signal::STOP } else { Signal::CONT };
        let server = self.server.as_ref().expect("it runs");
        kill_process(Pid::from_child(&server.child), signal).expect("it is our child");
    }

    /// Ends it; what it held is gone.
    pub fn kill(&mut self) {
        self.server = None;
    }

    /// Starts it again, empty, where it was.
    pub fn restart(&mut self) {
        self.kill();
        if let Err(log) = self.try_start() {
            panic!("redis-server does not start again: {log}");
        }
    }

    /// Runs a command without arguments' lengths: words without spaces.
    pub fn command(&self, words: &str) -> String {
        let mut stream = UnixStream::connect(&self.socket).expect("it runs");
        let line = format!("{words}\r\n");
        stream.write_all(line.as_bytes()).expect("it runs");
        let mut answer = vec![0; 1 << 16];
        let n = stream.read(&mut answer).expect("it answers");
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
#[derive(Debug)]
pub struct Garage {
    _server: Server,
    endpoint: String,
    dir: tempfile::TempDir,
}

const ACCESS_KEY: &str = "GK31c2f218a2e44f485b94239e";
const SECRET_KEY: &str = "b892c0665f0ada8a4755dae98baa3b133590e11dae3bcc1f9d769d67f16c3835";

impl Garage {
    /// Its bucket.
    pub const BUCKET: &str = "lazyimg";

    /// Its region.
    pub const REGION: &str = "garage";

    /// Starts one.
    pub fn start() -> Self {
        // Another process may take a port between the look and the bind.
        let mut tries = (0..TRIES).filter_map(|_| Self::try_start());
        tries.next().expect("garage does not start")
    }

    fn try_start() -> Option<Self> {
        let dir = tempfile::tempdir().expect("there is a directory for temporary files");
        let (rpc, s3) = (free_port(), free_port());
        let text = format!(
            r#"metadata_dir = "{dir}/meta"
data_dir = "{dir}/data"
db_engine = "lmdb"
replication_factor = 1
rpc_bind_addr = "127.0.0.1:{rpc}"
rpc_public_addr = "127.0.0.1:{rpc}"
rpc_secret = "{SECRET_KEY}"
[s3_api]
s3_region = "{}"
api_bind_addr = "127.0.0.1:{s3}"
"#,
            Self::REGION,
            dir = dir.path().display()
        );
        let config = write(dir.path(), "garage.toml", &text);
        let advice = "this test needs Garage, an S3 server: scripts/test installs it below \
                      ~/.cache/lazyimg/tools; or name one with LAZYIMG_TEST_GARAGE";
        let prepare = |command: &mut Command| {
            command
                .arg("-c")
                .arg(&config)
                .args(["server", "--single-node", "--default-bucket"])
                .env("GARAGE_DEFAULT_ACCESS_KEY", ACCESS_KEY)
                .env("GARAGE_DEFAULT_SECRET_KEY", SECRET_KEY)
                .env("GARAGE_DEFAULT_BUCKET", Self::BUCKET)
                .env("RUST_LOG", "garage=warn");
        };
        let mut server = Server::start(&garage_binary(), prepare, dir.path().join("log"), advice);
        let ready = server.wait(|| TcpStream::connect(("127.0.0.1", s3)).is_ok());
        ready.then(|| Self {
            _server: server,
            endpoint: format!("http://127.0.0.1:{s3}"),
            dir,
        })
    }

    /// Its address.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// A file with the access key's id.
    pub fn access_key_id_file(&self) -> PathBuf {
        write(self.dir.path(), "id", &format!("{ACCESS_KEY}\n"))
    }

    /// A file with the secret access key.
    pub fn secret_access_key_file(&self) -> PathBuf {
        write(self.dir.path(), "secret", &format!("{SECRET_KEY}\n"))
    }
}

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, text).expect("a test may write to its own directory");
    path
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
