//! Finding and opening the artifact of an image.

use bytes::Bytes;
use lazyimg_convergent::{ChunkId, Digest, TenantKey, seal};

use super::{ARTIFACT_TYPE, ArtifactError, Document, KEY_ID_ANNOTATION, PACK_TYPE, artifact_tag};
use crate::manifest::{MAX_MANIFEST_LEN, Manifest, ManifestError, OpenManifest};
use crate::reference::ManifestRef;
use crate::source::document::MAX_MANIFEST_BYTES;
use crate::source::{Descriptor, Repository, ResolvedDigest, SourceError};

/// An image that is ready to be mounted.
#[derive(Debug)]
pub struct Opened {
    /// The image that the reference meant.
    pub image: ResolvedDigest,
    /// Digest of the artifact.
    pub artifact: Digest,
    /// Its manifest, proven under the tenant's key.
    pub manifest: OpenManifest,
    /// The manifest as it was fetched, keys sealed: for whoever passes it on.
    pub manifest_bytes: Bytes,
    /// Ciphertexts of the first metadata chunks, fetched together with the manifest, each verified
    /// against its id.
    pub early: Vec<(ChunkId, Bytes)>,
}

/// A manifest is fetched in so many ranges at most, at the same time: each connection starts
/// slowly, several together do not.
const MANIFEST_PARTS: u64 = 6;

/// Bytes at the head of the metadata's pack that are fetched together with the manifest (24 KiB):
/// the first metadata chunk compresses to some 16 KB, and a new connection carries about 14 KB in
/// its first round trip, 28 KB more in its second.
const EARLY_LEN: u64 = 24 << 10;

/// What one new connection carries in its first round trip, in bytes: ten segments (RFC 6928).
const FIRST_WINDOW: u64 = 14_000;

/// An artifact's document and the bytes of its lazyimg manifest.
struct Fetched {
    digest: Digest,
    document: Document,
    bytes: Bytes,
    /// The head of the last pack, where the metadata begins. Not verified.
    head: Option<Bytes>,
}

/// Opens the image that `target` means.
///
/// Takes three round trips when the artifact's tag is there and right (the tag and the artifact's
/// tag at once, the lazyimg manifest), two more through the list of referrers.
///
/// # Errors
/// See [`ArtifactError`].
pub async fn open(
    repo: &Repository,
    target: &ManifestRef,
    tenant: &TenantKey,
) -> Result<Opened, ArtifactError> {
    let (image, hinted) = tokio::join!(repo.resolve_digest(target), hinted(repo, target));
    let image = image?;
    if let Some(fetched) = hinted.filter(|f| f.document.image() == Some(image.digest))
        && seal_id(&fetched.bytes) == Some(tenant.id())
    {
        return finish(image, fetched, tenant);
    }
    let descriptor = find(repo, &image.digest, Some(tenant)).await?;
    let fetched = fetch(repo, descriptor.digest).await?;
    finish(image, fetched, tenant)
}

/// The artifact of an image: the one under `tenant`'s key, or any if no key is given.
///
/// # Errors
/// [`ArtifactError::NotConverted`], [`ArtifactError::OtherKey`], or what the registry says.
pub async fn find(
    repo: &Repository,
    image: &Digest,
    tenant: Option<&TenantKey>,
) -> Result<Descriptor, ArtifactError> {
    // The newest is the last that was added.
    let newest = find_all(repo, image, tenant).await?.pop();
    newest.ok_or_else(|| ArtifactError::NotConverted {
        image: *image,
        repository: repo.name(),
    })
}

/// All artifacts of an image, at least one, the newest last: those under `tenant`'s key, or under
/// any if no key is given. An image that was converted in two ways has two.
///
/// # Errors
/// As [`find`].
pub async fn find_all(
    repo: &Repository,
    image: &Digest,
    tenant: Option<&TenantKey>,
) -> Result<Vec<Descriptor>, ArtifactError> {
    let all = repo.referrers(image, ARTIFACT_TYPE).await?;
    if all.is_empty() {
        return Err(ArtifactError::NotConverted {
            image: *image,
            repository: repo.name(),
        });
    }
    let Some(tenant) = tenant else {
        return Ok(all);
    };
    let yours = tenant.id();
    let key_of = |d: &Descriptor| d.annotations.get(KEY_ID_ANNOTATION).cloned();
    let is_mine = |d: &Descriptor| key_of(d) == Some(yours.to_string());
    if !all.iter().any(is_mine) {
        let theirs: Vec<_> = all.iter().filter_map(key_of).collect();
        return Err(ArtifactError::OtherKey {
            image: *image,
            theirs: theirs.join(", "),
            yours,
        });
    }
    Ok(all.into_iter().filter(is_mine).collect())
}

/// Reads an artifact without a key: its document and its lazyimg manifest, keys sealed.
pub(super) async fn read(
    repo: &Repository,
    digest: Digest,
) -> Result<(Document, Manifest), ArtifactError> {
    let fetched = fetch(repo, digest).await?;
    let manifest = Manifest::parse(&fetched.bytes)
        .map_err(|cause| ArtifactError::Manifest { digest, cause })?;
    Ok((fetched.document, manifest))
}

/// The lazyimg manifest of an artifact, keys sealed, and its length in bytes. Needs no key.
///
/// # Errors
/// See [`ArtifactError`].
pub async fn read_manifest(
    repo: &Repository,
    digest: Digest,
) -> Result<(Manifest, usize), ArtifactError> {
    let fetched = fetch(repo, digest).await?;
    let manifest = Manifest::parse(&fetched.bytes)
        .map_err(|cause| ArtifactError::Manifest { digest, cause })?;
    Ok((manifest, fetched.bytes.len()))
}

/// What the artifact's tag leads to; anything wrong with it only means the longer way.
async fn hinted(repo: &Repository, target: &ManifestRef) -> Option<Fetched> {
    let ManifestRef::Tag(tag) = target else {
        return None;
    };
    let tag = ManifestRef::Tag(artifact_tag(tag)?);
    let manifest = repo.manifest(tag, MAX_MANIFEST_BYTES).await.ok()?;
    let document = Document::parse(manifest.digest, &manifest.bytes).ok()?;
    fetch_blobs(repo, manifest.digest, document).await.ok()
}

async fn fetch(repo: &Repository, digest: Digest) -> Result<Fetched, ArtifactError> {
    let manifest = repo.manifest(digest, MAX_MANIFEST_BYTES).await?;
    let document = Document::parse(digest, &manifest.bytes)?;
    fetch_blobs(repo, digest, document).await
}

/// The lazyimg manifest, and the head of the metadata, at the same time.
async fn fetch_blobs(
    repo: &Repository,
    digest: Digest,
    document: Document,
) -> Result<Fetched, ArtifactError> {
    let head = async {
        let pack = document
            .layers
            .last()
            .filter(|l| l.media_type == PACK_TYPE)?;
        let len = EARLY_LEN.min(pack.size);
        let first = FIRST_WINDOW.min(len);
        // Two connections: together their first windows hold all of it.
        let first_part = repo.blob_range(&pack.digest, 0, first);
        if first == len {
            return first_part.await.ok();
        }
        let second_part = repo.blob_range(&pack.digest, first, len - first);
        let (a, b) = tokio::try_join!(first_part, second_part).ok()?;
        Some(Bytes::from([a, b].concat()))
    };
    let (bytes, head) = tokio::join!(fetch_manifest(repo, document.manifest()), head);
    Ok(Fetched {
        digest,
        bytes: bytes?,
        document,
        head,
    })
}

/// The lazyimg manifest, digest verified: in parts if it does not fit into a first window.
async fn fetch_manifest(repo: &Repository, blob: &Descriptor) -> Result<Bytes, SourceError> {
    let parts = blob.size.div_ceil(FIRST_WINDOW).min(MANIFEST_PARTS);
    if parts > 1 && blob.size <= MAX_MANIFEST_LEN {
        let part = blob.size.div_ceil(parts);
        let ranges = (0..parts).map(|n| {
            let start = n * part;
            repo.blob_range(&blob.digest, start, part.min(blob.size - start))
        });
        if let Ok(parts) = futures_util::future::try_join_all(ranges).await {
            let bytes = Bytes::from(parts.concat());
            if Digest::of(&bytes) == blob.digest {
                return Ok(bytes);
            }
        }
        // No ranges, or wrong bytes: the plain way has the errors and the retries.
    }
    repo.blob(&blob.digest, MAX_MANIFEST_LEN).await
}

fn seal_id(manifest: &[u8]) -> Option<lazyimg_convergent::KeyId> {
    let manifest = Manifest::parse(manifest).ok()?;
    seal::sealed_for(&manifest.sealed_keys).ok()
}

fn finish(
    image: ResolvedDigest,
    fetched: Fetched,
    tenant: &TenantKey,
) -> Result<Opened, ArtifactError> {
    let digest = fetched.digest;
    let manifest = open_manifest(&image.digest, digest, &fetched.bytes, tenant)?;
    let early = fetched
        .head
        .map_or_else(Vec::new, |head| verified(&manifest, &head));
    Ok(Opened {
        image,
        artifact: digest,
        manifest,
        manifest_bytes: fetched.bytes,
        early,
    })
}

/// Opens the lazyimg manifest of `image`, wherever its bytes come from: nothing of them is trusted
/// that the tenant's key does not prove. `named` stands in errors: the digest of what had the bytes.
///
/// # Errors
/// [`ArtifactError::Manifest`], or [`ArtifactError::WrongImage`] when it is another image's.
pub fn open_manifest(
    image: &Digest,
    named: Digest,
    bytes: &[u8],
    tenant: &TenantKey,
) -> Result<OpenManifest, ArtifactError> {
    let failed = |cause: ManifestError| ArtifactError::Manifest {
        digest: named,
        cause,
    };
    let manifest = Manifest::parse(bytes)
        .and_then(|m| m.open(tenant))
        .map_err(failed)?;
    if manifest.header().image != *image {
        return Err(ArtifactError::WrongImage {
            digest: named,
            inside: manifest.header().image,
            outside: *image,
        });
    }
    Ok(manifest)
}

/// The metadata chunks that lie whole in the head of the last pack.
fn verified(manifest: &OpenManifest, head: &Bytes) -> Vec<(ChunkId, Bytes)> {
    let Some(pack) = manifest.packs().last() else {
        return Vec::new();
    };
    let bodies = manifest
        .meta_chunks()
        .iter()
        .filter_map(|c| c.body.as_ref());
    bodies
        .filter(|b| b.pack == pack.digest)
        .filter_map(|b| {
            let start = usize::try_from(b.pack_offset).ok()?;
            let end = start.checked_add(b.stored_len as usize)?;
            let bytes = (end <= head.len()).then(|| head.slice(start..end))?;
            (ChunkId::of(&bytes) == b.id).then_some((b.id, bytes))
        })
        .collect()
}
