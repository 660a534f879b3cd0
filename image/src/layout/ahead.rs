//! Packs of small files encoded while their layer still streams by.
//!
//! Which files make a pack is known at the layer's end only: by then an entry may have replaced or
//! removed an earlier one, and packs follow the order of paths, not of entries. But nearly every
//! layer has its entries in path order, each once. So packs are guessed as if that were so, and
//! [`super::Plan`] takes those that turn out to be packs. For the others it reads the files' bytes
//! back out of the guesses; since packs end by content, the guesses behind a wrong one are right
//! again. Entries in no order at all wait in a working file instead.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::io;

use crate::manifest::BLOCK;

use super::{ChunkEncoder, PackCutter, Ticket, blocks};

/// A content: its hash and its size in bytes.
pub type Key = ([u8; 32], u64);

/// Guessing ends when more than one entry in so many is out of order, and more than [`MIN_BREAKS`]
/// are: then it is no order at all.
const BREAKS_SHARE: u64 = 16;
const MIN_BREAKS: u64 = 16;

/// A place in a guessed pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guessed {
    /// Which, from 0.
    pub pack: u32,
    /// Offset of the file in it, in bytes.
    pub offset: u32,
}

/// The guesses of one layer.
#[derive(Default)]
pub struct Ahead {
    cutter: PackCutter,
    plain: Vec<u8>,
    members: Vec<Key>,
    places: HashMap<Key, Guessed>,
    packs: Vec<(Vec<Key>, Ticket)>,
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

    /// Takes a small file of these bytes, which no lower layer has; where it is. `None`: there is no
    /// order to guess by, and it was not taken.
    ///
    /// # Errors
    /// The encoder's.
    pub fn add<E: ChunkEncoder>(
        &mut self,
        key: Key,
        bytes: &[u8],
        encoder: &mut E,
    ) -> io::Result<Option<Guessed>> {
        if let Some(&place) = self.places.get(&key) {
            return Ok(Some(place));
        }
        if self.is_hopeless() {
            return Ok(None);
        }
        let padded = blocks(key.1) * BLOCK;
        if self.cutter.overflows(padded) {
            self.end(encoder)?;
        }
        let start = self.plain.len();
        let place = Guessed {
            pack: self.packs.len() as u32,
            offset: start as u32,
        };
        self.plain.extend_from_slice(bytes);
        self.plain.resize(start + padded as usize, 0);
        self.members.push(key);
        self.places.insert(key, place);
        if self.cutter.add(padded, &key.0) {
            self.end(encoder)?;
        }
        Ok(Some(place))
    }

    /// The pack ends, if there is one.
    ///
    /// # Errors
    /// The encoder's.
    pub fn end<E: ChunkEncoder>(&mut self, encoder: &mut E) -> io::Result<()> {
        self.cutter.reset();
        if !self.members.is_empty() {
            let ticket = encoder.encode(std::mem::take(&mut self.plain))?;
            self.packs.push((std::mem::take(&mut self.members), ticket));
        }
        Ok(())
    }

    /// What a pack of exactly these contents became, if it was guessed.
    pub fn find<'a>(&self, members: impl Iterator<Item = &'a Key>) -> Option<Ticket> {
        let mut members = members.peekable();
        let first = self.places.get(*members.peek()?)?;
        let (guessed, ticket) = self.packs.get(first.pack as usize)?;
        guessed.iter().eq(members).then_some(*ticket)
    }

    /// What a guessed pack became.
    pub fn ticket(&self, pack: u32) -> Option<Ticket> {
        self.packs.get(pack as usize).map(|(_, ticket)| *ticket)
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
