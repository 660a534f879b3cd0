//! Images in a regional store: which image a name means there, its manifest, its chunks.
//!
//! What a tag means there is the store's word, as it is a registry's. What a digest means is not: an
//! image that was named by digest is taken from a store only under the very manifest of that digest.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use lazyimg_chunkstore::Guards;
use lazyimg_chunkstore::remote::{
    self, ManifestAnswer, RefAnswer, StoreClient, StoreError, StoreErrorCode, StoreTier,
    StoreTierOptions,
};
use lazyimg_chunkstore::wire::index_profile;
use lazyimg_convergent::{ChunkId, Digest, KeyId, TenantKey};
use lazyimg_image::artifact;
use lazyimg_image::manifest::OpenManifest;
use lazyimg_image::platform::Platform;
use lazyimg_image::reference::{ImageRef, RegistryRef};
use lazyimg_image::source::IndexDocument;
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::OpenError;
use crate::errno::chain;
use crate::protocol::{ErrorCode, StoreSettings};

/// How long a manifest is waited for that another host is bringing from the registry.
const MANIFEST_WAIT: Duration = Duration::from_secs(5);

/// A store that has said nothing for so long is passed over, where there is a registry behind it: a
/// thousand times the median of a store that is well.
const STALL: Duration = Duration::from_secs(1);

/// How long a name or a manifest may take, all attempts together, where there is a registry behind
/// the store: then that is asked. Hundreds of mounts may wait at once for a store that hangs.
const DOCUMENT: Duration = Duration::from_secs(3);

/// The stores that mounts read through: one client for each way to reach one.
#[derive(Default)]
pub struct Regions {
    tiers: Mutex<HashMap<StoreSettings, Weak<StoreTier>>>,
}

impl Regions {
    /// The store of these settings; the one that other mounts have, if there is one.
    pub fn get(&self, settings: &StoreSettings, guards: &Guards) -> Result<Region, OpenError> {
        let mut tiers = self.tiers.lock();
        let known = tiers.get(settings).and_then(Weak::upgrade);
        let tier = match known {
            Some(tier) => tier,
            None => {
                let tier = Arc::new(connect(settings, guards)?);
                tiers.retain(|_, tier| tier.strong_count() > 0);
                tiers.insert(settings.clone(), Arc::downgrade(&tier));
                tier
            }
        };
        let only = settings.only;
        Ok(Region {
            tier,
            only,
            brings: !only && !settings.no_write_back,
            patience: (!only).then_some(DOCUMENT),
        })
    }
}

fn connect(settings: &StoreSettings, guards: &Guards) -> Result<StoreTier, OpenError> {
    let usual = remote::StoreSettings::new(settings.urls.clone());
    let stall_timeout = match settings.only {
        true => usual.stall_timeout,
        // The registry is asked instead.
        false => STALL,
    };
    let client = remote::StoreSettings {
        stall_timeout,
        token_file: settings.token_file.clone().map(|path| path.0),
        ca_file: settings.ca_file.clone().map(|path| path.0),
        ..usual
    };
    let client = StoreClient::new(client, guards).map_err(|e| store_error(&e))?;
    let options = StoreTierOptions {
        tier_behind: !settings.only,
        write_back: !settings.only && !settings.no_write_back,
        ..StoreTierOptions::default()
    };
    Ok(StoreTier::new(client, options, &Handle::current()))
}

/// What a store says of a document.
#[derive(Debug, PartialEq, Eq)]
pub enum Said<T> {
    /// It has it.
    Has(T),
    /// It does not, or what it has is not what was asked for.
    Lacks,
    /// It can't be asked now, and the registry may.
    Silent,
}

/// A store, as one mount uses it.
#[derive(Clone)]
pub struct Region {
    /// Its chunks.
    pub tier: Arc<StoreTier>,
    /// Whether the registry is never asked.
    pub only: bool,
    /// Whether what comes from the registry is put into it.
    pub brings: bool,
    /// How long a document may take; `None`: as long as the client tries.
    patience: Option<Duration>,
}

impl Region {
    fn client(&self) -> &StoreClient {
        self.tier.client()
    }

    /// The image that a tag means, as whoever converted it told the store.
    pub async fn image_of(
        &self,
        registry: &RegistryRef,
        platform: &str,
    ) -> Result<Said<Digest>, OpenError> {
        let name = registry.store_name(platform);
        let answer = self.ask(Duration::ZERO, self.client().get_ref(&name, None));
        Ok(match answer.await? {
            Said::Has(RefAnswer::Found(record)) => Said::Has(record.image),
            Said::Silent => Said::Silent,
            Said::Has(_) | Said::Lacks => Said::Lacks,
        })
    }

    /// The image that an index means, proved by the index, which whoever converted it put beside the
    /// image.
    pub async fn image_in_index(
        &self,
        registry: &RegistryRef,
        platform: &Platform,
    ) -> Result<Said<Digest>, OpenError> {
        let Some(digest) = registry.digest else {
            return Ok(Said::Lacks);
        };
        let image = match self.image_of(registry, &platform.to_string()).await? {
            Said::Has(image) => image,
            other => return Ok(other),
        };
        let name = index_profile(&digest);
        let answer = self.client().get_profile(&image, &name);
        let bytes = match self.ask(Duration::ZERO, answer).await? {
            Said::Has(Some(bytes)) => bytes,
            Said::Silent => return Ok(Said::Silent),
            Said::Has(None) | Said::Lacks => return Ok(Said::Lacks),
        };
        let meant = IndexDocument::verified(digest, bytes).and_then(|index| index.image(platform));
        Ok(match meant {
            Ok(meant) => Said::Has(meant),
            Err(error) => {
                tracing::error!(%digest, error = chain(&error), "the store's index is not this one, or has no such image");
                Said::Lacks
            }
        })
    }

    /// The manifest of an image, which proves that it is this image's. `brings`: the caller can bring it
    /// from the registry if nobody else does.
    pub async fn manifest(
        &self,
        image: &Digest,
        tenant: &TenantKey,
        brings: bool,
    ) -> Result<Said<OpenManifest>, OpenError> {
        let (client, key) = (self.client(), tenant.id());
        let found = if brings && self.brings {
            let answer = client.await_manifest(image, &key, MANIFEST_WAIT);
            match self.ask(MANIFEST_WAIT, answer).await? {
                Said::Has(ManifestAnswer::Found(bytes)) => Said::Has(bytes),
                Said::Silent => Said::Silent,
                Said::Has(_) | Said::Lacks => Said::Lacks,
            }
        } else {
            let answer = self.ask(Duration::ZERO, client.get_manifest(image, &key));
            match answer.await? {
                Said::Has(Some(bytes)) => Said::Has(bytes),
                Said::Silent => Said::Silent,
                Said::Has(None) | Said::Lacks => Said::Lacks,
            }
        };
        let bytes = match found {
            Said::Has(bytes) => bytes,
            Said::Lacks => return Ok(Said::Lacks),
            Said::Silent => return Ok(Said::Silent),
        };
        match artifact::open_manifest(image, Digest::of(&bytes), &bytes, tenant) {
            Ok(manifest) => Ok(Said::Has(manifest)),
            Err(error) if self.only => Err(OpenError::artifact(&error)),
            Err(error) => {
                tracing::error!(%image, error = chain(&error), "the store's manifest is not this image's; asking the registry");
                Ok(Said::Lacks)
            }
        }
    }

    /// The answer to a request for a document, which may take `wait` longer than usual. A store that
    /// fails or hangs is no reason to fail, or to wait for long, where there is a registry.
    async fn ask<T>(
        &self,
        wait: Duration,
        answer: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<Said<T>, OpenError> {
        let failed = match self.patience {
            None => return answer.await.map(Said::Has).map_err(|e| store_error(&e)),
            Some(patience) => match tokio::time::timeout(patience + wait, answer).await {
                Ok(Ok(answer)) => return Ok(Said::Has(answer)),
                Ok(Err(error)) => chain(&error),
                Err(_) => format!("no answer within {:?}", patience + wait),
            },
        };
        let store = self.client().origin();
        tracing::warn!(
            store,
            error = failed,
            "the store can't be asked; asking the registry"
        );
        Ok(Said::Silent)
    }

    /// Brings the manifest that came from the registry into the store, in the background: the next
    /// host need not ask for it there. The chunks that came with it go first, or whoever waits for
    /// the manifest would miss them and fetch them too. The others follow as they are read.
    pub fn bring(&self, image: Digest, key: KeyId, manifest: Bytes, early: Vec<(ChunkId, Bytes)>) {
        if !self.brings {
            return;
        }
        let client = self.client().clone();
        tokio::spawn(async move {
            let bring = async {
                for (id, ciphertext) in early {
                    // Not checked yet: the store takes it only if it is what its id says.
                    client.put(&id, ciphertext, false).await?;
                }
                client.put_cached_manifest(&image, &key, manifest).await
            };
            // Nobody waits for it, and the mount has what it needs.
            if let Err(error) = bring.await {
                tracing::debug!(%image, %error, "the manifest could not be put into the store");
            }
        });
    }

    /// Why an image can't be opened that the store does not know.
    pub fn unknown(&self, reference: &ImageRef) -> OpenError {
        OpenError {
            code: ErrorCode::NotFound,
            message: format!(
                "the store {} does not know {reference} under this tenant's key, and the registry is not to be asked: \
                 convert it with --store, or mount it without --store-only",
                self.client().origin()
            ),
        }
    }

    /// What to try for a digest of which the store has no manifest: it may be one of an index, whose
    /// image only the registry can prove, and the store knows which it was when it was converted.
    pub async fn advice(&self, registry: &RegistryRef, platform: &str) -> Option<String> {
        let digest = registry.digest?;
        let Ok(Said::Has(image)) = self.image_of(registry, platform).await else {
            return None;
        };
        (image != digest).then(|| {
            format!(
                "; the store says that this digest is of an index whose image for {platform} is {image}, which only \
                 the registry can prove: if you trust it, name {}@{image}",
                registry.name()
            )
        })
    }
}

fn store_error(error: &StoreError) -> OpenError {
    use StoreErrorCode::{Forbidden, NotFound, Unauthorized};
    let code = match (error, error.code()) {
        (StoreError::Token { .. }, _) | (_, Some(Unauthorized | Forbidden)) => ErrorCode::Key,
        (_, Some(NotFound)) => ErrorCode::NotFound,
        _ if error.is_passing() => ErrorCode::Unreachable,
        _ => ErrorCode::Image,
    };
    let message = chain(error);
    OpenError { code, message }
}
