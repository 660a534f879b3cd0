//! From a tag to an image: index, platform, manifest, configuration, layers.

use lazyimg_convergent::Digest;

use super::document::{
    self, Descriptor, Document, ImageManifest, Index, MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES,
};
use super::{Manifest, Repository, SourceError};
use crate::platform::Platform;
use crate::reference::ManifestRef;

/// How deep indexes may nest. One inside another is seen in the wild (OCI layouts); more is a loop
/// in waiting.
pub const MAX_INDEX_DEPTH: usize = 4;

/// Which manifest a reference means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedDigest {
    /// The image manifest's digest.
    pub digest: Digest,
    /// The image manifest's length in bytes.
    pub size: u64,
    /// The image manifest's media type.
    pub media_type: String,
    /// The outermost index that led to it.
    pub index_digest: Option<Digest>,
}

/// An image, ready to be converted.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// Digest of the image manifest: the subject of what refers to the image.
    pub digest: Digest,
    /// Length of the image manifest in bytes.
    pub manifest_size: u64,
    /// Media type of the image manifest.
    pub media_type: String,
    /// The outermost index that led to it.
    pub index_digest: Option<Digest>,
    /// That index, where it names the image itself.
    pub index: Option<IndexDocument>,
    /// The layers, base first.
    pub layers: Vec<LayerDescriptor>,
    /// Digest of the configuration.
    pub config_digest: Digest,
    /// The configuration as it is.
    pub config: serde_json::Value,
    /// The exact bytes of the configuration.
    pub config_bytes: bytes::Bytes,
    /// The platform that the configuration names.
    pub platform: Platform,
}

/// An index as it is: what proves that its digest means an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexDocument {
    /// Its digest.
    pub digest: Digest,
    /// Its exact bytes.
    pub bytes: bytes::Bytes,
}

impl IndexDocument {
    /// Bytes that somebody says are the index of this digest.
    ///
    /// # Errors
    /// [`SourceError::DigestMismatch`].
    pub fn verified(digest: Digest, bytes: bytes::Bytes) -> Result<Self, SourceError> {
        let actual = Digest::of(&bytes);
        match actual == digest {
            true => Ok(Self { digest, bytes }),
            false => Err(SourceError::DigestMismatch {
                what: format!("index {digest}"),
                expected: digest.to_string(),
                actual: actual.to_string(),
            }),
        }
    }

    /// The image manifest that it names for a platform.
    ///
    /// # Errors
    /// When it is no index, has nothing for the platform, or names another index.
    pub fn image(&self, platform: &Platform) -> Result<Digest, SourceError> {
        let what = format!("index {}", self.digest);
        let index = document::parse_index(&what, &self.bytes)?;
        let chosen = choose(&index, Some(platform), &what)?;
        match chosen.is_index() {
            true => Err(SourceError::malformed(what, "it names another index")),
            false => Ok(chosen.digest),
        }
    }
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerDescriptor {
    /// Digest of the blob as stored.
    pub digest: Digest,
    /// Length of the blob as stored, in bytes.
    pub size: u64,
    /// Media type, one that can be unpacked.
    pub media_type: String,
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
}

/// The part of an image configuration that matters here.
#[derive(serde::Deserialize)]
struct Config {
    #[serde(default)]
    os: Option<String>,
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    variant: Option<String>,
    rootfs: RootFs,
}

#[derive(serde::Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

/// Where following indexes ended.
enum Found {
    /// The document itself was fetched on the way.
    Fetched(Manifest, ImageManifest),
    /// An index names it as an image manifest; it was not fetched.
    Named(Descriptor),
}

pub(super) async fn digest(
    repository: &Repository,
    reference: ManifestRef,
) -> Result<ResolvedDigest, SourceError> {
    let (found, index) = follow(repository, reference).await?;
    let index_digest = index.map(|index| index.outermost);
    Ok(match found {
        Found::Fetched(manifest, _) => ResolvedDigest {
            digest: manifest.digest,
            size: manifest.bytes.len() as u64,
            media_type: manifest.media_type,
            index_digest,
        },
        Found::Named(descriptor) => ResolvedDigest {
            digest: descriptor.digest,
            size: descriptor.size,
            media_type: descriptor.media_type,
            index_digest,
        },
    })
}

pub(super) async fn image(
    repository: &Repository,
    reference: ManifestRef,
) -> Result<ResolvedImage, SourceError> {
    let (found, index) = follow(repository, reference).await?;
    let (manifest, image) = match found {
        Found::Fetched(manifest, image) => (manifest, image),
        Found::Named(descriptor) => {
            let what = format!("manifest {}", descriptor.digest);
            let manifest = repository
                .manifest(descriptor.digest, MAX_MANIFEST_BYTES)
                .await?;
            match document::parse(&what, &manifest.media_type, &manifest.bytes)? {
                Document::Image(image) => (manifest, image),
                Document::Index(_) => {
                    return Err(SourceError::malformed(
                        what,
                        "an index names it as an image, and it is an index",
                    ));
                }
            }
        }
    };
    let what = format!("image {}", manifest.digest);
    for (i, layer) in image.layers.iter().enumerate() {
        document::check_layer_media_type(
            &format!("layer {i} ({}) of {what}", layer.digest),
            &layer.media_type,
        )?;
    }
    if image.config.size > MAX_CONFIG_BYTES {
        return Err(SourceError::TooLarge {
            what: format!("the configuration of {what}"),
            limit: MAX_CONFIG_BYTES,
            unit: "bytes",
        });
    }
    let config_bytes = repository
        .blob(&image.config.digest, MAX_CONFIG_BYTES)
        .await?;
    let (platform, diff_ids) = read_config(&what, &config_bytes, image.layers.len())?;
    if let Some(wanted) = repository.platform()
        && wanted.rank(&platform).is_none()
    {
        return Err(SourceError::NoPlatform {
            what,
            wanted: wanted.to_string(),
            available: platform.to_string(),
        });
    }
    let config = serde_json::from_slice(&config_bytes)
        .map_err(|e| SourceError::malformed(format!("the configuration of {what}"), e))?;
    let layers = image.layers.into_iter().zip(diff_ids);
    Ok(ResolvedImage {
        digest: manifest.digest,
        manifest_size: manifest.bytes.len() as u64,
        media_type: manifest.media_type,
        index_digest: index.as_ref().map(|index| index.outermost),
        index: index.and_then(|index| index.itself),
        layers: layers
            .map(|(layer, diff_id)| LayerDescriptor {
                digest: layer.digest,
                size: layer.size,
                media_type: layer.media_type,
                diff_id,
            })
            .collect(),
        config_digest: image.config.digest,
        config,
        config_bytes,
        platform,
    })
}

/// The outermost index on the way to an image.
struct Outermost {
    outermost: Digest,
    /// All of it, if it was the only one.
    itself: Option<IndexDocument>,
}

/// Follows indexes until an image manifest is named or found.
async fn follow(
    repository: &Repository,
    reference: ManifestRef,
) -> Result<(Found, Option<Outermost>), SourceError> {
    let mut reference = reference;
    let mut index_before: Option<Outermost> = None;
    for _ in 0..=MAX_INDEX_DEPTH {
        let what = format!("manifest {reference}");
        let manifest = repository.manifest(&reference, MAX_MANIFEST_BYTES).await?;
        match document::parse(&what, &manifest.media_type, &manifest.bytes)? {
            Document::Image(image) => return Ok((Found::Fetched(manifest, image), index_before)),
            Document::Index(index) => {
                index_before = Some(match index_before {
                    None => Outermost {
                        outermost: manifest.digest,
                        itself: Some(IndexDocument {
                            digest: manifest.digest,
                            bytes: manifest.bytes.clone(),
                        }),
                    },
                    Some(before) => Outermost {
                        outermost: before.outermost,
                        itself: None,
                    },
                });
                let chosen = choose(&index, repository.platform(), &what)?;
                if !chosen.is_index() {
                    return Ok((Found::Named(chosen.clone()), index_before));
                }
                reference = ManifestRef::Digest(chosen.digest);
            }
        }
    }
    Err(SourceError::malformed(
        format!("manifest {reference}"),
        format_args!("indexes nest deeper than {MAX_INDEX_DEPTH}"),
    ))
}

/// The entry of an index for a platform: the best of those that can run on it; failing that, the
/// only entry that names no platform, or a nested index.
pub(crate) fn choose<'a>(
    index: &'a Index,
    wanted: Option<&Platform>,
    what: &str,
) -> Result<&'a Descriptor, SourceError> {
    let host = Platform::host();
    let wanted = wanted.unwrap_or(&host);
    let ranked = index
        .manifests
        .iter()
        .filter_map(|d| Some((wanted.rank(d.platform.as_ref()?)?, d)));
    // `min_by_key` keeps the first of equals: the index's own order decides.
    if let Some((_, best)) = ranked.min_by_key(|(rank, _)| *rank) {
        return Ok(best);
    }
    let mut silent = index
        .manifests
        .iter()
        .filter(|d| d.platform.is_none() && d.artifact_type.is_none());
    if let (Some(only), None) = (silent.next(), silent.next()) {
        return Ok(only);
    }
    let known = index
        .manifests
        .iter()
        .filter_map(|d| d.platform.as_ref())
        .filter(|p| p.os != "unknown");
    let mut known: Vec<String> = known.map(Platform::to_string).collect();
    known.dedup();
    known.truncate(30);
    let available = if known.is_empty() {
        "no platforms at all".to_owned()
    } else {
        known.join(", ")
    };
    Err(SourceError::NoPlatform {
        what: what.into(),
        wanted: wanted.to_string(),
        available,
    })
}

fn read_config(
    what: &str,
    bytes: &[u8],
    layers: usize,
) -> Result<(Platform, Vec<Digest>), SourceError> {
    let what = format!("the configuration of {what}");
    let config: Config =
        serde_json::from_slice(bytes).map_err(|e| SourceError::malformed(&*what, e))?;
    if config.rootfs.diff_ids.len() != layers {
        let reason = format!(
            "it names {} diff ids for {layers} layers",
            config.rootfs.diff_ids.len()
        );
        return Err(SourceError::malformed(what, reason));
    }
    let diff_ids = config.rootfs.diff_ids.iter().map(|text| {
        text.parse().map_err(|_| SourceError::UnsupportedDigest {
            what: format!("a layer in {what}"),
            digest: text.chars().take(160).collect(),
        })
    });
    let diff_ids = diff_ids.collect::<Result<_, _>>()?;
    let host = Platform::host();
    let platform = Platform::normal(
        config
            .os
            .as_deref()
            .filter(|s| !s.is_empty())
            .unwrap_or(&host.os),
        config
            .architecture
            .as_deref()
            .filter(|s| !s.is_empty())
            .unwrap_or(&host.architecture),
        config.variant.as_deref(),
    );
    Ok((platform, diff_ids))
}

#[cfg(test)]
mod tests;
