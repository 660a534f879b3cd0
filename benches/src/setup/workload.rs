//! The images that are measured, made of the host's files.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::error::{BenchError, at};
use crate::setup::corpus::Corpus;
use crate::setup::oci::{self, Blob, Compression};
use crate::setup::tarball::Tar;

/// Sizes of files that count as small, in bytes.
const SMALL: std::ops::RangeInclusive<u64> = 512..=60 << 10;

/// Files in a directory of `files40k`, `mixed`.
const FILES_PER_DIR: usize = 20;

/// Directories in a directory: 40,000 files lie in 2,000 directories, below 20 at the top.
const DIRS_PER_DIR: usize = 100;

/// A file in `files40k` that is larger than the others comes after so many.
const LARGER_EVERY: usize = 800;

/// Name of the large file of `mixed`.
pub const LARGE_FILE: &str = "data/large.bin";

/// Name of the large file of `mixed` that does not compress.
pub const NOISE_FILE: &str = "data/noise.bin";

/// How large everything is.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// Small files in `mixed`.
    pub mixed_files: usize,
    /// Length of the large files in `mixed`, in bytes.
    pub large_bytes: usize,
    /// Files' bytes in `big`; 0: `big` is left out.
    pub big_bytes: u64,
}

impl Scale {
    /// As docs/benchmarks.md reports it: kernel.md's data, and an image of 6 GB.
    pub const FULL: Self = Self {
        mixed_files: 50_000,
        large_bytes: 512 << 20,
        big_bytes: 6_000_000_000,
    };
    /// For a look after a change.
    pub const QUICK: Self = Self {
        mixed_files: 10_000,
        large_bytes: 128 << 20,
        big_bytes: 0,
    };
}

/// An image: its uncompressed layers, from which layouts are made on demand.
#[derive(Debug)]
pub struct Image {
    /// Its name.
    pub name: &'static str,
    dir: PathBuf,
    /// Uncompressed layers.
    pub tars: Vec<Blob>,
    /// Regular files.
    pub files: usize,
    /// Bytes in them.
    pub file_bytes: u64,
}

impl Image {
    /// Bytes of all uncompressed layers.
    pub fn tar_bytes(&self) -> u64 {
        self.tars.iter().map(|t| t.len).sum()
    }

    /// The OCI layout of this image with such layers; made when first asked for.
    pub fn layout(&self, with: Compression) -> Result<PathBuf, BenchError> {
        let layout = self.dir.join(with.name());
        if !layout.join("index.json").exists() {
            oci::write_image(&layout, &self.tars, with)?;
        }
        Ok(layout)
    }

    /// For the head of the report.
    pub fn fact(&self) -> String {
        format!(
            "{}: {} files with {:.0} MB in {} layers ({:.0} MB of tar)",
            self.name,
            self.files,
            self.file_bytes as f64 / 1e6,
            self.tars.len(),
            self.tar_bytes() as f64 / 1e6
        )
    }
}

/// Makes workloads when they are first asked for.
pub struct Workloads {
    dir: PathBuf,
    scale: Scale,
    /// What every workload is made of.
    pub corpus: Corpus,
    files40k: OnceLock<Image>,
    mixed: OnceLock<Image>,
    big: OnceLock<Image>,
}

impl Workloads {
    /// Workloads below `dir`.
    pub fn new(dir: PathBuf, scale: Scale) -> Result<Self, BenchError> {
        let corpus = Corpus::find()?;
        let (files40k, mixed, big) = Default::default();
        Ok(Self {
            dir,
            scale,
            corpus,
            files40k,
            mixed,
            big,
        })
    }

    /// 40,000 files in 2,000 directories.
    pub fn files40k(&self) -> Result<&Image, BenchError> {
        cached(&self.files40k, || {
            self.build("files40k", 1, |_, tree| {
                tree.small(&self.corpus, 40_000 - 40_000 / LARGER_EVERY)?;
                let larger = self.corpus.files(200 << 10, 2 << 20);
                for (n, body) in larger.take(40_000 / LARGER_EVERY).enumerate() {
                    tree.file(&format!("t{:02}/larger{n:02}", n % 20), &body?)?;
                }
                Ok(())
            })
        })
    }

    /// kernel.md's data: small files and one large one; and one more that does not compress.
    pub fn mixed(&self) -> Result<&Image, BenchError> {
        cached(&self.mixed, || {
            self.build("mixed", 1, |_, tree| {
                tree.small(&self.corpus, self.scale.mixed_files)?;
                tree.dir("data")?;
                tree.file(
                    LARGE_FILE,
                    &self.corpus.large_bytes(self.scale.large_bytes)?,
                )?;
                tree.file(NOISE_FILE, &noise(self.scale.large_bytes))
            })
        })
    }

    /// 6 GB in four layers of all of the host's files; `None` in quick runs.
    pub fn big(&self) -> Result<Option<&Image>, BenchError> {
        const LAYERS: u64 = 4;
        if self.scale.big_bytes == 0 {
            return Ok(None);
        }
        let mut files = self.corpus.files(1, u64::MAX);
        let image = cached(&self.big, || {
            self.build("big", LAYERS as usize, |layer, tree| {
                let (mut n, mut bytes) = (0, 0);
                for body in files.by_ref() {
                    let body = body?;
                    if n % 30 == 0 {
                        tree.dir(&format!("l{layer}/d{:04}", n / 30))?;
                    }
                    tree.file(&format!("l{layer}/d{:04}/f{:02}", n / 30, n % 30), &body)?;
                    n += 1;
                    bytes += body.len() as u64;
                    if bytes >= self.scale.big_bytes / LAYERS {
                        break;
                    }
                }
                Ok(())
            })
        })?;
        Ok(Some(image))
    }

    fn build(
        &self,
        name: &'static str,
        layers: usize,
        mut fill: impl FnMut(usize, &mut Tree<'_>) -> Result<(), BenchError>,
    ) -> Result<Image, BenchError> {
        let dir = self.dir.join(name);
        let plain = dir.join(Compression::Plain.name());
        let mut image = Image {
            name,
            dir,
            tars: Vec::new(),
            files: 0,
            file_bytes: 0,
        };
        for layer in 0..layers {
            let blob = oci::write_blob(&plain, |out| {
                let mut tree = Tree {
                    tar: Tar::new(out),
                    at: plain.clone(),
                    files: 0,
                    bytes: 0,
                };
                fill(layer, &mut tree)?;
                image.files += tree.files;
                image.file_bytes += tree.bytes;
                tree.tar.finish().map(drop).map_err(at(&plain))
            })?;
            image.tars.push(blob);
        }
        Ok(image)
    }
}

fn cached<T>(
    cell: &OnceLock<T>,
    make: impl FnOnce() -> Result<T, BenchError>,
) -> Result<&T, BenchError> {
    if let Some(value) = cell.get() {
        return Ok(value);
    }
    let value = make()?;
    Ok(cell.get_or_init(|| value))
}

struct Tree<'a> {
    tar: Tar<&'a mut dyn std::io::Write>,
    at: PathBuf,
    files: usize,
    bytes: u64,
}

impl Tree<'_> {
    fn small(&mut self, corpus: &Corpus, count: usize) -> Result<(), BenchError> {
        let bodies = corpus.files(*SMALL.start(), *SMALL.end());
        for (n, body) in bodies.take(count).enumerate() {
            let dir = n / FILES_PER_DIR;
            let (top, name) = (dir / DIRS_PER_DIR, dir % DIRS_PER_DIR);
            if n % (FILES_PER_DIR * DIRS_PER_DIR) == 0 {
                self.dir(&format!("t{top:02}"))?;
            }
            if n % FILES_PER_DIR == 0 {
                self.dir(&format!("t{top:02}/mod{name:02}"))?;
            }
            self.file(
                &format!("t{top:02}/mod{name:02}/file{:02}", n % FILES_PER_DIR),
                &body?,
            )?;
        }
        Ok(())
    }

    fn dir(&mut self, name: &str) -> Result<(), BenchError> {
        self.tar.dir(name).map_err(at(&self.at))
    }

    fn file(&mut self, name: &str, body: &[u8]) -> Result<(), BenchError> {
        self.files += 1;
        self.bytes += body.len() as u64;
        self.tar.file(name, body).map_err(at(&self.at))
    }
}

/// Bytes that do not compress: xorshift64* (Vigna, "An experimental exploration of Marsaglia's
/// xorshift generators, scrambled", 2016), the same each time.
pub fn noise(len: usize) -> Vec<u8> {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend_from_slice(&random.draw().to_le_bytes());
    }
    out.truncate(len);
    out
}

/// xorshift64*; never seeded with 0.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

/// Bytes free on the filesystem of `path`.
pub fn free_bytes(path: &Path) -> Result<u64, BenchError> {
    let stat = rustix::fs::statvfs(path).map_err(|e| at(path)(e.into()))?;
    Ok(stat.f_bavail * stat.f_frsize)
}
