//! The machine: what it is, whether it has what the benches need, and its page cache.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::error::{BenchError, at, io};
use crate::process;

/// Programs that peers and workloads need, with their Debian packages.
const TOOLS: &[(&str, &str)] = &[
    ("docker-registry", "docker-registry"),
    ("skopeo", "skopeo"),
    ("umoci", "umoci"),
    ("zstd", "zstd"),
    ("tar", "tar"),
    ("ip", "iproute2"),
    ("nginx", "nginx-light"),
    ("redis-server", "redis-server"),
];

/// Says what is missing, all at once.
pub fn check() -> Result<(), BenchError> {
    let mut missing = Vec::new();
    if !rustix::process::geteuid().is_root() {
        missing.push("root (mounts, network namespaces, /proc/sys/vm/drop_caches)".to_owned());
    }
    for device in ["/dev/fuse", "/dev/net/tun"] {
        if !Path::new(device).exists() {
            missing.push(device.to_owned());
        }
    }
    for (tool, package) in TOOLS {
        if !on_path(tool) {
            missing.push(format!("{tool} (Debian package {package})"));
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(BenchError::Setup(format!(
        "the benches need: {}",
        missing.join(", ")
    )))
}

fn on_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(tool).is_file())
}

/// The machine in two lines, with the load it had before the benches began.
pub fn facts(work_dir: &Path) -> Result<Vec<String>, BenchError> {
    let read = |p: &str| fs::read_to_string(p).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text
            .lines()
            .find(|l| l.starts_with(name))
            .unwrap_or_default()
            .to_owned();
        line.split_once(':')
            .map(|(_, v)| v.trim().to_owned())
            .unwrap_or_default()
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let date = process::run(Command::new("date").args(["-u", "+%F %H:%M UTC"]))?;
    let memory: f64 = field(&read("/proc/meminfo"), "MemTotal")
        .trim_end_matches(" kB")
        .parse::<f64>()
        .map_or(0.0, |kib| kib * 1024.0 / 1e9);
    Ok(vec![
        format!(
            "machine: {cores} cores of {}, {memory:.0} GB of memory, Linux {}, working directory on {}",
            field(&read("/proc/cpuinfo"), "model name"),
            read("/proc/sys/kernel/osrelease").trim(),
            filesystem(work_dir)?,
        ),
        format!(
            "begun {}, load average before: {}",
            String::from_utf8_lossy(&date.stdout).trim(),
            read("/proc/loadavg")
                .split(' ')
                .take(3)
                .collect::<Vec<_>>()
                .join(" ")
        ),
    ])
}

/// The kind of filesystem that `path` lies on.
pub fn filesystem(path: &Path) -> Result<String, BenchError> {
    let magic = rustix::fs::statfs(path)
        .map_err(|e| at(path)(e.into()))?
        .f_type;
    Ok(match magic {
        0xEF53 => "ext4".into(),
        0x5846_5342 => "xfs".into(),
        0x9123_683E => "btrfs".into(),
        0x0102_1994 => "tmpfs".into(),
        0x794C_7630 => "overlayfs".into(),
        other => format!("a filesystem with magic {other:#x}"),
    })
}

/// Writes everything back, then empties the page cache and the caches of names and inodes.
pub fn drop_caches() -> Result<(), BenchError> {
    rustix::fs::sync();
    let path = "/proc/sys/vm/drop_caches";
    fs::write(path, "3").map_err(io(format!("{path} (needs root)")))
}
