//! Directories of the host, described in the words of `Tree::describe`; and commands.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use super::Blocks;

/// Root is needed to make devices and owners, and to read every attribute.
pub fn require_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test makes devices and owners: run it as root"
    );
}

/// Runs a command; panics with its output when it fails.
pub fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|e| {
        panic!("{command:?} can't be started ({e}); scripts/install-deps installs it")
    });
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// One line for each name below `root`, the root first.
pub fn describe(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut seen = BTreeMap::new();
    visit(root, b"", &mut seen, &mut lines);
    lines
}

fn visit(root: &Path, path: &[u8], seen: &mut BTreeMap<u64, String>, lines: &mut Vec<String>) {
    let full = root.join(OsStr::from_bytes(path));
    let meta = fs::symlink_metadata(&full).unwrap();
    let kind = meta.file_type();
    let rdev = || {
        let dev = meta.rdev();
        format!("{}:{}", rustix::fs::major(dev), rustix::fs::minor(dev))
    };
    let shown = path.escape_ascii().to_string();
    let what = if kind.is_dir() {
        "dir".to_owned()
    } else if kind.is_file() {
        let digest = if meta.len() == 0 {
            String::new()
        } else {
            digest(&full, meta.len())
        };
        format!("file {} {digest}", meta.len())
    } else if kind.is_symlink() {
        let target = fs::read_link(&full).unwrap();
        format!("symlink {}", target.as_os_str().as_bytes().escape_ascii())
    } else if kind.is_char_device() {
        format!("char {}", rdev())
    } else if kind.is_block_device() {
        format!("block {}", rdev())
    } else if kind.is_fifo() {
        "fifo".to_owned()
    } else {
        "socket".to_owned()
    };
    let mut line = format!(
        "/{shown} {:04o} {}:{} {}.{:09} nlink={} {what}",
        meta.mode() & 0o7777,
        meta.uid(),
        meta.gid(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.nlink(),
    );
    for (name, value) in xattrs(&full) {
        line += &format!(" {}={}", name.escape_ascii(), value.escape_ascii());
    }
    if !kind.is_dir() && meta.nlink() > 1 {
        let first = seen.entry(meta.ino()).or_insert(shown);
        line += &format!(" same-as=/{first}");
    }
    lines.push(line);
    if kind.is_dir() {
        let mut names: Vec<_> = fs::read_dir(&full)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
        for name in names {
            let below = if path.is_empty() {
                name.as_bytes().to_vec()
            } else {
                [path, b"/", name.as_bytes()].concat()
            };
            visit(root, &below, seen, lines);
        }
    }
}

fn digest(path: &Path, size: u64) -> String {
    let file = File::open(path).unwrap();
    let mut blocks = Blocks::default();
    let mut at = 0;
    let mut buffer = vec![0; 1 << 20];
    while at < size {
        // Holes of many GiB are not read.
        at = match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
            Ok(at) => at,
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => panic!("{path:?}: {e}"),
        };
        let len = file.read_at(&mut buffer, at).unwrap();
        blocks.data(at, &buffer[..len]);
        at += len as u64;
    }
    blocks.finish()
}

fn xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut names = vec![0; 1 << 16];
    let len = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let mut out: Vec<_> = names[..len]
        .split(|&b| b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 1 << 16];
            let len = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).unwrap();
            value.truncate(len);
            (name.to_vec(), value)
        })
        .collect();
    out.sort();
    out
}

/// Sets an attribute, also on a symbolic link.
pub fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
}

/// Sets the modification time, also of a symbolic link.
pub fn set_mtime(path: &Path, sec: i64, nsec: u32) {
    let time = rustix::fs::Timespec {
        tv_sec: sec,
        tv_nsec: nsec.into(),
    };
    let times = rustix::fs::Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(
        rustix::fs::CWD,
        path,
        &times,
        rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
    )
    .unwrap();
}

/// Takes the time out of the lines for which `of` says so (it gets path and rest).
pub fn without_time(lines: &[String], of: impl Fn(&str, &str) -> bool) -> Vec<String> {
    lines
        .iter()
        .map(|line| {
            let mut fields: Vec<&str> = line.split(' ').collect();
            if of(fields[0], line) {
                fields[3] = "-";
            }
            fields.join(" ")
        })
        .collect()
}
