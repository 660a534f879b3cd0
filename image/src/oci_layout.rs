//! An OCI image layout in a directory (OCI image specification, "Image Layout"): `oci-layout`,
//! `index.json`, `blobs/sha256/…`.
//!
//! Blobs arrive under a temporary name, are flushed, checked and renamed; `index.json` is replaced
//! by a rename under a lock on `oci-layout`, and what other tools wrote into it stays. Referrers are
//! entries of `index.json` whose manifest names a `subject`.

mod files;
mod index;

use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use lazyimg_convergent::Digest;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncReadExt as _;
use tokio_util::io::ReaderStream;

use crate::reference::ManifestRef;
use crate::registry::MAX_RANGE_BYTES;
use crate::source::document::{self, MAX_MANIFEST_BYTES};
use crate::source::registry_body::Body;
use crate::source::{BlobStream, Deletion, Descriptor, Manifest, Pushed, SourceError};
use index::Chosen;

/// Length of one read of a streamed blob, in bytes.
const STREAM_PIECE: usize = 512 * 1024;

/// A layout. Clones share the directory.
#[derive(Clone)]
pub(crate) struct Layout {
    dir: Arc<Path>,
}

impl Layout {
    /// The layout in `dir`, which is made when something is first written.
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.into() }
    }

    pub(crate) fn name(&self) -> String {
        format!("oci:{}", self.dir.display())
    }

    pub(crate) async fn manifest(
        &self,
        reference: &ManifestRef,
        max: u64,
    ) -> Result<Manifest, SourceError> {
        let reference = reference.clone();
        self.blocking(move |layout| layout.manifest_now(&reference, max))
            .await
    }

    pub(crate) async fn push_manifest(
        &self,
        reference: &ManifestRef,
        media_type: &str,
        bytes: Bytes,
        digest: Digest,
    ) -> Result<Pushed, SourceError> {
        let (reference, media_type) = (reference.clone(), media_type.to_owned());
        self.blocking(move |layout| {
            layout.write_blob(&digest, &bytes)?;
            let what = format!("manifest {digest}");
            let about = index::about(&what, &bytes)?;
            let mut entry = Descriptor::new(media_type, digest, bytes.len() as u64);
            entry.artifact_type = about.artifact_type;
            let subject_listed = about.subject.is_some();
            match &reference {
                ManifestRef::Tag(tag) => {
                    layout.edit_index(|index| index::put(index, &entry, Some(tag)))?
                }
                // Where it is found again: by its subject, or as the layout's only image.
                _ if subject_listed || matches!(reference, ManifestRef::Sole) => {
                    layout.edit_index(|index| index::put(index, &entry, None))?;
                }
                _ => {}
            }
            Ok(Pushed {
                digest,
                subject_listed,
            })
        })
        .await
    }

    pub(crate) async fn blob_stream(
        &self,
        digest: &Digest,
        size: u64,
    ) -> Result<BlobStream, SourceError> {
        let digest = *digest;
        let (file, path) = self
            .blocking(move |layout| layout.open_sized(&digest, size))
            .await?;
        let reader =
            ReaderStream::with_capacity(tokio::fs::File::from_std(file).take(size), STREAM_PIECE);
        let state = (reader, path, size);
        let pieces =
            futures_util::stream::try_unfold(state, move |(mut reader, path, left)| async move {
                match reader.next().await {
                    Some(Ok(piece)) => {
                        let left = left - piece.len() as u64;
                        Ok(Some((piece, (reader, path, left))))
                    }
                    Some(Err(e)) => Err(SourceError::io("read", path, e)),
                    None if left == 0 => Ok(None),
                    // It shrank since it was opened.
                    None => Err(SourceError::SizeMismatch {
                        what: format!("blob {digest}"),
                        expected: size,
                        actual: size - left,
                    }),
                }
            });
        Ok(BlobStream::new(pieces))
    }

    pub(crate) async fn blob_range(
        &self,
        digest: &Digest,
        offset: u64,
        len: u64,
    ) -> Result<Bytes, SourceError> {
        if len > MAX_RANGE_BYTES {
            return Err(SourceError::TooLarge {
                what: format!("a range of blob {digest}"),
                limit: MAX_RANGE_BYTES,
                unit: "bytes",
            });
        }
        let digest = *digest;
        self.blocking(move |layout| {
            let (file, path) = layout.open_blob(&digest)?;
            let mut out = BytesMut::zeroed(len as usize);
            file.read_exact_at(&mut out, offset)
                .map_err(|e| match e.kind() {
                    io::ErrorKind::UnexpectedEof => {
                        let reason = format!(
                            "it ends before byte {}, where a range of it should end",
                            offset.saturating_add(len)
                        );
                        SourceError::malformed(format!("blob {digest}"), reason)
                    }
                    _ => SourceError::io("read", path, e),
                })?;
            Ok(out.freeze())
        })
        .await
    }

    pub(crate) async fn blob(&self, digest: &Digest, max: u64) -> Result<Bytes, SourceError> {
        let digest = *digest;
        self.blocking(move |layout| layout.read_blob(&digest, max.min(MAX_RANGE_BYTES)))
            .await
    }

    pub(crate) async fn blob_exists(&self, digest: &Digest) -> Result<bool, SourceError> {
        let digest = *digest;
        self.blocking(move |layout| match layout.open_blob(&digest) {
            Ok(_) => Ok(true),
            Err(e) if e.is_not_found() => Ok(false),
            Err(e) => Err(e),
        })
        .await
    }

    pub(crate) async fn push_blob(
        &self,
        digest: &Digest,
        size: u64,
        mut body: Body,
    ) -> Result<(), SourceError> {
        let what = format!("blob {digest}");
        let upload = |cause| SourceError::Upload {
            what: what.clone(),
            cause,
        };
        let mut file = Some(self.blocking(|layout| layout.new_blob()).await?);
        let (mut hash, mut left) = (Sha256::new(), size);
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(upload)?;
            left = left.checked_sub(piece.len() as u64).ok_or_else(|| {
                upload(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "it is longer than was said",
                ))
            })?;
            let taken = (file.take(), hash);
            let (next, hashed) = self
                .blocking(move |_| {
                    let (Some(mut file), mut hash) = taken else {
                        return Err(SourceError::malformed("an upload", "its file is gone"));
                    };
                    hash.update(&piece);
                    file.write_all(&piece)?;
                    Ok((file, hash))
                })
                .await?;
            (file, hash) = (Some(next), hashed);
        }
        if left > 0 {
            return Err(upload(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("it ends {left} bytes before its end"),
            )));
        }
        let (digest, actual) = (*digest, Digest(hash.finalize().into()));
        if actual != digest {
            return Err(SourceError::DigestMismatch {
                what,
                expected: digest.to_string(),
                actual: actual.to_string(),
            });
        }
        self.blocking(move |layout| match file {
            Some(file) => layout.keep_blob(file, &digest),
            None => Err(SourceError::malformed("an upload", "its file is gone")),
        })
        .await
    }

    pub(crate) async fn push_blob_bytes(
        &self,
        digest: &Digest,
        bytes: Bytes,
    ) -> Result<(), SourceError> {
        let digest = *digest;
        self.blocking(move |layout| {
            let actual = Digest::of(&bytes);
            if actual != digest {
                let what = format!("blob {digest}");
                return Err(SourceError::DigestMismatch {
                    what,
                    expected: digest.to_string(),
                    actual: actual.to_string(),
                });
            }
            layout.write_blob(&digest, &bytes)
        })
        .await
    }

    /// A layout has no other repositories.
    pub(crate) async fn mount_blob(
        &self,
        _digest: &Digest,
        _from_repository: &str,
    ) -> Result<bool, SourceError> {
        Ok(false)
    }

    pub(crate) async fn referrers(
        &self,
        subject: &Digest,
        _artifact_type: &str,
    ) -> Result<Vec<Descriptor>, SourceError> {
        let subject = *subject;
        self.blocking(move |layout| {
            let index = match layout.read_index() {
                Ok(index) => index,
                Err(e) if e.is_not_found() => return Ok(Vec::new()),
                Err(e) => return Err(e),
            };
            let mut found = Vec::new();
            for mut entry in layout
                .entries(&index)?
                .into_iter()
                .filter(|d| !d.is_index() && d.size <= MAX_MANIFEST_BYTES)
            {
                let bytes = match layout.read_blob(&entry.digest, MAX_MANIFEST_BYTES) {
                    Ok(bytes) => bytes,
                    // An entry of a partial copy says nothing.
                    Err(e) if e.is_not_found() => continue,
                    Err(e) => return Err(e),
                };
                let about = index::about(&format!("manifest {}", entry.digest), &bytes)?;
                if about.subject == Some(subject)
                    && !found.iter().any(|d: &Descriptor| d.digest == entry.digest)
                {
                    entry.artifact_type = entry.artifact_type.or(about.artifact_type);
                    entry.annotations = about.annotations;
                    found.push(entry);
                }
            }
            Ok(found)
        })
        .await
    }

    pub(crate) async fn add_referrer(
        &self,
        _subject: &Digest,
        descriptor: &Descriptor,
    ) -> Result<(), SourceError> {
        let entry = descriptor.clone();
        self.blocking(move |layout| layout.edit_index(|index| index::put(index, &entry, None)))
            .await
    }

    /// Takes a manifest out of `index.json`. Its file stays, as all blobs do.
    pub(crate) async fn delete_manifest(&self, digest: &Digest) -> Result<Deletion, SourceError> {
        let digest = *digest;
        self.blocking(move |layout| {
            let mut was_there = false;
            layout.edit_index(|index| was_there = index::remove(index, &digest))?;
            Ok(match was_there {
                true => Deletion::Deleted,
                false => Deletion::WasGone,
            })
        })
        .await
    }

    pub(crate) async fn tags(&self, limit: usize) -> Result<Vec<String>, SourceError> {
        self.blocking(move |layout| {
            let mut tags: Vec<String> = Vec::new();
            for mut entry in layout.entries(&layout.read_index()?)? {
                if let Some(tag) = entry.annotations.remove(index::REF_NAME)
                    && tags.len() < limit
                    && !tags.contains(&tag)
                {
                    tags.push(tag);
                }
            }
            Ok(tags)
        })
        .await
    }

    fn manifest_now(&self, reference: &ManifestRef, max: u64) -> Result<Manifest, SourceError> {
        let what = format!("manifest {reference}");
        let max = max.min(MAX_MANIFEST_BYTES);
        let (digest, claimed) = match reference {
            ManifestRef::Digest(digest) => (*digest, None),
            ManifestRef::Tag(_) | ManifestRef::Sole => {
                let bytes = self.read_index()?;
                let entries = self.entries(&bytes)?;
                let chosen = match reference {
                    ManifestRef::Tag(tag) => index::by_tag(entries, tag),
                    _ => index::sole(entries),
                };
                match chosen.map_err(|reason| SourceError::malformed(self.name(), reason))? {
                    Chosen::Entry(entry) => (entry.digest, Some(entry.media_type)),
                    Chosen::Whole => return self.whole_index(bytes, max),
                    Chosen::Nothing => {
                        return Err(SourceError::NotFound {
                            what,
                            place: self.name(),
                        });
                    }
                }
            }
        };
        let bytes = self.read_blob(&digest, max)?;
        let media_type = document::media_type(&what, claimed.as_deref(), &bytes)?;
        Ok(Manifest {
            bytes,
            media_type,
            digest,
        })
    }

    /// `index.json` itself, as the index that it is.
    fn whole_index(&self, bytes: Bytes, max: u64) -> Result<Manifest, SourceError> {
        if bytes.len() as u64 > max {
            return Err(SourceError::TooLarge {
                what: format!("the index of {}", self.name()),
                limit: max,
                unit: "bytes",
            });
        }
        let media_type = oci_client::manifest::OCI_IMAGE_INDEX_MEDIA_TYPE.to_owned();
        let digest = Digest::of(&bytes);
        Ok(Manifest {
            bytes,
            media_type,
            digest,
        })
    }

    fn entries(&self, index: &[u8]) -> Result<Vec<Descriptor>, SourceError> {
        Ok(document::parse_index(&format!("the index of {}", self.name()), index)?.manifests)
    }

    /// Runs file work away from the runtime's workers.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, SourceError> + Send + 'static,
    ) -> Result<T, SourceError> {
        let layout = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&layout)).await;
        done.unwrap_or_else(|e| {
            Err(SourceError::io(
                "work on",
                PathBuf::from(&*self.dir),
                io::Error::other(e),
            ))
        })
    }
}
