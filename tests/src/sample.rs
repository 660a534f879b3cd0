//! A made-up image with its truth at hand: what was packed into the layer is what must be read.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::image::{Compression, Layout};
use crate::tree::read_file;

/// A directory, and an image of it in an OCI layout under the tag `v1`.
#[derive(Debug)]
pub struct Sample {
    /// The truth.
    pub source: PathBuf,
    /// The image.
    pub layout: Layout,
    /// The files, relative to the root of either.
    pub files: Vec<PathBuf>,
}

impl Sample {
    /// Makes one in `dir`: small files, files of a few chunks, text and noise, about `megabytes` in all.
    /// The same seed makes the same files.
    pub fn new(dir: &Path, seed: u64, megabytes: usize) -> Self {
        let source = dir.join("source");
        fs::create_dir_all(source.join("small")).expect("a test may write to its own directory");
        fs::create_dir_all(source.join("large")).expect("a test may write to its own directory");
        let mut random = fastrand::Rng::with_seed(seed);
        let mut left = megabytes << 20;
        let mut files = Vec::new();
        while left > 0 {
            let number = files.len();
            // Every eighth file has several chunks.
            let (dir, most) = if number % 8 == 7 {
                ("large", 3 << 20)
            } else {
                ("small", 200 << 10)
            };
            let len = random.usize(1..most).min(left);
            let bytes = if number % 3 == 0 {
                text(&mut random, len)
            } else {
                noise(&mut random, len)
            };
            let name = PathBuf::from(format!("{dir}/{number:04}"));
            fs::write(source.join(&name), bytes).expect("a test may write to its own directory");
            files.push(name);
            left -= len;
        }
        let layout = Layout::create(dir.join("layout"));
        let layer = layout.add_layer(&source, Compression::Zstd);
        layout.add_image("v1", &[layer]);
        Self {
            source,
            layout,
            files,
        }
    }

    /// Reads every file of a mount; gives those that can't be read, with their error numbers. A file with
    /// wrong bytes is a panic: that must never be.
    #[track_caller]
    pub fn unreadable(&self, root: &Path) -> Vec<(PathBuf, i32)> {
        let read = |name: &PathBuf| {
            self.check(root, name)
                .err()
                .map(|errno| (name.clone(), errno))
        };
        self.files.iter().filter_map(read).collect()
    }

    /// Panics unless every file of a mount reads right.
    #[track_caller]
    pub fn assert_right(&self, root: &Path) {
        assert_eq!(
            self.unreadable(root),
            Vec::new(),
            "these files can't be read"
        );
    }

    /// Reads one file of a mount: an error number, or a panic if the bytes are wrong.
    #[track_caller]
    pub fn check(&self, root: &Path, name: &Path) -> Result<(), i32> {
        let truth = fs::read(self.source.join(name)).expect("the source is there");
        let read = read_file(&root.join(name))?;
        let first = truth.iter().zip(&read).position(|(a, b)| a != b);
        assert!(
            first.is_none(),
            "WRONG BYTES in {} at {}",
            name.display(),
            first.unwrap_or_default()
        );
        assert_eq!(
            truth.len(),
            read.len(),
            "{} has another length",
            name.display()
        );
        Ok(())
    }

    /// Reads a piece of a file at a random place and compares it: an error number, or a panic if it is wrong.
    #[track_caller]
    pub fn check_piece(&self, root: &Path, random: &mut fastrand::Rng) -> Result<(), i32> {
        let name = &self.files[random.usize(..self.files.len())];
        let number = |e: std::io::Error| e.raw_os_error().unwrap_or(-1);
        let truth = fs::File::open(self.source.join(name)).expect("the source is there");
        let file = fs::File::open(root.join(name)).map_err(number)?;
        let len = truth.metadata().expect("the source is there").len();
        let start = random.u64(..len);
        let mut wanted = vec![0; (len - start).min(random.u64(1..300_000)) as usize];
        truth
            .read_exact_at(&mut wanted, start)
            .expect("the source is there");
        let mut got = vec![0; wanted.len()];
        file.read_exact_at(&mut got, start).map_err(number)?;
        assert!(
            wanted == got,
            "WRONG BYTES in {} in {} bytes from {start}",
            name.display(),
            wanted.len()
        );
        Ok(())
    }
}

/// Bytes that no compressor makes smaller.
pub fn noise(random: &mut fastrand::Rng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    random.fill(&mut bytes);
    bytes
}

/// Words, as programs and their texts have them.
fn text(random: &mut fastrand::Rng, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 16);
    while bytes.len() < len {
        bytes.extend_from_slice(format!("word-{} ", random.u16(..)).as_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Drops a file's clean pages from the kernel's page cache, so that the next read asks the mount.
pub fn forget(path: &Path) {
    if let Ok(file) = fs::File::open(path) {
        // Advice may be ignored; then the test reads from memory and its counters tell.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    }
}
