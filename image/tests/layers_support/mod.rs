//! What the differential tests of layers share: applying layers in memory, describing a directory
//! of the host in the words of `Tree::describe`, and comparing the two.

#![allow(dead_code)]

pub mod host;
pub mod model;
#[path = "../../src/tar/tests_support.rs"]
pub mod raw;
pub mod stack;

use std::io::Read;

use lazyimg_convergent::Digest;
use lazyimg_image::flatten::{ContentSink, Counters, FlattenError, apply_layer};
use lazyimg_image::limits::Limits;
use lazyimg_image::tree::{ContentId, Tree};

/// Content is compared by the digest of its 4 KiB blocks that are not zero, each with its number:
/// the same for every way to store a sparse file, and cheap for one of many GiB.
#[derive(Default)]
pub struct Blocks {
    pending: Vec<u8>,
    number: u64,
    digested: Vec<u8>,
}

/// Bytes of a block.
pub const BLOCK: u64 = 4096;

impl Blocks {
    /// Takes bytes at an offset; offsets only grow.
    pub fn data(&mut self, mut offset: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if offset / BLOCK != self.number {
                self.flush();
                self.number = offset / BLOCK;
            }
            let within = (offset % BLOCK) as usize;
            let len = bytes.len().min(BLOCK as usize - within);
            self.pending.resize(within, 0);
            self.pending.extend_from_slice(&bytes[..len]);
            bytes = &bytes[len..];
            offset += len as u64;
        }
    }

    fn flush(&mut self) {
        if self.pending.iter().any(|&b| b != 0) {
            self.pending.resize(BLOCK as usize, 0);
            self.digested.extend_from_slice(&self.number.to_le_bytes());
            self.digested
                .extend_from_slice(&Digest::of(&self.pending).0);
        }
        self.pending.clear();
    }

    /// The digest of all.
    pub fn finish(mut self) -> String {
        self.flush();
        Digest::of(&self.digested).hex()[..16].to_owned()
    }
}

/// A sink that keeps digests.
#[derive(Default)]
pub struct Digests {
    /// One for each file.
    pub all: Vec<String>,
    current: Blocks,
}

impl ContentSink for Digests {
    type Error = std::convert::Infallible;

    fn begin(&mut self, _size: u64) -> Result<(), Self::Error> {
        self.current = Blocks::default();
        Ok(())
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Self::Error> {
        self.current.data(offset, bytes);
        Ok(())
    }

    fn finish(&mut self) -> Result<ContentId, Self::Error> {
        self.all.push(std::mem::take(&mut self.current).finish());
        Ok(ContentId(self.all.len() as u32 - 1))
    }
}

/// An image being put together.
#[derive(Default)]
pub struct Image {
    /// The tree.
    pub tree: Tree,
    sink: Digests,
    count: Counters,
    layers: u32,
}

impl Image {
    /// Applies a layer.
    pub fn apply(&mut self, tar: impl Read) -> Result<(), FlattenError> {
        let number = self.layers;
        self.layers += 1;
        apply_layer(
            &mut self.tree,
            number,
            &format!("layer{number}"),
            tar,
            &mut self.sink,
            &Limits::default(),
            &mut self.count,
        )
        .map(|_| ())
    }

    /// What it is now, one line a name.
    pub fn describe(&self) -> Vec<String> {
        self.tree
            .describe(&|id| self.sink.all[id.0 as usize].clone())
    }
}

/// Panics with the lines in which two descriptions differ.
pub fn assert_same(ours: &[String], theirs: &[String], whose: &str) {
    let missing: Vec<_> = theirs.iter().filter(|line| !ours.contains(line)).collect();
    let extra: Vec<_> = ours.iter().filter(|line| !theirs.contains(line)).collect();
    assert!(
        ours == theirs,
        "ours differs from {whose}\nonly ours: {extra:#?}\nonly {whose}: {missing:#?}"
    );
}
