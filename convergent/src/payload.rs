//! Payload: what is encrypted. One codec byte, then the chunk's bytes in that codec.

use std::io::Cursor;

/// Codec byte: the bytes follow as they are.
pub const CODEC_STORED: u8 = 0;
/// Codec byte: one zstd frame (RFC 8878) follows.
pub const CODEC_ZSTD: u8 = 1;

/// zstd's level for chunks. Measured on chunks of 512 KiB of Debian's `/usr/lib`, one core:
///
/// | level | ratio | MB/s |
/// |---|---|---|
/// | -1 | 2.64 | 415 |
/// | 1 | 2.98 | 386 |
/// | 2 | 3.11 | 333 |
/// | 3 | 3.23 | 295 |
///
/// Level 3 saves 8 % of the bytes and takes 30 % longer, and conversions are bound by it.
pub const DEFAULT_LEVEL: i32 = 1;

/// Why a payload is not what its chunk table says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PayloadError {
    /// No codec byte.
    #[error("payload is empty")]
    Empty,
    /// A codec of a newer version.
    #[error("payload has codec {0}, which this version does not know: update lazyimg")]
    UnknownCodec(u8),
    /// Too many or too few bytes came out.
    #[error("payload holds {actual} bytes, its chunk table says {expected}")]
    Length {
        /// What came out, in bytes.
        actual: usize,
        /// What the chunk table says, in bytes.
        expected: usize,
    },
    /// The zstd frame is broken or longer than the chunk table says.
    #[error("payload's zstd frame does not decode to {expected} bytes: {cause}")]
    Zstd {
        /// What the chunk table says, in bytes.
        expected: usize,
        /// zstd's own words.
        cause: String,
    },
}

/// A compressor that is used again: contexts are costly to make.
pub struct Encoder {
    zstd: zstd::bulk::Compressor<'static>,
}

impl Encoder {
    /// An encoder at zstd `level` (1 to 19).
    ///
    /// # Errors
    /// When zstd can't allocate its context.
    pub fn new(level: i32) -> std::io::Result<Self> {
        Ok(Self {
            zstd: zstd::bulk::Compressor::new(level)?,
        })
    }

    /// The payload of `plain`: zstd if that saves more than 1/32, else stored.
    ///
    /// Deterministic for one version of zstd; a new version may give other bytes, and with them
    /// another key, so that no key ever encrypts two messages.
    pub fn encode(&mut self, plain: &[u8]) -> Vec<u8> {
        // Room for the worst case, not filled with zeros first.
        let bound = zstd::zstd_safe::compress_bound(plain.len());
        let mut out = Cursor::new(Vec::with_capacity(1 + bound));
        out.get_mut().push(CODEC_ZSTD);
        out.set_position(1);
        // Decoding costs more than the 3 % that a barely compressible chunk saves.
        let worth = plain.len() - plain.len() / 32;
        let compressed = self.zstd.compress_to_buffer(plain, &mut out);
        let mut out = out.into_inner();
        match compressed {
            Ok(len) if len < worth => {
                debug_assert_eq!(out.len(), 1 + len);
            }
            _ => {
                out.clear();
                out.push(CODEC_STORED);
                out.extend_from_slice(plain);
            }
        }
        out
    }
}

/// [`Encoder::encode`] with a context of its own.
pub fn encode(plain: &[u8], level: i32) -> Vec<u8> {
    let mut encoder = Encoder::new(level).expect("zstd context of a few hundred KiB");
    encoder.encode(plain)
}

/// The plaintext of a payload.
///
/// # Errors
/// When the payload does not decode to exactly `expected_len` bytes; never allocates more.
pub fn decode(payload: &[u8], expected_len: usize) -> Result<Vec<u8>, PayloadError> {
    let (&codec, body) = payload.split_first().ok_or(PayloadError::Empty)?;
    match codec {
        CODEC_STORED if body.len() == expected_len => Ok(body.to_vec()),
        CODEC_STORED => Err(PayloadError::Length {
            actual: body.len(),
            expected: expected_len,
        }),
        CODEC_ZSTD => {
            let plain =
                zstd::bulk::decompress(body, expected_len).map_err(|e| PayloadError::Zstd {
                    expected: expected_len,
                    cause: e.to_string(),
                })?;
            if plain.len() == expected_len {
                Ok(plain)
            } else {
                Err(PayloadError::Length {
                    actual: plain.len(),
                    expected: expected_len,
                })
            }
        }
        other => Err(PayloadError::UnknownCodec(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::bytes;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decode_gives_back_what_was_encoded(plain in prop::collection::vec(any::<u8>(), 0..5000), repeat in 1usize..20) {
            let plain = plain.repeat(repeat);
            prop_assert_eq!(decode(&encode(&plain, 3), plain.len()).unwrap(), plain);
        }

        #[test]
        fn random_payloads_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), len in 0usize..5000) {
            let _ = decode(&bytes, len);
        }
    }

    #[test]
    fn what_does_not_compress_is_stored() {
        let noise: Vec<u8> = (0..4096u32)
            .flat_map(|i| crate::Digest::of(&i.to_le_bytes()).0)
            .collect();
        let payload = encode(&noise, 3);
        assert_eq!((payload[0], payload.len()), (CODEC_STORED, noise.len() + 1));
    }

    #[test]
    fn zstd_is_taken_only_where_it_saves_more_than_a_32nd() {
        let noise: Vec<u8> = (0..128u32)
            .flat_map(|i| crate::Digest::of(&i.to_le_bytes()).0)
            .collect();
        let mut seen = [false; 2];
        // More and more zeros at the end, through the threshold byte by byte.
        for zeros in 0..256 {
            let mut plain = noise.clone();
            plain[4096 - zeros..].fill(0);
            let frame = zstd::bulk::compress(&plain, 3).unwrap().len();
            let payload = encode(&plain, 3);
            let compressed = payload[0] == CODEC_ZSTD;
            assert_eq!(compressed, frame + 4096 / 32 < 4096, "{frame}");
            seen[usize::from(compressed)] = true;
        }
        assert_eq!(seen, [true; 2]);
    }

    #[test]
    fn a_payload_of_each_codec_is_pinned_by_a_golden_vector() {
        // Made with the `zstd` program, version 1.5.4, and not by this crate.
        assert_eq!(
            decode(&bytes("payload.compressed"), 4096).unwrap(),
            [b'a'; 4096]
        );
        assert_eq!(
            decode(&bytes("chunk.payload"), 13).unwrap(),
            b"hello lazyimg"
        );
    }

    #[test]
    fn a_bomb_is_refused_without_inflating_it() {
        let bomb = encode(&vec![0; 1 << 20], 3);
        assert!(matches!(
            decode(&bomb, 4096),
            Err(PayloadError::Zstd { .. })
        ));
    }

    #[test]
    fn a_wrong_length_and_a_new_codec_are_refused() {
        assert_eq!(
            decode(&[0, 1, 2], 3),
            Err(PayloadError::Length {
                actual: 2,
                expected: 3
            })
        );
        assert_eq!(decode(&[9, 1], 1), Err(PayloadError::UnknownCodec(9)));
        assert_eq!(decode(&[], 0), Err(PayloadError::Empty));
    }
}
