//! Storing a converted image beside the image.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use lazyimg_convergent::{Digest, TenantKey};

use super::{
    ARTIFACT_TYPE, ArtifactError, Document, EMPTY, EMPTY_TYPE, KEY_ID_ANNOTATION, MANIFEST_TYPE,
    OCI_MANIFEST_TYPE, PACK_TYPE, ROOT_ANNOTATION, artifact_tag, open,
};
use crate::convert::{Form, packs};
use crate::manifest::Manifest;
use crate::reference::ManifestRef;
use crate::source::{Deletion, Descriptor, Repository};

/// What happens during a push, for progress bars.
#[derive(Debug, Clone, Copy)]
pub enum PushEvent {
    /// All packs together have this many bytes.
    Total(u64),
    /// So many bytes were sent, or found to be there.
    Done(u64),
}

/// What a push did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// Digest of the artifact.
    pub artifact: Digest,
    /// Bytes of packs that were uploaded.
    pub uploaded_bytes: u64,
    /// Packs that were uploaded.
    pub uploaded_packs: usize,
    /// Chunks in the packs that were uploaded.
    pub uploaded_chunks: u64,
    /// Length of the lazyimg manifest in bytes.
    pub manifest_bytes: u64,
}

/// Packs uploaded at once: while one is sent, another is hashed or synced at the other end.
const UPLOADS: usize = 3;

/// Bytes that are read from the spool and sent in one piece.
const SEND_LEN: u64 = 1 << 20;

/// Pushes the packs that the repository lacks, the lazyimg manifest and the artifact, and lists it
/// as a referrer of `subject`. Safe to repeat; nothing refers to anything that is not there yet.
///
/// # Errors
/// See [`ArtifactError`].
pub async fn push(
    repo: &Repository,
    form: &Form,
    subject: Descriptor,
    tag: Option<&str>,
    event: &(dyn Fn(PushEvent) + Sync),
) -> Result<Pushed, ArtifactError> {
    let total = form.manifest.packs.iter().map(|p| p.len).sum();
    event(PushEvent::Total(total));
    let spool = Arc::new(form.spool.try_clone()?);
    let uploads = form.manifest.packs.iter().zip(&form.pieces);
    let uploads = stream::iter(uploads.map(|(pack, pieces)| {
        let spool = spool.clone();
        async move {
            let missing = !repo.blob_exists(&pack.digest).await?;
            if missing {
                let body = pack_stream(spool, packs::joined(pieces));
                repo.push_blob(&pack.digest, pack.len, body).await?;
            }
            event(PushEvent::Done(pack.len));
            Ok::<_, ArtifactError>(missing.then_some((pack.len, pieces.pieces.len() as u64)))
        }
    }));
    let done: Vec<_> = uploads.buffer_unordered(UPLOADS).try_collect().await?;
    let (mut uploaded_bytes, mut uploaded_packs, mut uploaded_chunks) = (0, 0, 0);
    for (bytes, chunks) in done.into_iter().flatten() {
        uploaded_bytes += bytes;
        uploaded_packs += 1;
        uploaded_chunks += chunks;
    }
    let artifact = push_manifest(repo, &form.manifest, subject, tag).await?;
    Ok(Pushed {
        artifact,
        uploaded_bytes,
        uploaded_packs,
        uploaded_chunks,
        manifest_bytes: form.manifest.to_bytes().len() as u64,
    })
}

/// Takes an artifact of `image` off the list of its referrers and deletes it. Its packs stay.
///
/// # Errors
/// What the registry or layout says; then the artifact is listed as before.
pub async fn delete(
    repo: &Repository,
    image: &Digest,
    artifact: &Descriptor,
) -> Result<Deletion, ArtifactError> {
    // In this order: some registries take no list that names a manifest which is not there.
    let was_listed = repo.remove_referrer(image, &artifact.digest).await?;
    let deletion = repo.delete_manifest(&artifact.digest).await;
    if was_listed && !matches!(deletion, Ok(Deletion::Deleted | Deletion::WasGone)) {
        repo.add_referrer(image, artifact).await?;
    }
    Ok(deletion?)
}

/// Rotation: the artifact of `image` once more, under another tenant key. No pack is touched.
///
/// # Errors
/// See [`ArtifactError`].
pub async fn reseal(
    repo: &Repository,
    image: &Digest,
    tag: Option<&str>,
    old: &TenantKey,
    new: &TenantKey,
) -> Result<Digest, ArtifactError> {
    let digest = open::find(repo, image, Some(old)).await?.digest;
    let (document, mut manifest) = open::read(repo, digest).await?;
    manifest
        .reseal(old, new)
        .map_err(|cause| ArtifactError::Manifest { digest, cause })?;
    let subject = document.subject.ok_or_else(|| ArtifactError::Malformed {
        digest,
        what: "it has no subject".into(),
    })?;
    push_manifest(repo, &manifest, subject, tag).await
}

async fn push_manifest(
    repo: &Repository,
    manifest: &Manifest,
    mut subject: Descriptor,
    tag: Option<&str>,
) -> Result<Digest, ArtifactError> {
    subject.annotations.clear();
    subject.artifact_type = None;
    subject.platform = None;
    let image = subject.digest;
    let bytes = Bytes::from(manifest.to_bytes());
    let blob = Descriptor::new(MANIFEST_TYPE, Digest::of(&bytes), bytes.len() as u64);
    if !repo.blob_exists(&blob.digest).await? {
        repo.push_blob_bytes(&blob.digest, bytes).await?;
    }
    let empty = Descriptor::new(EMPTY_TYPE, Digest::of(EMPTY), EMPTY.len() as u64);
    if !repo.blob_exists(&empty.digest).await? {
        repo.push_blob_bytes(&empty.digest, Bytes::from_static(EMPTY))
            .await?;
    }
    let key = lazyimg_convergent::seal::sealed_for(&manifest.sealed_keys).map_err(|e| {
        ArtifactError::Manifest {
            digest: blob.digest,
            cause: e.into(),
        }
    })?;
    let annotations = std::collections::BTreeMap::from([
        (KEY_ID_ANNOTATION.to_owned(), key.to_string()),
        (ROOT_ANNOTATION.to_owned(), manifest.root().to_string()),
    ]);
    let packs = manifest
        .packs
        .iter()
        .map(|p| Descriptor::new(PACK_TYPE, p.digest, p.len));
    let document = Document {
        schema_version: 2,
        media_type: OCI_MANIFEST_TYPE.into(),
        artifact_type: ARTIFACT_TYPE.into(),
        config: empty,
        layers: std::iter::once(blob).chain(packs).collect(),
        subject: Some(subject),
        annotations: annotations.clone(),
    };
    let bytes = Bytes::from(serde_json::to_vec(&document).map_err(std::io::Error::other)?);
    let digest = Digest::of(&bytes);
    let mut descriptor = Descriptor::new(OCI_MANIFEST_TYPE, digest, bytes.len() as u64);
    descriptor.artifact_type = Some(ARTIFACT_TYPE.into());
    descriptor.annotations = annotations;
    let pushed = repo
        .push_manifest(digest, OCI_MANIFEST_TYPE, bytes.clone())
        .await?;
    if !pushed.subject_listed {
        repo.add_referrer(&image, &descriptor).await?;
    }
    if let Some(tag) = tag.and_then(artifact_tag) {
        repo.push_manifest(ManifestRef::Tag(tag), OCI_MANIFEST_TYPE, bytes)
            .await?;
    }
    Ok(digest)
}

/// A pack's bytes, read from the spool as they are sent.
fn pack_stream(
    spool: Arc<File>,
    pieces: Vec<(u64, u64)>,
) -> impl futures_util::Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    let reads: Vec<_> = pieces
        .into_iter()
        .flat_map(|(at, len)| {
            (0..len.div_ceil(SEND_LEN))
                .map(move |n| (at + n * SEND_LEN, SEND_LEN.min(len - n * SEND_LEN)))
        })
        .collect();
    stream::unfold(reads.into_iter(), move |mut reads| {
        let spool = spool.clone();
        async move {
            let (at, len) = reads.next()?;
            let read = tokio::task::spawn_blocking(move || {
                let mut buf = vec![0; len as usize];
                spool.read_exact_at(&mut buf, at).map(|()| Bytes::from(buf))
            })
            .await
            .unwrap_or_else(|e| Err(std::io::Error::other(e)));
            Some((read, reads))
        }
    })
}
