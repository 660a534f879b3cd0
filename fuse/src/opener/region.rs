//! Images in a regional store: which image a name means there, its manifest, its chunks.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use lazyimg_chunkstore::Guards;
use lazyimg_chunkstore::remote::{
    self, ManifestAnswer, RefAnswer, StoreClient, StoreError, StoreErrorCode, StoreTier,
    StoreTierOptions,
};
use lazyimg_convergent::{ChunkId, Digest, KeyId, TenantKey};
use lazyimg_image::artifact;
use lazyimg_image::manifest::OpenManifest;
use lazyimg_image::reference::{ImageRef, ManifestRef};
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
        let brings = !only && !settings.no_write_back;
        Ok(Region { tier, only, brings })
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

/// A store, as one mount uses it.
#[derive(Clone)]
pub struct Region {
    /// Its chunks.
    pub tier: Arc<StoreTier>,
    /// Whether the registry is never asked.
    pub only: bool,
    /// Whether what comes from the registry is put into it.
    pub brings: bool,
}

impl Region {
    fn client(&self) -> &StoreClient {
        self.tier.client()
    }

    /// The image that a name means, as whoever converted it told the store; `None` when the store
    /// does not know, or can't be asked and the registry may.
    pub async fn image_of(
        &self,
        reference: &ImageRef,
        platform: &str,
    ) -> Result<Option<Digest>, OpenError> {
        // A layout says itself.
        let ImageRef::Registry(registry) = reference else {
            return Ok(None);
        };
        let name = registry.store_name(platform);
        match self.client().get_ref(&name, None).await {
            Ok(RefAnswer::Found(record)) => Ok(Some(record.image)),
            // The digest of an image, not of an index of several: it is its own name.
            Ok(_) => Ok(match reference.target() {
                ManifestRef::Digest(digest) if self.only => Some(digest),
                _ => None,
            }),
            Err(error) => self.forgive(&error).map(|()| None),
        }
    }

    /// The manifest of an image; `None` when the store does not have it, or can't be asked and the
    /// registry may.
    pub async fn manifest(
        &self,
        image: &Digest,
        tenant: &TenantKey,
    ) -> Result<Option<OpenManifest>, OpenError> {
        let (client, key) = (self.client(), tenant.id());
        let answer = match self.brings {
            true => client.await_manifest(image, &key, MANIFEST_WAIT).await,
            false => client
                .get_manifest(image, &key)
                .await
                .map(|found| match found {
                    Some(bytes) => ManifestAnswer::Found(bytes),
                    None => ManifestAnswer::Missing,
                }),
        };
        let bytes = match answer {
            Ok(ManifestAnswer::Found(bytes)) => bytes,
            Ok(_) => return Ok(None),
            Err(error) => return self.forgive(&error).map(|()| None),
        };
        match artifact::open_manifest(image, Digest::of(&bytes), &bytes, tenant) {
            Ok(manifest) => Ok(Some(manifest)),
            Err(error) if self.only => Err(OpenError::artifact(&error)),
            Err(error) => {
                tracing::error!(%image, error = chain(&error), "the store's manifest is not this image's; asking the registry");
                Ok(None)
            }
        }
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

    /// A store that fails is no reason to fail where there is a registry.
    fn forgive(&self, error: &StoreError) -> Result<(), OpenError> {
        if self.only {
            return Err(store_error(error));
        }
        tracing::warn!(
            error = chain(error),
            "the store can't be asked; asking the registry"
        );
        Ok(())
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
