//! Chunk: payload → key → ciphertext → id, and back.
//!
//! Convergent encryption after Douceur et al. ("Reclaiming Space from Duplicate Files in a
//! Serverless Distributed File System", 2002) as AWS Lambda uses it (Brooker et al., USENIX ATC
//! 2023), with an authenticated cipher: the GCM tag, under a key from the sealed key table, proves
//! the bytes to the reader, and the id proves them to stores that hold no key.

use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, KeyInit, Nonce, Tag};

use crate::payload::{self, PayloadError};
use crate::secret::{derive, secret32};
use crate::{ChunkId, Digest, Salt};

secret32! {
    /// The AES-256-GCM key of one chunk.
    ChunkKey
}

/// Length of the GCM tag that ends a ciphertext, in bytes.
pub const TAG_LEN: usize = 16;

/// HKDF's info for chunk keys.
const KEY_INFO: &[u8] = b"lazyimg chunk key v1";

/// An encrypted chunk with its name and key.
#[derive(Debug, Clone)]
pub struct Sealed {
    /// SHA-256 of `ciphertext`.
    pub id: ChunkId,
    /// What opens it.
    pub key: ChunkKey,
    /// Encrypted payload and tag.
    pub ciphertext: Vec<u8>,
}

/// Why a chunk does not open.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Shorter than a codec byte and a tag.
    #[error("chunk of {0} bytes is shorter than its tag")]
    TooShort(usize),
    /// The bytes are not those that the key was made for.
    #[error("chunk fails authentication under its key: the bytes are damaged or not this chunk's")]
    Forged,
    /// Authentic, but not what the chunk table says.
    #[error(transparent)]
    Payload(#[from] PayloadError),
}

/// The key of a payload: `HKDF-SHA-256(salt, SHA-256(payload), "lazyimg chunk key v1")`.
pub fn key_of(salt: &Salt, payload: &[u8]) -> ChunkKey {
    ChunkKey::from_bytes(derive(salt.as_bytes(), &Digest::of(payload).0, &[KEY_INFO]))
}

/// Encrypts a payload in place.
///
/// The nonce is zero: a key belongs to exactly one message, since it is derived from it.
pub fn seal(salt: &Salt, payload: Vec<u8>) -> Sealed {
    let key = key_of(salt, &payload);
    let mut ciphertext = payload;
    let tag = cipher(&key)
        .encrypt_inout_detached(&Nonce::default(), &[], ciphertext.as_mut_slice().into())
        .expect("a chunk is far below GCM's limit of 64 GiB");
    ciphertext.extend_from_slice(&tag);
    Sealed {
        id: ChunkId::of(&ciphertext),
        key,
        ciphertext,
    }
}

/// Decrypts and authenticates; the payload.
///
/// # Errors
/// [`OpenError::TooShort`] and [`OpenError::Forged`].
pub fn open_payload(key: &ChunkKey, mut ciphertext: Vec<u8>) -> Result<Vec<u8>, OpenError> {
    let len = ciphertext.len();
    let body = len.checked_sub(TAG_LEN).ok_or(OpenError::TooShort(len))?;
    let tag = Tag::try_from(&ciphertext[body..]).map_err(|_| OpenError::TooShort(len))?;
    ciphertext.truncate(body);
    cipher(key)
        .decrypt_inout_detached(
            &Nonce::default(),
            &[],
            ciphertext.as_mut_slice().into(),
            &tag,
        )
        .map_err(|_| OpenError::Forged)?;
    Ok(ciphertext)
}

/// Decrypts, authenticates and decompresses: plaintext of exactly `expected_len` bytes.
///
/// # Errors
/// See [`OpenError`]; nothing of a chunk that fails is returned.
pub fn open(key: &ChunkKey, ciphertext: &[u8], expected_len: usize) -> Result<Vec<u8>, OpenError> {
    open_owned(key, ciphertext.to_vec(), expected_len)
}

/// [`open`] for a ciphertext that need not be kept: decrypts in place.
///
/// # Errors
/// See [`OpenError`].
pub fn open_owned(
    key: &ChunkKey,
    ciphertext: Vec<u8>,
    expected_len: usize,
) -> Result<Vec<u8>, OpenError> {
    let mut payload = open_payload(key, ciphertext)?;
    if payload.first() == Some(&payload::CODEC_STORED) && payload.len() == expected_len + 1 {
        payload.remove(0);
        return Ok(payload);
    }
    Ok(payload::decode(&payload, expected_len)?)
}

fn cipher(key: &ChunkKey) -> Aes256Gcm {
    Aes256Gcm::new(key.as_bytes().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DomainSecret, golden};
    use proptest::prelude::*;

    fn salt() -> Salt {
        Salt::derive(&DomainSecret::from_bytes([7; 32]), "test", 1)
    }

    #[test]
    fn equal_payloads_give_equal_chunks_and_other_salts_other_chunks() {
        let a = seal(&salt(), vec![0, 1, 2]);
        let b = seal(&salt(), vec![0, 1, 2]);
        let c = seal(&Salt::from_bytes([9; 32]), vec![0, 1, 2]);
        assert_eq!((a.id, &a.ciphertext), (b.id, &b.ciphertext));
        assert_ne!(a.id, c.id);
    }

    #[test]
    fn the_format_is_pinned_by_a_golden_vector() {
        // docs/format.md has the numbers; computed with Python's cryptography, not with this crate.
        let sealed = seal(
            &Salt::from_bytes(golden::array("chunk.salt")),
            golden::bytes("chunk.payload"),
        );
        assert_eq!(*sealed.key.as_bytes(), golden::array("chunk.key"));
        assert_eq!(sealed.ciphertext, golden::bytes("chunk.ciphertext"));
        assert_eq!(sealed.id.0, golden::array("chunk.id"));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_noticed(plain in prop::collection::vec(any::<u8>(), 1..500), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let sealed = seal(&salt(), crate::payload::encode(&plain, 3));
            prop_assert_eq!(open(&sealed.key, &sealed.ciphertext, plain.len()).unwrap(), plain.clone());
            let mut bad = sealed.ciphertext.clone();
            let at = at.index(bad.len());
            bad[at] ^= 1 << bit;
            prop_assert_eq!(open(&sealed.key, &bad, plain.len()), Err(OpenError::Forged));
        }

        #[test]
        fn random_ciphertexts_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..100), len in 0usize..1000) {
            prop_assert!(open(&ChunkKey::from_bytes([1; 32]), &bytes, len).is_err());
        }
    }
}
