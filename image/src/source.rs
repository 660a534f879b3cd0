//! Where images come from and artifacts go to: one repository in a registry, or one OCI layout.
//!
//! [`Repository`] is the facade over [`crate::registry`] and [`crate::oci_layout`]. All that names
//! bytes by digest is verified here, except streams and ranges, which say so: their readers hash
//! what they read anyway (layers), or check pieces of it (chunks).
//!
//! What a mount needs costs one round trip per call on a warm connection:
//! [`Repository::resolve_digest`] (which manifest is it), then [`Repository::referrers`],
//! [`Repository::manifest`], [`Repository::blob_range`]. Calls made at the same time use separate
//! connections; [`Repository::preconnect`] opens some while the first answer is awaited.

mod blob_stream;
pub mod document;
pub mod error;
pub mod options;
mod resolve;

use bytes::Bytes;
use futures_util::Stream;
use lazyimg_convergent::Digest;

pub use blob_stream::BlobStream;
pub use document::Descriptor;
pub use error::SourceError;
pub use options::{Parallelism, RetryPolicy, SourceOptions, Timeouts};
pub use resolve::{IndexDocument, LayerDescriptor, ResolvedDigest, ResolvedImage};

use crate::oci_layout::Layout;
use crate::platform::Platform;
use crate::reference::{ImageRef, ManifestRef};
use crate::registry::Registry;

/// One repository of a registry, or one OCI layout. Cheap to clone; clones share connections,
/// tokens and what was learned of the registry.
#[derive(Clone)]
pub struct Repository {
    backend: Backend,
    platform: Option<Platform>,
}

#[derive(Clone)]
enum Backend {
    Registry(Registry),
    Layout(Layout),
}

/// A manifest document as it was received, its digest verified.
#[derive(Debug, Clone)]
pub struct Manifest {
    /// The exact bytes.
    pub bytes: Bytes,
    /// Media type, from the server or the document itself.
    pub media_type: String,
    /// SHA-256 of `bytes`.
    pub digest: Digest,
}

/// What became of a pushed manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pushed {
    /// SHA-256 of the manifest.
    pub digest: Digest,
    /// The registry itself lists the manifest as a referrer of its `subject`. When false,
    /// [`Repository::add_referrer`] has to.
    pub subject_listed: bool,
}

/// What became of a manifest that was to be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deletion {
    /// It is gone now.
    Deleted,
    /// It was not there.
    WasGone,
    /// The registry deletes nothing: it is still there.
    Unsupported,
}

macro_rules! forward {
    ($self:ident, $name:ident($($arg:expr),*)) => {
        match &$self.backend {
            Backend::Registry(registry) => registry.$name($($arg),*).await,
            Backend::Layout(layout) => layout.$name($($arg),*).await,
        }
    };
}

impl Repository {
    /// Opens the repository that `reference` lies in. No request is made; a layout need not exist
    /// yet when it is only written to.
    ///
    /// # Errors
    /// [`SourceError::Setup`] when TLS can't be set up.
    pub fn open(reference: &ImageRef, options: &SourceOptions) -> Result<Self, SourceError> {
        let backend = match reference {
            ImageRef::Registry(reference) => Backend::Registry(Registry::open(reference, options)?),
            ImageRef::Layout { dir, .. } => Backend::Layout(Layout::new(dir)),
        };
        Ok(Self {
            backend,
            platform: options.platform.clone(),
        })
    }

    /// Whether it is a registry's, and not a directory of this host.
    pub fn is_remote(&self) -> bool {
        matches!(self.backend, Backend::Registry(_))
    }

    /// For messages: `registry/repository` or `oci:DIR`.
    pub fn name(&self) -> String {
        match &self.backend {
            Backend::Registry(registry) => registry.name().to_owned(),
            Backend::Layout(layout) => layout.name(),
        }
    }

    /// Opens connections in the background, so that the requests that follow the first answer find
    /// warm ones. Costs the caller nothing and never fails.
    pub fn preconnect(&self, connections: usize) {
        if let Backend::Registry(registry) = &self.backend {
            registry.preconnect(connections);
        }
    }

    /// Which image manifest `reference` means on the chosen platform. One request for an image
    /// manifest or an index (the manifest an index points to is not fetched), more for nested indexes.
    ///
    /// # Errors
    /// Not found, no such platform, or what [`Repository::manifest`] says.
    pub async fn resolve_digest(
        &self,
        reference: impl Into<ManifestRef>,
    ) -> Result<ResolvedDigest, SourceError> {
        resolve::digest(self, reference.into()).await
    }

    /// The image that `reference` means: manifest, configuration, layers. Two requests, three with
    /// an index.
    ///
    /// # Errors
    /// Also when a layer can't be converted (foreign, encrypted, too many, diff ids missing).
    pub async fn resolve(
        &self,
        reference: impl Into<ManifestRef>,
    ) -> Result<ResolvedImage, SourceError> {
        resolve::image(self, reference.into()).await
    }

    /// Gets a manifest of at most `max` bytes, digest verified.
    ///
    /// # Errors
    /// Not found, too large, or not the bytes the digest promises.
    pub async fn manifest(
        &self,
        reference: impl Into<ManifestRef>,
        max: u64,
    ) -> Result<Manifest, SourceError> {
        let reference = reference.into();
        forward!(self, manifest(&reference, max))
    }

    /// Stores a manifest under a tag, or under its own digest.
    ///
    /// # Errors
    /// When `reference` is a digest that is not that of `bytes`, or the registry refuses.
    pub async fn push_manifest(
        &self,
        reference: impl Into<ManifestRef>,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<Pushed, SourceError> {
        let reference = reference.into();
        let digest = Digest::of(&bytes);
        if let ManifestRef::Digest(promised) = &reference
            && *promised != digest
        {
            return Err(SourceError::DigestMismatch {
                what: format!("the manifest to push to {}", self.name()),
                expected: promised.to_string(),
                actual: digest.to_string(),
            });
        }
        forward!(self, push_manifest(&reference, media_type, bytes, digest))
    }

    /// A whole blob as a stream of exactly `size` bytes. A broken connection is resumed. The digest
    /// is **not** verified: the reader hashes what it reads.
    ///
    /// # Errors
    /// Not found, or no answer; later failures come as items of the stream.
    pub async fn blob_stream(&self, digest: &Digest, size: u64) -> Result<BlobStream, SourceError> {
        forward!(self, blob_stream(digest, size))
    }

    /// Exactly `len` bytes of a blob from `offset` on, **not** verified.
    ///
    /// # Errors
    /// [`SourceError::TooLarge`] above [`crate::registry::MAX_RANGE_BYTES`]; a blob that ends
    /// before; what the network says.
    pub async fn blob_range(
        &self,
        digest: &Digest,
        offset: u64,
        len: u64,
    ) -> Result<Bytes, SourceError> {
        forward!(self, blob_range(digest, offset, len))
    }

    /// As [`Repository::blob_range`], in one attempt: for callers with retries and budgets of their
    /// own, which would multiply with those made here.
    ///
    /// # Errors
    /// As [`Repository::blob_range`].
    pub async fn blob_range_once(
        &self,
        digest: &Digest,
        offset: u64,
        len: u64,
    ) -> Result<Bytes, SourceError> {
        match &self.backend {
            Backend::Registry(registry) => registry.blob_range_once(digest, offset, len).await,
            Backend::Layout(layout) => layout.blob_range(digest, offset, len).await,
        }
    }

    /// A whole blob of at most `max` bytes, digest verified.
    ///
    /// # Errors
    /// Not found, too large, or not the bytes the digest promises.
    pub async fn blob(&self, digest: &Digest, max: u64) -> Result<Bytes, SourceError> {
        forward!(self, blob(digest, max))
    }

    /// Whether the repository holds a blob.
    ///
    /// # Errors
    /// No clear answer.
    pub async fn blob_exists(&self, digest: &Digest) -> Result<bool, SourceError> {
        forward!(self, blob_exists(digest))
    }

    /// Uploads `size` bytes that arrive as a stream. Nothing is held in memory, so a failure after
    /// the first byte is final; [`Repository::push_blob_bytes`] retries. The receiver verifies the
    /// digest.
    ///
    /// # Errors
    /// [`SourceError::Upload`] when `body` fails or has another length.
    pub async fn push_blob(
        &self,
        digest: &Digest,
        size: u64,
        body: impl Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    ) -> Result<(), SourceError> {
        let body: registry_body::Body = Box::pin(body);
        forward!(self, push_blob(digest, size, body))
    }

    /// Uploads a blob that lies in memory, with retries.
    ///
    /// # Errors
    /// What the registry or the file system says in the end.
    pub async fn push_blob_bytes(&self, digest: &Digest, bytes: Bytes) -> Result<(), SourceError> {
        forward!(self, push_blob_bytes(digest, bytes))
    }

    /// Asks the registry to take over a blob from another of its repositories. False when it would
    /// not (then push it), always false for layouts.
    ///
    /// # Errors
    /// No clear answer.
    pub async fn mount_blob(
        &self,
        digest: &Digest,
        from_repository: &str,
    ) -> Result<bool, SourceError> {
        forward!(self, mount_blob(digest, from_repository))
    }

    /// The manifests that name `subject` as their subject, those of one artifact type when it is
    /// not empty. From the Referrers API, or from the fallback tag `sha256-<hex>` where the
    /// registry has none; while that is unknown both are asked at once. None is an empty list.
    ///
    /// # Errors
    /// Neither gave a clear answer.
    pub async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: &str,
    ) -> Result<Vec<Descriptor>, SourceError> {
        let mut all = forward!(self, referrers(subject, artifact_type))?;
        if !artifact_type.is_empty() {
            all.retain(|d| d.artifact_type.as_deref() == Some(artifact_type));
        }
        Ok(all)
    }

    /// Makes `descriptor`, a manifest already pushed with that `subject`, known as its referrer.
    /// A no-op where the registry does it. Otherwise the fallback tag is read, extended, written
    /// and read again until the entry stays: registries have no conditional writes.
    ///
    /// # Errors
    /// [`SourceError::Contended`] when other writers keep winning.
    pub async fn add_referrer(
        &self,
        subject: &Digest,
        descriptor: &Descriptor,
    ) -> Result<(), SourceError> {
        forward!(self, add_referrer(subject, descriptor))
    }

    /// Deletes a manifest, and the tags that name it. Its blobs stay until the registry collects its
    /// garbage. The list of referrers under the fallback tag is [`Repository::remove_referrer`]'s.
    ///
    /// # Errors
    /// The registry refuses, or gives no clear answer.
    pub async fn delete_manifest(&self, digest: &Digest) -> Result<Deletion, SourceError> {
        forward!(self, delete_manifest(digest))
    }

    /// Takes `referrer` off the list of referrers of `subject` under the fallback tag; false when it
    /// is not on it. Where the registry keeps the list it follows from
    /// [`Repository::delete_manifest`].
    ///
    /// # Errors
    /// [`SourceError::Contended`] when other writers keep winning.
    pub async fn remove_referrer(
        &self,
        subject: &Digest,
        referrer: &Digest,
    ) -> Result<bool, SourceError> {
        match &self.backend {
            Backend::Registry(registry) => registry.remove_referrer(subject, referrer).await,
            // Its index lists manifests that are there.
            Backend::Layout(_) => Ok(false),
        }
    }

    /// The tags of the repository, at most `limit`, in the registry's order.
    ///
    /// # Errors
    /// No such repository, or no clear answer.
    pub async fn tags(&self, limit: usize) -> Result<Vec<String>, SourceError> {
        forward!(self, tags(limit))
    }

    /// The platform asked for, if one was.
    pub(crate) fn platform(&self) -> Option<&Platform> {
        self.platform.as_ref()
    }
}

/// The tag under which referrers of `subject` are listed where the registry has no Referrers API
/// (distribution specification, "Referrers Tag Schema").
pub fn referrers_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}

pub(crate) mod registry_body {
    //! The body of an upload.
    use super::{Bytes, Stream};

    /// Pieces of an upload, in order.
    pub(crate) type Body =
        std::pin::Pin<Box<dyn Stream<Item = std::io::Result<Bytes>> + Send + 'static>>;
}
