//! What the catalog takes and gives.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use lazyimg_convergent::{ChunkId, Digest, KeyId};
use serde::{Deserialize, Serialize, Serializer};

use crate::engine::RootId;

/// The name of a tenant: 1 to 64 of `a-z`, `0-9`, `-` and `_`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantName(Arc<str>);

/// A text that is no [`TenantName`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no name of a tenant: 1 to 64 of a-z, 0-9, - and _")]
pub struct ParseTenantError(String);

impl TenantName {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TenantName {
    type Err = ParseTenantError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match is_plain_name(text) {
            true => Ok(Self(text.into())),
            false => Err(ParseTenantError(text.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for TenantName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for TenantName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// 1 to 64 of `a-z`, `0-9`, `-` and `_`: nothing that means anything in a document's name.
pub(super) fn is_plain_name(text: &str) -> bool {
    let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
    (1..=64).contains(&text.len()) && text.bytes().all(ok)
}

/// What became of a chunk that was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// The tenant has put it now.
    New,
    /// The tenant had before, and it is there.
    Known,
    /// The store's copy was gone or bad; this one is in its place.
    Repaired,
}

/// What became of a manifest that was put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ManifestPut {
    /// The image is live from now on.
    Created,
    /// The same manifest was there; the image is live.
    Known,
    /// Nothing was kept: the tenant has to put these chunks first. Each once, in the manifest's order;
    /// the search ends soon after [`super::MAX_MISSING`].
    Missing(Vec<ChunkId>),
}

/// A live manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ManifestInfo {
    /// The tenant key that it is sealed for.
    #[serde(serialize_with = "as_text")]
    pub key: KeyId,
    /// Its length.
    pub bytes: u64,
    /// The root that it lies in.
    #[serde(serialize_with = "as_text")]
    pub root: RootId,
}

/// What must be true for a reference to be changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Nothing.
    Always,
    /// `If-None-Match: *`: there is none yet.
    Absent,
    /// `If-Match`: it is still the one with this ETag, which is written without its quotes.
    Match(String),
}

/// What a tag meant when the image was converted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reference {
    /// The image.
    #[serde(serialize_with = "as_text")]
    pub image: Digest,
    /// When it was said, in seconds since 1970.
    pub at: u64,
    /// Names this state of it; without quotes.
    #[serde(skip)]
    pub etag: String,
}

/// Where a root is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RootState {
    /// Takes chunks and manifests.
    Active,
    /// What lives is copied out of it.
    Retired,
    /// No live image is left.
    Expired,
    /// Its chunks and documents go.
    Deleting,
}

impl fmt::Display for RootState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Active => "active",
            Self::Retired => "retired",
            Self::Expired => "expired",
            Self::Deleting => "deleting",
        })
    }
}

/// A root, as `GET /v1/admin/roots` tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RootInfo {
    /// Its number.
    #[serde(serialize_with = "as_text")]
    pub root: RootId,
    /// Its state.
    pub state: RootState,
    /// Since when, in seconds since 1970; `None` if a crash left that unsaid: the next pass notes it.
    pub since: Option<u64>,
    /// When its last alarm was acknowledged, in seconds since 1970.
    pub acknowledged: Option<u64>,
    /// Since when alarms do not stop its deletion, in seconds since 1970.
    pub alarms_ignored: Option<u64>,
    /// What stops its deletion, unless alarms are ignored.
    pub alarm: Option<Alarm>,
}

/// A read that found its chunk in an expired root only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alarm {
    /// When the first such read came, in seconds since 1970.
    pub at: u64,
    /// Who read.
    pub tenant: String,
    /// What, 64 hex digits.
    pub chunk: String,
    /// The instance of the store that answered.
    pub instance: String,
}

/// How to collect garbage; the body of `POST /v1/admin/gc`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GcOptions {
    /// Change nothing, only report what would be done.
    pub dry_run: bool,
    /// How long a root is kept after it has expired; 7 days if not given.
    pub grace_seconds: Option<u64>,
    /// Drop manifests that nobody has asked for in so long, instead of moving them.
    pub unused_seconds: Option<u64>,
}

/// What a pass did, or with `dry_run` would have done.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct GcReport {
    /// Whether nothing was changed.
    pub dry_run: bool,
    /// For each root but the active one, oldest first.
    pub roots: Vec<GcRoot>,
}

/// What a pass did with one root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GcRoot {
    /// Its number.
    #[serde(serialize_with = "as_text")]
    pub root: RootId,
    /// Its state before the pass.
    pub before: RootState,
    /// Its state after the pass; `None` when it is gone.
    pub after: Option<RootState>,
    /// Whether an alarm stops its deletion.
    pub alarm: bool,
    /// What kept the pass from doing all that it should with this root; the next pass tries again.
    pub error: Option<String>,
    /// For how many seconds yet nothing may be done with it.
    pub wait_seconds: u64,
    /// Manifests that were moved to the active root.
    pub manifests_moved: u64,
    /// Manifests that nobody has asked for in too long, and that were dropped.
    pub manifests_dropped: u64,
    /// Chunks that were copied for it.
    pub chunks_copied: u64,
    /// Bytes in them.
    pub bytes_copied: u64,
    /// Manifests that could not be moved, because chunks of theirs are gone or damaged. The root stays
    /// until these chunks are put again or the images deleted.
    pub stuck: Vec<Stuck>,
}

/// A manifest that can't be moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stuck {
    /// Whose.
    pub tenant: TenantName,
    /// Of which image.
    #[serde(serialize_with = "as_text")]
    pub image: Digest,
    /// For which tenant key.
    #[serde(serialize_with = "as_text")]
    pub key: KeyId,
    /// How many of its chunks are gone or damaged; 0 when the manifest itself is.
    pub chunks: u64,
}

/// What the store holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// The engine's name.
    pub engine: String,
    /// Bytes of disk or memory that the engine uses, where it can tell.
    pub engine_bytes: Option<u64>,
    /// Each root, oldest first.
    pub roots: Vec<RootStats>,
    /// Each tenant that has put something, by name.
    pub tenants: Vec<TenantStats>,
}

/// What a root holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RootStats {
    /// Its number, state and alarm.
    #[serde(flatten)]
    pub info: RootInfo,
    /// Chunks in it.
    pub chunks: u64,
    /// Bytes in them.
    pub chunk_bytes: u64,
    /// False when counting stopped at [`super::MAX_COUNTED`] of something: there is more.
    pub counted_all: bool,
    /// Live images in it; the same image of two tenants counts twice.
    pub images: u64,
}

/// What a tenant uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TenantStats {
    /// Its name.
    pub tenant: TenantName,
    /// Bytes of chunks and manifests that it has put; each once, whoever else has put the same.
    pub bytes: u64,
}

fn as_text<T: fmt::Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_tenants_are_plain() {
        for good in ["a", "team-1", "x_y", &"a".repeat(64)] {
            assert_eq!(good.parse::<TenantName>().unwrap().to_string(), good);
        }
        for bad in ["", "A", "a/b", "a.b", "..", "a b", "ä", &"a".repeat(65)] {
            assert!(bad.parse::<TenantName>().is_err(), "{bad}");
        }
    }
}
