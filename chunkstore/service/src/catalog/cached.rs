//! Manifests that a host brought from the registry, for the next one to find.
//!
//! They are not live: they protect no chunk, no collection moves them, and they go with their root.
//! What they name is fetched from wherever it is. A live manifest of the same image and key counts
//! before them.

use bytes::Bytes;
use lazyimg_convergent::{Digest, KeyId};
use tokio::time::Instant;

use crate::engine::{RootId, When};

use super::images::parse_for;
use super::names;
use super::types::TenantName;
use super::{Catalog, CatalogError};

impl Catalog {
    /// Keeps a manifest that is not live, in the active root.
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
        let len = bytes.len() as u64;
        parse_for(image, key, bytes.clone()).await?;
        let view = self.fresh_view().await?;
        let active = view.active()?;
        let doc = names::cached_manifest(active, tenant, image, key);
        let there = self.engine.has_docs(std::slice::from_ref(&doc)).await?;
        let more = if there == [true] { 0 } else { len };
        let _room = self.reserve(&view, tenant, quota, more).await?;
        self.engine.put_doc(&doc, bytes, When::Always).await?;
        if more > 0 {
            self.usage.add(active, tenant, more as i64);
        }
        let now = self.fresh_view().await?;
        self.clean_up_if_gone(&now, active).await
    }

    /// A manifest that somebody brought; the newest root that has it counts.
    ///
    /// # Errors
    /// [`CatalogError::Engine`].
    pub async fn get_cached_manifest(
        &self,
        tenant: &TenantName,
        image: &Digest,
        key: KeyId,
    ) -> Result<Option<Bytes>, CatalogError> {
        let mut view = self.view().await?;
        loop {
            let began = Instant::now();
            let roots: Vec<RootId> = view.living().rev().collect();
            for root in roots {
                let doc = names::cached_manifest(root, tenant, image, key);
                if let Some(bytes) = self.engine.get_doc(&doc).await? {
                    return Ok(Some(bytes));
                }
            }
            match self.newer_view(&view, began).await? {
                Some(newer) => view = newer,
                None => return Ok(None),
            }
        }
    }
}
