//! From a mount request to an image that can be read: the registry behind it.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_chunkstore::{BlobRanges, FetchError, OriginOptions, PackOrigin, Tier};
use lazyimg_convergent::{ChunkId, Digest};
use lazyimg_image::artifact::{self, ArtifactError};
use lazyimg_image::failure::FailureClass;
use lazyimg_image::reference::ImageRef;
use lazyimg_image::source::{Repository, SourceError, SourceOptions};

use crate::errno::chain;
use crate::protocol::{ErrorCode, MountRequest};
use crate::view::ImageView;

/// The name of the registry among the tiers.
pub const REGISTRY_TIER: &str = "registry";

/// Connections that are opened while the first answer is awaited: what opening an artifact uses at
/// once.
const PRECONNECT: usize = 6;

/// An image that is ready to be mounted.
pub struct OpenedImage {
    /// Its chunk tables.
    pub view: ImageView,
    /// Where its chunks come from, nearest first.
    pub tiers: Vec<Arc<dyn Tier>>,
    /// Ciphertexts that came along while it was opened.
    pub early: Vec<(ChunkId, Bytes)>,
}

/// Why an image could not be opened, in words for the user: the causes are many, and nobody but a
/// person acts on them.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct OpenError {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
}

impl OpenError {
    /// With all the causes of `error`.
    pub fn of(error: &(dyn std::error::Error + 'static)) -> Self {
        Self {
            code: ErrorCode::Image,
            message: chain(error),
        }
    }

    fn artifact(error: &ArtifactError) -> Self {
        let code = match error.class() {
            FailureClass::NotFound => ErrorCode::NotFound,
            FailureClass::Key => ErrorCode::Key,
            FailureClass::Unreachable => ErrorCode::Unreachable,
            FailureClass::Damaged => ErrorCode::Damaged,
            FailureClass::Other => ErrorCode::Image,
        };
        Self {
            code,
            message: chain(error),
        }
    }
}

/// Finds and opens images. The daemon has one; tests bring their own.
#[async_trait]
pub trait ImageOpener: Send + Sync {
    /// Opens the image of a request. Ends by itself: every step has a deadline.
    async fn open(&self, request: &MountRequest) -> Result<OpenedImage, OpenError>;
}

/// Opens images in registries and OCI layouts.
#[derive(Debug, Default)]
pub struct RegistryOpener {
    /// How the registry is read from.
    pub origin: OriginOptions,
}

#[async_trait]
impl ImageOpener for RegistryOpener {
    async fn open(&self, request: &MountRequest) -> Result<OpenedImage, OpenError> {
        let reference: ImageRef = request.image.parse().map_err(|e| OpenError::of(&e))?;
        let repository = Repository::open(&reference, &source_options(request)?)
            .map_err(|e| OpenError::of(&e))?;
        // The image's tag and the artifact's take two connections; right after them the manifest in
        // parts, and the head of the metadata.
        repository.preconnect(PRECONNECT);
        let provider = request.key.provider();
        // A key command may take seconds.
        let tenant = tokio::task::spawn_blocking(move || provider.existing_tenant_key())
            .await
            .map_err(|e| OpenError::of(&e))?
            .map_err(|e| OpenError {
                code: ErrorCode::Key,
                message: chain(&e),
            })?;
        let opened = artifact::open(&repository, &reference.target(), &tenant)
            .await
            .map_err(|e| OpenError::artifact(&e))?;
        let view = ImageView::of_manifest(&opened.manifest).map_err(|e| OpenError::of(&e))?;
        let origin = PackOrigin::new(
            REGISTRY_TIER,
            Arc::new(RepositoryBlobs(repository)),
            self.origin.clone(),
        );
        Ok(OpenedImage {
            view,
            tiers: vec![Arc::new(origin)],
            early: opened.early,
        })
    }
}

fn source_options(request: &MountRequest) -> Result<SourceOptions, OpenError> {
    let platform = request
        .source
        .platform
        .as_deref()
        .map(str::parse)
        .transpose()
        .map_err(|e: lazyimg_image::platform::ParsePlatformError| OpenError::of(&e))?;
    Ok(SourceOptions {
        platform,
        plain_http: request.source.plain_http,
        docker_config: request.source.docker_config.clone().map(|path| path.0),
        credentials: request.source.credentials.clone().map(Into::into),
        ..SourceOptions::default()
    })
}

/// A repository as the origin of chunks.
pub struct RepositoryBlobs(pub Repository);

#[async_trait]
impl BlobRanges for RepositoryBlobs {
    async fn read_range(&self, blob: &Digest, offset: u64, len: u64) -> Result<Bytes, FetchError> {
        self.0
            .blob_range_once(blob, offset, len)
            .await
            .map_err(fetch_error)
    }
}

/// What a tier says for what a source said.
fn fetch_error(error: SourceError) -> FetchError {
    match error {
        SourceError::NotFound { .. } => FetchError::NotFound(chain(&error)),
        SourceError::Unauthorized { .. } | SourceError::Credentials(_) => {
            FetchError::Unauthorized(chain(&error))
        }
        SourceError::RateLimited { retry_after, .. } => FetchError::Unavailable {
            retry_after,
            source: Box::new(error),
        },
        SourceError::DigestMismatch { .. } | SourceError::SizeMismatch { .. } => {
            FetchError::Corrupt(chain(&error))
        }
        error if error.is_retryable() => FetchError::unavailable(error),
        SourceError::TooLarge { .. }
        | SourceError::RangesUnsupported { .. }
        | SourceError::Unsupported { .. }
        | SourceError::Malformed { .. } => FetchError::Invalid(chain(&error)),
        // A status, a redirect, a file that can't be read: it may well be different tomorrow.
        error => FetchError::unavailable(error),
    }
}
