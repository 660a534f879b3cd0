//! Images in registries and OCI layouts.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_chunkstore::{BlobRanges, FetchError, Guards, OriginOptions, PackOrigin, Tier};
use lazyimg_convergent::{ChunkId, Digest, TenantKey};
use lazyimg_image::artifact;
use lazyimg_image::manifest::OpenManifest;
use lazyimg_image::platform::Platform;
use lazyimg_image::reference::{ImageRef, ManifestRef, RegistryRef};
use lazyimg_image::source::{Repository, SourceError, SourceOptions};

use super::known::{Known, KnownImage, OpenKey};
use super::region::{Region, Regions, Said};
use super::{ImageOpener, OpenError, OpenedImage};
use crate::errno::chain;
use crate::protocol::{ErrorCode, MountRequest};
use crate::view::ImageView;

/// The name of the registry among the tiers.
pub const REGISTRY_TIER: &str = "registry";

/// Connections that are opened while the first answer is awaited: what opening an artifact uses at
/// once.
const PRECONNECT: usize = 6;

/// Opens images in registries and OCI layouts, through a regional store where a mount has one.
#[derive(Default)]
pub struct RegistryOpener {
    /// How the registry is read from.
    pub origin: OriginOptions,
    known: Known,
    regions: Regions,
    /// Of all registries and stores that mounts of this process read from.
    guards: Guards,
}

#[async_trait]
impl ImageOpener for RegistryOpener {
    async fn open(&self, request: &MountRequest) -> Result<OpenedImage, OpenError> {
        let reference: ImageRef = request.image.parse().map_err(|e| OpenError::of(&e))?;
        let options = source_options(request)?;
        let platform = options.platform.clone().unwrap_or_else(Platform::host);
        let repository = Repository::open(&reference, &options).map_err(|e| OpenError::of(&e))?;
        let region = request.source.store.as_ref();
        let region = region.map(|settings| self.regions.get(settings, &self.guards));
        let asked = Asked {
            reference,
            platform,
            repository,
            region: region.transpose()?,
        };
        // The image's tag and the artifact's take two connections; right after them the manifest in
        // parts, and the head of the metadata.
        if asked.region.is_none() && !self.known.is_mounted(&request.image) {
            asked.repository.preconnect(PRECONNECT);
        }
        let provider = request.key.provider();
        // A key command may take seconds.
        let tenant = tokio::task::spawn_blocking(move || provider.existing_tenant_key())
            .await
            .map_err(|e| OpenError::of(&e))?
            .map_err(|e| OpenError {
                code: ErrorCode::Key,
                message: chain(&e),
            })?;
        let key = OpenKey::of(request, tenant.id());
        let mounted = self.known.mounted(&key);
        let open = self.open_now(&asked, &tenant, mounted);
        self.known.share(&key, open).await
    }
}

/// What is to be opened, and where.
struct Asked {
    reference: ImageRef,
    platform: Platform,
    repository: Repository,
    region: Option<Region>,
}

impl Asked {
    /// The image that the registry says is meant.
    async fn resolve(&self, target: &ManifestRef) -> Result<Digest, OpenError> {
        let error = match self.repository.resolve_digest(target).await {
            Ok(resolved) => return Ok(resolved.digest),
            Err(error) => error,
        };
        let mut error = OpenError::artifact(&error.into());
        if error.code == ErrorCode::Unreachable
            && let (Some(region), ImageRef::Registry(registry)) = (&self.region, &self.reference)
        {
            let advice = region.advice(registry, &self.platform.to_string()).await;
            error.message += &advice.unwrap_or_default();
        }
        Err(error)
    }
}

/// What a look into the store found.
enum Found {
    /// All of it.
    Opened(OpenedImage),
    /// The image that is meant, if it knows; and whether it is worth while to ask it more.
    Named(Option<Digest>, bool),
}

impl RegistryOpener {
    /// Opens an image; where a mount has it already, only asks what its name means now.
    async fn open_now(
        &self,
        asked: &Asked,
        tenant: &TenantKey,
        mounted: Option<KnownImage>,
    ) -> Result<OpenedImage, OpenError> {
        let (repository, target) = (&asked.repository, asked.reference.target());
        let found = match (&asked.region, &asked.reference) {
            (Some(region), ImageRef::Registry(registry)) => {
                self.look_up(asked, region, registry, tenant, mounted.as_ref())
                    .await?
            }
            // A layout says itself what its names mean.
            _ => Found::Named(None, true),
        };
        let (named, mut region) = match found {
            Found::Opened(opened) => return Ok(opened),
            Found::Named(image, answers) => (image, asked.region.as_ref().filter(|_| answers)),
        };
        let mut image = named;
        if image.is_none() && (asked.region.is_some() || mounted.is_some()) {
            image = Some(asked.resolve(&target).await?);
        }
        if let Some(mounted) = mounted.filter(|mounted| image == Some(mounted.image)) {
            return Ok(mounted.opened());
        }
        let named_so = image.map(ManifestRef::Digest).as_ref() == Some(&target);
        if let (Some(asking), Some(image)) = (region, &image)
            // Else it has been asked already, by this very digest.
            && (asking.brings || !named_so || !repository.is_remote())
        {
            match asking.manifest(image, tenant, true).await? {
                Said::Has(manifest) => return self.opened_by_store(asked, &manifest),
                Said::Lacks if asking.only => return Err(asking.unknown(&asked.reference)),
                Said::Lacks => {}
                Said::Silent => region = None,
            }
        }
        // What the store calls the image counts here too: two hosts must not mount two images.
        let target = named.map_or(target, ManifestRef::Digest);
        let opened = artifact::open(repository, &target, tenant)
            .await
            .map_err(|e| OpenError::artifact(&e))?;
        let view = ImageView::of_manifest(&opened.manifest).map_err(|e| OpenError::of(&e))?;
        if let Some(region) = region {
            let early = opened.early.clone();
            region.bring(view.image, tenant.id(), opened.manifest_bytes, early);
        }
        Ok(self.opened(asked, view, opened.early))
    }

    /// Looks for an image of a registry in the store: by what a tag means there, or by its digest.
    async fn look_up(
        &self,
        asked: &Asked,
        region: &Region,
        registry: &RegistryRef,
        tenant: &TenantKey,
        mounted: Option<&KnownImage>,
    ) -> Result<Found, OpenError> {
        let Some(exact) = registry.digest else {
            return match region
                .image_of(registry, &asked.platform.to_string())
                .await?
            {
                Said::Has(image) => Ok(Found::Named(Some(image), true)),
                Said::Lacks if region.only => Err(region.unknown(&asked.reference)),
                Said::Lacks => Ok(Found::Named(None, true)),
                Said::Silent => Ok(Found::Named(None, false)),
            };
        };
        if let Some(mounted) = mounted.filter(|mounted| mounted.image == exact) {
            return Ok(Found::Opened(mounted.opened()));
        }
        // The manifest proves itself. No lease: it would be one for a manifest that nobody has, if this
        // is an index.
        match region.manifest(&exact, tenant, false).await? {
            Said::Has(manifest) => {
                let opened = self.opened_by_store(asked, &manifest)?;
                return Ok(Found::Opened(opened));
            }
            Said::Lacks => {}
            Said::Silent => return Ok(Found::Named(None, false)),
        }
        // What the store calls this digest proves nothing, but an index does that names the image.
        match region.image_in_index(registry, &asked.platform).await? {
            Said::Has(image) => Ok(Found::Named(Some(image), true)),
            Said::Lacks if region.only => {
                let mut error = region.unknown(&asked.reference);
                let advice = region.advice(registry, &asked.platform.to_string()).await;
                error.message += &advice.unwrap_or_default();
                Err(error)
            }
            Said::Lacks => Ok(Found::Named(None, true)),
            Said::Silent => Ok(Found::Named(None, false)),
        }
    }

    fn opened_by_store(
        &self,
        asked: &Asked,
        manifest: &OpenManifest,
    ) -> Result<OpenedImage, OpenError> {
        let view = ImageView::of_manifest(manifest).map_err(|e| OpenError::of(&e))?;
        Ok(self.opened(asked, view, Vec::new()))
    }

    /// An image with the tiers that its chunks come from.
    fn opened(&self, asked: &Asked, view: ImageView, early: Vec<(ChunkId, Bytes)>) -> OpenedImage {
        let mut tiers: Vec<Arc<dyn Tier>> = Vec::new();
        let mut registry = true;
        if let Some(region) = &asked.region {
            tiers.push(region.tier.clone());
            registry = !region.only;
        }
        if registry {
            let blobs = Arc::new(RepositoryBlobs(asked.repository.clone()));
            let mut origin = PackOrigin::new(REGISTRY_TIER, blobs, self.origin.clone());
            if let Some(host) = host_of(&asked.reference) {
                origin = origin.guarded(self.guards.of(host));
            }
            tiers.push(Arc::new(origin));
        }
        OpenedImage {
            view: Arc::new(view),
            tiers,
            early,
        }
    }
}

/// The registry that an image comes from; a layout is a directory.
fn host_of(reference: &ImageRef) -> Option<&str> {
    match reference {
        ImageRef::Registry(registry) => Some(&registry.registry),
        ImageRef::Layout { .. } => None,
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
