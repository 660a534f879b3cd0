//! Manifests that a host brought from the registry, for the next one to find.
//!
//! They are not live: they protect no chunk, no collection moves them, and they go with their root.
//! What they name is fetched from wherever it is. A live manifest of the same image and key counts
//! before them.

use bytes::Bytes;
use lazyimg_convergent::{Digest, KeyId};

use crate::engine::{RootId, When};

use super::images::{TRIES, parse_for};
use super::names::{self, Version};
use super::types::TenantName;
use super::{Catalog, CatalogError};

/// A copy: its root, its document, and which one it is.
type Copy = (RootId, String, Version);

impl Catalog {
    /// Keeps a manifest that is not live, in the active root and in the place of those that were
    /// brought before.
    ///
    /// # Errors
    /// [`CatalogError::BadManifest`], [`CatalogError::TooLarge`], [`CatalogError::Quota`],
    /// [`CatalogError::Engine`].
    pub async fn put_cached_manifest(
        &self,
        tenant: &TenantName,
        quota: Option<u64>,
        image: &Digest,
        key: KeyId,
        bytes: Bytes,
    ) -> Result<(), CatalogError> {
        parse_for(image, key, bytes.clone()).await?;
        let (tenant, image) = (tenant.clone(), *image);
        self.unbroken(move |this| async move {
            let _one_changes = this.images.lock((tenant.clone(), image)).await;
            let view = this.fresh_view().await?;
            let active = view.active()?;
            let all = view.counted().map(|root| root.id);
            let before = this.cached_copies(all, &tenant, &image, key).await?;
            let latest = before.iter().map(|(.., version)| *version).max();
            let version = this.new_version(&bytes, latest);
            let freed = before.iter().map(|(.., version)| u64::from(version.len));
            let more = u64::from(version.len).saturating_sub(freed.sum());
            let _room = this.reserve(&view, &tenant, quota, more).await?;
            let prefix = names::cached_of_key(active, &tenant, &image, key);
            let doc = format!("{prefix}{version}");
            this.engine.put_doc(&doc, bytes, When::Always).await?;
            this.usage.add(active, &tenant, version.len.into());
            for (root, doc, version) in before {
                this.engine.delete_doc(&doc).await?;
                this.give_back(root, &tenant, version.len);
            }
            let now = this.fresh_view().await?;
            this.clean_up_if_gone(&now, active).await
        })
        .await
    }

    /// All copies in some roots.
    async fn cached_copies(
        &self,
        roots: impl Iterator<Item = RootId>,
        tenant: &TenantName,
        image: &Digest,
        key: KeyId,
    ) -> Result<Vec<Copy>, CatalogError> {
        let mut copies = Vec::new();
        for root in roots {
            let prefix = names::cached_of_key(root, tenant, image, key);
            for doc in self.all_docs(&prefix).await? {
                match names::version_of(&doc) {
                    Some(version) => copies.push((root, doc, version)),
                    None => tracing::warn!(doc, "not a document of this store; left alone"),
                }
            }
        }
        Ok(copies)
    }

    /// A manifest that somebody brought; the one that was brought last counts. A copy that is damaged
    /// is as good as none: who asks goes to the registry, and brings it again.
    ///
    /// # Errors
    /// [`CatalogError::Engine`].
    pub async fn get_cached_manifest(
        &self,
        tenant: &TenantName,
        image: &Digest,
        key: KeyId,
    ) -> Result<Option<Bytes>, CatalogError> {
        let mut look = self.look().await?;
        let mut replaced = 0;
        loop {
            // What it names may lie in the same root: whoever reads that in an expired one raises alarms.
            let roots = look.view.living();
            let mut copies = self.cached_copies(roots, tenant, image, key).await?;
            copies.sort_by_key(|(root, _, version)| (*version, *root));
            let mut gone = false;
            while let Some((_, doc, version)) = copies.pop() {
                match self.engine.get_doc(&doc).await.map_err(CatalogError::from) {
                    Ok(None) => gone = true,
                    Ok(Some(bytes)) if version.is_of(&bytes) => return Ok(Some(bytes)),
                    Ok(Some(_)) => tracing::warn!(doc, "this manifest is damaged"),
                    Err(error) if error.is_damage() => {
                        tracing::warn!(doc, %error, "this manifest is damaged");
                    }
                    Err(error) => return Err(error),
                }
            }
            // The one that took its place was there before it went.
            replaced += usize::from(gone);
            let once_more = gone && replaced < TRIES;
            if !once_more && !self.look_again(&mut look).await? {
                return Ok(None);
            }
        }
    }
}
