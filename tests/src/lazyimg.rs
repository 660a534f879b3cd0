//! The program under test, as a user has it: a home, a cache, keys, mounts.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;

use crate::process::{Finished, run};
use crate::workdir::mounts_below;

/// `lazyimg` with a home directory, configuration and cache of its own. When it is dropped, its
/// mounts and its daemon end.
#[derive(Debug)]
pub struct Lazyimg {
    home: PathBuf,
    cache: PathBuf,
    user: Option<u32>,
    env: Vec<(String, String)>,
}

impl Lazyimg {
    /// A user with an empty home at `home`.
    pub fn new(home: impl Into<PathBuf>) -> Self {
        let home = home.into();
        fs::create_dir_all(home.join("tmp")).expect("a test may write to its own directory");
        Self {
            cache: home.join("cache/lazyimg"),
            home,
            user: None,
            env: Vec::new(),
        }
    }

    /// An unprivileged user: uid and gid, no groups. Programs must be reachable for it.
    pub fn new_unprivileged(home: impl Into<PathBuf>, uid: u32) -> Self {
        let mut lazyimg = Self::new(home);
        for dir in [&lazyimg.home, &lazyimg.home.join("tmp")] {
            chown(dir, Some(uid), Some(uid)).expect("root may");
        }
        lazyimg.user = Some(uid);
        lazyimg
    }

    /// Another home with the same cache directory.
    pub fn with_cache(mut self, cache: impl Into<PathBuf>) -> Self {
        self.cache = cache.into();
        let value = self.cache.to_string_lossy().into_owned();
        self.env("LAZYIMG_CACHE_DIR", &value)
    }

    /// Adds an environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Its home directory.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// The directory of the host cache.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// The configuration directory: key, domain secret, `config.toml`.
    pub fn config(&self) -> PathBuf {
        self.home.join("config/lazyimg")
    }

    /// The tenant key's file.
    pub fn key_file(&self) -> PathBuf {
        self.config().join("tenant.key")
    }

    /// Gives this user the keys of another one: what an administrator copies to a second machine.
    pub fn copy_secrets_from(&self, other: &Self) {
        fs::create_dir_all(self.config()).expect("a test may write to its own directory");
        for name in ["tenant.key", "domain-default.secret"] {
            let from = other.config().join(name);
            let to = self.config().join(name);
            // `copy` keeps the mode, which must be 0600.
            fs::copy(&from, &to).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
            if let Some(uid) = self.user {
                chown(&to, Some(uid), Some(uid)).expect("root may");
            }
        }
        if let Some(uid) = self.user {
            for dir in [self.home.join("config"), self.config()] {
                chown(dir, Some(uid), Some(uid)).expect("root may");
            }
        }
    }

    /// The command, with nothing of the tester's own environment.
    pub fn command(&self, args: &[&str]) -> Command {
        let binary = crate::binary::lazyimg();
        let mut command = match self.user {
            None => Command::new(binary),
            Some(uid) => {
                let mut command = Command::new("setpriv");
                command
                    .arg(format!("--reuid={uid}"))
                    .arg(format!("--regid={uid}"));
                command
                    .arg("--clear-groups")
                    .arg("--")
                    .arg(reachable(binary, &self.home));
                command
            }
        };
        command.args(args).env_clear().current_dir(&self.home);
        command.env(
            "PATH",
            std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin:/usr/sbin:/sbin".into()),
        );
        command
            .env("HOME", &self.home)
            .env("TMPDIR", self.home.join("tmp"));
        command
            .env("XDG_CONFIG_HOME", self.home.join("config"))
            .env("XDG_CACHE_HOME", self.home.join("cache"));
        command
            .env("RUST_BACKTRACE", "1")
            .envs(self.env.iter().cloned());
        command
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> Finished {
        run(&mut self.command(args))
    }

    /// Runs it and gives its output; panics if it fails.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        self.run(args).ok()
    }

    /// Runs it; panics unless it ends with `code`. Gives what it said on standard error.
    #[track_caller]
    pub fn fails(&self, code: i32, args: &[&str]) -> String {
        self.run(args).fails(code)
    }

    /// Runs it with `--json` and gives the document.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.ok(&[args, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("not JSON ({e}): {text}"))
    }

    /// Converts an image; gives the report.
    #[track_caller]
    pub fn convert(&self, reference: &str) -> Value {
        self.json(&["convert", reference])
    }

    /// Mounts an image at `dir`, which is made.
    #[track_caller]
    pub fn mount(&self, reference: &str, dir: impl Into<PathBuf>) -> Mounted<'_> {
        self.mount_with(reference, dir, &[])
    }

    /// Mounts with more flags.
    #[track_caller]
    pub fn mount_with(
        &self,
        reference: &str,
        dir: impl Into<PathBuf>,
        flags: &[&str],
    ) -> Mounted<'_> {
        let dir = dir.into();
        // A mount point whose daemon was killed answers with an error; then it is there.
        let _ = fs::create_dir_all(&dir);
        if let Some(uid) = self.user {
            let _ = chown(&dir, Some(uid), Some(uid));
        }
        let path = dir.to_string_lossy().into_owned();
        self.ok(&[&["mount", reference, path.as_str()], flags].concat());
        Mounted {
            lazyimg: self,
            dir,
            gone: false,
        }
    }

    /// The status of the daemon.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.json(&["status"])
    }

    /// The process of the daemon.
    #[track_caller]
    pub fn daemon(&self) -> Pid {
        let status = self.status();
        let pid = status["pid"]
            .as_i64()
            .unwrap_or_else(|| panic!("no pid in {status}"));
        i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .expect("a process id")
    }

    /// Kills the daemon without warning and waits until it is gone.
    #[track_caller]
    pub fn kill_daemon(&self) {
        let pid = self.daemon();
        kill_process(pid, Signal::KILL).expect("it runs");
        wait_gone(pid, Duration::from_secs(20));
    }

    /// Takes all mounts off and ends the daemon: all that stays is on disk.
    #[track_caller]
    pub fn stop(&self) {
        let pid = self.find_daemon();
        self.ok(&["umount", "--all", "--lazy"]);
        if let Some(pid) = pid {
            // It may end by itself when nothing is mounted.
            let _ = kill_process(pid, Signal::TERM);
            wait_gone(pid, Duration::from_secs(20));
        }
    }

    /// The daemon's log, both files of it.
    pub fn log(&self) -> String {
        let read = |name| fs::read_to_string(self.cache.join(name)).unwrap_or_default();
        read("daemon.log.1") + &read("daemon.log")
    }

    /// The process that holds the lock of the cache directory, whether or not it answers.
    pub fn find_daemon(&self) -> Option<Pid> {
        let lock = fs::read_to_string(self.cache.join("daemon.lock")).ok()?;
        let pid = lock.trim().parse().ok().and_then(Pid::from_raw)?;
        // Process ids are used again: only a process that has our cache directory open is ours.
        let fds = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_pid())).ok()?;
        let lock = self.cache.join("daemon.lock");
        let ours = fds
            .flatten()
            .any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == lock));
        ours.then_some(pid)
    }
}

impl Drop for Lazyimg {
    fn drop(&mut self) {
        for mount in mounts_below(&self.home).iter().rev() {
            let _ = unmount(mount, UnmountFlags::DETACH);
        }
        if let Some(pid) = self.find_daemon() {
            let _ = kill_process(pid, Signal::KILL);
            let started = Instant::now();
            while test_kill_process(pid).is_ok() && started.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// The binary where an unprivileged user can run it: cargo's directory is often below `/root`.
fn reachable(binary: &Path, home: &Path) -> PathBuf {
    let copy = home.join("lazyimg");
    if !copy.exists() {
        // By another process: a copy of ours could be open for writing in a child that another test
        // forks just then, and cannot be run until that child has become something else.
        let copied = fs::hard_link(binary, &copy).is_ok()
            || Command::new("cp")
                .args([binary, &copy])
                .status()
                .is_ok_and(|s| s.success());
        assert!(copied, "copying {}", binary.display());
    }
    copy
}

/// Waits until a process is gone (a zombie that nobody reaps counts as gone).
#[track_caller]
pub fn wait_gone(pid: Pid, deadline: Duration) {
    let stat = format!("/proc/{}/stat", pid.as_raw_pid());
    crate::process::wait_for(&format!("process {pid:?} ends"), deadline, || {
        let text = fs::read_to_string(&stat).unwrap_or_default();
        text.rsplit_once(')')
            .is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'))
    });
}

/// A mounted image; taken off when dropped.
#[derive(Debug)]
pub struct Mounted<'a> {
    lazyimg: &'a Lazyimg,
    dir: PathBuf,
    gone: bool,
}

impl Mounted<'_> {
    /// The mount point.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path in it.
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.dir.join(path)
    }

    /// The mount's entry in `status --json`.
    #[track_caller]
    pub fn status(&self) -> Value {
        let status = self.lazyimg.status();
        let dir = fs::canonicalize(&self.dir).unwrap_or_else(|_| self.dir.clone());
        let mounts = status["mounts"]
            .as_array()
            .unwrap_or_else(|| panic!("no mounts in {status}"));
        let found = mounts
            .iter()
            .find(|m| m["mountpoint"].as_str().map(Path::new) == Some(&dir));
        found
            .unwrap_or_else(|| panic!("no mount at {} in {status}", dir.display()))
            .clone()
    }

    /// A number in [`Mounted::status`] by its path of keys.
    #[track_caller]
    pub fn count(&self, pointer: &str) -> u64 {
        let status = self.status();
        let value = status.pointer(pointer).and_then(Value::as_u64);
        value.unwrap_or_else(|| panic!("no number at {pointer} in {status:#}"))
    }

    /// Takes it off; panics if that fails.
    #[track_caller]
    pub fn umount(mut self) {
        self.gone = true;
        self.lazyimg.ok(&["umount", &self.dir.to_string_lossy()]);
    }

    /// Forgets it: somebody else takes it off.
    pub fn leave(mut self) {
        self.gone = true;
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if !self.gone {
            let _ = unmount(&self.dir, UnmountFlags::DETACH);
        }
    }
}
