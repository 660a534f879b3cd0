//! The log of the documents after a power cut: whether only its end is torn, or something that was
//! acknowledged is damaged.
//!
//! RocksDB either refuses a log with any wrong checksum in it, or silently forgets what follows that. A
//! write that a power cut has torn was never acknowledged, and may be forgotten. But each write is synced
//! before the next one begins: so if another record begins behind a damaged one, that one was whole.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The log consists of blocks; a header does not cross their ends.
const BLOCK: usize = 32 << 10;
/// Checksum, length as 16 bits, type; little endian.
const HEADER: usize = 7;
/// Types of records: whole ones, and the first, middle and last parts of those that cross blocks.
const TYPES: std::ops::RangeInclusive<u8> = 1..=4;
/// Those that begin something.
const BEGIN: std::ops::RangeInclusive<u8> = 1..=2;
/// Logs are far shorter; what is longer is not looked at, in bytes.
const MAX_LOG: u64 = 1 << 30;

/// Whether of all logs in a directory only the newest is damaged, and only at its end.
pub fn is_torn(dir: &Path) -> io::Result<bool> {
    let mut logs: Vec<(u64, PathBuf)> = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let number = path.file_stem().and_then(OsStr::to_str);
        let number = number.and_then(|stem| stem.parse().ok());
        if path.extension() == Some(OsStr::new("log"))
            && let Some(number) = number
        {
            logs.push((number, path));
        }
    }
    logs.sort();
    let Some((_, newest)) = logs.pop() else {
        return Ok(false);
    };
    for (_, older) in logs {
        if first_damage(&read(&older)?).is_some() {
            return Ok(false);
        }
    }
    let log = read(&newest)?;
    Ok(first_damage(&log).is_some_and(|at| !begins_after(&log, at)))
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    if fs::metadata(path)?.len() > MAX_LOG {
        return Err(io::Error::other("this log is too long"));
    }
    fs::read(path)
}

/// The record at the beginning of what is left of a block: its type and its length with the header;
/// `None` if there is none whole.
fn record(rest: &[u8]) -> Option<(u8, usize)> {
    let header = rest.first_chunk::<HEADER>()?;
    let len = usize::from(u16::from_le_bytes([header[4], header[5]]));
    let kind = header[6];
    let end = HEADER + len;
    if !TYPES.contains(&kind) || end > rest.len() {
        return None;
    }
    let crc = crc32c::crc32c(&rest[6..end]);
    let masked = crc.rotate_right(15).wrapping_add(0xa282_ead8);
    (header[..4] == masked.to_le_bytes()).then_some((kind, end))
}

/// Where the first thing is that is no record. Zeros up to the end are none, and no damage.
fn first_damage(log: &[u8]) -> Option<usize> {
    let mut at = 0;
    while at < log.len() {
        let block_end = (at / BLOCK * BLOCK + BLOCK).min(log.len());
        let rest = &log[at..block_end];
        match record(rest) {
            Some((_, len)) => at += len,
            // What is left of a block has no room for a header.
            None if rest.len() < HEADER && block_end.is_multiple_of(BLOCK) => at = block_end,
            None if log[at..].iter().all(|byte| *byte == 0) => return None,
            None => return Some(at),
        }
    }
    None
}

/// Whether a record begins anywhere behind the damage.
fn begins_after(log: &[u8], damage: usize) -> bool {
    (damage + 1..log.len()).any(|at| {
        let block_end = (at / BLOCK * BLOCK + BLOCK).min(log.len());
        record(&log[at..block_end]).is_some_and(|(kind, _)| BEGIN.contains(&kind))
    })
}

#[cfg(test)]
mod tests {
    use super::super::{EmbeddedEngine, EmbeddedOptions};
    use super::*;
    use crate::engine::{Engine, EngineError, When};
    use bytes::Bytes;

    fn open(dir: &Path) -> Result<EmbeddedEngine, EngineError> {
        EmbeddedEngine::open(&EmbeddedOptions::new(dir))
    }

    fn content(n: u8) -> Bytes {
        // The last one crosses several blocks.
        let len = if n == 9 { 150_000 } else { 500 };
        Bytes::from(vec![n; len])
    }

    /// A directory with ten documents in its log, and that log.
    async fn filled() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(dir.path()).unwrap();
        for n in 0..10 {
            let name = format!("doc/{n}");
            let put = engine.put_doc(&name, content(n), When::Always);
            put.await.unwrap();
        }
        engine.close().await;
        let logs = fs::read_dir(dir.path().join("docs")).unwrap();
        let mut logs: Vec<PathBuf> = logs.map(|entry| entry.unwrap().path()).collect();
        logs.retain(|path| path.extension() == Some(OsStr::new("log")));
        logs.sort();
        (dir, logs.pop().unwrap())
    }

    async fn there(dir: &Path) -> Vec<u8> {
        let engine = open(dir).unwrap();
        let mut there = Vec::new();
        for n in 0..10 {
            if let Some(found) = engine.get_doc(&format!("doc/{n}")).await.unwrap() {
                assert_eq!(found, content(n));
                there.push(n);
            }
        }
        engine.close().await;
        there
    }

    #[tokio::test]
    async fn a_flipped_bit_in_what_was_acknowledged_is_damage_and_nothing_is_forgotten() {
        let (dir, log) = filled().await;
        let good = fs::read(&log).unwrap();
        assert_eq!(first_damage(&good), None);
        // In the first record, in its header, and in the one before the last.
        for at in [3, 5, 300, 4500] {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            fs::write(&log, &bad).unwrap();
            assert!(!is_torn(&dir.path().join("docs")).unwrap(), "at {at}");
            let opened = open(dir.path()).map(|_| ());
            assert!(
                matches!(opened, Err(EngineError::Damaged(_))),
                "at {at}: {opened:?}"
            );
        }
        fs::write(&log, &good).unwrap();
        assert_eq!(there(dir.path()).await, (0..10).collect::<Vec<u8>>());
    }

    #[tokio::test]
    async fn a_write_that_a_power_cut_has_torn_is_forgotten_and_nothing_else() {
        type Tear = fn(&mut Vec<u8>);
        let tears: [Tear; 4] = [
            |log| log.truncate(log.len() - 1),
            |log| log.truncate(log.len() - 100_000),
            // The file was made longer, and some pages of it were never written.
            |log| {
                let len = log.len();
                log[len - 60_000..len - 50_000].fill(0);
            },
            |log| *log.last_mut().unwrap() ^= 1,
        ];
        for (n, tear) in tears.into_iter().enumerate() {
            let (dir, path) = filled().await;
            let mut log = fs::read(&path).unwrap();
            tear(&mut log);
            fs::write(&path, &log).unwrap();
            let found = there(dir.path()).await;
            assert_eq!(found, (0..9).collect::<Vec<u8>>(), "tear {n}");
            // It takes more, and what it takes stays.
            let engine = open(dir.path()).unwrap();
            let put = engine.put_doc("doc/9", content(9), When::Absent);
            assert!(put.await.unwrap());
            engine.close().await;
            assert_eq!(there(dir.path()).await.len(), 10, "tear {n}");
        }
    }
}
