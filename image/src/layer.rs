//! One layer's blob, read once: compressed bytes are hashed, decompressed, and hashed again.
//!
//! ```text
//! blob ─▶ [digest] ─▶ gunzip / unzstd ─▶ bounded channel ─▶ [diff id] ─▶ tar reader
//!         └──────── thread of its own ────────┘             └─ caller's thread ─┘
//! ```
//!
//! Decompressing takes about as long as hashing, parsing and storing what comes out, so the two
//! halves run side by side, with a fixed number of buffers between them. An uncompressed layer needs
//! one hash and no thread (its digest is its diff id); a small one is not worth a thread either.
//!
//! Nothing that a layer says may be relied on before [`LayerReader::read`] returned `Ok`: only then
//! both digests were compared.

mod error;
mod unpack;

use std::io::{self, Read};
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};
use lazyimg_convergent::Digest;
use sha2::{Digest as _, Sha256};

use crate::limits::{Limits, within};
use crate::source::LayerDescriptor;
use unpack::Unpacker;

pub use error::{LayerError, LayerProblem};

/// Bytes of one buffer between the decompressing thread and the reader: large enough that a
/// hand-over costs nothing beside filling it.
const BUFFER_BYTES: usize = 256 << 10;

/// Buffers between the two threads (1 MiB): evens out their pace, and bounds the memory.
const BUFFERS: usize = 4;

/// Blobs up to this many compressed bytes are decompressed by the reader itself: a few
/// milliseconds' work, for which a thread is not worth starting.
const INLINE_BYTES: u64 = 256 << 10;

/// How a layer's tar is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip (RFC 1952), one member or several.
    Gzip,
    /// Zstandard (RFC 8878), one frame or several, skippable frames among them.
    Zstd,
}

impl Compression {
    /// What a layer's media type promises; `None` when it is no layer that can be unpacked.
    pub fn of_media_type(media_type: &str) -> Option<Self> {
        let rest = [
            "application/vnd.oci.image.layer.v1.tar",
            "application/vnd.oci.image.layer.nondistributable.v1.tar",
            "application/vnd.docker.image.rootfs.diff.tar",
            "application/vnd.docker.image.rootfs.foreign.diff.tar",
        ]
        .iter()
        .find_map(|prefix| media_type.strip_prefix(prefix))?;
        match rest {
            "" => Some(Self::None),
            "+gzip" | ".gzip" => Some(Self::Gzip),
            "+zstd" | ".zstd" => Some(Self::Zstd),
            _ => None,
        }
    }

    /// What the first bytes of a blob are.
    fn of_magic(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A frame, or a skippable frame.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

impl std::fmt::Display for Compression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "uncompressed tar",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        })
    }
}

/// The uncompressed bytes of a layer. See the module's text.
pub struct LayerReader<'a> {
    number: u32,
    layer: &'a LayerDescriptor,
    limits: &'a Limits,
    feed: Feed<'a>,
    /// `None` when the blob is not compressed.
    diff_id: Option<Sha256>,
    produced: u64,
    /// The digest of the compressed bytes, once all were read.
    ended: Option<Digest>,
}

enum Feed<'a> {
    /// Decompressed when read.
    Inline(Box<dyn Unpack + 'a>),
    /// Decompressed by a thread.
    Piped {
        full: Receiver<Result<Piece, LayerProblem>>,
        empty: Sender<Vec<u8>>,
        piece: Piece,
        read: usize,
    },
}

/// What the decompressing thread sends.
#[derive(Default)]
struct Piece {
    bytes: Vec<u8>,
    /// Compressed bytes read so far.
    consumed: u64,
    /// Set on the last one.
    digest: Option<Digest>,
}

/// A blob being unpacked, whatever it is read from.
trait Unpack {
    /// Fills the buffer as far as there are bytes.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, LayerProblem>;
    /// Compressed bytes read so far.
    fn consumed(&self) -> u64;
    /// The digest of the compressed bytes; right once `fill` did not fill its buffer.
    fn digest(&self) -> Digest;
}

impl<'a> LayerReader<'a> {
    /// Reads the blob of layer `number` (from 0 at the base) from `blob`: `body` gets the
    /// uncompressed bytes and reads as many as it likes; the rest is drained, then the length, the
    /// digest and the diff id are checked.
    ///
    /// When `body` ends early, with an error, this waits for the read of `blob` in flight, which
    /// must therefore end by itself in the end.
    ///
    /// # Errors
    /// The first error of `body`; else a [`LayerError`] when the blob can't be read, is not what its
    /// descriptor says, or exceeds a limit. Inside `body` such errors are `io::Error`s that hold the
    /// [`LayerError`].
    pub fn read<R, T, E>(
        number: u32,
        layer: &'a LayerDescriptor,
        blob: R,
        limits: &'a Limits,
        body: impl FnOnce(&mut LayerReader<'_>) -> Result<T, E>,
    ) -> Result<T, E>
    where
        R: Read + Send,
        E: From<LayerError>,
    {
        let fail = |problem| LayerError::new(number, layer, problem);
        let unpacker = Unpacker::new(layer, blob, limits).map_err(fail)?;
        let compressed = unpacker.compression() != Compression::None;
        thread::scope(|scope| {
            let feed = if compressed && layer.size > INLINE_BYTES {
                let (full_tx, full) = bounded(BUFFERS);
                let (empty, empty_rx) = bounded(BUFFERS);
                scope.spawn(move || pump(unpacker, &full_tx, &empty_rx));
                Feed::Piped {
                    full,
                    empty,
                    piece: Piece::default(),
                    read: 0,
                }
            } else {
                Feed::Inline(Box::new(unpacker))
            };
            let mut reader = LayerReader {
                number,
                layer,
                limits,
                feed,
                diff_id: compressed.then(Sha256::new),
                produced: 0,
                ended: None,
            };
            let result = body(&mut reader)?;
            reader.finish().map_err(fail)?;
            Ok(result)
        })
    }

    /// Reads what `body` left, and compares.
    fn finish(mut self) -> Result<(), LayerProblem> {
        let mut scratch = vec![0; BUFFER_BYTES];
        let actual = loop {
            if self.next(&mut scratch)? == 0
                && let Some(digest) = self.ended
            {
                break digest;
            }
        };
        if actual != self.layer.digest {
            return Err(LayerProblem::Digest { actual });
        }
        let actual = match self.diff_id {
            Some(hasher) => Digest(hasher.finalize().into()),
            None => actual,
        };
        if actual != self.layer.diff_id {
            return Err(LayerProblem::DiffId {
                expected: self.layer.diff_id,
                actual,
            });
        }
        Ok(())
    }

    /// The next bytes, 0 at the end.
    fn next(&mut self, out: &mut [u8]) -> Result<usize, LayerProblem> {
        if self.ended.is_some() && !self.buffered() {
            return Ok(0);
        }
        match &mut self.feed {
            Feed::Inline(unpacker) => {
                let len = unpacker.fill(out)?;
                let consumed = unpacker.consumed();
                if len < out.len() {
                    self.ended = Some(unpacker.digest());
                }
                if let Some(hasher) = &mut self.diff_id {
                    hasher.update(&out[..len]);
                }
                self.account(len, consumed)?;
                Ok(len)
            }
            Feed::Piped {
                full,
                empty,
                piece,
                read,
            } => {
                let mut fresh = None;
                if *read == piece.bytes.len() {
                    let next = full.recv().map_err(|_| LayerProblem::Stopped)??;
                    let used = std::mem::replace(piece, next);
                    // When nobody wants it back, it is freed.
                    let _ = empty.try_send(used.bytes);
                    *read = 0;
                    self.ended = piece.digest;
                    if let Some(hasher) = &mut self.diff_id {
                        hasher.update(&piece.bytes);
                    }
                    fresh = Some((piece.bytes.len(), piece.consumed));
                }
                let len = out.len().min(piece.bytes.len() - *read);
                out[..len].copy_from_slice(&piece.bytes[*read..*read + len]);
                *read += len;
                if let Some((len, consumed)) = fresh {
                    self.account(len, consumed)?;
                }
                Ok(len)
            }
        }
    }

    fn buffered(&self) -> bool {
        match &self.feed {
            Feed::Inline(_) => false,
            Feed::Piped { piece, read, .. } => *read < piece.bytes.len(),
        }
    }

    /// Counts what came out against what went in.
    fn account(&mut self, produced: usize, consumed: u64) -> Result<(), LayerProblem> {
        self.produced += produced as u64;
        let Limits {
            layer_bytes,
            compression_ratio,
            compression_slack_bytes,
            ..
        } = *self.limits;
        within(
            self.produced,
            layer_bytes,
            "bytes in one layer, uncompressed",
            Some("--max-layer-bytes"),
        )?;
        let fair = consumed
            .saturating_mul(compression_ratio)
            .saturating_add(compression_slack_bytes);
        if self.produced > fair {
            within(
                self.produced
                    .div_ceil(consumed.max(1))
                    .max(compression_ratio + 1),
                compression_ratio,
                "uncompressed bytes for each compressed one",
                Some("--max-compression-ratio"),
            )?;
        }
        Ok(())
    }
}

impl Read for LayerReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        self.next(out)
            .map_err(|problem| io::Error::other(LayerError::new(self.number, self.layer, problem)))
    }
}

/// The decompressing thread: ends with the blob, with the first error, or when nobody listens.
fn pump(
    mut unpacker: impl Unpack,
    full: &Sender<Result<Piece, LayerProblem>>,
    empty: &Receiver<Vec<u8>>,
) {
    loop {
        let mut bytes = empty.try_recv().unwrap_or_default();
        bytes.resize(BUFFER_BYTES, 0);
        let result = unpacker.fill(&mut bytes).map(|len| {
            let last = len < bytes.len();
            bytes.truncate(len);
            Piece {
                bytes,
                consumed: unpacker.consumed(),
                digest: last.then(|| unpacker.digest()),
            }
        });
        let more = matches!(&result, Ok(piece) if piece.digest.is_none());
        if full.send(result).is_err() || !more {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
