//! Two trees, compared in everything that a file system can say about them.

mod snapshot;

use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

pub use snapshot::{Entry, Tree, read_file, snapshot};

/// The properties that are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Field {
    Kind,
    Mode,
    Uid,
    Gid,
    Mtime,
    Nlink,
    /// Which names are one inode.
    Links,
    Size,
    Rdev,
    Target,
    Xattrs,
    Content,
}

/// Differences that are told; a broken tree has many thousands.
const MAX_TOLD: usize = 60;

/// Exceptions of a comparison: whether a field of a path is *not* compared. Each use must say why.
pub type Except<'a> = &'a dyn Fn(&[u8], Field) -> bool;

/// No exceptions.
pub fn nothing(_: &[u8], _: Field) -> bool {
    false
}

/// Panics with a readable list unless the trees are equal, but for `except`.
#[track_caller]
pub fn assert_same(what: &str, left: (&str, &Tree), right: (&str, &Tree), except: Except<'_>) {
    let differences = diff(left, right, except);
    if differences.is_empty() {
        return;
    }
    let mut text = format!("{what}: {} differences\n", differences.len());
    for line in differences.iter().take(MAX_TOLD) {
        let _ = writeln!(text, "  {line}");
    }
    if differences.len() > MAX_TOLD {
        text.push_str("  …\n");
    }
    panic!("{text}");
}

/// Snapshots two directories and asserts that they are equal, but for `except`.
#[track_caller]
pub fn assert_same_dirs(what: &str, left: &Path, right: &Path, except: Except<'_>) {
    let (a, b) = (snapshot(left), snapshot(right));
    assert_same(
        what,
        (&left.to_string_lossy(), &a),
        (&right.to_string_lossy(), &b),
        except,
    );
}

/// The differences, one line each.
pub fn diff(left: (&str, &Tree), right: (&str, &Tree), except: Except<'_>) -> Vec<String> {
    let mut lines = Vec::new();
    for (path, a) in left.1 {
        match right.1.get(path) {
            None => lines.push(format!("{}: only in {}", show(path), left.0)),
            Some(b) => fields(path, (left.0, a), (right.0, b), except, &mut lines),
        }
    }
    let extra = right.1.keys().filter(|path| !left.1.contains_key(*path));
    lines.extend(extra.map(|path| format!("{}: only in {}", show(path), right.0)));
    lines
}

fn fields(
    path: &[u8],
    left: (&str, &Entry),
    right: (&str, &Entry),
    except: Except<'_>,
    lines: &mut Vec<String>,
) {
    let (a, b) = (left.1, right.1);
    let mut check = |field: Field, same: bool, values: &dyn Fn(&Entry) -> String| {
        if !same && !except(path, field) {
            let (a, b) = (values(a), values(b));
            lines.push(format!(
                "{}: {field:?}: {} has {a}, {} has {b}",
                show(path),
                left.0,
                right.0
            ));
        }
    };
    check(Field::Kind, a.kind == b.kind, &|e| e.kind.to_string());
    check(Field::Mode, a.mode == b.mode, &|e| {
        format!("{:04o}", e.mode)
    });
    check(Field::Uid, a.uid == b.uid, &|e| e.uid.to_string());
    check(Field::Gid, a.gid == b.gid, &|e| e.gid.to_string());
    check(Field::Mtime, a.mtime == b.mtime, &|e| {
        format!("{}.{:09}", e.mtime.0, e.mtime.1)
    });
    check(Field::Nlink, a.nlink == b.nlink, &|e| e.nlink.to_string());
    check(Field::Links, a.first_name == b.first_name, &|e| {
        show(&e.first_name)
    });
    check(Field::Size, a.size == b.size, &|e| e.size.to_string());
    check(Field::Rdev, a.rdev == b.rdev, &|e| {
        format!("{}:{}", e.rdev.0, e.rdev.1)
    });
    check(Field::Target, a.target == b.target, &|e| show(&e.target));
    check(Field::Xattrs, a.xattrs == b.xattrs, &|e| {
        let pairs = e
            .xattrs
            .iter()
            .map(|(name, value)| format!("{}={}", show(name), show(value)));
        format!("{{{}}}", pairs.collect::<Vec<_>>().join(", "))
    });
    check(
        Field::Content,
        a.content == b.content,
        &|e| match &e.content {
            Ok(hash) => format!("bytes with hash {}…", &hash.to_hex()[..12]),
            Err(error) => error.clone(),
        },
    );
}

/// Any bytes, readable and in one line.
pub fn show(bytes: &[u8]) -> String {
    let text = bytes.escape_ascii().to_string();
    match text.char_indices().nth(160) {
        Some((cut, _)) => format!("{}… ({} bytes)", &text[..cut], bytes.len()),
        None => text,
    }
}

/// Panics unless inode numbers make sense: what a directory lists is what `stat` says, `.` and `..`
/// included; one number is one inode.
#[track_caller]
pub fn assert_inodes(root: &Path) {
    use std::os::unix::fs::MetadataExt;
    let ino = |path: &Path| {
        let meta = std::fs::symlink_metadata(path);
        meta.unwrap_or_else(|e| panic!("stat {}: {e}", path.display()))
            .ino()
    };
    let mut seen = std::collections::HashMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(dir) = open.pop() {
        let told = |e: rustix::io::Errno| -> ! { panic!("reading {}: {e}", dir.display()) };
        let file = std::fs::File::open(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let mut dots = 0;
        for entry in rustix::fs::Dir::read_from(&file).unwrap_or_else(|e| told(e)) {
            let entry = entry.unwrap_or_else(|e| told(e));
            let name = std::ffi::OsStr::from_bytes(entry.file_name().to_bytes());
            let path = dir.join(name);
            if name == ".." && dir == root {
                // What the kernel puts over a mount's root is not the file system's own.
                dots += 1;
                continue;
            }
            assert_eq!(
                entry.ino(),
                ino(&path),
                "d_ino and st_ino of {}",
                path.display()
            );
            if name == "." || name == ".." {
                dots += 1;
                continue;
            }
            let meta = std::fs::symlink_metadata(&path)
                .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let first = seen
                .entry(meta.ino())
                .or_insert_with(|| (path.clone(), 0, meta.nlink()));
            first.1 += 1;
            if meta.is_dir() {
                assert_eq!(
                    first.0,
                    path,
                    "two directories have the inode number {}",
                    meta.ino()
                );
                open.push(path);
            }
        }
        assert_eq!(dots, 2, "{} lists . and ..", dir.display());
    }
    for (number, (path, names, nlink)) in seen {
        let is_dir = path.symlink_metadata().is_ok_and(|m| m.is_dir());
        assert!(
            is_dir || names == nlink,
            "{}: {nlink} links but {names} names of inode {number}",
            path.display()
        );
    }
}
