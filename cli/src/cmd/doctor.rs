//! `lazyimg doctor`: what this host can do, and which path will be used.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::args::Doctor;
use crate::exit::Error;
use crate::output::{self, bytes};
use crate::secrets;

/// Below this, a cache is of little use and eviction starts at once, in bytes.
const LITTLE_SPACE: u64 = 2 << 30;

#[derive(Debug, Serialize)]
struct Report {
    /// Whether mounting will work.
    ready: bool,
    /// `direct` (root), `fusermount3`, or `none`.
    mount_path: &'static str,
    checks: Vec<Check>,
}

#[derive(Debug, Serialize)]
struct Check {
    what: &'static str,
    /// `ok`, `note` (works, with less) or `fail` (does not work).
    state: State,
    finding: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    Note,
    Fail,
}

/// Runs the command.
pub fn run(args: &Doctor) -> Result<(), Error> {
    let root = rustix::process::geteuid().is_root();
    let fuse = fuse_device();
    let helper = find_program("fusermount3");
    let mount_path = match (fuse.state, root, &helper) {
        (State::Fail, _, _) => "none",
        (_, true, _) => "direct",
        (_, false, Some(_)) => "fusermount3",
        (_, false, None) => "none",
    };
    let checks = vec![
        kernel(),
        fuse,
        fusermount(root, helper.as_deref()),
        erofs(),
        open_files(),
        cache(args),
        key(args),
        credentials(),
    ];
    let ready = mount_path != "none" && checks.iter().all(|c| c.state != State::Fail);
    let report = Report {
        ready,
        mount_path,
        checks,
    };
    if args.json {
        output::json(&report)?
    } else {
        output::data(&text(&report))?
    }
    if ready {
        Ok(())
    } else {
        Err(Error::Other(
            "this host can't mount yet: see the lines with `fail`".into(),
        ))
    }
}

fn check(what: &'static str, state: State, finding: impl Into<String>, advice: &str) -> Check {
    let advice = (!advice.is_empty() && state != State::Ok).then(|| advice.to_owned());
    Check {
        what,
        state,
        finding: finding.into(),
        advice,
    }
}

fn kernel() -> Check {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let state = if version >= (5, 4) {
        State::Ok
    } else {
        State::Note
    };
    check(
        "kernel",
        state,
        format!("Linux {release}"),
        "lazyimg is tested on Linux 5.4 and later",
    )
}

fn fuse_device() -> Check {
    let open = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse");
    match open {
        Ok(_) => check("/dev/fuse", State::Ok, "can be opened", ""),
        Err(e) => check(
            "/dev/fuse",
            State::Fail,
            e.to_string(),
            "load the module (`modprobe fuse`), or let users open the device (`chmod 666 /dev/fuse`)",
        ),
    }
}

fn fusermount(root: bool, helper: Option<&Path>) -> Check {
    match (helper, root) {
        (Some(path), _) => {
            let set_uid = fs::metadata(path).is_ok_and(|m| m.mode() & 0o4000 != 0);
            let state = if set_uid || root {
                State::Ok
            } else {
                State::Fail
            };
            let finding = format!(
                "{}{}",
                path.display(),
                if set_uid { "" } else { " (not set-user-id)" }
            );
            check(
                "fusermount3",
                state,
                finding,
                "reinstall the package fuse3: without set-user-id it mounts for root only",
            )
        }
        (None, true) => check(
            "fusermount3",
            State::Ok,
            "not installed; root does not need it",
            "",
        ),
        (None, false) => check(
            "fusermount3",
            State::Fail,
            "not installed",
            "apt-get install fuse3",
        ),
    }
}

fn erofs() -> Check {
    let known = fs::read_to_string("/proc/filesystems").is_ok_and(|t| t.contains("erofs"));
    let finding = if known {
        "the kernel has it"
    } else {
        "not loaded"
    };
    // Mounts go through FUSE; EROFS is for `export`.
    check(
        "EROFS",
        if known { State::Ok } else { State::Note },
        finding,
        "only `lazyimg export` and the kernel's own mount use it: `modprobe erofs`",
    )
}

fn open_files() -> Check {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile)
        .current
        .unwrap_or(u64::MAX);
    let state = if limit >= 1024 {
        State::Ok
    } else {
        State::Note
    };
    check(
        "open files",
        state,
        format!("limit {limit}"),
        "raise it to 1024 or more (`ulimit -n`)",
    )
}

fn cache(args: &Doctor) -> Check {
    let dir = match args
        .cache
        .cache_dir
        .clone()
        .or_else(crate::config::cache_dir)
    {
        Some(dir) => dir,
        None => {
            return check(
                "cache",
                State::Fail,
                "neither HOME nor XDG_CACHE_HOME is set",
                "say where with --cache-dir",
            );
        }
    };
    let existing = dir
        .ancestors()
        .find(|p| p.exists())
        .unwrap_or(Path::new("/"));
    if let Err(e) = rustix::fs::access(existing, rustix::fs::Access::WRITE_OK) {
        return check(
            "cache",
            State::Fail,
            format!("{}: {e}", existing.display()),
            "choose a directory of yours with --cache-dir",
        );
    }
    match rustix::fs::statvfs(existing) {
        Ok(stat) => {
            let free = stat.f_bavail * stat.f_frsize;
            let state = if free >= LITTLE_SPACE {
                State::Ok
            } else {
                State::Note
            };
            let finding = format!(
                "{}: {} free, at most {} used",
                dir.display(),
                bytes(free),
                bytes(args.cache.cache_bytes)
            );
            check(
                "cache",
                state,
                finding,
                "little space: the cache will forget early; choose another place with --cache-dir",
            )
        }
        Err(e) => check(
            "cache",
            State::Note,
            format!("{}: {e}", existing.display()),
            "",
        ),
    }
}

fn key(args: &Doctor) -> Check {
    match secrets::tenant(&args.key) {
        Ok(lazyimg_convergent::provider::Provider::File(path)) if !path.exists() => check(
            "tenant key",
            State::Note,
            format!("{} does not exist yet", path.display()),
            "`lazyimg convert` makes it; to mount what others converted, copy theirs there (mode 0600)",
        ),
        Ok(provider) => match provider.existing_tenant_key() {
            Ok(key) => check("tenant key", State::Ok, format!("key {}", key.id()), ""),
            Err(e) => check("tenant key", State::Fail, e.to_string(), "see the finding"),
        },
        Err(e) => check("tenant key", State::Fail, e.to_string(), "see the finding"),
    }
}

fn credentials() -> Check {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let dir = std::env::var_os("DOCKER_CONFIG")
        .map(PathBuf::from)
        .or_else(|| home.map(|h| h.join(".docker")));
    match dir.map(|d| d.join("config.json")).filter(|p| p.exists()) {
        Some(path) => check("credentials", State::Ok, path.display().to_string(), ""),
        None => check(
            "credentials",
            State::Ok,
            "none: registries are asked anonymously",
            "",
        ),
    }
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    for c in &report.checks {
        let state = match c.state {
            State::Ok => "ok  ",
            State::Note => "note",
            State::Fail => "fail",
        };
        out += &format!("{state}  {:12} {}\n", c.what, c.finding);
        if let Some(advice) = &c.advice {
            out += &format!("      {:12} → {advice}\n", "");
        }
    }
    out += &match report.mount_path {
        "direct" => "mounts: FUSE tree, mounted directly (root)\n".to_owned(),
        "fusermount3" => "mounts: FUSE tree, through fusermount3 (no root needed)\n".to_owned(),
        _ => "mounts: not possible yet\n".to_owned(),
    };
    out
}
