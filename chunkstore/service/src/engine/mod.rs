//! Where a store keeps what it holds: chunks under roots, and small documents.
//!
//! An engine knows nothing of tenants, rights or liveness. It keeps what it has acknowledged, through
//! any crash of the process; what it gives back is checked by whoever reads it. One store process owns
//! an embedded engine; any number of processes may share the others.

pub mod config;
pub mod embedded;
pub mod hot;
#[cfg(any(test, feature = "testing"))]
pub mod memory;
pub mod objects;
mod part;
pub mod redis;

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_convergent::{ChunkId, Digest, MAX_STORED_LEN};

pub use part::FilePart;

/// The number of a root: a namespace of chunks and documents that is deleted as a whole. Later roots
/// have higher numbers. Written `r` and eight decimal digits or more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootId(pub NonZeroU32);

impl RootId {
    /// The root of a store in which nothing was ever rotated.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// The root after this one; `None` after four thousand million.
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

impl fmt::Display for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{:08}", self.0)
    }
}

/// A text that is no [`RootId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no root: roots are written like r00000001")]
pub struct ParseRootError(pub String);

impl FromStr for RootId {
    type Err = ParseRootError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = || {
            let digits = text.strip_prefix('r').filter(|d| d.len() >= 8)?;
            let root = Self(digits.parse().ok()?);
            // One way to write each.
            (root.to_string() == text).then_some(root)
        };
        number().ok_or_else(|| ParseRootError(text.to_owned()))
    }
}

/// Why an engine did not do it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EngineError {
    /// There is no room: a full disk, a quota of the object store.
    #[error("the store's engine is full: {0}; add room, or delete images and collect garbage")]
    Full(String),
    /// It can't be reached or is in trouble; it may work a moment later.
    #[error("the store's engine is unavailable: {0}")]
    Unavailable(String),
    /// What it holds is damaged.
    #[error("the store's engine is damaged: {0}")]
    Damaged(String),
    /// The engine can't be used like this: wrong settings, a directory of something else, a name
    /// or a length out of bounds.
    #[error("{0}")]
    Setup(String),
}

/// When [`Engine::put_doc`] writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Whatever is there.
    Always,
    /// Only where nothing is.
    Absent,
}

/// A document's longest name, in bytes: object stores have less than 512 for it and a prefix. Names are
/// of `a-z`, `0-9`, `-`, `.`, `_` and `/`; no part between `/` is empty, `.` or `..`.
pub const MAX_DOC_NAME: usize = 384;

/// A document's greatest length, in bytes.
pub const MAX_DOC_LEN: usize = 64 << 20;

/// Whether a document may have this name. Every engine looks before it does anything.
pub(crate) fn check_doc_name(name: &str) -> Result<(), EngineError> {
    let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b);
    // No empty part and no `.` or `..`: object stores and file systems read those as something else.
    let is_part = |part: &str| part.bytes().all(is_plain) && !["", ".", ".."].contains(&part);
    if name.len() <= MAX_DOC_NAME && name.split('/').all(is_part) {
        return Ok(());
    }
    Err(EngineError::Setup(format!(
        "{name:?} cannot name a document: names have 1 to {MAX_DOC_NAME} bytes of a-z, 0-9, `-`, \
         `.`, `_`, and parts between `/` that are not empty, `.` or `..`"
    )))
}

/// Whether a document may have this name and this content.
pub(crate) fn check_doc_put(name: &str, bytes: &[u8]) -> Result<(), EngineError> {
    check_doc_name(name)?;
    if bytes.len() > MAX_DOC_LEN {
        return Err(EngineError::Setup(format!(
            "the document {name} has {} bytes, the most is {MAX_DOC_LEN}",
            bytes.len()
        )));
    }
    Ok(())
}

/// Whether a chunk can have this length.
pub(crate) fn check_chunk_put(id: &ChunkId, bytes: &[u8]) -> Result<(), EngineError> {
    if (1..=MAX_STORED_LEN).contains(&bytes.len()) {
        return Ok(());
    }
    Err(EngineError::Setup(format!(
        "chunk {} has {} bytes: chunks have 1 to {MAX_STORED_LEN}",
        id.hex(),
        bytes.len()
    )))
}

/// Reads [`ChunkId::hex`].
pub(crate) fn parse_chunk_id(hex: &str) -> Option<ChunkId> {
    let digest: Digest = format!("sha256:{hex}").parse().ok()?;
    Some(ChunkId(digest.0))
}

/// What holds chunks and documents.
///
/// Everything that returns `Ok` has happened and survives the end of the process. All methods may be
/// called at once from many tasks, and again after a failure. Cancelling a call leaves its effect open.
#[async_trait]
pub trait Engine: Send + Sync {
    /// A short name for logs and metrics: `embedded`, `s3`, `redis`.
    fn name(&self) -> &str;

    /// Keeps a chunk whose id **the caller has verified**; true when it was not there before. A copy
    /// that is there is not looked at: see [`Engine::replace_chunk`].
    async fn put_chunk(
        &self,
        root: RootId,
        id: &ChunkId,
        bytes: Bytes,
    ) -> Result<bool, EngineError>;

    /// Puts a chunk in the place of a copy that was found bad.
    async fn replace_chunk(
        &self,
        root: RootId,
        id: &ChunkId,
        bytes: Bytes,
    ) -> Result<(), EngineError>;

    /// A chunk, as it lies there; damage that the engine notices by itself is [`EngineError::Damaged`].
    async fn get_chunk(&self, root: RootId, id: &ChunkId) -> Result<Option<Bytes>, EngineError>;

    /// The same of the copy that is kept, whatever faster copies there are beside it: for who wants to
    /// know whether that one is good.
    async fn get_kept_chunk(
        &self,
        root: RootId,
        id: &ChunkId,
    ) -> Result<Option<Bytes>, EngineError> {
        self.get_chunk(root, id).await
    }

    /// A chunk that can be sent as it lies in a file, without waiting for a disk; `None` says nothing
    /// but that [`Engine::get_chunk`] has to be asked. Unlike there the copy was checked at some time
    /// since the start, not now. Does not block.
    fn ready_chunk(&self, root: RootId, id: &ChunkId) -> Option<FilePart> {
        let _ = (root, id);
        None
    }

    /// For each id its length in bytes, or `None` when the root does not have it.
    async fn stat_chunks(
        &self,
        root: RootId,
        ids: &[ChunkId],
    ) -> Result<Vec<Option<u32>>, EngineError>;

    /// Chunks of a root in the order of their ids, from the one after `after` on; at most `limit`. Fewer
    /// than `limit` means that these were the last.
    async fn list_chunks(
        &self,
        root: RootId,
        after: Option<&ChunkId>,
        limit: usize,
    ) -> Result<Vec<(ChunkId, u32)>, EngineError>;

    /// Deletes every chunk of a root and gives the room back; may be repeated after a failure.
    async fn remove_chunks(&self, root: RootId) -> Result<(), EngineError>;

    /// Keeps a document; false when it was there and `when` is [`When::Absent`].
    async fn put_doc(&self, name: &str, bytes: Bytes, when: When) -> Result<bool, EngineError>;

    /// Keeps several small documents. Not atomic: after a failure some may be there.
    async fn put_docs(&self, docs: Vec<(String, Bytes)>) -> Result<(), EngineError>;

    /// A document.
    async fn get_doc(&self, name: &str) -> Result<Option<Bytes>, EngineError>;

    /// Which of these documents are there.
    async fn has_docs(&self, names: &[String]) -> Result<Vec<bool>, EngineError>;

    /// Deletes a document; one that is not there is fine.
    async fn delete_doc(&self, name: &str) -> Result<(), EngineError>;

    /// Names of documents that begin with `prefix`, in their order, from the one after `after` on; at
    /// most `limit`. Fewer than `limit` means that these were the last.
    async fn list_docs(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<String>, EngineError>;

    /// Deletes every document whose name begins with `prefix`; may be repeated after a failure.
    async fn remove_docs(&self, prefix: &str) -> Result<(), EngineError>;

    /// Whether it can take and give now. Cheap: asked every few seconds.
    async fn check(&self) -> Result<(), EngineError>;

    /// Bytes of disk or memory that it uses, where it can tell.
    async fn used_bytes(&self) -> Result<Option<u64>, EngineError>;

    /// Ends cleanly; nothing is asked of it afterwards.
    async fn close(&self);
}
