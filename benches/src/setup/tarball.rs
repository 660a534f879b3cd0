//! Writes ustar archives (POSIX.1-1988) with directories and regular files: all that workloads need.

use std::io::{self, Write};

/// Length of headers and unit of padding, in bytes.
const RECORD: usize = 512;

/// Time of every entry, in seconds since 1970: fixed, so that workloads are the same each time.
const MTIME: u64 = 1_700_000_000;

/// An archive being written.
pub struct Tar<W> {
    out: W,
}

impl<W: Write> Tar<W> {
    /// An empty archive.
    pub fn new(out: W) -> Self {
        Self { out }
    }

    /// Adds a directory; `name` is shorter than 100 bytes.
    pub fn dir(&mut self, name: &str) -> io::Result<()> {
        self.out
            .write_all(&header(&format!("{name}/"), 0, b'5', 0o755))
    }

    /// Adds a regular file; `name` is shorter than 100 bytes.
    pub fn file(&mut self, name: &str, body: &[u8]) -> io::Result<()> {
        self.out
            .write_all(&header(name, body.len() as u64, b'0', 0o644))?;
        self.out.write_all(body)?;
        let padding = body.len().next_multiple_of(RECORD) - body.len();
        self.out.write_all(&[0; RECORD][..padding])
    }

    /// Writes the end and gives the writer back.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * RECORD])?;
        Ok(self.out)
    }
}

fn header(name: &str, size: u64, kind: u8, mode: u32) -> [u8; RECORD] {
    let mut h = [0; RECORD];
    let mut put = |at: usize, bytes: &[u8]| h[at..at + bytes.len()].copy_from_slice(bytes);
    assert!(name.len() < 100, "workloads have short names");
    put(0, name.as_bytes());
    put(100, format!("{mode:07o}").as_bytes());
    put(108, b"0000000\x000000000");
    put(124, format!("{size:011o}").as_bytes());
    put(136, format!("{MTIME:011o}").as_bytes());
    put(148, b"        ");
    put(156, &[kind]);
    put(257, b"ustar\x0000root");
    put(297, b"root");
    let sum: u32 = h.iter().map(|b| u32::from(*b)).sum();
    h[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    h
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn gnu_tar_reads_what_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        let mut tar = Tar::new(std::fs::File::create(&path).unwrap());
        tar.dir("d").unwrap();
        tar.file("d/f", &[7; 1000]).unwrap();
        tar.finish().unwrap();
        let done = crate::process::run(
            Command::new("tar")
                .args(["-xf", "a.tar"])
                .current_dir(dir.path()),
        );
        done.unwrap();
        assert_eq!(std::fs::read(dir.path().join("d/f")).unwrap(), [7; 1000]);
    }
}
