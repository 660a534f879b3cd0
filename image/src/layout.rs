//! Where the bytes of files lie in the data space, and where chunks begin and end.
//!
//! The data space is made of *groups*, layer by layer (base first) and inside a layer by path:
//!
//! * a file of at least [`LARGE`] bytes is a group of its own, cut every [`LARGE`] bytes from its own
//!   start, so that a change elsewhere never moves a cut;
//! * smaller files are packed together in path order, each at a 4 KiB boundary; [`PackCutter`] says,
//!   from the content of what was packed, where a pack ends.
//!
//! What a layer contributes depends on that layer and the ones below it, never on the ones above:
//! images with a common base share the base's chunks and packs, whatever they add, replace or delete.
//! A group that nothing in the final tree refers to is left out of the data space; that moves
//! offsets, and no chunk. A file whose content a lower layer (or an earlier path) has is given that
//! range, and has none of its own.

mod ahead;
mod cutter;
mod plan;
mod sink;
#[cfg(test)]
mod tests;

pub use ahead::Guessed;
pub use cutter::{LARGE, PACK_MAX, PACK_TARGET, PackCutter};
pub use plan::{Cut, Group, Plan, PlanError, Region};
pub use sink::{Body, Content, Contents, LayerSink, SinkError, Small};

/// Takes plaintext chunks and gives a ticket for what they become.
///
/// The plaintext's length is a positive multiple of 4096 and at most
/// [`lazyimg_convergent::MAX_CHUNK_LEN`].
pub trait ChunkEncoder {
    /// Hands over one chunk. May block while encoders are busy.
    ///
    /// # Errors
    /// When an encoder failed before: the conversion can't succeed any more.
    fn encode(&mut self, plain: Vec<u8>) -> std::io::Result<Ticket>;

    /// The plaintext of a chunk that was handed over. May block until it is encoded.
    ///
    /// # Errors
    /// When an encoder failed, or the working file can't be read.
    fn decode(&mut self, ticket: Ticket) -> std::io::Result<Vec<u8>>;
}

/// Stands for one encoded chunk; numbered from 0 in the order of [`ChunkEncoder::encode`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u32);

/// Rounds up to whole blocks of 4096 bytes.
pub(crate) fn blocks(len: u64) -> u64 {
    len.div_ceil(crate::manifest::BLOCK)
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Blocks of 64 so that the compiler uses wide registers and data still ends the search early.
    bytes
        .chunks(64)
        .all(|block| block.iter().fold(0, |a, b| a | b) == 0)
}
