//! Why the catalog did not do it.

use lazyimg_convergent::{Digest, KeyId};

use crate::engine::{EngineError, RootId};

use super::types::{RootState, TenantName};

/// Why the catalog did not do it. What each means in HTTP: the module that serves it.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The engine did not.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The tenant has no room left.
    #[error(
        "tenant {tenant} uses {used} of {quota} bytes, {wanted} more do not fit: delete images, or ask \
         who runs the store for more"
    )]
    Quota {
        /// Whose.
        tenant: TenantName,
        /// Bytes it uses.
        used: u64,
        /// Bytes it may use.
        quota: u64,
        /// Bytes that were to come.
        wanted: u64,
    },
    /// Not the manifest that the request says.
    #[error("the manifest is refused: {0}")]
    BadManifest(#[from] BadManifest),
    /// A name that the store does not keep.
    #[error("{text:?} is no {what}: {rule}")]
    BadName {
        /// What it was to name.
        what: &'static str,
        /// As it came; cut off if long.
        text: String,
        /// What such a name is like.
        rule: &'static str,
    },
    /// Longer than the store takes.
    #[error("{what} of {len} bytes, {limit} are allowed")]
    TooLarge {
        /// What it is.
        what: &'static str,
        /// Its length in bytes.
        len: u64,
        /// The longest, in bytes.
        limit: u64,
    },
    /// More of them than the store takes.
    #[error("there are {limit} {what} already: delete some first")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
    /// A profile of an image that is not live.
    #[error("image {0} is not live in this store: put its manifest first")]
    NotLive(Digest),
    /// No such root.
    #[error("there is no root {0}: GET /v1/admin/roots lists them")]
    NoSuchRoot(RootId),
    /// The step is not allowed in the root's state.
    #[error("root {root} is {state}: {why}")]
    Conflict {
        /// Which root.
        root: RootId,
        /// Its state.
        state: RootState,
        /// What is not possible, and what to do.
        why: &'static str,
    },
    /// Another pass is under way.
    #[error("garbage collection is under way: ask again when it is done")]
    GcUnderWay,
    /// `If-Match` or `If-None-Match` does not hold.
    #[error("it was changed by somebody else: read it again, then decide")]
    Precondition,
    /// Roots change faster than the request gets done.
    #[error("the store's roots changed several times during the request; try again")]
    RootsMove,
    /// A document of the store that can't be read.
    #[error("the store's document {name} is damaged: {why}")]
    Damaged {
        /// Its name in the engine.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// The catalog can't be opened like this.
    #[error("{0}")]
    Setup(String),
}

impl CatalogError {
    /// Whether something that lies in the store can't be read, and could not a moment later either.
    pub(super) fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Damaged { .. } | Self::Engine(EngineError::Damaged(_))
        )
    }
}

/// What is wrong with a manifest.
#[derive(Debug, thiserror::Error)]
pub enum BadManifest {
    /// It can't be parsed.
    #[error(transparent)]
    Parse(#[from] lazyimg_image::manifest::ManifestError),
    /// It is another image's.
    #[error("it is of image {actual}, not of {asked}")]
    Image {
        /// What its header says.
        actual: Digest,
        /// What the request says.
        asked: Digest,
    },
    /// It is sealed under another key.
    #[error("its keys are sealed for tenant key {actual}, not for {asked}")]
    Key {
        /// What its key table says.
        actual: KeyId,
        /// What the request says.
        asked: KeyId,
    },
    /// One chunk with two lengths.
    #[error("it says {says} bytes for chunk {chunk}, which has {actual}")]
    Length {
        /// Which chunk.
        chunk: lazyimg_convergent::ChunkId,
        /// What the manifest says.
        says: u32,
        /// What the store has.
        actual: u32,
    },
}
