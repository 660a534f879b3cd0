//! A regional store process: `lazyimg store serve`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::process::{kill, wait_for};
use crate::registry::free_port;

/// A store on loopback. Ends when dropped.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    listen: String,
    args: Vec<String>,
    url: String,
    child: Option<Child>,
}

impl Store {
    /// Starts one that keeps everything in `dir`, and lets everybody do everything.
    #[track_caller]
    pub fn start(dir: impl Into<PathBuf>) -> Self {
        Self::start_with(dir, &[])
    }

    /// Starts one with more flags.
    #[track_caller]
    pub fn start_with(dir: impl Into<PathBuf>, args: &[&str]) -> Self {
        let dir = dir.into();
        let data = dir.join("data").to_string_lossy().into_owned();
        let args = [&["--data", &data], args].concat();
        Self::start_at(dir, &format!("127.0.0.1:{}", free_port()), &args)
    }

    /// Starts one that listens at `listen`, and whose flags say where it keeps what it holds. `dir` is
    /// its home, and has its log.
    #[track_caller]
    pub fn start_at(dir: impl Into<PathBuf>, listen: &str, args: &[&str]) -> Self {
        let dir = dir.into();
        fs::create_dir_all(&dir).expect("a test may write to its own directory");
        let mut store = Self {
            dir,
            listen: listen.to_owned(),
            args: args.iter().map(|a| (*a).to_owned()).collect(),
            url: String::new(),
            child: None,
        };
        store.restart();
        store
    }

    /// Starts the process, with the address and the flags that it had before.
    #[track_caller]
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .expect("a test may write to its own directory");
        // Killed with the thread that started it: none survives a test, however that ends.
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(crate::binary::lazyimg())
            .args(["store", "serve", "--listen", &self.listen])
            .args(&self.args)
            .env_clear()
            .env("HOME", &self.dir)
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("the binary was built");
        // It says so once it serves.
        let mut line = String::new();
        let out = child.stdout.take().expect("it is piped");
        let _ = BufReader::new(out).read_line(&mut line);
        self.child = Some(child);
        let url = line
            .strip_prefix("serving ")
            .and_then(|rest| rest.split(' ').next());
        let log = || fs::read_to_string(self.log()).unwrap_or_default();
        self.url = url
            .unwrap_or_else(|| panic!("{line:?}\n{}", log()))
            .to_owned();
    }

    /// Its directory of chunks and documents.
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.dir.join("store.log")
    }

    /// Its address.
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        let port = self.listen.rsplit(':').next().and_then(|p| p.parse().ok());
        port.expect("an address with a port")
    }

    /// What it counts, in Prometheus' text form. Only of a store without tenants and TLS.
    #[track_caller]
    pub fn metrics(&self) -> String {
        let mut socket = TcpStream::connect(&self.listen).expect("it runs");
        let head = format!(
            "GET /metrics HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n",
            self.listen
        );
        let mut said = String::new();
        let patience = Some(Duration::from_secs(60));
        let done = socket
            .set_read_timeout(patience)
            .and_then(|()| socket.write_all(head.as_bytes()))
            .and_then(|()| socket.read_to_string(&mut said));
        done.unwrap_or_else(|e| panic!("{} does not tell its metrics: {e}", self.url));
        assert!(said.starts_with("HTTP/1.1 200 "), "{said}");
        said
    }

    /// One of its metrics, by name and labels as they are written; zero if it is not there yet.
    #[track_caller]
    pub fn metric(&self, series: &str) -> u64 {
        let text = self.metrics();
        let values = text.lines().filter_map(|line| line.strip_prefix(series));
        let mut values = values.filter_map(|rest| rest.strip_prefix(' ')?.parse().ok());
        values.next().unwrap_or(0)
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(self.child.as_ref().expect("it runs"))
    }

    /// Kills it.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            kill(&mut child);
        }
    }

    /// Ends it as an init system does, and waits until it has.
    #[track_caller]
    pub fn stop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let _ = kill_process(Pid::from_child(&child), Signal::TERM);
        let mut status = None;
        wait_for("the store ends", Duration::from_secs(60), || {
            status = child.try_wait().expect("it is our child");
            status.is_some()
        });
        let log = || fs::read_to_string(self.log()).unwrap_or_default();
        assert!(status.is_some_and(|s| s.success()), "{status:?}\n{}", log());
    }

    /// Stops the process in its tracks: connections are accepted, nothing is answered.
    pub fn freeze(&self) {
        kill_process(self.pid(), Signal::STOP).expect("it is our child");
    }

    /// Lets a frozen process go on.
    pub fn thaw(&self) {
        kill_process(self.pid(), Signal::CONT).expect("it is our child");
    }

    /// Segment files of its engine.
    pub fn segments(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        collect(&self.data().join("segments"), &mut found);
        found.sort();
        found
    }
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => collect(&path, found),
            false => found.push(path),
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.kill();
    }
}
