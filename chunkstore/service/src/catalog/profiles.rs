//! Start profiles of images: small, sealed by the client, gone with the image.

use bytes::Bytes;
use lazyimg_convergent::Digest;

use crate::engine::{EngineError, RootId, When};

use super::images::TRIES;
use super::names;
use super::types::{TenantName, is_plain_name};
use super::{Catalog, CatalogError, MAX_PROFILE, MAX_PROFILES};

impl Catalog {
    /// Keeps a profile of a live image.
    ///
    /// # Errors
    /// [`CatalogError::NotLive`], [`CatalogError::TooLarge`], [`CatalogError::TooMany`],
    /// [`CatalogError::BadName`], [`CatalogError::Quota`], [`CatalogError::Engine`].
    pub async fn put_profile(
        &self,
        tenant: &TenantName,
        quota: Option<u64>,
        image: &Digest,
        name: &str,
        bytes: Bytes,
    ) -> Result<(), CatalogError> {
        check_name(name)?;
        if bytes.len() > MAX_PROFILE {
            return Err(CatalogError::TooLarge {
                what: "a profile",
                len: bytes.len() as u64,
                limit: MAX_PROFILE as u64,
            });
        }
        let (tenant, image, name) = (tenant.clone(), *image, name.to_owned());
        self.unbroken(move |this| async move {
            let _one_changes = this.images.lock((tenant.clone(), image)).await;
            this.keep_profile(&tenant, quota, &image, &name, bytes)
                .await
        })
        .await
    }

    /// For who has the image's lock.
    async fn keep_profile(
        &self,
        tenant: &TenantName,
        quota: Option<u64>,
        image: &Digest,
        name: &str,
        bytes: Bytes,
    ) -> Result<(), CatalogError> {
        let len = bytes.len() as u64;
        let mut view = self.fresh_view().await?;
        for _ in 0..TRIES {
            if !self.is_live(&view, tenant, image).await? {
                return Err(CatalogError::NotLive(*image));
            }
            let active = view.active()?;
            let prefix = names::profiles(active, tenant, image);
            let doc = format!("{prefix}{name}");
            let there = self.engine.list_docs(&prefix, None, MAX_PROFILES).await?;
            if there.len() >= MAX_PROFILES && !there.contains(&doc) {
                return Err(CatalogError::TooMany {
                    what: "profiles of this image",
                    limit: MAX_PROFILES,
                });
            }
            let before = self.profile_len(&doc).await?;
            let more = len.saturating_sub(before);
            let _room = self.reserve(&view, tenant, quota, more).await?;
            self.engine
                .put_doc(&doc, bytes.clone(), When::Always)
                .await?;
            self.usage.add(active, tenant, len as i64 - before as i64);
            let now = self.fresh_view().await?;
            if now.active()? == active {
                return Ok(());
            }
            self.clean_up_if_gone(&now, active).await?;
            view = now;
        }
        Err(CatalogError::RootsMove)
    }

    /// The length of a profile: none if there is none, or if it can't be read.
    pub(super) async fn profile_len(&self, doc: &str) -> Result<u64, CatalogError> {
        match self.engine.get_doc(doc).await {
            Ok(bytes) => Ok(bytes.map_or(0, |bytes| bytes.len() as u64)),
            Err(EngineError::Damaged(why)) => {
                tracing::warn!(doc, why, "this profile is damaged");
                Ok(0)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Deletes a profile; for who has the image's lock.
    pub(super) async fn drop_profile(
        &self,
        root: RootId,
        tenant: &TenantName,
        doc: &str,
    ) -> Result<(), CatalogError> {
        let len = self.profile_len(doc).await?;
        self.engine.delete_doc(doc).await?;
        self.give_back(root, tenant, u32::try_from(len).unwrap_or(u32::MAX));
        Ok(())
    }

    /// A profile; the newest root that has it counts.
    ///
    /// # Errors
    /// [`CatalogError::BadName`], [`CatalogError::Engine`].
    pub async fn get_profile(
        &self,
        tenant: &TenantName,
        image: &Digest,
        name: &str,
    ) -> Result<Option<Bytes>, CatalogError> {
        check_name(name)?;
        let mut look = self.look().await?;
        loop {
            for root in look.view.living().rev() {
                let doc = format!("{}{name}", names::profiles(root, tenant, image));
                if let Some(bytes) = self.engine.get_doc(&doc).await? {
                    return Ok(Some(bytes));
                }
            }
            if !self.look_again(&mut look).await? {
                return Ok(None);
            }
        }
    }

    /// Deletes a profile; false when there was none.
    ///
    /// # Errors
    /// [`CatalogError::BadName`], [`CatalogError::Engine`].
    pub async fn delete_profile(
        &self,
        tenant: &TenantName,
        image: &Digest,
        name: &str,
    ) -> Result<bool, CatalogError> {
        check_name(name)?;
        let (tenant, image, name) = (tenant.clone(), *image, name.to_owned());
        self.unbroken(move |this| async move {
            let _one_changes = this.images.lock((tenant.clone(), image)).await;
            let mut found = false;
            for root in this.fresh_view().await?.living() {
                let doc = format!("{}{name}", names::profiles(root, &tenant, &image));
                if this.has_doc(doc.clone()).await? {
                    this.drop_profile(root, &tenant, &doc).await?;
                    found = true;
                }
            }
            Ok(found)
        })
        .await
    }

    /// Copies an image's profiles into another root, where there are none of their names. One that can't
    /// be read is left behind. Each copy counts in its root.
    pub(super) async fn copy_profiles(
        &self,
        from: RootId,
        to: RootId,
        tenant: &TenantName,
        image: &Digest,
    ) -> Result<(), CatalogError> {
        let (prefix, target) = (
            names::profiles(from, tenant, image),
            names::profiles(to, tenant, image),
        );
        for doc in self.all_docs(&prefix).await? {
            let Some(name) = doc.strip_prefix(&prefix) else {
                continue;
            };
            let bytes = match self.engine.get_doc(&doc).await {
                Ok(Some(bytes)) => bytes,
                Ok(None) => continue,
                Err(EngineError::Damaged(why)) => {
                    tracing::warn!(doc, why, "this profile is damaged");
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let (copy, len) = (format!("{target}{name}"), bytes.len() as i64);
            if self.engine.put_doc(&copy, bytes, When::Absent).await? {
                self.usage.add(to, tenant, len);
            }
        }
        Ok(())
    }
}

fn check_name(name: &str) -> Result<(), CatalogError> {
    match is_plain_name(name) {
        true => Ok(()),
        false => Err(CatalogError::BadName {
            what: "name of a profile",
            text: name.chars().take(80).collect(),
            rule: "1 to 64 of a-z, 0-9, - and _",
        }),
    }
}
