//! Packs of small files encoded while their layer still streams by.
//!
//! Which files make a pack is known at the layer's end only: by then an entry may have replaced or
//! removed an earlier one, and packs follow the order of paths, not of entries. But nearly every
//! layer has its entries in path order, each once. So packs are guessed as if that were so, and
//! [`super::Plan`] takes those that turn out to be packs; a wrong guess costs an encoding for nothing,
//! and since packs end by content, the guesses behind it are right again.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::io;

use crate::manifest::BLOCK;

use super::{ChunkEncoder, PackCutter, Ticket, blocks};

/// A content: its hash and its size in bytes.
pub type Key = ([u8; 32], u64);

/// Guessing ends when more than one entry in so many is out of order, and more than [`MIN_BREAKS`]
/// are: then it is no order at all.
const BREAKS_SHARE: u64 = 16;
const MIN_BREAKS: u64 = 16;

/// The guesses of one layer.
#[derive(Default)]
pub struct Ahead {
    cutter: PackCutter,
    plain: Vec<u8>,
    members: Vec<Key>,
    seen: HashSet<Key>,
    /// First member → all members, and what they became.
    encoded: HashMap<Key, (Vec<Key>, Ticket)>,
    last: Vec<u8>,
    entries: u64,
    breaks: u64,
}

impl Ahead {
    /// An entry begins.
    pub fn entry(&mut self, path: &[u8]) {
        self.entries += 1;
        if order(&self.last, path) == Ordering::Greater {
            self.breaks += 1;
        }
        self.last.clear();
        self.last.extend_from_slice(path);
    }

    fn is_hopeless(&self) -> bool {
        self.breaks > MIN_BREAKS && self.breaks * BREAKS_SHARE > self.entries
    }

    /// A small file of these bytes, which no lower layer has, comes next.
    ///
    /// # Errors
    /// The encoder's.
    pub fn add<E: ChunkEncoder>(
        &mut self,
        key: Key,
        bytes: &[u8],
        encoder: &mut E,
    ) -> io::Result<()> {
        if self.is_hopeless() {
            self.plain = Vec::new();
            self.members.clear();
            return Ok(());
        }
        if !self.seen.insert(key) {
            return Ok(());
        }
        let padded = blocks(key.1) * BLOCK;
        if self.cutter.overflows(padded) {
            self.end(encoder)?;
        }
        let end = self.plain.len() + padded as usize;
        self.plain.extend_from_slice(bytes);
        self.plain.resize(end, 0);
        self.members.push(key);
        if self.cutter.add(padded, &key.0) {
            self.end(encoder)?;
        }
        Ok(())
    }

    /// The pack ends, if there is one.
    ///
    /// # Errors
    /// The encoder's.
    pub fn end<E: ChunkEncoder>(&mut self, encoder: &mut E) -> io::Result<()> {
        self.cutter.reset();
        let Some(&first) = self.members.first() else {
            return Ok(());
        };
        let ticket = encoder.encode(std::mem::take(&mut self.plain))?;
        let members = std::mem::take(&mut self.members);
        self.encoded.insert(first, (members, ticket));
        Ok(())
    }

    /// What a pack of exactly these contents became, if it was guessed.
    pub fn find<'a>(&self, members: impl Iterator<Item = &'a Key>) -> Option<Ticket> {
        let mut members = members.peekable();
        let (guessed, ticket) = self.encoded.get(*members.peek()?)?;
        guessed.iter().eq(members).then_some(*ticket)
    }
}

/// The order of two paths in a walk: components compared one by one.
fn order(a: &[u8], b: &[u8]) -> Ordering {
    let components = |path| <[u8]>::split(path, |&byte| byte == b'/').filter(|c| !c.is_empty());
    components(a).cmp(components(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_in_order_as_a_walk_meets_them() {
        let walk = ["", "a", "a/b", "a/b/c", "a/b-c", "a.b", "ab"];
        for pair in walk.windows(2) {
            assert_eq!(
                order(pair[0].as_bytes(), pair[1].as_bytes()),
                Ordering::Less,
                "{pair:?}"
            );
        }
        assert_eq!(order(b"./a/", b"./a"), Ordering::Equal);
    }
}
