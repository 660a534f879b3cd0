//! What the layers of an image may ask of the machine that reads them.
//!
//! A layer comes from a stranger: everything whose size it decides is bounded here, before memory
//! or time is spent on it. The defaults let every sensible image through. Each can be raised by a flag
//! of `lazyimg convert`, which the errors of [`crate::tar`], [`crate::layer`] and [`crate::flatten`]
//! name; but not [`PATH_BYTES`], [`NAME_BYTES`] and [`SYMLINK_HOPS`], which are Linux's own: no program
//! could open what lies beyond them, on any file system.

/// Uncompressed bytes of one layer. The largest layers seen (CUDA, model weights) have 20 GiB; at
/// the speed of a conversion 128 GiB are already half an hour of work.
pub const LAYER_BYTES: u64 = 128 << 30;

/// Uncompressed bytes of one image: the apparent sizes of all regular files of all layers, holes
/// included, because each file takes a range of the data space. EROFS numbers blocks of 4 KiB with
/// 32 bits, which ends at 16 TiB; 2 TiB leaves room and keeps the chunk table small. What is not zeros
/// may have some 1.1 TiB, whatever the flag says: [`crate::manifest::MAX_MANIFEST_LEN`] ends there.
pub const IMAGE_BYTES: u64 = 2 << 40;

/// Apparent bytes of one file, holes included. A sparse `lastlog` of a host with large user ids
/// reaches several hundred GiB and costs nothing; nothing sensible reaches 1 TiB.
pub const FILE_BYTES: u64 = 1 << 40;

/// Entries of all layers together, with the parents that no layer mentions. Large images have
/// 300,000; an entry costs roughly 200 to 300 bytes of memory, so the worst case stays near 500 MB.
pub const ENTRIES_PER_IMAGE: u64 = 2_000_000;

/// Bytes of names, link targets and extended attributes of all layers together. They stay in memory
/// until the metadata is written. Half a million labelled files need about 60 MiB.
pub const METADATA_BYTES: u64 = 512 << 20;

/// Layers of one image. Overlayfs stops at 500 lower directories, Docker at 127; a manifest of 4 MiB,
/// the longest that is read, has room for some 20,000.
pub const LAYERS: u32 = 512;

/// Bytes of a path or of a link target: Linux's `PATH_MAX` with its closing zero byte taken off.
/// No program could open a longer one by name.
pub const PATH_BYTES: usize = 4095;

/// Bytes of one name in a directory: Linux's `NAME_MAX`; EROFS could not be listed with more.
pub const NAME_BYTES: usize = 255;

/// Directories above an entry. `PATH_BYTES` allows 2,047; no build writes more than a hundred, and
/// each level costs a lookup on every open.
pub const PATH_DEPTH: usize = 1024;

/// Symbolic links that are followed while the parents of one entry are resolved: Linux's own limit
/// (`MAXSYMLINKS`), after which it says ELOOP.
pub const SYMLINK_HOPS: usize = 40;

/// Names that are looked up while the parents of one entry are resolved, those inside link targets
/// included. Ordinary entries need ten; without a limit, 40 hops through targets of 4 KiB would make
/// each entry cost 80,000 lookups.
pub const RESOLVE_STEPS: usize = 4096;

/// Bytes of all extended attributes of one entry, names and values. Linux limits one value to
/// 64 KiB (`XATTR_SIZE_MAX`) and the list of names to as much; EROFS holds at most 256 KiB inline.
pub const XATTR_BYTES_PER_ENTRY: usize = 64 << 10;

/// Extended attributes of one entry. A file with a label, ACLs and capabilities has four.
pub const XATTR_COUNT_PER_ENTRY: usize = 256;

/// Bytes of one PAX extended header or GNU long name. Go's `archive/tar`, which containerd and
/// Docker read layers with, refuses more than 1 MiB as well.
pub const PAX_BYTES: usize = 1 << 20;

/// Data extents of one sparse file. Each takes 16 bytes of memory while the file is read.
pub const SPARSE_EXTENTS: usize = 1 << 20;

/// Uncompressed bytes for each compressed byte of a layer, beyond [`COMPRESSION_SLACK_BYTES`]. ELF and text
/// reach 3 to 5, a layer of logs 30; deflate cannot exceed 1,032, zstd has no limit at all.
pub const COMPRESSION_RATIO: u64 = 200;

/// Uncompressed bytes that are not held against [`COMPRESSION_RATIO`]: a layer with one preallocated file
/// of zeros is honest, and a gigabyte takes seconds, not hours.
pub const COMPRESSION_SLACK_BYTES: u64 = 1 << 30;

/// The window a zstd frame may ask for, as a power of two: 128 MiB, what `zstd --long=27` writes and
/// `zstd -d` accepts without a flag. It is memory that the decompressor must hold.
pub const ZSTD_WINDOW_LOG: u32 = 27;

/// A layer asked for more than a limit allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {limit} {what}{}", hint(self.flag))]
pub struct Exceeded {
    /// What there is too much of, with its unit.
    pub what: &'static str,
    /// The limit that was in force.
    pub limit: u64,
    /// The flag that raises it; `None` where the limit is Linux's own.
    pub flag: Option<&'static str>,
}

fn hint(flag: Option<&'static str>) -> String {
    flag.map_or_else(
        || ", which is as much as Linux can use".to_owned(),
        |flag| format!(": if you trust the image, raise the limit with {flag}"),
    )
}

/// `Ok` while `actual` is within `limit`; `flag` raises it (`None`: nothing does).
pub(crate) fn within(
    actual: u64,
    limit: u64,
    what: &'static str,
    flag: Option<&'static str>,
) -> Result<(), Exceeded> {
    if actual <= limit {
        Ok(())
    } else {
        Err(Exceeded { what, limit, flag })
    }
}

/// The limits in force for one conversion; `Default` takes the constants of this module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// See [`LAYER_BYTES`].
    pub layer_bytes: u64,
    /// See [`IMAGE_BYTES`].
    pub image_bytes: u64,
    /// See [`FILE_BYTES`].
    pub file_bytes: u64,
    /// See [`ENTRIES_PER_IMAGE`].
    pub entries_per_image: u64,
    /// See [`METADATA_BYTES`].
    pub metadata_bytes: u64,
    /// See [`LAYERS`].
    pub layers: u32,
    /// See [`PATH_BYTES`].
    pub path_bytes: usize,
    /// See [`NAME_BYTES`].
    pub name_bytes: usize,
    /// See [`PATH_DEPTH`].
    pub path_depth: usize,
    /// See [`SYMLINK_HOPS`].
    pub symlink_hops: usize,
    /// See [`RESOLVE_STEPS`].
    pub resolve_steps: usize,
    /// See [`XATTR_BYTES_PER_ENTRY`].
    pub xattr_bytes_per_entry: usize,
    /// See [`XATTR_COUNT_PER_ENTRY`].
    pub xattr_count_per_entry: usize,
    /// See [`PAX_BYTES`].
    pub pax_bytes: usize,
    /// See [`SPARSE_EXTENTS`].
    pub sparse_extents: usize,
    /// See [`COMPRESSION_RATIO`].
    pub compression_ratio: u64,
    /// See [`COMPRESSION_SLACK_BYTES`].
    pub compression_slack_bytes: u64,
    /// See [`ZSTD_WINDOW_LOG`].
    pub zstd_window_log: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            layer_bytes: LAYER_BYTES,
            image_bytes: IMAGE_BYTES,
            file_bytes: FILE_BYTES,
            entries_per_image: ENTRIES_PER_IMAGE,
            metadata_bytes: METADATA_BYTES,
            layers: LAYERS,
            path_bytes: PATH_BYTES,
            name_bytes: NAME_BYTES,
            path_depth: PATH_DEPTH,
            symlink_hops: SYMLINK_HOPS,
            resolve_steps: RESOLVE_STEPS,
            xattr_bytes_per_entry: XATTR_BYTES_PER_ENTRY,
            xattr_count_per_entry: XATTR_COUNT_PER_ENTRY,
            pax_bytes: PAX_BYTES,
            sparse_extents: SPARSE_EXTENTS,
            compression_ratio: COMPRESSION_RATIO,
            compression_slack_bytes: COMPRESSION_SLACK_BYTES,
            zstd_window_log: ZSTD_WINDOW_LOG,
        }
    }
}
