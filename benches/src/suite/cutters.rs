//! Where chunks begin and end, measured: what an upgrade of real packages stores anew, and what a
//! start fetches, for several chunk lengths, with large files cut at fixed lengths or by FastCDC.
//!
//! Two versions of a set of Python packages are installed with pip, which needs the network; without
//! it the table is left out.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lazyimg_convergent::Digest;
use lazyimg_convergent::payload::{self, Encoder};

use crate::error::{BenchError, at, io};
use crate::process;
use crate::report::{Report, Table};
use crate::suite::Bench;

/// The packages before.
const OLD: &[&str] = &[
    "numpy==1.26.3",
    "scipy==1.11.3",
    "pandas==2.1.3",
    "django==4.2.10",
    "cryptography==42.0.4",
];

/// After a patch upgrade of all of them.
const PATCH: &[&str] = &[
    "numpy==1.26.4",
    "scipy==1.11.4",
    "pandas==2.1.4",
    "django==4.2.11",
    "cryptography==42.0.5",
];

/// After a minor upgrade of all of them.
const MINOR: &[&str] = &[
    "numpy==2.0.2",
    "scipy==1.13.1",
    "pandas==2.2.3",
    "django==5.1.4",
    "cryptography==43.0.3",
];

/// Prints the files of a tree that the start of a program reads.
const START: &str = "\
import sys, numpy, pandas, django.urls, django.http, django.template
print('\\n'.join(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)))";

/// Targets, in bytes.
const TARGETS: [usize; 4] = [128 << 10, 256 << 10, 512 << 10, 1 << 20];

/// How large files are cut.
#[derive(Debug, Clone, Copy)]
enum Large {
    /// Every target bytes from the file's start.
    Fixed,
    /// By content: FastCDC (Xia et al., USENIX ATC 2016), from a quarter of the target to twice.
    FastCdc,
}

/// Runs the bench.
pub fn run(bench: &Bench) -> Result<Report, BenchError> {
    if bench.quick {
        return Ok(Report::default());
    }
    let dir = bench.dir.join("packages");
    let install = |name: &str, packages| install(&dir.join(name), packages);
    let trees = (|| {
        Ok((
            install("old", OLD)?,
            install("patch", PATCH)?,
            install("minor", MINOR)?,
        ))
    })();
    let (old, patch, minor) = match trees {
        Ok(trees) => trees,
        Err(e) => {
            let e: BenchError = e;
            let why = e.to_string();
            let last = why.lines().last().unwrap_or_default();
            let facts = vec![format!(
                "table of cutters left out, pip can't install: {last}"
            )];
            return Ok(Report {
                facts,
                ..Report::default()
            });
        }
    };
    let start = start_files(&dir.join("old"))?;
    let start_bytes: usize = old
        .iter()
        .filter(|f| start.contains(&f.0))
        .map(|f| f.1.len())
        .sum();
    let mut sizes = Sizes::new()?;
    let mut rows = Vec::new();
    for target in TARGETS {
        for large in [Large::Fixed, Large::FastCdc] {
            let before = Cut::new(&old, target, large, &mut sizes);
            let [patch, minor] = [&patch, &minor].map(|t| Cut::new(t, target, large, &mut sizes));
            rows.push(vec![
                format!("{} KiB", target >> 10),
                format!("{large:?}"),
                before.chunks.len().to_string(),
                mb(before.stored()),
                patch.new_since(&before),
                minor.new_since(&before),
                mb(before.fetched(&start)),
            ]);
        }
    }
    fs::remove_dir_all(&dir).map_err(at(&dir))?;
    let bytes: usize = old.iter().map(|f| f.1.len()).sum();
    let columns = [
        "target",
        "large files",
        "chunks",
        "stored MB",
        "new after patch upgrade",
        "new after minor upgrade",
        "fetched by the imports, MB",
    ];
    let title = format!(
        "cutters: {}; {} files, {:.0} MB; importing numpy, pandas and django reads {} files with {:.1} MB",
        OLD.join(", "),
        old.len(),
        bytes as f64 / 1e6,
        start.len(),
        start_bytes as f64 / 1e6
    );
    let columns = columns.map(str::to_owned).to_vec();
    let tables = vec![Table {
        bench: "cutters",
        title,
        columns,
        rows,
    }];
    Ok(Report {
        tables,
        ..Report::default()
    })
}

/// A tree: paths and bytes of files, in the order of paths.
type Tree = Vec<(PathBuf, Vec<u8>)>;

fn install(dir: &Path, packages: &[&str]) -> Result<Tree, BenchError> {
    process::run(
        Command::new("pip")
            .args([
                "install",
                "--quiet",
                "--no-compile",
                "--only-binary",
                ":all:",
                "--target",
            ])
            .arg(dir)
            .args(packages),
    )?;
    let mut paths = Vec::new();
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(d) = dirs.pop() {
        for entry in fs::read_dir(&d).map_err(at(&d))? {
            let path = entry.map_err(at(&d))?.path();
            if path.is_dir() {
                dirs.push(path)
            } else {
                paths.push(path)
            }
        }
    }
    paths.sort();
    let relative = |p: &Path| p.strip_prefix(dir).unwrap_or(p).to_path_buf();
    paths
        .iter()
        .map(|p| Ok((relative(p), fs::read(p).map_err(at(p))?)))
        .collect()
}

fn start_files(dir: &Path) -> Result<HashSet<PathBuf>, BenchError> {
    let done = process::run(
        Command::new("python3")
            .args(["-B", "-c", START])
            .env("PYTHONPATH", dir),
    )?;
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    Ok(text
        .lines()
        .filter_map(|l| Path::new(l).strip_prefix(dir).ok())
        .map(Into::into)
        .collect())
}

/// Stored lengths of chunks, each compressed once.
struct Sizes {
    encoder: Encoder,
    known: HashMap<Digest, usize>,
}

impl Sizes {
    fn new() -> Result<Self, BenchError> {
        let encoder = Encoder::new(payload::DEFAULT_LEVEL).map_err(io("a zstd context"))?;
        Ok(Self {
            encoder,
            known: HashMap::new(),
        })
    }

    fn of(&mut self, plain: &[u8]) -> (Digest, usize) {
        let digest = Digest::of(plain);
        let encoder = &mut self.encoder;
        (
            digest,
            *self
                .known
                .entry(digest)
                .or_insert_with(|| encoder.encode(plain).len()),
        )
    }
}

/// A tree in chunks.
struct Cut {
    /// Stored length of each.
    chunks: HashMap<Digest, usize>,
    /// The chunks of each file.
    files: HashMap<PathBuf, Vec<Digest>>,
}

impl Cut {
    /// Cuts a tree as `image::layout` does, but with any target: files of at least `target` bytes on
    /// their own, smaller ones together until a hash of the last one's content says so.
    fn new(tree: &Tree, target: usize, large: Large, sizes: &mut Sizes) -> Self {
        let mut cut = Self {
            chunks: HashMap::new(),
            files: HashMap::new(),
        };
        let (mut pack, mut packed): (Vec<u8>, Vec<&PathBuf>) = Default::default();
        let mut known: HashMap<Digest, PathBuf> = HashMap::new();
        for (path, bytes) in tree {
            let digest = Digest::of(bytes);
            if bytes.is_empty() || known.contains_key(&digest) {
                continue;
            }
            known.insert(digest, path.clone());
            if bytes.len() >= target {
                for piece in pieces(bytes, target, large) {
                    cut.add(piece, &[path], sizes);
                }
                continue;
            }
            let padded = bytes.len().next_multiple_of(4096);
            if pack.len() + padded > 2 * target {
                cut.add(
                    &std::mem::take(&mut pack),
                    &std::mem::take(&mut packed),
                    sizes,
                );
            }
            pack.extend_from_slice(bytes);
            pack.resize(pack.len().next_multiple_of(4096), 0);
            packed.push(path);
            if ends(&digest, padded, pack.len(), target) {
                cut.add(
                    &std::mem::take(&mut pack),
                    &std::mem::take(&mut packed),
                    sizes,
                );
            }
        }
        if !pack.is_empty() {
            cut.add(&pack, &packed, sizes);
        }
        cut
    }

    fn add(&mut self, plain: &[u8], files: &[&PathBuf], sizes: &mut Sizes) {
        let (digest, len) = sizes.of(plain);
        self.chunks.insert(digest, len);
        for file in files {
            self.files.entry((*file).clone()).or_default().push(digest);
        }
    }

    fn stored(&self) -> usize {
        self.chunks.values().sum()
    }

    fn new_since(&self, before: &Self) -> String {
        let new = self
            .chunks
            .iter()
            .filter(|(id, _)| !before.chunks.contains_key(id));
        let new: usize = new.map(|(_, len)| len).sum();
        format!(
            "{} MB ({:.0} %)",
            mb(new),
            new as f64 * 100.0 / self.stored() as f64
        )
    }

    /// Stored length of all chunks that hold any part of these files.
    fn fetched(&self, files: &HashSet<PathBuf>) -> usize {
        let wanted: HashSet<_> = files
            .iter()
            .filter_map(|f| self.files.get(f))
            .flatten()
            .collect();
        wanted
            .into_iter()
            .filter_map(|id| self.chunks.get(id))
            .sum()
    }
}

/// The rule of `image::layout::PackCutter`, with any target.
fn ends(digest: &Digest, padded: usize, pack_len: usize, target: usize) -> bool {
    let least = target / 4;
    let mut head = [0; 8];
    head.copy_from_slice(&digest.0[..8]);
    pack_len >= least
        && u64::from_le_bytes(head)
            < (u64::MAX / (target - least) as u64).saturating_mul(padded as u64)
}

fn pieces(bytes: &[u8], target: usize, large: Large) -> Vec<&[u8]> {
    match large {
        Large::Fixed => bytes.chunks(target).collect(),
        Large::FastCdc => fastcdc::v2020::FastCDC::new(bytes, target / 4, target, target * 2)
            .map(|c| &bytes[c.offset..c.offset + c.length])
            .collect(),
    }
}

fn mb(bytes: usize) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}
