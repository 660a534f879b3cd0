//! Searching files for runs of planted bytes, at every offset.

use std::collections::HashSet;
use std::path::Path;

/// Bytes in a row that count as a find: what the promise names.
pub const RUN: usize = 16;

/// All runs of [`RUN`] bytes of some planted bytes.
pub struct Runs {
    runs: HashSet<[u8; RUN]>,
    /// First three bytes of each run, as bits: most offsets are ruled out by one look.
    first: Vec<u64>,
}

impl std::fmt::Debug for Runs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} runs", self.runs.len())
    }
}

impl Default for Runs {
    fn default() -> Self {
        Self {
            runs: HashSet::new(),
            first: vec![0; 1 << 18],
        }
    }
}

impl Runs {
    /// Adds every run of `planted`.
    pub fn plant(&mut self, planted: &[u8]) {
        assert!(planted.len() >= RUN, "too short to be found");
        for window in planted.windows(RUN) {
            let run: [u8; RUN] = window.try_into().expect("a window has its length");
            let bit = prefix(&run);
            self.first[bit / 64] |= 1 << (bit % 64);
            self.runs.insert(run);
        }
    }

    /// The offset of the first run in `bytes`.
    pub fn find(&self, bytes: &[u8]) -> Option<usize> {
        bytes.windows(RUN).position(|window| {
            let bit = prefix(window);
            self.first[bit / 64] & (1 << (bit % 64)) != 0
                && <[u8; RUN]>::try_from(window).is_ok_and(|run| self.runs.contains(&run))
        })
    }

    /// Files at or below `dir` that contain a run, and at which offset.
    pub fn find_below(&self, dir: &Path) -> Vec<String> {
        let files = crate::flip::files_below(dir);
        files.iter().filter_map(|file| self.find_in(file)).collect()
    }

    /// Whether `file` contains a run, and at which offset.
    pub fn find_in(&self, file: &Path) -> Option<String> {
        let bytes = std::fs::read(file).unwrap_or_default();
        self.find(&bytes)
            .map(|offset| format!("{} at byte {offset}", file.display()))
    }
}

fn prefix(bytes: &[u8]) -> usize {
    usize::from(bytes[0]) << 16 | usize::from(bytes[1]) << 8 | usize::from(bytes[2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_found_at_any_offset_and_a_shorter_one_is_not() {
        let planted: Vec<u8> = (0..=255).collect();
        let mut runs = Runs::default();
        runs.plant(&planted);
        let mut haystack = vec![7; 1000];
        assert_eq!(runs.find(&haystack), None);
        haystack[501..516].copy_from_slice(&planted[40..55]);
        assert_eq!(runs.find(&haystack), None, "15 bytes");
        haystack[501..517].copy_from_slice(&planted[40..56]);
        assert_eq!(runs.find(&haystack), Some(501));
    }
}
