//! Start profiles of images: small, sealed by the client, gone with the image.

use bytes::Bytes;
use lazyimg_convergent::Digest;
use tokio::time::Instant;

use crate::engine::{RootId, When};

use super::images::TRIES;
use super::names;
use super::types::{TenantName, is_plain_name};
use super::{Catalog, CatalogError, MAX_PROFILE, MAX_PROFILES};

impl Catalog {
    /// Keeps a profile of a live image.
    ///
    /// # Errors
    /// [`CatalogError::NotLive`], [`CatalogError::TooLarge`], [`CatalogError::TooMany`],
    /// [`CatalogError::BadName`], [`CatalogError::Engine`].
    pub async fn put_profile(
        &self,
        tenant: &TenantName,
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
            self.engine
                .put_doc(&doc, bytes.clone(), When::Always)
                .await?;
            let now = self.fresh_view().await?;
            if now.active()? == active {
                return Ok(());
            }
            self.clean_up_if_gone(&now, active).await?;
            view = now;
        }
        Err(CatalogError::RootsMove)
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
        let mut view = self.view().await?;
        loop {
            let began = Instant::now();
            let roots: Vec<RootId> = view.living().rev().collect();
            for root in roots {
                let doc = format!("{}{name}", names::profiles(root, tenant, image));
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
        let mut found = false;
        for root in self.fresh_view().await?.living() {
            let doc = format!("{}{name}", names::profiles(root, tenant, image));
            if self.has_doc(doc.clone()).await? {
                self.engine.delete_doc(&doc).await?;
                found = true;
            }
        }
        Ok(found)
    }

    /// Copies an image's profiles into another root, where there are none of their names.
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
            if let Some(bytes) = self.engine.get_doc(&doc).await? {
                let copy = format!("{target}{name}");
                self.engine.put_doc(&copy, bytes, When::Absent).await?;
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
