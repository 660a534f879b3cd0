//! The words of the store's protocol, version 1: `docs/store.md`. Client and server share this file;
//! it does no I/O.

use lazyimg_convergent::{ChunkId, Digest, MAX_STORED_LEN};

/// Chunks asked for in one request, at most.
pub const MAX_BATCH: usize = 4096;

/// Media type of a list of ids: 32 bytes each, nothing between.
pub const IDS_TYPE: &str = "application/vnd.lazyimg.ids.v1";

/// Media type of the answer to get many: frames.
pub const FRAMES_TYPE: &str = "application/vnd.lazyimg.chunks.v1";

/// Length of a frame's head, in bytes.
pub const FRAME_HEAD: usize = 8;

/// Request header: how long, in milliseconds, the store may wait for chunks that somebody else is
/// bringing. Without it the store does not wait.
pub const WAIT_HEADER: &str = "lazyimg-wait-ms";

/// Request header of put: `1` means that the store's copy gave wrong bytes and should be looked at.
pub const REPAIR_HEADER: &str = "lazyimg-repair";

/// Request header of a put of a manifest: `1` means that it is only kept for others to find, and
/// protects no chunk.
pub const CACHED_HEADER: &str = "lazyimg-cached";

/// Answer header: who brings a reference or a manifest that is not there, `yours` or `coming`.
pub const LEASE_HEADER: &str = "lazyimg-lease";

/// Header of every answer: names the request in the store's log.
pub const REQUEST_ID_HEADER: &str = "lazyimg-request-id";

/// The longest that a store waits for [`WAIT_HEADER`], in milliseconds.
pub const MAX_WAIT_MS: u64 = 30_000;

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// The chunk follows.
    Chunk,
    /// The store does not have it, or the asker may not read it.
    Missing,
    /// The store does not have it, and expects the asker to bring it: nobody else is.
    Yours,
    /// Somebody else is bringing it; it had not come when the wait was over.
    Coming,
    /// The store could not read it now.
    Failed,
    /// The store's copy is damaged: whoever has the chunk should put it with [`REPAIR_HEADER`].
    Damaged,
    /// The answer is complete. An answer without this one was cut off.
    End,
}

impl FrameKind {
    fn code(self) -> u8 {
        match self {
            Self::Chunk => 0,
            Self::Missing => 1,
            Self::Yours => 2,
            Self::Coming => 3,
            Self::Failed => 4,
            Self::Damaged => 5,
            Self::End => 255,
        }
    }

    fn of(code: u8) -> Option<Self> {
        let all = [
            Self::Chunk,
            Self::Missing,
            Self::Yours,
            Self::Coming,
            Self::Failed,
            Self::Damaged,
            Self::End,
        ];
        all.into_iter().find(|kind| kind.code() == code)
    }
}

/// A profile's greatest length, in bytes.
pub const MAX_PROFILE: usize = 1 << 20;

/// The name of the profile of an image that holds the index through which the image is named: `index-`
/// and half of the digest's hex digits.
pub fn index_profile(index: &Digest) -> String {
    format!("index-{}", &index.hex()[..32])
}

/// A frame's head: one byte kind, three zero bytes, and the length of what follows as a big-endian
/// u32. Only [`FrameKind::Chunk`] has a length other than zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHead {
    /// What it says.
    pub kind: FrameKind,
    /// Length of the ciphertext that follows, in bytes.
    pub len: u32,
}

impl FrameHead {
    /// The head of a frame that carries no chunk.
    pub fn bare(kind: FrameKind) -> Self {
        Self { kind, len: 0 }
    }

    /// As bytes.
    pub fn to_bytes(self) -> [u8; FRAME_HEAD] {
        let mut head = [0; FRAME_HEAD];
        head[0] = self.kind.code();
        head[4..].copy_from_slice(&self.len.to_be_bytes());
        head
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`WireError`] for what no version 1 store says.
    pub fn parse(head: [u8; FRAME_HEAD]) -> Result<Self, WireError> {
        let [code, zeros @ .., _, _, _, _] = head;
        let [_, _, _, _, len @ ..] = head;
        let len = u32::from_be_bytes(len);
        let kind = FrameKind::of(code).ok_or(WireError::Kind(code))?;
        let fits = match kind {
            FrameKind::Chunk => len > 0 && len as usize <= MAX_STORED_LEN,
            _ => len == 0,
        };
        if zeros != [0; 3] || !fits {
            return Err(WireError::Head { kind, len });
        }
        Ok(Self { kind, len })
    }
}

/// Bytes that are not the protocol's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A frame of a kind that version 1 does not have.
    #[error("a frame of unknown kind {0}")]
    Kind(u8),
    /// A frame's head contradicts itself.
    #[error("a frame of kind {kind:?} with {len} bytes")]
    Head {
        /// Its kind.
        kind: FrameKind,
        /// Its length.
        len: u32,
    },
    /// A list of ids that is empty, too long, or not of whole ids.
    #[error("a list of {0} bytes is not one of 1 to {MAX_BATCH} ids of 32 bytes")]
    Ids(usize),
}

/// A list of ids as the body of a request.
pub fn write_ids<'a>(ids: impl IntoIterator<Item = &'a ChunkId>) -> Vec<u8> {
    ids.into_iter().flat_map(|id| id.0).collect()
}

/// The ids of a request's body.
///
/// # Errors
/// [`WireError::Ids`].
pub fn parse_ids(body: &[u8]) -> Result<Vec<ChunkId>, WireError> {
    let (ids, rest) = body.as_chunks::<32>();
    if ids.is_empty() || ids.len() > MAX_BATCH || !rest.is_empty() {
        return Err(WireError::Ids(body.len()));
    }
    Ok(ids.iter().map(|id| ChunkId(*id)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_come_back_as_they_were_written() {
        for (kind, len) in [
            (FrameKind::Chunk, 1),
            (FrameKind::Chunk, MAX_STORED_LEN as u32),
            (FrameKind::Missing, 0),
            (FrameKind::Yours, 0),
            (FrameKind::Coming, 0),
            (FrameKind::Failed, 0),
            (FrameKind::Damaged, 0),
            (FrameKind::End, 0),
        ] {
            let head = FrameHead { kind, len };
            assert_eq!(FrameHead::parse(head.to_bytes()), Ok(head));
        }
    }

    #[test]
    fn heads_that_contradict_themselves_are_refused() {
        for head in [
            [9, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0, 0, 1],
            [0, 0, 0, 0, 255, 255, 255, 255],
            [1, 0, 0, 0, 0, 0, 0, 1],
        ] {
            assert!(FrameHead::parse(head).is_err(), "{head:?}");
        }
    }

    #[test]
    fn lists_hold_whole_ids_and_not_too_many() {
        let ids = [ChunkId([1; 32]), ChunkId([2; 32])];
        assert_eq!(parse_ids(&write_ids(&ids)).unwrap(), ids);
        for len in [0, 31, 33, 32 * (MAX_BATCH + 1)] {
            assert_eq!(parse_ids(&vec![0; len]), Err(WireError::Ids(len)));
        }
    }
}
