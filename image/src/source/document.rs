//! Manifests and indexes as they come: bytes and a media type in, checked types out. No I/O.

use std::collections::BTreeMap;

use bytes::Bytes;
use lazyimg_convergent::Digest;
use oci_client::manifest::{
    IMAGE_DOCKER_LAYER_GZIP_MEDIA_TYPE, IMAGE_DOCKER_LAYER_TAR_MEDIA_TYPE,
    IMAGE_LAYER_GZIP_MEDIA_TYPE, IMAGE_LAYER_MEDIA_TYPE, IMAGE_MANIFEST_LIST_MEDIA_TYPE,
    IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE, OciDescriptor,
    OciImageManifest,
};
use serde::{Deserialize, Serialize};

use super::error::SourceError;
use crate::platform::Platform;

/// The largest manifest or index that is read, in bytes: what the distribution specification asks
/// registries to accept.
pub const MAX_MANIFEST_BYTES: u64 = 4 << 20;

/// The largest image configuration that is read, in bytes. Histories of hundreds of commands take
/// some 100 KB.
pub const MAX_CONFIG_BYTES: u64 = 8 << 20;

/// The most entries of an index that are looked at.
pub const MAX_INDEX_ENTRIES: usize = 8192;

/// How the media type of a layer packed with zstd reads (OCI image specification 1.1).
pub const LAYER_ZSTD_MEDIA_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// What `Accept` of a manifest request says: everything that can be told apart, so that a registry
/// neither converts nor answers 404.
pub(crate) const ACCEPT_MANIFEST: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// A content descriptor of the OCI image specification, with a digest that is one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type of the target.
    pub media_type: String,
    /// SHA-256 of the target.
    pub digest: Digest,
    /// Length of the target in bytes.
    pub size: u64,
    /// What kind of artifact the target is, in indexes and referrer lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Free annotations.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "null_as_default"
    )]
    pub annotations: BTreeMap<String, String>,
    /// For which platform, in indexes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

/// A manifest document.
#[derive(Debug, Clone)]
pub(crate) enum Document {
    /// One image (or artifact).
    Image(ImageManifest),
    /// A choice of manifests.
    Index(Index),
}

/// One image's manifest.
#[derive(Debug, Clone)]
pub(crate) struct ImageManifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// A choice of manifests, of which those with an unknown digest algorithm were left out.
#[derive(Debug, Clone)]
pub(crate) struct Index {
    pub manifests: Vec<Descriptor>,
}

/// The fields by which documents are told apart.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    schema_version: Option<i64>,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct RawIndex {
    #[serde(default, deserialize_with = "null_as_default")]
    manifests: Vec<serde_json::Value>,
}

fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

impl Descriptor {
    /// A descriptor without annotations.
    pub fn new(media_type: impl Into<String>, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.into(),
            digest,
            size,
            artifact_type: None,
            annotations: BTreeMap::new(),
            platform: None,
        }
    }

    /// From oci-client's loose form.
    pub(crate) fn from_oci(loose: &OciDescriptor, what: &str) -> Result<Self, SourceError> {
        let digest = loose
            .digest
            .parse()
            .map_err(|_| SourceError::UnsupportedDigest {
                what: what.into(),
                digest: loose.digest.chars().take(160).collect(),
            })?;
        let size = u64::try_from(loose.size)
            .map_err(|_| SourceError::malformed(what, "its size is negative"))?;
        Ok(Self {
            media_type: loose.media_type.clone(),
            digest,
            size,
            artifact_type: loose.artifact_type.clone(),
            annotations: loose.annotations.clone().unwrap_or_default(),
            platform: None,
        })
    }

    /// Whether the target is an index by its media type.
    pub fn is_index(&self) -> bool {
        matches!(
            self.media_type.as_str(),
            OCI_IMAGE_INDEX_MEDIA_TYPE | IMAGE_MANIFEST_LIST_MEDIA_TYPE
        )
    }
}

/// The media type of a document: what the server says, unless that is nothing specific, then what
/// the document says, then what its fields say. A contradiction between the two is refused, because
/// two readers could see two images in one document (CVE-2021-41190).
pub(crate) fn media_type(
    what: &str,
    content_type: Option<&str>,
    bytes: &[u8],
) -> Result<String, SourceError> {
    let claimed = content_type
        .map(|t| {
            t.split(';')
                .next()
                .unwrap_or_default()
                .trim()
                .to_ascii_lowercase()
        })
        .filter(|t| {
            !matches!(
                t.as_str(),
                "" | "application/json" | "text/plain" | "application/octet-stream" | "text/html"
            )
        });
    let probe: Probe = serde_json::from_slice(bytes).map_err(|e| {
        let shown: String = String::from_utf8_lossy(&bytes[..bytes.len().min(40)])
            .chars()
            .filter(|c| !c.is_control())
            .collect();
        SourceError::malformed(
            what,
            format_args!("it is not a manifest ({e}); it starts with `{shown}`"),
        )
    })?;
    let claims_schema_1 = claimed
        .as_deref()
        .is_some_and(|t| t.contains("docker.distribution.manifest.v1+"));
    if probe.schema_version == Some(1) || claims_schema_1 {
        return Err(SourceError::UnsupportedMediaType {
            what: what.into(),
            media_type: claimed.unwrap_or_else(|| "schema 1".into()),
            hint: "it is a schema 1 manifest, given up in 2019; pull and push the image with a current tool to convert it",
        });
    }
    if probe.manifests.is_some() && (probe.layers.is_some() || probe.config.is_some()) {
        return Err(SourceError::malformed(
            what,
            "it has the fields of an image and of an index at once",
        ));
    }
    match (claimed, probe.media_type) {
        (Some(claimed), Some(inner)) if claimed != inner => Err(SourceError::malformed(
            what,
            format_args!("it was served as `{claimed}` and calls itself `{inner}`"),
        )),
        (Some(known), _) | (None, Some(known)) => Ok(known),
        (None, None) if probe.manifests.is_some() => Ok(OCI_IMAGE_INDEX_MEDIA_TYPE.into()),
        (None, None) if probe.layers.is_some() => Ok(OCI_IMAGE_MEDIA_TYPE.into()),
        (None, None) => Err(SourceError::malformed(
            what,
            "it is neither an image manifest nor an index",
        )),
    }
}

/// Reads a document of a known media type.
pub(crate) fn parse(what: &str, media_type: &str, bytes: &Bytes) -> Result<Document, SourceError> {
    match media_type {
        OCI_IMAGE_MEDIA_TYPE | IMAGE_MANIFEST_MEDIA_TYPE => {
            parse_image(what, bytes).map(Document::Image)
        }
        OCI_IMAGE_INDEX_MEDIA_TYPE | IMAGE_MANIFEST_LIST_MEDIA_TYPE => {
            parse_index(what, bytes).map(Document::Index)
        }
        other => Err(SourceError::UnsupportedMediaType {
            what: what.into(),
            media_type: other.chars().take(160).collect(),
            hint: "only OCI and Docker schema 2 manifests and indexes are read",
        }),
    }
}

fn parse_image(what: &str, bytes: &[u8]) -> Result<ImageManifest, SourceError> {
    let loose: OciImageManifest =
        serde_json::from_slice(bytes).map_err(|e| SourceError::malformed(what, e))?;
    if loose.schema_version != 2 {
        return Err(SourceError::malformed(
            what,
            format_args!("its schemaVersion is {}", loose.schema_version),
        ));
    }
    // As many as fit into a manifest: a conversion has a limit of its own (--max-layers).
    let layers = loose.layers.iter().enumerate();
    Ok(ImageManifest {
        config: Descriptor::from_oci(&loose.config, &format!("the configuration of {what}"))?,
        layers: layers
            .map(|(i, layer)| Descriptor::from_oci(layer, &format!("layer {i} of {what}")))
            .collect::<Result<_, _>>()?,
    })
}

/// Reads an index, whatever its media type. Entries with a digest that is not SHA-256 are left out:
/// they may be for somebody else, and the entries we can use stay usable.
pub(crate) fn parse_index(what: &str, bytes: &[u8]) -> Result<Index, SourceError> {
    // serde would take an array for a struct whose fields have defaults.
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(SourceError::malformed(what, "it is not a JSON object"));
    }
    let raw: RawIndex =
        serde_json::from_slice(bytes).map_err(|e| SourceError::malformed(what, e))?;
    if raw.manifests.len() > MAX_INDEX_ENTRIES {
        return Err(SourceError::TooLarge {
            what: what.into(),
            limit: MAX_INDEX_ENTRIES as u64,
            unit: "entries",
        });
    }
    let mut manifests = Vec::with_capacity(raw.manifests.len());
    for (i, entry) in raw.manifests.into_iter().enumerate() {
        let digest = entry
            .get("digest")
            .and_then(|d| d.as_str())
            .unwrap_or_default();
        if !digest.starts_with("sha256:") {
            tracing::warn!(index = what, entry = i, digest = %digest.chars().take(160).collect::<String>(), "entry without a sha256 digest is left out");
            continue;
        }
        let descriptor = Descriptor::deserialize(entry)
            .map_err(|e| SourceError::malformed(format!("entry {i} of {what}"), e))?;
        manifests.push(descriptor);
    }
    Ok(Index { manifests })
}

/// Checks that a layer is one that can be fetched and unpacked, by its media type.
pub(crate) fn check_layer_media_type(what: &str, media_type: &str) -> Result<(), SourceError> {
    let refuse = |hint| {
        Err(SourceError::UnsupportedMediaType {
            what: what.into(),
            media_type: media_type.chars().take(160).collect(),
            hint,
        })
    };
    match media_type {
        IMAGE_LAYER_MEDIA_TYPE
        | IMAGE_LAYER_GZIP_MEDIA_TYPE
        | LAYER_ZSTD_MEDIA_TYPE
        | IMAGE_DOCKER_LAYER_TAR_MEDIA_TYPE
        | IMAGE_DOCKER_LAYER_GZIP_MEDIA_TYPE
        | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(()),
        foreign if foreign.contains("nondistributable") || foreign.contains(".foreign.") => refuse(
            "it is a foreign layer, which its maker serves from elsewhere and which registries don't hold",
        ),
        encrypted if encrypted.ends_with("+encrypted") => {
            refuse("the layer is encrypted; decrypt the image first, for example with skopeo")
        }
        _ => refuse(
            "layers are tar, tar+gzip or tar+zstd; an artifact that is no container image can't be converted",
        ),
    }
}

#[cfg(test)]
mod tests;
