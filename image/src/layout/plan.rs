//! From contents to groups, from groups to places.

use std::collections::HashMap;
use std::io;

use crate::manifest::BLOCK;
use crate::tree::{ContentId, Kind, Tree};

use super::ahead::Key;
use super::sink::{Decoded, Small, SmallFiles};
use super::{Body, ChunkEncoder, Contents, LARGE, PackCutter, Ticket, blocks};

/// Why a layer could not be laid out.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The layer's spool can't be read back.
    #[error("reading a working file of the conversion back: {0}")]
    Spool(#[source] io::Error),
    /// A chunk could not be encoded.
    #[error("encoding a chunk: {0}")]
    Encode(#[source] io::Error),
    /// The data space would exceed what EROFS addresses.
    #[error("image's data space exceeds 16 TiB, the most that EROFS addresses with 4 KiB blocks")]
    TooLarge,
}

/// A stretch of a group: one stored chunk, or a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Length in blocks of 4096 bytes.
    pub blocks: u64,
    /// `None` for a hole.
    pub ticket: Option<Ticket>,
}

/// A run of chunks that stays together: one large file, or one pack of small ones.
#[derive(Debug)]
pub struct Group {
    /// The layer that contributes it.
    pub layer: u32,
    /// Its chunks and holes in order.
    pub cuts: Vec<Cut>,
}

/// Where a content lies.
#[derive(Debug, Clone, Copy)]
struct Place {
    group: u32,
    block: u64,
}

/// The groups of all layers so far, in the order of the data space.
#[derive(Debug, Default)]
pub struct Plan {
    groups: Vec<Group>,
    /// Content hash and size → where the first content of that kind lies.
    places: HashMap<Key, Place>,
}

/// The data space: what the final tree refers to.
#[derive(Debug)]
pub struct Region {
    /// Chunks and holes by offset; neighbouring holes are one.
    pub cuts: Vec<Cut>,
    /// Length in blocks.
    pub blocks: u64,
    /// First block of each group, `None` where nothing refers to it.
    starts: Vec<Option<u64>>,
}

impl Plan {
    /// Lays out what `layer` brought. `tree` is the tree as of this layer.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn add_layer<E: ChunkEncoder>(
        &mut self,
        layer: u32,
        tree: &Tree,
        contents: &Contents,
        small: &SmallFiles,
        encoder: &mut E,
    ) -> Result<(), PlanError> {
        let mut pack = Pack::new(layer, small);
        let mut walk = tree.walk();
        while let Some((_, id)) = walk.next_entry() {
            let Kind::File {
                content: Some(id), ..
            } = tree.get(id).kind
            else {
                continue;
            };
            let content = contents.get(id);
            let key = (content.hash, content.size);
            if content.layer != layer || self.holds(&key) || pack.holds(&key) {
                continue;
            }
            match &content.body {
                Body::Zero => {}
                Body::Large(tickets) => {
                    let group = self.groups.len() as u32;
                    self.groups.push(Group {
                        layer,
                        cuts: large_cuts(content.size, tickets),
                    });
                    self.places.insert(key, Place { group, block: 0 });
                }
                Body::Small(at) => {
                    let ended = pack.add(key, *at, &mut self.groups, encoder)?;
                    self.places.extend(ended);
                }
            }
        }
        let last = pack.end(&mut self.groups, encoder)?;
        self.places.extend(last);
        Ok(())
    }

    /// Whether a layer laid out so far has this content.
    pub(super) fn holds(&self, key: &Key) -> bool {
        self.places.contains_key(key)
    }

    /// The groups in order.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// The data space of the final tree.
    ///
    /// # Errors
    /// [`PlanError::TooLarge`].
    pub fn finish(&self, tree: &Tree, contents: &Contents) -> Result<Region, PlanError> {
        let mut live = vec![false; self.groups.len()];
        for (_, inode) in tree.inodes() {
            if let Kind::File {
                content: Some(id), ..
            } = inode.kind
                && let Some(place) = self.place_of(contents, id)
            {
                live[place.group as usize] = true;
            }
        }
        let mut region = Region {
            cuts: Vec::new(),
            blocks: 0,
            starts: vec![None; live.len()],
        };
        for (at, group) in self.groups.iter().enumerate().filter(|(at, _)| live[*at]) {
            region.starts[at] = Some(region.blocks);
            for cut in &group.cuts {
                region.push(*cut);
            }
        }
        if region.blocks >= u64::from(u32::MAX) {
            return Err(PlanError::TooLarge);
        }
        Ok(region)
    }

    /// First block of a content in the data space; `None` when it is all zeros.
    pub fn start_block(&self, region: &Region, contents: &Contents, id: ContentId) -> Option<u32> {
        let place = self.place_of(contents, id)?;
        let start = region.starts[place.group as usize]?;
        u32::try_from(start + place.block).ok()
    }

    fn place_of(&self, contents: &Contents, id: ContentId) -> Option<Place> {
        let content = contents.get(id);
        self.places.get(&(content.hash, content.size)).copied()
    }
}

impl Region {
    fn push(&mut self, cut: Cut) {
        self.blocks += cut.blocks;
        match self.cuts.last_mut() {
            Some(last)
                if last.ticket.is_none()
                    && cut.ticket.is_none()
                    && last.blocks + cut.blocks <= u64::from(u32::MAX) =>
            {
                last.blocks += cut.blocks;
            }
            _ => self.cuts.push(cut),
        }
    }
}

fn large_cuts(size: u64, tickets: &std::collections::BTreeMap<u64, Ticket>) -> Vec<Cut> {
    let window = LARGE / BLOCK;
    let total = blocks(size);
    let (mut cuts, mut at) = (Vec::new(), 0);
    for (&index, &ticket) in tickets {
        let start = index * window;
        if start > at {
            cuts.push(Cut {
                blocks: start - at,
                ticket: None,
            });
        }
        let len = window.min(total - start);
        cuts.push(Cut {
            blocks: len,
            ticket: Some(ticket),
        });
        at = start + len;
    }
    if at < total {
        cuts.push(Cut {
            blocks: total - at,
            ticket: None,
        });
    }
    cuts
}

/// The pack of small files that is being filled.
struct Pack<'a> {
    layer: u32,
    small: &'a SmallFiles,
    cutter: PackCutter,
    /// Its files in order: content, and where the bytes are.
    files: Vec<(Key, Small)>,
    /// Content → its block in the pack.
    members: HashMap<Key, u64>,
    /// Length in blocks.
    blocks: u64,
    decoded: Decoded,
}

impl<'a> Pack<'a> {
    fn new(layer: u32, small: &'a SmallFiles) -> Self {
        Self {
            layer,
            small,
            cutter: PackCutter::default(),
            files: Vec::new(),
            members: HashMap::new(),
            blocks: 0,
            decoded: None,
        }
    }

    /// Adds a file; the places of a pack that ended with it or before it.
    fn add<E: ChunkEncoder>(
        &mut self,
        key: Key,
        at: Small,
        groups: &mut Vec<Group>,
        encoder: &mut E,
    ) -> Result<Vec<(Key, Place)>, PlanError> {
        let padded = blocks(key.1) * BLOCK;
        let mut ended = Vec::new();
        if self.cutter.overflows(padded) {
            ended = self.end(groups, encoder)?;
        }
        self.files.push((key, at));
        self.members.insert(key, self.blocks);
        self.blocks += blocks(key.1);
        if self.cutter.add(padded, &key.0) {
            ended.extend(self.end(groups, encoder)?);
        }
        Ok(ended)
    }

    /// Whether the open pack has this content already.
    fn holds(&self, key: &Key) -> bool {
        self.members.contains_key(key)
    }

    /// Ends the pack: a group of one chunk.
    fn end<E: ChunkEncoder>(
        &mut self,
        groups: &mut Vec<Group>,
        encoder: &mut E,
    ) -> Result<Vec<(Key, Place)>, PlanError> {
        self.cutter.reset();
        if self.files.is_empty() {
            return Ok(Vec::new());
        }
        let ticket = match self.small.encoded(self.files.iter().map(|(key, _)| key)) {
            Some(ticket) => ticket,
            None => {
                let plain = self.read(encoder)?;
                encoder.encode(plain).map_err(PlanError::Encode)?
            }
        };
        self.files.clear();
        let group = groups.len() as u32;
        groups.push(Group {
            layer: self.layer,
            cuts: vec![Cut {
                blocks: std::mem::take(&mut self.blocks),
                ticket: Some(ticket),
            }],
        });
        Ok(self
            .members
            .drain()
            .map(|(key, block)| (key, Place { group, block }))
            .collect())
    }

    /// The bytes of its files, each padded to whole blocks.
    fn read<E: ChunkEncoder>(&mut self, encoder: &mut E) -> Result<Vec<u8>, PlanError> {
        let mut plain = Vec::with_capacity((self.blocks * BLOCK) as usize);
        for ((_, size), at) in &self.files {
            let start = plain.len();
            plain.resize(start + (blocks(*size) * BLOCK) as usize, 0);
            let body = &mut plain[start..start + *size as usize];
            self.small
                .read(*at, body, encoder, &mut self.decoded)
                .map_err(PlanError::Spool)?;
        }
        Ok(plain)
    }
}
