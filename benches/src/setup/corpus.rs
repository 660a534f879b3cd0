//! Realistic content: the files below the host's /usr.
//!
//! Where the host has less than a workload asks for, the files are taken again with all bytes
//! XORed with the number of the pass: other bytes, as compressible as before.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{BenchError, at};

/// Where content comes from; what is missing is left out.
const ROOTS: [&str; 4] = ["/usr/lib", "/usr/share", "/usr/bin", "/usr/include"];

/// Not taken: already compressed, of which images hold little.
const COMPRESSED: [&str; 14] = [
    "gz", "xz", "bz2", "zst", "zip", "whl", "jar", "png", "jpg", "gif", "woff", "woff2", "pdf",
    "pyc",
];

/// Not taken, in bytes (512 MiB): one odd file must not decide a workload.
const LARGEST: u64 = 512 << 20;

/// The host's files, in the order of their paths.
#[derive(Debug)]
pub struct Corpus {
    files: Vec<(PathBuf, u64)>,
}

impl Corpus {
    /// Finds the files.
    pub fn find() -> Result<Self, BenchError> {
        let mut files = Vec::new();
        for root in ROOTS.map(Path::new) {
            if root.is_dir() {
                walk(root, &mut files)?;
            }
        }
        if files.len() < 1000 {
            return Err(BenchError::Setup("fewer than 1000 files below /usr".into()));
        }
        Ok(Self { files })
    }

    /// Files of `least..=most` bytes, again and again with other bytes.
    pub fn files(
        &self,
        least: u64,
        most: u64,
    ) -> impl Iterator<Item = Result<Vec<u8>, BenchError>> {
        let fitting: Vec<&PathBuf> = self
            .files
            .iter()
            .filter(|f| (least..=most).contains(&f.1))
            .map(|f| &f.0)
            .collect();
        (0u8..=255).flat_map(move |pass| {
            fitting.clone().into_iter().map(move |path| {
                let mut bytes = fs::read(path).map_err(at(path))?;
                if pass > 0 {
                    bytes.iter_mut().for_each(|b| *b ^= pass);
                }
                Ok(bytes)
            })
        })
    }

    /// `count` pieces of `len` bytes at equal distances through all files, laid end to end: a fair
    /// sample of their bytes, small files and large.
    pub fn sample(&self, len: usize, count: usize) -> Result<Vec<u8>, BenchError> {
        let total: u64 = self.files.iter().map(|f| f.1).sum();
        let distance = (total / count as u64).max(1);
        let (mut out, mut start, mut next) = (Vec::with_capacity(len * count), 0, 0);
        for (path, size) in &self.files {
            let end = start + size;
            while out.len() % len != 0 || (next < end && out.len() < len * count) {
                let from = if out.len() % len == 0 {
                    next - start
                } else {
                    0
                };
                let bytes = fs::read(path).map_err(at(path))?;
                let from = bytes.len().min(from as usize);
                let taken = (bytes.len() - from).min(len - out.len() % len);
                out.extend_from_slice(&bytes[from..from + taken]);
                if out.len() % len != 0 {
                    break;
                }
                next += distance;
            }
            start = end;
        }
        out.truncate(out.len() / len * len);
        Ok(out)
    }

    /// `len` bytes out of large files, one after another.
    pub fn large_bytes(&self, len: usize) -> Result<Vec<u8>, BenchError> {
        let mut out = Vec::with_capacity(len);
        for file in self.files(1 << 20, LARGEST) {
            let file = file?;
            out.extend_from_slice(&file[..file.len().min(len - out.len())]);
            if out.len() == len {
                return Ok(out);
            }
        }
        Err(BenchError::Setup("no file of 1 MiB below /usr".into()))
    }
}

fn walk(root: &Path, out: &mut Vec<(PathBuf, u64)>) -> Result<(), BenchError> {
    let mut dirs = VecDeque::from([root.to_path_buf()]);
    while let Some(dir) = dirs.pop_front() {
        let mut entries = fs::read_dir(&dir)
            .and_then(|entries| entries.collect::<Result<Vec<_>, _>>())
            .map_err(at(&dir))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            // A package manager may be at work: what vanished meanwhile is left out.
            let Ok(meta) = entry.metadata() else { continue };
            let packed = path
                .extension()
                .is_some_and(|e| COMPRESSED.iter().any(|c| e == *c));
            if meta.is_dir() {
                dirs.push_back(path);
            } else if meta.is_file() && !packed && meta.nlink() == 1 && meta.len() <= LARGEST {
                out.push((path, meta.len()));
            }
        }
    }
    Ok(())
}
