//! The OCI artifact that a converted image is: where it lies beside the image, and how it is found.
//!
//! An OCI image manifest (image spec 1.1, "Guidelines for Artifact Usage") with
//! `artifactType` [`ARTIFACT_TYPE`], the image as its `subject`, and as layers the lazyimg manifest
//! first and the packs after it. It is listed as a referrer of the image, and, where the image was
//! named by a tag, also tagged `<tag>-lazyimg`: a mount asks for that tag while it resolves the
//! image's own, which saves it two round trips. The tag is a hint: it is followed only if its
//! subject is the image that the registry names in the same moment.

mod open;
mod push;

use lazyimg_convergent::{Digest, KeyId};
use serde::{Deserialize, Serialize};

use crate::source::{Descriptor, SourceError};

pub use open::{Opened, find, find_all, open, open_manifest, read_manifest};
pub use push::{PushEvent, Pushed, delete, push, reseal};

/// `artifactType` of a converted image.
pub const ARTIFACT_TYPE: &str = "application/vnd.lazyimg.image.v1";
/// Media type of the lazyimg manifest.
pub const MANIFEST_TYPE: &str = "application/vnd.lazyimg.manifest.v1";
/// Media type of a pack.
pub const PACK_TYPE: &str = "application/vnd.lazyimg.pack.v1";
/// Annotation: which tenant key opens the artifact.
pub const KEY_ID_ANNOTATION: &str = "dev.lazyimg.key-id";
/// Annotation: the image's root, digest of header and chunk table.
pub const ROOT_ANNOTATION: &str = "dev.lazyimg.root";
/// What follows an image's tag in the tag of its artifact.
pub const TAG_SUFFIX: &str = "-lazyimg";

pub(crate) const OCI_MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
pub(crate) const EMPTY: &[u8] = b"{}";
/// Blobs that an artifact may list: 64 Ki packs of 64 MiB are 4 TiB.
const MAX_BLOBS: usize = 65_536;

/// Why an artifact could not be found, read or written.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// The registry or layout failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Nobody converted the image.
    #[error(
        "image {image} in {repository} has no lazyimg artifact: run `lazyimg convert` on it first"
    )]
    NotConverted {
        /// The image manifest's digest.
        image: Digest,
        /// Where it was looked for.
        repository: String,
    },
    /// It was converted by others only.
    #[error(
        "image {image} was converted under tenant key(s) {theirs}, and yours is {yours}: \
         use the key that it was converted with (--key-file, --key-command), or convert it under yours"
    )]
    OtherKey {
        /// The image manifest's digest.
        image: Digest,
        /// Keys that would open one of its artifacts.
        theirs: String,
        /// The key at hand.
        yours: KeyId,
    },
    /// The artifact's manifest is not one of ours.
    #[error("lazyimg artifact {digest} is malformed: {what}; convert the image again")]
    Malformed {
        /// Digest of the artifact.
        digest: Digest,
        /// What is wrong.
        what: String,
    },
    /// The lazyimg manifest can't be read or opened.
    #[error("lazyimg artifact {digest}: {cause}")]
    Manifest {
        /// Digest of the artifact.
        digest: Digest,
        /// Why.
        #[source]
        cause: crate::manifest::ManifestError,
    },
    /// The artifact describes another image than it says.
    #[error(
        "lazyimg artifact {digest} was made for image {inside}, and is listed for {outside}: the registry is wrong or hostile; convert the image again"
    )]
    WrongImage {
        /// Digest of the artifact.
        digest: Digest,
        /// The image inside the sealed manifest.
        inside: Digest,
        /// The image that it was found at.
        outside: Digest,
    },
    /// A working file failed.
    #[error("working file of the conversion: {0}")]
    Spool(#[from] std::io::Error),
}

/// The artifact's manifest as JSON has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Document {
    pub schema_version: u32,
    pub media_type: String,
    #[serde(default)]
    pub artifact_type: String,
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
    pub subject: Option<Descriptor>,
    #[serde(default)]
    pub annotations: std::collections::BTreeMap<String, String>,
}

impl Document {
    pub(crate) fn parse(digest: Digest, bytes: &[u8]) -> Result<Self, ArtifactError> {
        let malformed = |what: &str| ArtifactError::Malformed {
            digest,
            what: what.into(),
        };
        let document: Self = serde_json::from_slice(bytes)
            .map_err(|e| malformed(&format!("not a manifest: {e}")))?;
        if document.artifact_type != ARTIFACT_TYPE {
            return Err(malformed("its artifactType is another one"));
        }
        if document.subject.is_none() {
            return Err(malformed("it has no subject"));
        }
        match document.layers.first() {
            Some(first) if first.media_type == MANIFEST_TYPE => {}
            _ => return Err(malformed("its first layer is not a lazyimg manifest")),
        }
        if document.layers.len() > MAX_BLOBS {
            return Err(malformed("it lists too many blobs"));
        }
        Ok(document)
    }

    /// The lazyimg manifest's descriptor.
    pub(crate) fn manifest(&self) -> &Descriptor {
        &self.layers[0]
    }

    /// The image that it says it is for.
    pub(crate) fn image(&self) -> Option<Digest> {
        self.subject.as_ref().map(|s| s.digest)
    }
}

/// The tag of the artifact of an image tagged `tag`; `None` when it would be too long.
pub(crate) fn artifact_tag(tag: &str) -> Option<String> {
    (tag.len() + TAG_SUFFIX.len() <= crate::reference::MAX_TAG_LEN)
        .then(|| format!("{tag}{TAG_SUFFIX}"))
}
