//! An opened image as the front ends see it: two spaces of bytes, each cut into chunks.

use std::ops::Range;

use lazyimg_chunkstore::{ChunkRef, ChunkSpec, PackRange};
use lazyimg_convergent::{Digest, MAX_CHUNK_LEN};
use lazyimg_image::manifest::{Chunk, OpenManifest};

/// A piece of a space: one chunk, or a hole.
#[derive(Debug, Clone)]
pub struct Extent {
    /// Where it begins in its space, in bytes.
    pub start: u64,
    /// Its length in bytes; holes may be longer than any chunk.
    pub len: u64,
    /// What reads it; `None` for a hole, which reads as zeros.
    pub spec: Option<ChunkSpec>,
}

impl Extent {
    fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// The chunk tables of an image, ready for reading.
#[derive(Debug, Clone)]
pub struct ImageView {
    meta: Vec<Extent>,
    data: Vec<Extent>,
    /// Digest of the image that was converted.
    pub image: Digest,
    /// Whether any file has extended attributes.
    pub has_xattrs: bool,
    /// Bytes in regular files, hard links counted once, holes included.
    pub file_bytes: u64,
    /// Bytes of ciphertext the image consists of; a chunk that occurs twice counts once.
    pub stored_bytes: u64,
}

/// Chunk tables that can't be read from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ViewError {
    /// Chunks overlap or leave a gap.
    #[error(
        "chunk table of the {space} space has a gap or an overlap at byte {at}; convert the image again"
    )]
    Gap {
        /// `metadata` or `data`.
        space: &'static str,
        /// Byte offset in the space.
        at: u64,
    },
    /// A stored chunk longer than the format allows.
    #[error(
        "chunk of {len} bytes in the {space} space, at most {MAX_CHUNK_LEN} are allowed; convert the image again"
    )]
    TooLong {
        /// `metadata` or `data`.
        space: &'static str,
        /// Plaintext length in bytes.
        len: u64,
    },
    /// The metadata space has no chunk, or a hole.
    #[error("the metadata space is empty or has a hole; convert the image again")]
    NoMetadata,
}

/// A part of one extent that a range of a space touches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Index of the extent in its space.
    pub extent: usize,
    /// Bytes inside the extent.
    pub within: Range<u64>,
}

impl ImageView {
    /// A view of the given tables; each covers its space from 0 without gaps.
    ///
    /// # Errors
    /// See [`ViewError`].
    pub fn new(
        meta: Vec<Extent>,
        data: Vec<Extent>,
        image: Digest,
        has_xattrs: bool,
    ) -> Result<Self, ViewError> {
        check("metadata", &meta)?;
        check("data", &data)?;
        if meta.is_empty() || meta.iter().any(|e| e.spec.is_none()) {
            return Err(ViewError::NoMetadata);
        }
        Ok(Self {
            meta,
            data,
            image,
            has_xattrs,
            file_bytes: 0,
            stored_bytes: 0,
        })
    }

    /// The view of a manifest that was opened.
    ///
    /// # Errors
    /// See [`ViewError`].
    pub fn of_manifest(manifest: &OpenManifest) -> Result<Self, ViewError> {
        let header = manifest.header();
        let extents = |chunks: &[Chunk]| chunks.iter().map(extent_of).collect();
        let view = Self::new(
            extents(manifest.meta_chunks()),
            extents(manifest.data_chunks()),
            header.image,
            header.has_xattrs,
        )?;
        Ok(Self {
            file_bytes: header.file_bytes,
            stored_bytes: manifest.stored_bytes(),
            ..view
        })
    }

    /// Length of the metadata space in bytes.
    pub fn meta_len(&self) -> u64 {
        self.meta.last().map_or(0, Extent::end)
    }

    /// Length of the data space in bytes.
    pub fn data_len(&self) -> u64 {
        self.data.last().map_or(0, Extent::end)
    }

    /// Chunks of the metadata space, in order; never holes.
    pub fn meta(&self) -> &[Extent] {
        &self.meta
    }

    /// Chunks and holes of the data space, in order.
    pub fn data(&self) -> &[Extent] {
        &self.data
    }

    /// Everything that is stored, metadata first.
    pub fn specs(&self) -> impl Iterator<Item = &ChunkSpec> {
        self.meta
            .iter()
            .chain(&self.data)
            .filter_map(|e| e.spec.as_ref())
    }

    /// Which parts of which extents the bytes `range` of the data space lie in, in order. Covers
    /// less than `range` where the space ends before it.
    pub fn segments(&self, range: Range<u64>) -> impl Iterator<Item = Segment> + '_ {
        let first = extent_at(&self.data, range.start);
        self.data[first..]
            .iter()
            .enumerate()
            .take_while(move |(_, extent)| extent.start < range.end)
            .map(move |(i, extent)| Segment {
                extent: first + i,
                within: range.start.max(extent.start) - extent.start
                    ..range.end.min(extent.end()) - extent.start,
            })
    }
}

/// Index of the extent that covers `offset`; the number of extents beyond the end.
pub(crate) fn extent_at(extents: &[Extent], offset: u64) -> usize {
    extents.partition_point(|e| e.end() <= offset)
}

fn check(space: &'static str, extents: &[Extent]) -> Result<(), ViewError> {
    let mut at = 0_u64;
    for extent in extents {
        if extent.start != at || extent.len == 0 {
            return Err(ViewError::Gap { space, at });
        }
        if let Some(spec) = &extent.spec
            && (extent.len > MAX_CHUNK_LEN as u64 || u64::from(spec.plain_len) != extent.len)
        {
            return Err(ViewError::TooLong {
                space,
                len: extent.len,
            });
        }
        at = at
            .checked_add(extent.len)
            .ok_or(ViewError::Gap { space, at })?;
    }
    Ok(())
}

fn extent_of(chunk: &Chunk) -> Extent {
    let spec = chunk.body.as_ref().map(|body| ChunkSpec {
        chunk: ChunkRef {
            id: body.id,
            stored_len: body.stored_len,
            at: Some(PackRange {
                pack: body.pack,
                offset: body.pack_offset,
            }),
        },
        key: body.key.clone(),
        // A length that does not fit is far beyond MAX_CHUNK_LEN: `check` refuses it.
        plain_len: u32::try_from(chunk.len).unwrap_or(u32::MAX),
    });
    Extent {
        start: chunk.start,
        len: chunk.len,
        spec,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hole(start: u64, len: u64) -> Extent {
        Extent {
            start,
            len,
            spec: None,
        }
    }

    fn chunk(start: u64, len: u32) -> Extent {
        let spec = ChunkSpec {
            chunk: ChunkRef {
                id: Default::default(),
                stored_len: len,
                at: None,
            },
            key: lazyimg_convergent::ChunkKey::from_bytes([0; 32]),
            plain_len: len,
        };
        Extent {
            start,
            len: u64::from(len),
            spec: Some(spec),
        }
    }

    fn view(data: Vec<Extent>) -> Result<ImageView, ViewError> {
        ImageView::new(vec![chunk(0, 4096)], data, Digest::default(), false)
    }

    #[test]
    fn a_range_is_split_at_extent_borders_and_ends_with_the_space() {
        let view = view(vec![chunk(0, 8192), hole(8192, 4096), chunk(12288, 4096)]).unwrap();
        let split = |range| {
            view.segments(range)
                .map(|s| (s.extent, s.within))
                .collect::<Vec<_>>()
        };
        assert_eq!(split(0..1), [(0, 0..1)]);
        assert_eq!(
            split(8191..12289),
            [(0, 8191..8192), (1, 0..4096), (2, 0..1)]
        );
        assert_eq!(split(12288..99999), [(2, 0..4096)]);
        assert_eq!(split(16384..16385), []);
    }

    #[test]
    fn tables_with_gaps_overlaps_or_giants_are_refused() {
        assert!(matches!(
            view(vec![hole(4096, 4096)]),
            Err(ViewError::Gap { at: 0, .. })
        ));
        assert!(matches!(
            view(vec![hole(0, 8192), hole(4096, 4096)]),
            Err(ViewError::Gap { at: 8192, .. })
        ));
        assert!(matches!(view(vec![hole(0, 0)]), Err(ViewError::Gap { .. })));
        assert!(matches!(
            view(vec![chunk(0, 2 << 20)]),
            Err(ViewError::TooLong { .. })
        ));
        let without = ImageView::new(vec![], vec![], Digest::default(), false);
        assert!(matches!(without, Err(ViewError::NoMetadata)));
    }
}
