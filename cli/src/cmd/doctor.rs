//! `lazyimg doctor`: what this host can do, and which path will be used.

mod cache;
mod credentials;
mod rights;

use std::fs;
use std::path::PathBuf;

use serde::Serialize;

use crate::args::Doctor;
use crate::exit::Error;
use crate::{output, secrets};
use rights::{MountPath, Rights};

#[derive(Debug, Serialize)]
struct Report {
    /// Whether mounting will work.
    ready: bool,
    /// `direct`, `fusermount3`, or `none`.
    mount_path: MountPath,
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
    let rights = Rights::of_this_process();
    let fuse = fuse_device();
    let helper = find_program(rights::HELPER);
    let mount_path = match fuse.state {
        State::Fail => MountPath::None,
        _ => rights.mount_path(helper.as_deref()),
    };
    let checks = vec![
        kernel(),
        fuse,
        rights.check_mounting(helper.as_deref()),
        rights.check_others(mount_path),
        rights.check_random_reads(),
        erofs(),
        open_files(),
        cache::check_cache(args),
        key(args),
        credentials::check_credentials(args.docker_config.as_deref()),
    ];
    let ready = mount_path != MountPath::None && checks.iter().all(|c| c.state != State::Fail);
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
    out += match report.mount_path {
        MountPath::Direct => "mounts: FUSE tree, mounted directly (CAP_SYS_ADMIN)\n",
        MountPath::Helper => "mounts: FUSE tree, through fusermount3 (no root needed)\n",
        MountPath::None => "mounts: not possible yet\n",
    };
    out
}
