//! Hashes and decompresses a blob.

use std::io::{self, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use lazyimg_convergent::Digest;
use sha2::{Digest as _, Sha256};

use super::{Compression, LayerProblem, Unpack};
use crate::limits::{Exceeded, Limits, within};
use crate::source::LayerDescriptor;

/// Compressed bytes that are read at once.
const READ_BYTES: usize = 128 << 10;

/// A blob that is hashed, checked against its descriptor's length, and decompressed.
pub(super) struct Unpacker<R: Read> {
    compression: Compression,
    decoder: Decoder<R>,
    window_log: u32,
}

enum Decoder<R: Read> {
    None(BufReader<Raw<R>>),
    Gzip(Box<MultiGzDecoder<BufReader<Raw<R>>>>),
    Zstd(zstd::stream::read::Decoder<'static, BufReader<Raw<R>>>),
}

impl<R: Read> Unpacker<R> {
    pub(super) fn new(
        layer: &LayerDescriptor,
        blob: R,
        limits: &Limits,
    ) -> Result<Self, LayerProblem> {
        let compression = Compression::of_media_type(&layer.media_type)
            .ok_or_else(|| LayerProblem::MediaType(layer.media_type.clone()))?;
        within(
            layer.size,
            limits.layer_bytes,
            "bytes in one layer",
            Some("--max-layer-bytes"),
        )?;
        let mut raw = Raw::new(blob, layer.size);
        let found = Compression::of_magic(raw.peek()?);
        if found != compression {
            return Err(LayerProblem::Magic {
                declared: compression,
                found,
            });
        }
        let raw = BufReader::with_capacity(READ_BYTES, raw);
        let decoder = match compression {
            Compression::None => Decoder::None(raw),
            Compression::Gzip => Decoder::Gzip(Box::new(MultiGzDecoder::new(raw))),
            Compression::Zstd => {
                let set_up = || {
                    let mut decoder = zstd::stream::read::Decoder::with_buffer(raw)?;
                    decoder.window_log_max(limits.zstd_window_log)?;
                    io::Result::Ok(decoder)
                };
                Decoder::Zstd(
                    set_up().map_err(|cause| LayerProblem::Decompress { compression, cause })?,
                )
            }
        };
        Ok(Self {
            compression,
            decoder,
            window_log: limits.zstd_window_log,
        })
    }

    pub(super) fn compression(&self) -> Compression {
        self.compression
    }

    fn raw(&self) -> &Raw<R> {
        match &self.decoder {
            Decoder::None(raw) => raw.get_ref(),
            Decoder::Gzip(decoder) => decoder.get_ref().get_ref(),
            Decoder::Zstd(decoder) => decoder.get_ref().get_ref(),
        }
    }

    fn problem(&self, cause: io::Error) -> LayerProblem {
        match cause.downcast::<LayerProblem>() {
            Ok(problem) => problem,
            // The only way zstd's binding tells errors apart.
            Err(cause) if cause.to_string().contains("too much memory") => {
                LayerProblem::Limit(Exceeded {
                    what: "bits of zstd window size",
                    limit: u64::from(self.window_log),
                    flag: Some("--max-zstd-window-log"),
                })
            }
            Err(cause) => LayerProblem::Decompress {
                compression: self.compression,
                cause,
            },
        }
    }
}

impl<R: Read> Unpack for Unpacker<R> {
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, LayerProblem> {
        let mut len = 0;
        while len < buffer.len() {
            let rest = &mut buffer[len..];
            let result = match &mut self.decoder {
                Decoder::None(raw) => raw.read(rest),
                Decoder::Gzip(decoder) => decoder.read(rest),
                Decoder::Zstd(decoder) => decoder.read(rest),
            };
            match result {
                Ok(0) => break,
                Ok(n) => len += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.problem(e)),
            }
        }
        Ok(len)
    }

    fn consumed(&self) -> u64 {
        self.raw().read
    }

    fn digest(&self) -> Digest {
        Digest(self.raw().hasher.clone().finalize().into())
    }
}

/// The compressed bytes: hashed as they pass, and exactly as many as the descriptor states.
struct Raw<R> {
    inner: R,
    hasher: Sha256,
    read: u64,
    expected: u64,
    /// The first bytes, until they were read.
    head: Vec<u8>,
}

impl<R: Read> Raw<R> {
    fn new(inner: R, expected: u64) -> Self {
        Self {
            inner,
            hasher: Sha256::new(),
            read: 0,
            expected,
            head: Vec::new(),
        }
    }

    /// The first four bytes, or all when there are fewer; they stay to be read.
    fn peek(&mut self) -> Result<&[u8], LayerProblem> {
        self.inner
            .by_ref()
            .take(4)
            .read_to_end(&mut self.head)
            .map_err(LayerProblem::Read)?;
        Ok(&self.head)
    }
}

impl<R: Read> Read for Raw<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let len = if self.head.is_empty() {
            match self.inner.read(out) {
                Ok(len) => len,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => return Err(e),
                Err(e) => return Err(io::Error::other(LayerProblem::Read(e))),
            }
        } else {
            let len = out.len().min(self.head.len());
            out[..len].copy_from_slice(&self.head[..len]);
            self.head.drain(..len);
            len
        };
        self.hasher.update(&out[..len]);
        self.read += len as u64;
        if self.read > self.expected {
            return Err(io::Error::other(LayerProblem::TooLong {
                expected: self.expected,
            }));
        }
        if len == 0 && !out.is_empty() && self.read < self.expected {
            return Err(io::Error::other(LayerProblem::Truncated {
                expected: self.expected,
                actual: self.read,
            }));
        }
        Ok(len)
    }
}
