//! Packs: which ciphertexts go into which blob.
//!
//! A layer's packs hold the chunks that the layer contributes, in layout order, each once, without
//! those that packs of lower layers hold. They depend on the layer and those below it alone, so
//! images with a common base have the base's packs in common, byte for byte: they are uploaded once,
//! and nothing has to be remembered about what was uploaded before.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use lazyimg_convergent::{ChunkId, Digest};
use sha2::{Digest as _, Sha256};

use super::encode_pool::Encoded;
use crate::manifest::{Pack, Stored};

/// A pack is closed at this length in bytes (64 MiB): large enough that a 10 GB image has tens of
/// blobs, small enough that several are hashed and uploaded side by side, and that an upload that
/// fails is not long to repeat.
pub const PACK_BLOB_LEN: u64 = 64 << 20;

/// Pieces of the spool that make one pack.
#[derive(Debug, Clone, Default)]
pub struct PackPieces {
    /// (offset in the spool, length), in the order of the pack.
    pub pieces: Vec<(u64, u32)>,
    /// Sum of the lengths.
    pub len: u64,
}

/// All packs of an image under construction.
#[derive(Debug, Default)]
pub struct Packs {
    packs: Vec<PackPieces>,
    places: HashMap<ChunkId, (u32, u64)>,
    open: bool,
}

impl Packs {
    /// Adds a chunk unless a pack has it already.
    pub fn add(&mut self, chunk: &Encoded) {
        if self.places.contains_key(&chunk.id) {
            return;
        }
        if !self.open
            || self
                .packs
                .last()
                .is_none_or(|p| p.len + u64::from(chunk.len) > PACK_BLOB_LEN)
        {
            self.packs.push(PackPieces::default());
            self.open = true;
        }
        let at = self.packs.len() as u32 - 1;
        let pack = self.packs.last_mut().expect("pushed above");
        self.places.insert(chunk.id, (at, pack.len));
        pack.pieces.push((chunk.at, chunk.len));
        pack.len += u64::from(chunk.len);
    }

    /// The next chunk begins a new pack: called at the end of each layer.
    pub fn close(&mut self) {
        self.open = false;
    }

    /// How a chunk that was added is stored.
    pub fn stored(&self, chunk: &Encoded) -> Stored {
        let (pack, offset) = self.places[&chunk.id];
        Stored {
            id: chunk.id,
            len: chunk.len,
            pack,
            offset,
        }
    }

    /// The pieces of each pack.
    pub fn pieces(&self) -> &[PackPieces] {
        &self.packs
    }
}

/// Length of the reads of [`digest`] in bytes.
const READ_LEN: usize = 1 << 20;

/// The blob digests of all packs, in their order, computed on `threads` threads.
///
/// # Errors
/// When the spool can't be read, or no thread can be made.
pub fn digests(spool: &File, packs: &[PackPieces], threads: usize) -> io::Result<Vec<Pack>> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            match packs.get(at) {
                Some(pack) => done.push((at, digest(spool, pack)?)),
                None => return io::Result::Ok(done),
            }
        }
    };
    let mut all = std::thread::scope(|scope| {
        let helpers = (1..threads.min(packs.len()))
            .map(|_| std::thread::Builder::new().spawn_scoped(scope, work))
            .collect::<io::Result<Vec<_>>>()?;
        let mut all = work()?;
        for helper in helpers {
            let failed = |_| io::Error::other("a hashing thread panicked");
            all.extend(helper.join().map_err(failed)??);
        }
        io::Result::Ok(all)
    })?;
    all.sort_unstable_by_key(|(at, _)| *at);
    Ok(all.into_iter().map(|(_, pack)| pack).collect())
}

/// The blob digest of a pack.
fn digest(spool: &File, pack: &PackPieces) -> io::Result<Pack> {
    let mut hash = Sha256::new();
    let mut buf = vec![0; READ_LEN];
    for &(at, len) in &joined(pack) {
        let mut done = 0;
        while done < len {
            let step = (len - done).min(READ_LEN as u64) as usize;
            spool.read_exact_at(&mut buf[..step], at + done)?;
            hash.update(&buf[..step]);
            done += step as u64;
        }
    }
    Ok(Pack {
        digest: Digest(hash.finalize().into()),
        len: pack.len,
    })
}

/// Neighbouring pieces joined, so that reading back takes few calls.
pub fn joined(pack: &PackPieces) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    for &(at, len) in &pack.pieces {
        match out.last_mut() {
            Some((start, sum)) if *start + *sum == at => *sum += u64::from(len),
            _ => out.push((at, u64::from(len))),
        }
    }
    out
}
