//! Live images: manifests, in whose names chunks are kept.
//!
//! A manifest is live once its document is in a root that was still the newest *afterwards*: whoever
//! retires that root and looks for manifests then finds it. Nothing here relies on clocks.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use lazyimg_convergent::{ChunkId, Digest, KeyId, seal};
use lazyimg_image::manifest::{Manifest, ManifestError};

use crate::engine::{RootId, When};

use super::chunks::Right;
use super::error::BadManifest;
use super::names::{self, ManifestName, Version};
use super::roots::View;
use super::types::{ManifestInfo, ManifestPut, TenantName};
use super::{Catalog, CatalogError, MAX_MANIFEST};

/// How often a request begins again because the roots or the image changed under it.
pub(super) const TRIES: usize = 8;

/// Milliseconds of a day.
pub(super) const DAY_MS: u64 = 24 * 3600 * 1000;

/// What of a manifest concerns the store.
pub(super) struct Parsed {
    pub image: Digest,
    pub key: KeyId,
    /// Each chunk once, with its length.
    pub chunks: Vec<(ChunkId, u32)>,
}

/// Manifests up to so many bytes are read at once, longer ones on a thread that may take its time.
const SHORT: usize = 64 << 10;

/// Reads a manifest that is put as that of `image`, sealed for `key`.
pub(super) async fn parse_for(
    image: &Digest,
    key: KeyId,
    bytes: Bytes,
) -> Result<Parsed, CatalogError> {
    if bytes.len() > MAX_MANIFEST {
        return Err(CatalogError::TooLarge {
            what: "a manifest",
            len: bytes.len() as u64,
            limit: MAX_MANIFEST as u64,
        });
    }
    let parsed = parse(bytes).await?;
    if parsed.image != *image {
        let (actual, asked) = (parsed.image, *image);
        return Err(BadManifest::Image { actual, asked }.into());
    }
    if parsed.key != key {
        let (actual, asked) = (parsed.key, key);
        return Err(BadManifest::Key { actual, asked }.into());
    }
    Ok(parsed)
}

/// Reads a manifest.
pub(super) async fn parse(bytes: Bytes) -> Result<Parsed, CatalogError> {
    if bytes.len() <= SHORT {
        return Ok(parse_now(&bytes)?);
    }
    match tokio::task::spawn_blocking(move || parse_now(&bytes)).await {
        Ok(parsed) => Ok(parsed?),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(CatalogError::Setup("the store is ending".to_owned())),
        },
    }
}

fn parse_now(bytes: &[u8]) -> Result<Parsed, BadManifest> {
    let manifest = Manifest::parse(bytes)?;
    let key = seal::sealed_for(&manifest.sealed_keys).map_err(ManifestError::Unseal)?;
    let mut lengths = HashMap::new();
    let mut chunks = Vec::new();
    for stored in manifest.stored() {
        match lengths.insert(stored.id, stored.len) {
            None => chunks.push((stored.id, stored.len)),
            Some(len) if len == stored.len => {}
            Some(len) => {
                return Err(BadManifest::Length {
                    chunk: stored.id,
                    says: stored.len,
                    actual: len,
                });
            }
        }
    }
    Ok(Parsed {
        image: manifest.header.image,
        key,
        chunks,
    })
}

/// What became of a manifest that was written.
enum KeptManifest {
    Live(ManifestPut),
    /// It was taken back: there is a newer root.
    RootsMoved(Arc<View>),
}

impl Catalog {
    /// A number that no one else has.
    fn nonce(&self) -> u64 {
        let count = self.nonces.fetch_add(1, Ordering::Relaxed);
        RandomState::new().hash_one((&self.options.instance, count))
    }

    /// A name for a copy of a manifest that nobody else uses.
    pub(super) fn copy_name(&self, root: RootId, of: &ManifestName) -> ManifestName {
        let version = Version {
            nonce: self.nonce(),
            ..of.version
        };
        ManifestName {
            root,
            version,
            ..of.clone()
        }
    }

    /// Makes an image live.
    ///
    /// # Errors
    /// [`CatalogError::BadManifest`], [`CatalogError::TooLarge`], [`CatalogError::Quota`],
    /// [`CatalogError::RootsMove`], [`CatalogError::Engine`]. After the last two it may be live.
    pub async fn put_manifest(
        &self,
        tenant: &TenantName,
        quota: Option<u64>,
        image: &Digest,
        key: KeyId,
        bytes: Bytes,
    ) -> Result<ManifestPut, CatalogError> {
        let parsed = parse_for(image, key, bytes.clone()).await?;
        let mut view = self.fresh_view().await?;
        for _ in 0..TRIES {
            let brought = self
                .bring(&view, tenant, &parsed.chunks, Right::Asked)
                .await?;
            if !brought.is_complete() {
                let now = self.fresh_view().await?;
                if now.active()? != view.active()? {
                    self.clean_up_if_gone(&now, view.active()?).await?;
                    view = now;
                    continue;
                }
                return match brought.wrong_length {
                    Some((chunk, says, actual)) => Err(BadManifest::Length {
                        chunk,
                        says,
                        actual,
                    }
                    .into()),
                    None => Ok(ManifestPut::Missing(brought.missing)),
                };
            }

            let (of, image, bytes) = (tenant.clone(), *image, bytes.clone());
            let kept = self.unbroken(move |this| async move {
                let _one_changes = this.images.lock((of.clone(), image)).await;
                this.keep_manifest(&view, &of, quota, &image, key, bytes)
                    .await
            });
            match kept.await? {
                KeptManifest::Live(put) => return Ok(put),
                KeptManifest::RootsMoved(now) => view = now,
            }
        }
        Err(CatalogError::RootsMove)
    }

    /// Writes a manifest, the chunks of which are there, into the active root of `view`; for who has the
    /// image's lock.
    async fn keep_manifest(
        &self,
        view: &View,
        tenant: &TenantName,
        quota: Option<u64>,
        image: &Digest,
        key: KeyId,
        bytes: Bytes,
    ) -> Result<KeptManifest, CatalogError> {
        let before = self.copies(view, tenant, image, key).await?;
        let latest = before.iter().map(|c| c.version).max();
        let version = self.new_version(&bytes, latest);
        let same = |v: Version| (v.hash, v.len) == (version.hash, version.len);
        let put = match latest.is_some_and(same) {
            true => ManifestPut::Known,
            false => ManifestPut::Created,
        };
        let len = u64::from(version.len);
        let more = len.saturating_sub(before.iter().map(|c| u64::from(c.version.len)).sum());
        let _room = self.reserve(view, tenant, quota, more).await?;
        let name = ManifestName {
            root: view.active()?,
            tenant: tenant.clone(),
            image: *image,
            key,
            version,
        };
        let doc = name.to_string();
        self.engine.put_doc(&doc, bytes, When::Always).await?;
        let now = self.fresh_view().await?;
        if now.active()? == name.root {
            self.usage.add(name.root, tenant, version.len.into());
            self.supersede(&before).await;
            return Ok(KeptManifest::Live(put));
        }
        // It may have come too late for who looks for manifests in that root: again, in the next.
        self.engine.delete_doc(&doc).await?;
        self.clean_up_if_gone(&now, name.root).await?;
        Ok(KeptManifest::RootsMoved(now))
    }

    /// For a copy of a manifest that is put now, after one of version `latest`.
    pub(super) fn new_version(&self, bytes: &[u8], latest: Option<Version>) -> Version {
        Version {
            // Later than what it takes the place of, whatever the clocks say.
            stamp: self
                .now_ms()
                .max(latest.map_or(0, |v| v.stamp.saturating_add(1))),
            hash: Version::hash_of(bytes),
            len: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            nonce: self.nonce(),
        }
    }

    /// Takes away what a newer manifest has replaced. What stays after a failure is never asked for.
    async fn supersede(&self, copies: &[ManifestName]) {
        for copy in copies {
            match self.engine.delete_doc(&copy.to_string()).await {
                Ok(()) => self.give_back(copy.root, &copy.tenant, copy.version.len),
                Err(error) => {
                    tracing::warn!(%error, "a replaced manifest stays until the image is deleted");
                    return;
                }
            }
        }
    }

    /// All copies of a manifest in the roots in which images live, oldest root first.
    async fn copies(
        &self,
        view: &View,
        tenant: &TenantName,
        image: &Digest,
        key: KeyId,
    ) -> Result<Vec<ManifestName>, CatalogError> {
        let mut copies = Vec::new();
        for root in view.living() {
            let prefix = names::manifests_of_key(root, tenant, image, key);
            copies.extend(self.manifest_names(&prefix).await?);
        }
        Ok(copies)
    }

    pub(super) async fn manifest_names(
        &self,
        prefix: &str,
    ) -> Result<Vec<ManifestName>, CatalogError> {
        let names = self.all_docs(prefix).await?;
        names.into_iter().map(parse_name).collect()
    }

    /// The manifest in force.
    async fn find_manifest(
        &self,
        tenant: &TenantName,
        image: &Digest,
        key: KeyId,
    ) -> Result<Option<ManifestName>, CatalogError> {
        let mut look = self.look().await?;
        loop {
            let copies = self.copies(&look.view, tenant, image, key).await?;
            let found = copies
                .into_iter()
                .max_by_key(|c| (c.version.in_force(), c.root));
            if found.is_some() || !self.look_again(&mut look).await? {
                return Ok(found);
            }
        }
    }

    /// A live manifest.
    ///
    /// # Errors
    /// [`CatalogError::Engine`], [`CatalogError::Damaged`].
    pub async fn get_manifest(
        &self,
        tenant: &TenantName,
        image: &Digest,
        key: KeyId,
    ) -> Result<Option<Bytes>, CatalogError> {
        for _ in 0..TRIES {
            let Some(name) = self.find_manifest(tenant, image, key).await? else {
                return Ok(None);
            };
            let doc = name.to_string();
            // Without it, it was moved between the two calls.
            if let Some(bytes) = self.engine.get_doc(&doc).await? {
                check_copy(&name, &bytes)?;
                self.note_used(tenant, image).await;
                return Ok(Some(bytes));
            }
        }
        Err(CatalogError::RootsMove)
    }

    /// The length of a live manifest.
    ///
    /// # Errors
    /// [`CatalogError::Engine`], [`CatalogError::Damaged`].
    pub async fn stat_manifest(
        &self,
        tenant: &TenantName,
        image: &Digest,
        key: KeyId,
    ) -> Result<Option<u64>, CatalogError> {
        let found = self.find_manifest(tenant, image, key).await?;
        Ok(found.map(|name| name.version.len.into()))
    }

    /// The image no longer lives under this key; false when it did not.
    ///
    /// # Errors
    /// [`CatalogError::Engine`], [`CatalogError::RootsMove`]: it may still be live.
    pub async fn delete_manifest(
        &self,
        tenant: &TenantName,
        image: &Digest,
        key: KeyId,
    ) -> Result<bool, CatalogError> {
        let (tenant, image) = (tenant.clone(), *image);
        self.unbroken(move |this| async move {
            let _one_changes = this.images.lock((tenant.clone(), image)).await;
            this.take_away(&tenant, &image, key).await
        })
        .await
    }

    /// Deletes all copies of a manifest; for who has the image's lock.
    async fn take_away(
        &self,
        tenant: &TenantName,
        image: &Digest,
        key: KeyId,
    ) -> Result<bool, CatalogError> {
        let mut found = false;
        let mut view = self.fresh_view().await?;
        for _ in 0..TRIES {
            // Oldest root first. A move writes the copy, then looks whether what it copied is still
            // there: it is found here, or finds its origin gone and takes itself back.
            for root in view.living() {
                let prefix = names::manifests_of_key(root, tenant, image, key);
                for copy in self.manifest_names(&prefix).await? {
                    self.engine.delete_doc(&copy.to_string()).await?;
                    self.give_back(root, tenant, copy.version.len);
                    found = true;
                }
            }
            let now = self.fresh_view().await?;
            if now.active()? == view.active()? {
                if found && !self.is_live(&now, tenant, image).await? {
                    self.forget_image(&now, tenant, image).await?;
                }
                return Ok(found);
            }
            view = now;
        }
        Err(CatalogError::RootsMove)
    }

    /// Whether any manifest of an image is there.
    pub(super) async fn is_live(
        &self,
        view: &View,
        tenant: &TenantName,
        image: &Digest,
    ) -> Result<bool, CatalogError> {
        for root in view.living() {
            let prefix = names::manifests_of_image(root, tenant, image);
            if !self.engine.list_docs(&prefix, None, 1).await?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn forget_image(
        &self,
        view: &View,
        tenant: &TenantName,
        image: &Digest,
    ) -> Result<(), CatalogError> {
        for root in view.living() {
            for profile in self.all_docs(&names::profiles(root, tenant, image)).await? {
                self.drop_profile(root, tenant, &profile).await?;
            }
        }
        let used = names::used(tenant, image);
        Ok(self.engine.delete_doc(&used).await?)
    }

    /// The live manifests of an image, by key.
    ///
    /// # Errors
    /// [`CatalogError::Engine`], [`CatalogError::Damaged`].
    pub async fn list_manifests(
        &self,
        tenant: &TenantName,
        image: &Digest,
    ) -> Result<Vec<ManifestInfo>, CatalogError> {
        let mut look = self.look().await?;
        let mut latest: BTreeMap<[u8; 8], ManifestName> = BTreeMap::new();
        loop {
            for root in look.view.living() {
                let prefix = names::manifests_of_image(root, tenant, image);
                for name in self.manifest_names(&prefix).await? {
                    let order = |n: &ManifestName| (n.version.in_force(), n.root);
                    let known = latest.entry(name.key.0).or_insert_with(|| name.clone());
                    if order(&name) > order(known) {
                        *known = name;
                    }
                }
            }
            if !self.look_again(&mut look).await? {
                break;
            }
        }
        let info = |name: ManifestName| ManifestInfo {
            key: name.key,
            bytes: name.version.len.into(),
            root: name.root,
        };
        Ok(latest.into_values().map(info).collect())
    }

    /// The tenant's live images in the order of their digests, from the one after `after` on, at most
    /// `limit`.
    ///
    /// # Errors
    /// [`CatalogError::Engine`], [`CatalogError::Damaged`].
    pub async fn list_images(
        &self,
        tenant: &TenantName,
        after: Option<&Digest>,
        limit: usize,
    ) -> Result<Vec<Digest>, CatalogError> {
        let mut look = self.look().await?;
        let mut images = BTreeSet::new();
        loop {
            for root in look.view.living() {
                let some = self.images_of_root(root, tenant, after, limit).await?;
                images.extend(some);
            }
            if !self.look_again(&mut look).await? {
                break;
            }
        }
        Ok(images.into_iter().take(limit).collect())
    }

    async fn images_of_root(
        &self,
        root: RootId,
        tenant: &TenantName,
        after: Option<&Digest>,
        limit: usize,
    ) -> Result<Vec<Digest>, CatalogError> {
        const PAGE: usize = 1000;
        let prefix = names::manifests_of_tenant(root, tenant);
        // All that belongs to an image has `/` after its digest; `0` is the byte after that.
        let past = |image: &Digest| format!("{prefix}{}0", image.hex());
        let mut images: Vec<Digest> = Vec::new();
        let mut from = after.map(past);
        while images.len() < limit {
            let page = self
                .engine
                .list_docs(&prefix, from.as_deref(), PAGE)
                .await?;
            let last = page.len() < PAGE;
            for name in page {
                let image = parse_name(name)?.image;
                if images.last() != Some(&image) {
                    images.push(image);
                }
            }
            from = images.last().map(past);
            if last {
                break;
            }
        }
        images.truncate(limit);
        Ok(images)
    }

    /// Notes, once a day, that an image was asked for. If that fails it was as well not noted.
    async fn note_used(&self, tenant: &TenantName, image: &Digest) {
        let day = self.now_ms() / DAY_MS;
        let key = (tenant.clone(), *image);
        let known = self.used_days.lock().put(key, day);
        if known == Some(day) {
            return;
        }
        let name = names::used(tenant, image);
        let noted = self
            .engine
            .put_doc(&name, day.to_string().into(), When::Always)
            .await;
        if let Err(error) = noted {
            tracing::debug!(%error, "not noted that an image was asked for");
            self.used_days.lock().pop(&(tenant.clone(), *image));
        }
    }

    /// When an image was last asked for, as far as was noted: the end of that day, in milliseconds
    /// since 1970.
    pub(super) async fn last_used(
        &self,
        tenant: &TenantName,
        image: &Digest,
    ) -> Result<Option<u64>, CatalogError> {
        let name = names::used(tenant, image);
        let Some(bytes) = self.engine.get_doc(&name).await? else {
            return Ok(None);
        };
        let day: Option<u64> = std::str::from_utf8(&bytes)
            .ok()
            .and_then(|t| t.parse().ok());
        Ok(day.map(|day| day.saturating_add(1).saturating_mul(DAY_MS)))
    }
}

/// A name below a root's manifests.
pub(super) fn parse_name(name: String) -> Result<ManifestName, CatalogError> {
    name.parse().map_err(|()| CatalogError::Damaged {
        name,
        why: "no manifest of this store is called so".to_owned(),
    })
}

/// Whether these are the bytes that were put under this name.
pub(super) fn check_copy(name: &ManifestName, bytes: &[u8]) -> Result<(), CatalogError> {
    match name.version.is_of(bytes) {
        true => Ok(()),
        false => Err(CatalogError::Damaged {
            name: name.to_string(),
            why: "its bytes are not those that were put; put the manifest again".to_owned(),
        }),
    }
}
