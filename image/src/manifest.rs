//! The image manifest: chunk table and pack table in clear, key table sealed.
//!
//! One blob, so that a mount gets all it must know in one request. `docs/format.md` has the bytes.
//! Parsing checks everything that can be checked without a key; [`Manifest::open`] then proves the
//! chunk table by opening the key table that is bound to its digest. Nothing of a manifest that was
//! not opened may be used to answer a read.

mod codec;
#[cfg(test)]
mod tests;

use lazyimg_convergent::{ChunkId, ChunkKey, Digest, TenantKey, seal};

pub use codec::{HEADER_LEN, MAGIC, VERSION};

/// Block size of both spaces, in bytes: EROFS's and the page cache's.
pub const BLOCK: u64 = 4096;

/// The largest manifest that is read, in bytes (192 MiB): 2.4 million chunks, 1.1 TiB of data in cuts
/// of 512 KiB. It bounds what a hostile registry can make a host hold.
pub const MAX_MANIFEST_LEN: u64 = 192 << 20;

/// What is true of the whole image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Length of the metadata space in bytes; a multiple of [`BLOCK`].
    pub meta_len: u64,
    /// Length of the data space in bytes; a multiple of [`BLOCK`].
    pub data_len: u64,
    /// Digest of the OCI image manifest that was converted.
    pub image: Digest,
    /// Whether any file has extended attributes.
    pub has_xattrs: bool,
    /// Regular files, hard links counted once.
    pub files: u64,
    /// Bytes in regular files, hard links counted once, holes included.
    pub file_bytes: u64,
    /// Public name of the salt.
    pub salt_id: [u8; 16],
    /// Epoch of the salt.
    pub epoch: u32,
    /// Dedup domain of the salt.
    pub domain: String,
}

/// One entry of the chunk table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Length in its space, in blocks of [`BLOCK`] bytes.
    pub blocks: u32,
    /// The stored chunk; `None` is a hole.
    pub stored: Option<Stored>,
}

/// How a chunk is stored, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// SHA-256 of the ciphertext.
    pub id: ChunkId,
    /// Length of the ciphertext in bytes.
    pub len: u32,
    /// Index into [`Manifest::packs`].
    pub pack: u32,
    /// Byte offset in the pack.
    pub offset: u64,
}

/// A pack: a blob that holds ciphertexts one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pack {
    /// Digest of the blob.
    pub digest: Digest,
    /// Its length in bytes.
    pub len: u64,
}

/// A manifest whose keys are sealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// What is true of the whole image.
    pub header: Header,
    /// Chunks of the metadata space, in order, without gaps; never holes.
    pub meta: Vec<Entry>,
    /// Chunks of the data space, in order, without gaps.
    pub data: Vec<Entry>,
    /// The packs.
    pub packs: Vec<Pack>,
    /// The sealed key table: the keys of all stored chunks, metadata first.
    pub sealed_keys: Vec<u8>,
}

/// Why a manifest can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Bytes that no lazyimg wrote.
    #[error("lazyimg manifest is damaged at byte {at}: {what}; convert the image again")]
    Malformed {
        /// Byte offset.
        at: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// A newer format.
    #[error(
        "lazyimg manifest has version {0}, this lazyimg reads version {VERSION}: update lazyimg or convert the image again"
    )]
    Version(u32),
    /// A feature this version does not know.
    #[error(
        "lazyimg manifest needs feature bits {0:#x}, which this lazyimg does not know: update lazyimg"
    )]
    Features(u32),
    /// More than this version reads.
    #[error("lazyimg manifest of {0} bytes is larger than {MAX_MANIFEST_LEN} bytes")]
    TooLarge(u64),
    /// More than any version reads: nothing could mount the image.
    #[error(
        "image has too many chunks: its lazyimg manifest would have {0} bytes, and none above \
         {MAX_MANIFEST_LEN} bytes can be mounted (about 1.1 TiB of data); split the image"
    )]
    TooManyChunks(u64),
    /// The key table does not open.
    #[error(transparent)]
    Unseal(#[from] seal::UnsealError),
    /// The key table opens but does not fit.
    #[error("key table holds {actual} bytes, {expected} were expected; convert the image again")]
    KeyCount {
        /// Bytes in the key table.
        actual: usize,
        /// 32 for each stored chunk.
        expected: usize,
    },
}

/// A chunk with its place in its space and, unless it is a hole, all that it takes to read it.
#[derive(Debug, Clone)]
pub struct Chunk {
    /// Byte offset in its space.
    pub start: u64,
    /// Plaintext length in bytes; holes may be longer than any chunk.
    pub len: u64,
    /// `None` for a hole.
    pub body: Option<ChunkBody>,
}

/// What it takes to fetch and open a chunk.
#[derive(Debug, Clone)]
pub struct ChunkBody {
    /// SHA-256 of the ciphertext.
    pub id: ChunkId,
    /// Length of the ciphertext in bytes.
    pub stored_len: u32,
    /// Its key.
    pub key: ChunkKey,
    /// The pack that holds it.
    pub pack: Digest,
    /// Byte offset in the pack.
    pub pack_offset: u64,
}

/// A manifest that was proven under a tenant's key.
#[derive(Debug, Clone)]
pub struct OpenManifest {
    header: Header,
    root: Digest,
    packs: Vec<Pack>,
    meta: Vec<Chunk>,
    data: Vec<Chunk>,
}

impl Manifest {
    /// The bytes of the manifest.
    pub fn to_bytes(&self) -> Vec<u8> {
        codec::write(self)
    }

    /// Reads a manifest.
    ///
    /// # Errors
    /// See [`ManifestError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        codec::read(bytes)
    }

    /// Whether a manifest of so many entries (chunks and holes), stored entries and packs can be read
    /// back: to be asked before an image is stored.
    ///
    /// # Errors
    /// [`ManifestError::TooManyChunks`].
    pub fn check_counts(entries: u64, stored: u64, packs: u64) -> Result<(), ManifestError> {
        match codec::len_of(entries, stored, packs) {
            len if len > MAX_MANIFEST_LEN => Err(ManifestError::TooManyChunks(len)),
            _ => Ok(()),
        }
    }

    /// [`Manifest::check_counts`] of this one.
    ///
    /// # Errors
    /// [`ManifestError::TooManyChunks`].
    pub fn check_len(&self) -> Result<(), ManifestError> {
        let entries = self.meta.len() + self.data.len();
        let (stored, packs) = (self.stored().count(), self.packs.len());
        Self::check_counts(entries as u64, stored as u64, packs as u64)
    }

    /// Digest of header and chunk table: the image's root. Equal roots are equal trees and bytes.
    pub fn root(&self) -> Digest {
        Digest::of(&codec::write_table(self))
    }

    /// Seals the keys of all stored chunks (metadata first, then data) into this manifest.
    pub fn seal_keys<'a>(&mut self, tenant: &TenantKey, keys: impl Iterator<Item = &'a ChunkKey>) {
        let mut table = zeroize::Zeroizing::new(Vec::new());
        for key in keys {
            table.extend_from_slice(key.as_bytes());
        }
        self.sealed_keys = seal::seal(tenant, &self.root(), &table);
    }

    /// Rotation: the same image under another tenant key. No chunk changes.
    ///
    /// # Errors
    /// When the key table does not open under `old`.
    pub fn reseal(&mut self, old: &TenantKey, new: &TenantKey) -> Result<(), ManifestError> {
        self.sealed_keys = seal::reseal(old, new, &self.root(), &self.sealed_keys)?;
        Ok(())
    }

    /// All entries that are stored, metadata first.
    pub fn stored(&self) -> impl Iterator<Item = &Stored> {
        self.meta
            .iter()
            .chain(&self.data)
            .filter_map(|e| e.stored.as_ref())
    }

    /// Proves the chunk table and takes out the keys.
    ///
    /// # Errors
    /// [`ManifestError::Unseal`] with the wrong key or altered tables.
    pub fn open(self, tenant: &TenantKey) -> Result<OpenManifest, ManifestError> {
        let root = self.root();
        let keys = seal::open(tenant, &root, &self.sealed_keys)?;
        let expected = self.stored().count() * 32;
        if keys.len() != expected {
            return Err(ManifestError::KeyCount {
                actual: keys.len(),
                expected,
            });
        }
        let mut keys = keys.chunks_exact(32);
        let mut place = |entries: &[Entry]| {
            let mut start = 0;
            let mut chunks = Vec::with_capacity(entries.len());
            for entry in entries {
                let len = u64::from(entry.blocks) * BLOCK;
                let body = entry.stored.map(|stored| {
                    let mut key = zeroize::Zeroizing::new([0; 32]);
                    key.copy_from_slice(keys.next().expect("keys were counted"));
                    ChunkBody {
                        id: stored.id,
                        stored_len: stored.len,
                        key: ChunkKey::from_bytes(*key),
                        pack: self.packs[stored.pack as usize].digest,
                        pack_offset: stored.offset,
                    }
                });
                chunks.push(Chunk { start, len, body });
                start += len;
            }
            chunks
        };
        let meta = place(&self.meta);
        let data = place(&self.data);
        Ok(OpenManifest {
            header: self.header,
            root,
            packs: self.packs,
            meta,
            data,
        })
    }
}

impl OpenManifest {
    /// What is true of the whole image.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Digest of header and chunk table.
    pub fn root(&self) -> Digest {
        self.root
    }

    /// The packs.
    pub fn packs(&self) -> &[Pack] {
        &self.packs
    }

    /// Chunks of the metadata space by offset, without gaps.
    pub fn meta_chunks(&self) -> &[Chunk] {
        &self.meta
    }

    /// Chunks of the data space by offset, without gaps; holes included.
    pub fn data_chunks(&self) -> &[Chunk] {
        &self.data
    }

    /// Bytes of ciphertext that the image consists of; a chunk that occurs twice counts once.
    pub fn stored_bytes(&self) -> u64 {
        let mut seen = std::collections::HashSet::new();
        self.meta
            .iter()
            .chain(&self.data)
            .filter_map(|c| c.body.as_ref())
            .filter(|b| seen.insert(b.id))
            .map(|b| u64::from(b.stored_len))
            .sum()
    }

    /// The chunk of `chunks` that covers byte `offset` of its space.
    pub fn chunk_at(chunks: &[Chunk], offset: u64) -> Option<&Chunk> {
        let at = chunks.partition_point(|c| c.start + c.len <= offset);
        chunks.get(at)
    }
}
