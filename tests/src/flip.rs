//! Damage: one bit, in place, and back.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A flipped bit; [`Flipped::restore`] flips it back.
#[derive(Debug)]
pub struct Flipped {
    file: PathBuf,
    offset: u64,
    bit: u8,
}

/// Flips one bit of `file` in place, as a failing disk does: same length, same inode.
pub fn bit(file: &Path, offset: u64, bit: u8) -> Flipped {
    toggle(file, offset, bit);
    Flipped {
        file: file.to_owned(),
        offset,
        bit,
    }
}

impl Flipped {
    /// Makes it good again.
    pub fn restore(self) {
        toggle(&self.file, self.offset, self.bit);
    }
}

impl std::fmt::Display for Flipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "bit {} of byte {} of {}",
            self.bit,
            self.offset,
            self.file.display()
        )
    }
}

fn toggle(path: &Path, offset: u64, bit: u8) {
    let told = |e: std::io::Error| -> File { panic!("{} at {offset}: {e}", path.display()) };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap_or_else(told);
    let mut byte = [0];
    let done = file.read_exact_at(&mut byte, offset).and_then(|()| {
        byte[0] ^= 1 << (bit % 8);
        file.write_all_at(&byte, offset)
    });
    done.unwrap_or_else(|e| panic!("{} at {offset}: {e}", path.display()));
}

/// All regular files at or below `dir`, in the order of their names.
pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        // A file or directory of a live cache may be gone by now.
        let Ok(entries) = std::fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries.flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => open.push(entry.path()),
                Ok(kind) if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files.sort();
    files
}
