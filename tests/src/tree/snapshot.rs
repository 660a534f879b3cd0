//! Everything that a directory tree says about itself.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::SeekFrom;

/// Paths from the root (which is empty) to what lies there.
pub type Tree = BTreeMap<Vec<u8>, Entry>;

/// What a path is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// `d`, `f`, `l`, `c`, `b`, `p` or `s`.
    pub kind: char,
    /// The lower 12 bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Link count.
    pub nlink: u64,
    /// The first of the names, in byte order, that are this inode; directories have their own.
    pub first_name: Vec<u8>,
    /// Bytes of a file, 0 for what has none (file systems differ in what a directory's size is).
    pub size: u64,
    /// Major and minor number of a device.
    pub rdev: (u32, u32),
    /// Where a symbolic link points.
    pub target: Vec<u8>,
    /// All extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Hash of a file's bytes, or why it can't be read. Holes and zeros are the same.
    pub content: Result<blake3::Hash, String>,
}

/// Snapshots the tree below `root`, reading every byte.
#[track_caller]
pub fn snapshot(root: &Path) -> Tree {
    let mut found = Vec::new();
    walk(root, Vec::new(), &mut found);
    found.sort();
    let mut tree = Tree::new();
    let mut first_names: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    for path in found {
        let mut entry = describe(&below(root, &path));
        let meta = stat(&below(root, &path));
        entry.first_name = match entry.kind {
            'd' => path.clone(),
            _ => first_names
                .entry((meta.dev(), meta.ino()))
                .or_insert_with(|| path.clone())
                .clone(),
        };
        tree.insert(path, entry);
    }
    read_contents(root, &mut tree);
    tree
}

fn below(root: &Path, path: &[u8]) -> PathBuf {
    if path.is_empty() {
        root.to_owned()
    } else {
        root.join(OsStr::from_bytes(path))
    }
}

fn stat(path: &Path) -> Metadata {
    fs::symlink_metadata(path).unwrap_or_else(|e| panic!("stat {}: {e}", path.display()))
}

fn walk(root: &Path, path: Vec<u8>, found: &mut Vec<Vec<u8>>) {
    let dir = below(root, &path);
    let is_dir = stat(&dir).is_dir();
    found.push(path.clone());
    if !is_dir {
        return;
    }
    let entries = fs::read_dir(&dir).unwrap_or_else(|e| panic!("reading {}: {e}", dir.display()));
    for entry in entries {
        let entry = entry.unwrap_or_else(|e| panic!("reading {}: {e}", dir.display()));
        let mut child = path.clone();
        if !child.is_empty() {
            child.push(b'/');
        }
        child.extend_from_slice(entry.file_name().as_bytes());
        walk(root, child, found);
    }
}

fn describe(path: &Path) -> Entry {
    let meta = stat(path);
    let kind = match meta.mode() & 0o170_000 {
        0o040_000 => 'd',
        0o100_000 => 'f',
        0o120_000 => 'l',
        0o020_000 => 'c',
        0o060_000 => 'b',
        0o010_000 => 'p',
        0o140_000 => 's',
        other => panic!("{}: unknown type {other:o}", path.display()),
    };
    let target = match kind {
        'l' => fs::read_link(path)
            .unwrap_or_else(|e| panic!("readlink {}: {e}", path.display()))
            .into_os_string()
            .into_vec(),
        _ => Vec::new(),
    };
    let rdev = match kind {
        'c' | 'b' => (
            rustix::fs::major(meta.rdev()),
            rustix::fs::minor(meta.rdev()),
        ),
        _ => (0, 0),
    };
    Entry {
        kind,
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        nlink: meta.nlink(),
        first_name: Vec::new(),
        size: match kind {
            'f' | 'l' => meta.size(),
            _ => 0,
        },
        rdev,
        target,
        xattrs: xattrs(path),
        content: Ok(blake3::Hash::from_bytes([0; 32])),
    }
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    // The kernel lets no list and no value be larger than 64 KiB.
    let mut list = vec![0; 1 << 16];
    let len = match rustix::fs::llistxattr(path, &mut list[..]) {
        Ok(len) => len,
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => 0,
        Err(error) => panic!("listxattr {}: {error}", path.display()),
    };
    let names = list[..len]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty());
    names
        .map(|name| (name.to_vec(), xattr(path, name)))
        .collect()
}

fn xattr(path: &Path, name: &[u8]) -> Vec<u8> {
    let mut value = vec![0; 1 << 16];
    match rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]) {
        Ok(len) => value.truncate(len),
        Err(error) => panic!("getxattr {} {}: {error}", path.display(), super::show(name)),
    }
    value
}

/// Hashes the files' bytes, each inode once, on two threads.
fn read_contents(root: &Path, tree: &mut Tree) {
    let is_first =
        |(path, entry): &(&Vec<u8>, &Entry)| entry.kind == 'f' && **path == entry.first_name;
    let files: Vec<Vec<u8>> = tree
        .iter()
        .filter(is_first)
        .map(|(path, _)| path.clone())
        .collect();
    let (next, hashes) = (AtomicUsize::new(0), Mutex::new(HashMap::new()));
    let work = || {
        let mut buffer = vec![0; BUFFER];
        while let Some(path) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            let hash = hash_file(&below(root, path), &mut buffer).map_err(|e| e.to_string());
            hashes
                .lock()
                .expect("no hasher panics")
                .insert(path.clone(), hash);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
    let hashes = hashes.into_inner().expect("no hasher panics");
    for entry in tree.values_mut().filter(|e| e.kind == 'f') {
        entry.content = hashes[&entry.first_name].clone();
    }
}

/// Bytes that are read at once.
const BUFFER: usize = 1 << 20;

/// Zeros are left out of the hash in blocks of this many bytes, so that a hole needs no reading and equals
/// zeros that are stored.
const BLOCK: usize = 64 << 10;

static ZEROS: [u8; BLOCK] = [0; BLOCK];

fn hash_file(path: &Path, buffer: &mut [u8]) -> std::io::Result<blake3::Hash> {
    let file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut at = next_data(&file, 0)?;
    let mut end = 0;
    while let Some(start) = at {
        let start = start / BLOCK as u64 * BLOCK as u64;
        let len = read_at(&file, start, buffer)?;
        for (i, block) in buffer[..len].chunks(BLOCK).enumerate() {
            if *block != ZEROS[..block.len()] {
                hasher.update(&(start + (i * BLOCK) as u64).to_le_bytes());
                hasher.update(block);
            }
        }
        end = end.max(start + len as u64);
        at = if len < buffer.len() {
            None
        } else {
            next_data(&file, end)?
        };
    }
    // `end` shows files whose bytes end before their size says.
    let size = file.metadata()?.len();
    if end > size {
        return Err(std::io::Error::other(format!(
            "{end} bytes can be read, but its size is {size}"
        )));
    }
    Ok(hasher.finalize())
}

/// Where data is at or after `from`; none after the last.
fn next_data(file: &File, from: u64) -> std::io::Result<Option<u64>> {
    match rustix::fs::seek(file.as_fd(), SeekFrom::Data(from)) {
        Ok(at) => Ok(Some(at)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn read_at(file: &File, offset: u64, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read_at(&mut buffer[len..], offset + len as u64)? {
            0 => break,
            n => len += n,
        }
    }
    Ok(len)
}

/// A file's bytes, read with plain `read` calls, or the error number.
pub fn read_file(path: &Path) -> Result<Vec<u8>, i32> {
    let number = |e: std::io::Error| e.raw_os_error().unwrap_or(-1);
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|mut f| f.read_to_end(&mut bytes))
        .map_err(number)?;
    Ok(bytes)
}
