//! The store and its peers as processes, all with the same chunks.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lazyimg_convergent::ChunkId;
use rustix::process::{Pid, Signal, kill_process};

use crate::error::{BenchError, at, io};
use crate::process::Usage;
use crate::setup::lazyimg::Lazyimg;
use crate::setup::workload::noise;

/// Length of a chunk, in bytes: ciphertext does not compress, and this is the usual length.
pub const CHUNK: usize = 512 << 10;

/// How long a server may take to listen, and to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// Chunks that every server has.
pub struct Chunks {
    bytes: Vec<u8>,
    /// Their names.
    pub ids: Vec<ChunkId>,
}

impl Chunks {
    /// `count` chunks of bytes that do not compress, the same each time.
    pub fn new(count: usize) -> Self {
        let bytes = noise(count * CHUNK);
        let ids = bytes.chunks_exact(CHUNK).map(ChunkId::of).collect();
        Self { bytes, ids }
    }

    fn each(&self) -> impl Iterator<Item = (&ChunkId, &[u8])> {
        self.ids.iter().zip(self.bytes.chunks_exact(CHUNK))
    }
}

/// A server; ends when dropped.
pub struct Server {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Server {
    fn start(command: &mut Command, address: SocketAddr, log: &Path) -> Result<Self, BenchError> {
        let name = command.get_program().to_string_lossy().into_owned();
        let err = File::create(log).map_err(at(log))?;
        let out = err.try_clone().map_err(at(log))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .map_err(io(format!("starting {name}")))?;
        let server = Self { child, address };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err() {
            if Instant::now() > deadline {
                let log = log.display();
                return Err(BenchError::Setup(format!(
                    "{name} does not listen on {address}; see {log}"
                )));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    /// nginx with sendfile and without a log, one worker for each core; the chunks are files.
    ///
    /// `tcp_nopush` stays off, as it is by default: over loopback it makes nginx several times slower.
    pub fn nginx(dir: &Path, chunks: &Chunks) -> Result<Self, BenchError> {
        let files = dir.join("files");
        fs::create_dir_all(&files).map_err(at(&files))?;
        for (id, bytes) in chunks.each() {
            let path = files.join(id.hex());
            fs::write(&path, bytes).map_err(at(&path))?;
        }
        let address = free_address()?;
        let here = dir.display();
        let text = format!(
            "daemon off; user root; worker_processes auto; pid {here}/pid; error_log {here}/error.log;\n\
             events {{ worker_connections 4096; }}\n\
             http {{\n  access_log off; sendfile on; tcp_nodelay on;\n  \
             open_file_cache max=4096; keepalive_requests 1000000000; keepalive_timeout 300s;\n  \
             client_body_temp_path {here}/body; proxy_temp_path {here}/proxy;\n  \
             fastcgi_temp_path {here}/fastcgi; uwsgi_temp_path {here}/uwsgi; scgi_temp_path {here}/scgi;\n  \
             server {{ listen {address}; root {here}/files; }}\n}}\n"
        );
        let config = dir.join("nginx.conf");
        fs::write(&config, text).map_err(at(&config))?;
        let mut command = Command::new("nginx");
        command.arg("-e").arg(dir.join("error.log"));
        command.arg("-p").arg(dir).arg("-c").arg(&config);
        Self::start(&mut command, address, &dir.join("log"))
    }

    /// Redis without persistence; the chunks are values under their names in hex.
    pub fn redis(dir: &Path, chunks: &Chunks) -> Result<Self, BenchError> {
        fs::create_dir_all(dir).map_err(at(dir))?;
        let address = free_address()?;
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        command.args(["--port", &address.port().to_string(), "--dir"]);
        command.arg(dir);
        let server = Self::start(&mut command, address, &dir.join("log"))?;
        let mut stream = connect(address)?;
        for (id, bytes) in chunks.each() {
            let hex = id.hex();
            let len = bytes.len();
            let head = format!("*3\r\n$3\r\nSET\r\n$64\r\n{hex}\r\n${len}\r\n");
            let mut ok = [0; 5];
            stream
                .write_all(head.as_bytes())
                .and_then(|()| stream.write_all(bytes))
                .and_then(|()| stream.write_all(b"\r\n"))
                .and_then(|()| stream.read_exact(&mut ok))
                .map_err(io("filling Redis"))?;
            if &ok != b"+OK\r\n" {
                return Err(BenchError::Setup("Redis refused a SET".into()));
            }
        }
        Ok(server)
    }

    /// User and system time of the process and its children so far, in seconds.
    pub fn cpu_s(&self) -> f64 {
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        let pids = children.split_whitespace().filter_map(|p| p.parse().ok());
        std::iter::once(pid)
            .chain(pids)
            .filter_map(Usage::of)
            .map(|usage| usage.cpu_s)
            .sum()
    }

    /// What the process itself has used so far.
    pub fn usage(&self) -> Result<Usage, BenchError> {
        Usage::of(self.child.id()).ok_or_else(|| BenchError::Setup("a server has ended".into()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Asked first: nginx takes its workers along.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A store with one tenant and a token.
pub struct Store {
    /// The process.
    pub server: Server,
    /// What its tenant shows.
    pub token: String,
    /// Where that lies.
    pub token_file: PathBuf,
}

impl Store {
    /// One that keeps everything below `dir` and listens on `ip`, in the network namespace of the calling
    /// thread.
    pub fn start(lazyimg: &Lazyimg, dir: &Path, ip: Ipv4Addr) -> Result<Self, BenchError> {
        fs::create_dir_all(dir).map_err(at(dir))?;
        let token_file = dir.join("bench.token");
        let token = "0123456789abcdef".repeat(4);
        let _ = fs::remove_file(&token_file);
        File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&token_file)
            .and_then(|mut f| f.write_all(token.as_bytes()))
            .map_err(at(&token_file))?;
        let tenants = dir.join("tenants.toml");
        let text =
            "[tenants.bench]\ntoken-files = [\"bench.token\"]\nrights = [\"read\", \"write\"]\n";
        fs::write(&tenants, text).map_err(at(&tenants))?;
        let log = dir.join("log");
        let err = File::create(&log).map_err(at(&log))?;
        let mut command = lazyimg.command();
        command
            .args(["store", "serve", "--json", "--listen"])
            .arg(format!("{ip}:0"))
            .arg("--data")
            .arg(dir.join("data"))
            .arg("--tenants")
            .arg(&tenants);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(err)
            .spawn()
            .map_err(io("starting the store"))?;
        // It says where it listens once it serves.
        let mut line = String::new();
        if let Some(out) = child.stdout.take() {
            BufReader::new(out)
                .read_line(&mut line)
                .map_err(io("the store's output"))?;
        }
        let mut server = Server {
            child,
            address: (IpAddr::V4(ip), 0).into(),
        };
        let started: Option<serde_json::Value> = serde_json::from_str(&line).ok();
        let address = started.and_then(|started| started["listen"].as_str()?.parse().ok());
        server.address = address.ok_or_else(|| {
            let said = fs::read_to_string(&log).unwrap_or_default();
            BenchError::Setup(format!("the store did not start: {line}{said}"))
        })?;
        Ok(Self {
            server,
            token,
            token_file,
        })
    }

    /// As clients name it.
    pub fn url(&self) -> String {
        format!("http://{}", self.server.address)
    }

    /// Puts chunks through HTTP; from the network namespace of the calling thread.
    pub fn fill(&self, chunks: &Chunks) -> Result<(), BenchError> {
        let mut stream = connect(self.server.address)?;
        for (id, bytes) in chunks.each() {
            let (hex, len, token) = (id.hex(), bytes.len(), &self.token);
            let head = format!(
                "PUT /v1/chunks/{hex} HTTP/1.1\r\nhost: store\r\nauthorization: Bearer {token}\r\n\
                 content-length: {len}\r\n\r\n"
            );
            stream
                .write_all(head.as_bytes())
                .and_then(|()| stream.write_all(bytes))
                .map_err(io("filling the store"))?;
            let mut answer = Vec::new();
            // The answer has no body: its head ends it.
            while !answer.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream
                    .read_exact(&mut byte)
                    .map_err(io("the store's answer to a put"))?;
                answer.push(byte[0]);
            }
            if !answer.starts_with(b"HTTP/1.1 20") {
                let said = String::from_utf8_lossy(&answer).into_owned();
                return Err(BenchError::Setup(format!(
                    "the store refused a chunk: {said}"
                )));
            }
        }
        Ok(())
    }
}

/// A connection that sends at once.
pub fn connect(address: SocketAddr) -> Result<TcpStream, BenchError> {
    let stream = TcpStream::connect(address).map_err(io(format!("connecting to {address}")))?;
    stream.set_nodelay(true).map_err(io("TCP_NODELAY"))?;
    Ok(stream)
}

fn free_address() -> Result<SocketAddr, BenchError> {
    let probe = TcpListener::bind("127.0.0.1:0").map_err(io("a free loopback port"))?;
    probe.local_addr().map_err(io("a free loopback port"))
}
