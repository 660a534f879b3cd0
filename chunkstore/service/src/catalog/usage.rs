//! How many bytes a tenant uses: what it has put into the roots in which images live.
//!
//! Each instance keeps its own sum for each root and tenant and writes it down now and then; a tenant
//! uses what all of them say together. A chunk that is copied from one root into another moves its
//! bytes along, so the sum for one root may be negative. After a crash what was not yet written is
//! forgotten: the tenant is then said to use less than it does, until the root goes.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::engine::{RootId, When};

use super::names;
use super::roots::View;
use super::types::TenantName;
use super::{Catalog, CatalogError};

/// How long the sums of other instances are believed.
const OTHERS_TTL: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Own {
    /// What was written down when this instance began; `None` until it was read.
    base: Option<i64>,
    /// What came since.
    delta: i64,
    dirty: bool,
}

struct Others {
    at: Instant,
    bytes: i64,
}

#[derive(Default)]
struct Sums {
    own: HashMap<(RootId, TenantName), Own>,
    others: HashMap<TenantName, Others>,
    /// What is on its way.
    reserved: HashMap<TenantName, u64>,
}

/// What is known of the tenants' usage.
#[derive(Default)]
pub(super) struct Usage {
    sums: Mutex<Sums>,
    flushing: tokio::sync::Mutex<()>,
}

impl Usage {
    /// Counts bytes that were put, or, negative, went.
    pub fn add(&self, root: RootId, tenant: &TenantName, bytes: i64) {
        if bytes == 0 {
            return;
        }
        let mut sums = self.sums.lock();
        let own = sums.own.entry((root, tenant.clone())).or_default();
        own.delta += bytes;
        own.dirty = true;
    }

    /// Whom this instance has counted something for.
    pub fn tenants(&self) -> Vec<TenantName> {
        let sums = self.sums.lock();
        let dirty = sums.own.iter().filter(|(_, own)| own.dirty);
        dirty.map(|((_, tenant), _)| tenant.clone()).collect()
    }
}

/// Room that was found within a quota, until it is counted or given back.
pub(super) struct Reservation<'a> {
    usage: &'a Usage,
    tenant: &'a TenantName,
    bytes: u64,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut sums = self.usage.sums.lock();
        if let Some(reserved) = sums.reserved.get_mut(self.tenant) {
            *reserved = reserved.saturating_sub(self.bytes);
            if *reserved == 0 {
                sums.reserved.remove(self.tenant);
            }
        }
    }
}

impl Catalog {
    /// Room for `bytes` more, if the quota has it.
    pub(super) async fn reserve<'a>(
        &'a self,
        view: &View,
        tenant: &'a TenantName,
        quota: Option<u64>,
        bytes: u64,
    ) -> Result<Option<Reservation<'a>>, CatalogError> {
        let Some(quota) = quota.filter(|_| bytes > 0) else {
            return Ok(None);
        };
        let used = self.used_bytes(view, tenant).await?;
        let mut sums = self.usage.sums.lock();
        let reserved = sums.reserved.entry(tenant.clone()).or_default();
        let used = used.saturating_add(*reserved);
        if used.saturating_add(bytes) > quota {
            return Err(CatalogError::Quota {
                tenant: tenant.clone(),
                used,
                quota,
                wanted: bytes,
            });
        }
        *reserved += bytes;
        Ok(Some(Reservation {
            usage: &self.usage,
            tenant,
            bytes,
        }))
    }

    /// What a tenant uses, as far as this instance knows.
    pub(super) async fn used_bytes(
        &self,
        view: &View,
        tenant: &TenantName,
    ) -> Result<u64, CatalogError> {
        let mut own = 0;
        for root in view.living() {
            own += self.own_sum(root, tenant).await?;
        }
        let others = self.others_sum(view, tenant).await?;
        Ok((own + others).max(0).unsigned_abs())
    }

    async fn own_sum(&self, root: RootId, tenant: &TenantName) -> Result<i64, CatalogError> {
        let key = (root, tenant.clone());
        let known = {
            let mut sums = self.usage.sums.lock();
            let own = sums.own.entry(key.clone()).or_default();
            own.base.map(|base| base + own.delta)
        };
        if let Some(sum) = known {
            return Ok(sum);
        }
        let name = names::usage(root, tenant, &self.options.instance);
        let base = self.number(&name).await?;
        let mut sums = self.usage.sums.lock();
        let own = sums.own.entry(key).or_default();
        Ok(*own.base.get_or_insert(base) + own.delta)
    }

    async fn others_sum(&self, view: &View, tenant: &TenantName) -> Result<i64, CatalogError> {
        let young = |others: &&Others| others.at.elapsed() < OTHERS_TTL;
        let known = {
            let sums = self.usage.sums.lock();
            sums.others.get(tenant).filter(young).map(|o| o.bytes)
        };
        if let Some(bytes) = known {
            return Ok(bytes);
        }
        let at = Instant::now();
        let mut bytes = 0;
        for root in view.living() {
            let mine = names::usage(root, tenant, &self.options.instance);
            for name in self.all_docs(&names::usages_of(root, tenant)).await? {
                if name != mine {
                    bytes += self.number(&name).await?;
                }
            }
        }
        let mut sums = self.usage.sums.lock();
        sums.others.insert(tenant.clone(), Others { at, bytes });
        Ok(bytes)
    }

    async fn number(&self, name: &str) -> Result<i64, CatalogError> {
        let Some(bytes) = self.engine.get_doc(name).await? else {
            return Ok(0);
        };
        let number = std::str::from_utf8(&bytes)
            .ok()
            .and_then(|t| t.parse().ok());
        number.ok_or_else(|| CatalogError::Damaged {
            name: name.to_owned(),
            why: "not a decimal number".to_owned(),
        })
    }

    /// Writes down what this instance has counted: every few seconds, and before it ends.
    ///
    /// # Errors
    /// [`CatalogError::Engine`]; what was not written is kept for the next time.
    pub async fn flush_usage(&self) -> Result<(), CatalogError> {
        let _one_flushes = self.usage.flushing.lock().await;
        let view = self.view().await?;
        let living: Vec<RootId> = view.living().collect();
        let newest = view.active()?;
        let dirty: Vec<(RootId, TenantName)> = {
            let mut sums = self.usage.sums.lock();
            // A root that this view does not know yet is not gone.
            sums.own
                .retain(|(root, _), _| living.contains(root) || *root > newest);
            let dirty = sums.own.iter().filter(|(_, own)| own.dirty);
            dirty.map(|(key, _)| key.clone()).collect()
        };
        for (root, tenant) in dirty {
            self.own_sum(root, &tenant).await?;
            let key = (root, tenant);
            let sum = {
                let mut sums = self.usage.sums.lock();
                let Some(own) = sums.own.get_mut(&key) else {
                    continue;
                };
                own.dirty = false;
                own.base.unwrap_or(0) + own.delta
            };
            let name = names::usage(root, &key.1, &self.options.instance);
            let put = self
                .engine
                .put_doc(&name, sum.to_string().into(), When::Always)
                .await;
            if let Err(error) = put {
                if let Some(own) = self.usage.sums.lock().own.get_mut(&key) {
                    own.dirty = true;
                }
                return Err(error.into());
            }
        }
        Ok(())
    }
}
