//! The daemon and its client as processes of their own: `mini.rs`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use lazyimg_fuse::mountpoint::mounted_at;
use lazyimg_fuse::protocol::StatusReport;

use super::{BuiltImage, need_root};

/// A directory with an image, a cache and mount points in it, that any user may enter.
pub struct Place {
    pub root: tempfile::TempDir,
    pub mini: PathBuf,
    pub user: Option<u32>,
}

impl Place {
    pub fn new(image: &BuiltImage) -> Self {
        need_root();
        let root = tempfile::tempdir().unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o777)).unwrap();
        image.write_to(&root.path().join("image"));
        for name in ["mnt", "other"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        // Not where it was built: other users can't go there.
        // Cargo sets it for tests, and builds the program for them.
        let built = option_env!("CARGO_BIN_EXE_mini").unwrap_or_default();
        let mini = root.path().join("mini");
        // By another process: a copy of ours could be open for writing in a child that another test
        // forks just then, and cannot be run until that child has become something else.
        let copied = Command::new("cp").arg(built).arg(&mini).status();
        assert!(copied.unwrap().success());
        Self {
            root,
            mini,
            user: None,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn health(&self, word: &str) {
        fs::write(self.path("image/health"), word).unwrap();
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = match self.user {
            None => Command::new(&self.mini),
            Some(uid) => {
                let mut command = Command::new("setpriv");
                command
                    .arg(format!("--reuid={uid}"))
                    .arg(format!("--regid={uid}"))
                    .arg("--clear-groups")
                    .arg(&self.mini);
                command
            }
        };
        // The first word is the verb, the others are names in this place, or words.
        for (i, arg) in args.iter().enumerate() {
            let is_name = i > 0 && ["cache", "cache2", "image", "mnt", "other"].contains(arg);
            command.arg(if is_name {
                self.path(arg).into_os_string()
            } else {
                arg.into()
            });
        }
        command.env("MINI_LINGER_MS", "300").stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let log = fs::read_to_string(self.path("cache/daemon.log")).unwrap_or_default();
        assert!(
            output.status.success(),
            "{args:?}: {}\nlog:\n{log}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    pub fn fails(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(!output.status.success(), "{args:?} should fail");
        String::from_utf8(output.stderr).unwrap()
    }

    pub fn status(&self) -> Option<StatusReport> {
        serde_json::from_str(&self.ok(&["status", "cache"])).unwrap()
    }

    pub fn wait_until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(Instant::now() < deadline, "timed out: {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn is_mounted(&self, name: &str) -> bool {
        mounted_at(&self.path(name)).unwrap().is_some()
    }

    pub fn kill(&self, signal: rustix::process::Signal) -> u32 {
        let pid = self.status().unwrap().pid;
        rustix::process::kill_process(rustix::process::Pid::from_raw(pid as i32).unwrap(), signal)
            .unwrap();
        self.wait_until("the daemon is dead", || !is_running(pid));
        pid
    }
}

/// Whether any thread of it lives: the first is a zombie until the last has ended.
pub fn is_running(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let zombie = stat
        .rsplit(')')
        .next()
        .is_none_or(|rest| rest.is_empty() || rest.trim_start().starts_with('Z'));
    threads > 1 || !zombie
}

impl Drop for Place {
    fn drop(&mut self) {
        for name in ["mnt", "other"] {
            while self.is_mounted(name) {
                let flags =
                    rustix::mount::UnmountFlags::FORCE | rustix::mount::UnmountFlags::DETACH;
                rustix::mount::unmount(self.path(name), flags).unwrap();
            }
        }
    }
}
