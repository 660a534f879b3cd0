//! What names a chunk, where it lies, and what opens it.

use lazyimg_convergent::{ChunkId, ChunkKey, Digest};

/// Where a chunk lies in the registry: a range of a pack, which is a blob of the image's artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PackRange {
    /// The pack's digest.
    pub pack: Digest,
    /// Where the chunk's ciphertext begins in the pack, in bytes. Its length is
    /// [`ChunkRef::stored_len`].
    pub offset: u64,
}

/// A chunk as stores see it: no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkRef {
    /// SHA-256 of the ciphertext.
    pub id: ChunkId,
    /// Length of the ciphertext, in bytes; at most [`lazyimg_convergent::MAX_STORED_LEN`].
    pub stored_len: u32,
    /// Where the registry has it; `None` when only tiers that go by id can serve it.
    pub at: Option<PackRange>,
}

/// A chunk as readers see it: with the key that opens and proves it.
#[derive(Debug, Clone)]
pub struct ChunkSpec {
    /// Name, length, place.
    pub chunk: ChunkRef,
    /// From the sealed key table.
    pub key: ChunkKey,
    /// Length of the plaintext, in bytes; at most [`lazyimg_convergent::MAX_CHUNK_LEN`].
    pub plain_len: u32,
}

impl ChunkSpec {
    /// The chunk's name.
    pub fn id(&self) -> &ChunkId {
        &self.chunk.id
    }
}
