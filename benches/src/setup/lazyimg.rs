//! The program under test, as a user runs it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::{BenchError, at};
use crate::process::{self, Finished};

/// How long a daemon may take to end when it is asked to.
const DAEMON_ENDS_WITHIN: Duration = Duration::from_secs(20);

/// The `lazyimg` binary with keys and configuration of its own.
pub struct Lazyimg {
    binary: PathBuf,
    home: PathBuf,
}

impl Lazyimg {
    /// `binary`, with its keys and caches below `home`.
    pub fn new(binary: PathBuf, home: PathBuf) -> Result<Self, BenchError> {
        fs::create_dir_all(&home).map_err(at(&home))?;
        Ok(Self { binary, home })
    }

    /// A command that knows nothing of the caller's settings.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("LAZYIMG_") {
                command.env_remove(name);
            }
        }
        command
            .env("XDG_CONFIG_HOME", self.home.join("config"))
            .env("XDG_CACHE_HOME", self.home.join("cache"))
            .arg("--quiet");
        command
    }

    /// `lazyimg convert`; what it printed and what it used.
    pub fn convert(&self, image: &str, args: &[&str]) -> Result<(Value, Finished), BenchError> {
        let work = self.home.join("convert");
        fs::create_dir_all(&work).map_err(at(&work))?;
        let mut command = self.command();
        command
            .args(["convert", image, "--json", "--plain-http", "--work-dir"])
            .arg(work)
            .args(args);
        let done = process::run(&mut command)?;
        Ok((parse("lazyimg convert", &done.stdout)?, done))
    }

    /// `lazyimg inspect --json`.
    pub fn inspect(&self, image: &str) -> Result<Value, BenchError> {
        let mut command = self.command();
        command.args(["inspect", image, "--json", "--plain-http"]);
        parse("lazyimg inspect", &process::run(&mut command)?.stdout)
    }

    /// `lazyimg mount`: the mount, and how long the command took.
    pub fn mount(
        &self,
        image: &str,
        dir: &Path,
        cache: &Path,
        flags: &[&str],
    ) -> Result<(Mounted<'_>, Finished), BenchError> {
        for d in [dir, cache] {
            fs::create_dir_all(d).map_err(at(d))?;
        }
        let mut command = self.command();
        command
            .args(["mount", image, "--plain-http"])
            .args(flags)
            .arg("--cache-dir")
            .arg(cache)
            .arg(dir);
        let done = process::run(&mut command)?;
        let mounted = Mounted {
            lazyimg: self,
            dir: dir.to_path_buf(),
            cache: cache.to_path_buf(),
            up: true,
        };
        Ok((mounted, done))
    }
}

fn parse(what: &str, bytes: &[u8]) -> Result<Value, BenchError> {
    serde_json::from_slice(bytes).map_err(|e| BenchError::Json {
        what: what.to_owned(),
        cause: e.to_string(),
    })
}

/// A mount and the daemon behind it; both end when dropped.
pub struct Mounted<'a> {
    lazyimg: &'a Lazyimg,
    dir: PathBuf,
    cache: PathBuf,
    up: bool,
}

impl Mounted<'_> {
    /// `lazyimg status --json`.
    pub fn status(&self) -> Result<Value, BenchError> {
        let mut command = self.lazyimg.command();
        command
            .args(["status", "--json", "--cache-dir"])
            .arg(&self.cache);
        parse("lazyimg status", &process::run(&mut command)?.stdout)
    }

    /// The process id of the daemon that serves it.
    pub fn daemon(&self) -> Result<u32, BenchError> {
        let pid = self.status()?["pid"]
            .as_u64()
            .and_then(|pid| u32::try_from(pid).ok());
        pid.ok_or_else(|| BenchError::Json {
            what: "lazyimg status".into(),
            cause: "no pid".into(),
        })
    }

    /// Unmounts and waits until the daemon is gone, so that the next mount starts a fresh one.
    pub fn end(mut self) -> Result<(), BenchError> {
        self.up = false;
        let daemon = self.daemon()?;
        self.umount(&[])?;
        wait_for_end(daemon);
        Ok(())
    }

    fn umount(&self, flags: &[&str]) -> Result<(), BenchError> {
        let mut command = self.lazyimg.command();
        command
            .arg("umount")
            .args(flags)
            .arg("--cache-dir")
            .arg(&self.cache)
            .arg(&self.dir);
        process::run(&mut command).map(drop)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if self.up {
            let daemon = self.daemon();
            let _ = self.umount(&["--lazy"]);
            if let Ok(pid) = daemon {
                wait_for_end(pid);
            }
        }
    }
}

/// Asks a daemon without mounts to end, and waits for it.
fn wait_for_end(pid: u32) {
    let started = Instant::now();
    if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    while Path::new("/proc").join(pid.to_string()).exists()
        && started.elapsed() < DAEMON_ENDS_WITHIN
    {
        std::thread::sleep(Duration::from_millis(10));
    }
}
