//! The loops that are timed: the same code on both trees, in this process.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::error::{BenchError, at};
use crate::setup::workload::Random;

/// Length of one sequential read, in bytes: what cat and cp use.
const SEQUENTIAL: usize = 128 << 10;

/// What a loop saw: two trees that are equal give the same.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Names, or reads.
    pub count: u64,
    /// A sum over sizes, or bytes.
    pub sum: u64,
}

/// Runs a loop: seconds and what it saw.
pub fn timed(f: impl FnOnce() -> Result<Seen, BenchError>) -> Result<(f64, Seen), BenchError> {
    let started = Instant::now();
    let seen = f()?;
    Ok((started.elapsed().as_secs_f64(), seen))
}

/// `find | stat`: every name below `root`, each with its own lstat.
pub fn find_stat(root: &Path) -> Result<Seen, BenchError> {
    let mut seen = Seen::default();
    each(root, &mut |path, _| {
        let meta = fs::symlink_metadata(path)?;
        seen.count += 1;
        // A directory's size is its filesystem's own affair.
        seen.sum += u64::from(meta.mode()) + if meta.is_dir() { 0 } else { meta.len() };
        Ok(())
    })?;
    Ok(seen)
}

/// Every name below `root`, without stat.
pub fn walk(root: &Path) -> Result<Seen, BenchError> {
    let mut seen = Seen::default();
    each(root, &mut |_, kind| {
        seen.count += 1;
        seen.sum += u64::from(kind.is_file());
        Ok(())
    })?;
    Ok(seen)
}

/// Every file below `root` that `skip` does not name: opened, read to its end, closed.
pub fn read_files(root: &Path, skip: &[PathBuf]) -> Result<Seen, BenchError> {
    let (mut seen, mut buf) = (Seen::default(), vec![0; SEQUENTIAL]);
    each(root, &mut |path, kind| {
        if kind.is_file() && !skip.iter().any(|s| s == path) {
            seen.count += 1;
            seen.sum = seen
                .sum
                .wrapping_add(drain(&mut File::open(path)?, &mut buf)?);
        }
        Ok(())
    })?;
    Ok(seen)
}

/// One file from its start to its end.
pub fn read_sequentially(path: &Path) -> Result<Seen, BenchError> {
    let mut buf = vec![0; SEQUENTIAL];
    let sum = File::open(path)
        .and_then(|mut f| drain(&mut f, &mut buf))
        .map_err(at(path))?;
    Ok(Seen { count: 1, sum })
}

/// `count` reads of `len` bytes at random multiples of `len`.
pub fn read_randomly(path: &Path, len: usize, count: u64, seed: u64) -> Result<Seen, BenchError> {
    let mut random = Random(seed | 1);
    let mut seen = Seen::default();
    let mut read = || {
        let file = File::open(path)?;
        let places = file.metadata()?.len() / len as u64;
        let mut buf = vec![0; len];
        for _ in 0..count {
            file.read_exact_at(&mut buf, random.draw() % places * len as u64)?;
            seen.count += 1;
            seen.sum = seen.sum.wrapping_add(sample(&buf));
        }
        Ok(())
    };
    read().map_err(at(path))?;
    Ok(seen)
}

fn drain(file: &mut File, buf: &mut [u8]) -> io::Result<u64> {
    let mut sum = 0u64;
    loop {
        match file.read(buf)? {
            0 => return Ok(sum),
            n => sum = sum.wrapping_add(n as u64).wrapping_add(sample(&buf[..n])),
        }
    }
}

/// A few of the bytes, so that wrong content is noticed without costing what is measured.
fn sample(bytes: &[u8]) -> u64 {
    bytes.iter().step_by(509).map(|b| u64::from(*b)).sum()
}

fn each(
    root: &Path,
    f: &mut dyn FnMut(&Path, fs::FileType) -> io::Result<()>,
) -> Result<(), BenchError> {
    let mut dirs = vec![root.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        let names = fs::read_dir(&dir).map_err(at(&dir))?;
        for entry in names {
            let entry = entry.map_err(at(&dir))?;
            let (path, kind) = (entry.path(), entry.file_type().map_err(at(&dir))?);
            f(&path, kind).map_err(at(&path))?;
            if kind.is_dir() {
                dirs.push(path);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_trees_are_seen_alike_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let tree = |name: &str, byte: u8| {
            let root = dir.path().join(name);
            fs::create_dir_all(root.join("d")).unwrap();
            fs::write(root.join("d/f"), [byte; 3000]).unwrap();
            root
        };
        let (a, b, c) = (tree("a", 1), tree("b", 1), tree("c", 2));
        let read = |p: &Path| read_files(p, &[]).unwrap();
        assert_eq!(find_stat(&a).unwrap(), find_stat(&b).unwrap());
        assert_eq!(walk(&a).unwrap(), Seen { count: 2, sum: 1 });
        assert_eq!(read(&a), read(&b));
        assert_ne!(read(&a), read(&c));
        let random = |p: &Path| read_randomly(&p.join("d/f"), 512, 9, 7).unwrap();
        assert_eq!(random(&a), random(&b));
        assert_eq!(random(&a).count, 9);
    }
}
