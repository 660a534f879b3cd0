//! How many bytes a tenant uses: what it has put into the roots that are read.
//!
//! Each instance keeps its own sum for each root and tenant and writes it down now and then; a tenant
//! uses what all of them say together, on top of what was last counted ([`super::recount`]). A chunk
//! that is copied from one root into another moves its bytes along, so the sum for one root may be
//! negative. After a crash what was not yet written is forgotten, until it is counted anew.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::engine::{RootId, When};

use super::names;
use super::roots::View;
use super::types::TenantName;
use super::{Catalog, CatalogError};

/// How long the sums of other instances are believed.
const OTHERS_TTL: Duration = Duration::from_secs(10);

/// Bytes that one of several instances gives back for what was deleted in a root, until the next count:
/// when the same is deleted through several of them at once, each believes to have done it.
const GIVEN_BACK: u64 = 1 << 30;

#[derive(Default)]
struct Own {
    /// What was written down when this instance began; `None` until it was read.
    base: Option<i64>,
    /// What came since.
    delta: i64,
    dirty: bool,
    /// Bytes that were given back since the last count, which was at `counted_ms`.
    given_back: u64,
    counted_ms: u64,
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
    /// Counts bytes that were put, or, negative, moved to another root.
    pub fn add(&self, root: RootId, tenant: &TenantName, bytes: i64) {
        if bytes == 0 {
            return;
        }
        let mut sums = self.sums.lock();
        let own = sums.own.entry((root, tenant.clone())).or_default();
        own.delta = own.delta.saturating_add(bytes);
        own.dirty = true;
    }

    /// Counts bytes that a tenant has deleted; `alone`: no other instance can have counted them too.
    pub fn give_back(&self, root: RootId, tenant: &TenantName, bytes: u32, alone: bool) {
        if !alone {
            let mut sums = self.sums.lock();
            let own = sums.own.entry((root, tenant.clone())).or_default();
            let sum = own.given_back.saturating_add(bytes.into());
            if sum > GIVEN_BACK {
                return;
            }
            own.given_back = sum;
        }
        self.add(root, tenant, -i64::from(bytes));
    }

    /// Whom this instance has counted something for.
    pub fn tenants(&self) -> Vec<TenantName> {
        let sums = self.sums.lock();
        let dirty = sums.own.iter().filter(|(_, own)| own.dirty);
        dirty.map(|((_, tenant), _)| tenant.clone()).collect()
    }

    /// What a tenant has was counted anew.
    pub fn forget_others(&self, tenant: &TenantName) {
        self.sums.lock().others.remove(tenant);
    }

    fn was_counted(&self, root: RootId, tenant: &TenantName, at_ms: u64) {
        let mut sums = self.sums.lock();
        if let Some(own) = sums.own.get_mut(&(root, tenant.clone()))
            && own.counted_ms != at_ms
        {
            own.counted_ms = at_ms;
            own.given_back = 0;
        }
    }
}

/// What a tenant was found to have in a root, and what the instances' sums were then: `counted/TENANT`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Counted {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// How many bytes.
    pub bytes: u64,
    /// The sum of each instance that had one: what it counts beyond is not in `bytes`.
    pub sums: BTreeMap<String, i64>,
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
        let reserved = sums.reserved.get(tenant).copied().unwrap_or(0);
        let used = used.saturating_add(reserved);
        if used.saturating_add(bytes) > quota {
            return Err(CatalogError::Quota {
                tenant: tenant.clone(),
                used,
                quota,
                wanted: bytes,
            });
        }
        *sums.reserved.entry(tenant.clone()).or_default() += bytes;
        Ok(Some(Reservation {
            usage: &self.usage,
            tenant,
            bytes,
        }))
    }

    /// Counts a document of an image that a tenant has deleted.
    pub(super) fn give_back(&self, root: RootId, tenant: &TenantName, bytes: u32) {
        self.usage.give_back(root, tenant, bytes, self.exclusive());
    }

    /// What a tenant uses, as far as this instance knows.
    pub(super) async fn used_bytes(
        &self,
        view: &View,
        tenant: &TenantName,
    ) -> Result<u64, CatalogError> {
        // Others first, which may take a while: what this instance counts meanwhile is not left out.
        let others = self.others_sum(view, tenant).await?;
        let mut own = 0i64;
        for root in view.counted() {
            own = own.saturating_add(self.own_sum(root.id, tenant).await?);
        }
        Ok(own.saturating_add(others).max(0).unsigned_abs())
    }

    /// What this instance has counted.
    pub(super) async fn own_sum(
        &self,
        root: RootId,
        tenant: &TenantName,
    ) -> Result<i64, CatalogError> {
        let key = (root, tenant.clone());
        let known = {
            let mut sums = self.usage.sums.lock();
            let own = sums.own.entry(key.clone()).or_default();
            own.base.map(|base| base.saturating_add(own.delta))
        };
        if let Some(sum) = known {
            return Ok(sum);
        }
        let name = names::usage(root, tenant, &self.options.instance);
        let base = self.number(&name).await?;
        let mut sums = self.usage.sums.lock();
        let own = sums.own.entry(key).or_default();
        Ok(own.base.get_or_insert(base).saturating_add(own.delta))
    }

    /// What the other instances have written down for a root, by name.
    pub(super) async fn sums_of_others(
        &self,
        root: RootId,
        tenant: &TenantName,
    ) -> Result<BTreeMap<String, i64>, CatalogError> {
        let prefix = names::usages_of(root, tenant);
        let mut sums = BTreeMap::new();
        for name in self.all_docs(&prefix).await? {
            let instance = &name[prefix.len()..];
            if instance != self.options.instance {
                sums.insert(instance.to_owned(), self.number(&name).await?);
            }
        }
        Ok(sums)
    }

    /// What was last counted; `None` too if that can't be read: it will be counted anew.
    pub(super) async fn counted(
        &self,
        root: RootId,
        tenant: &TenantName,
    ) -> Result<Option<Counted>, CatalogError> {
        let name = names::counted(root, tenant);
        match self.json_doc(&name).await {
            Err(error) if error.is_damage() => {
                tracing::warn!(%error, "what a tenant uses must be counted anew");
                Ok(None)
            }
            found => found,
        }
    }

    /// What others say, and what was counted beyond this instance's own sums.
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
        let mut bytes = 0i64;
        for root in view.counted() {
            let sums = self.sums_of_others(root.id, tenant).await?;
            bytes = sums.values().fold(bytes, |sum, n| sum.saturating_add(*n));
            if let Some(counted) = self.counted(root.id, tenant).await? {
                self.usage.was_counted(root.id, tenant, counted.at_ms);
                let found = i64::try_from(counted.bytes).unwrap_or(i64::MAX);
                let known = counted.sums.values();
                let known = known.fold(0i64, |sum, n| sum.saturating_add(*n));
                bytes = bytes.saturating_add(found).saturating_sub(known);
            }
        }
        let mut sums = self.usage.sums.lock();
        sums.others.insert(tenant.clone(), Others { at, bytes });
        Ok(bytes)
    }

    /// A sum; zero if it can't be read: it is made good for when the tenant's bytes are counted.
    async fn number(&self, name: &str) -> Result<i64, CatalogError> {
        let bytes = match self.engine.get_doc(name).await.map_err(CatalogError::from) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(0),
            Err(error) if error.is_damage() => {
                tracing::warn!(%error, "a sum of what a tenant uses is damaged");
                return Ok(0);
            }
            Err(error) => return Err(error),
        };
        let number = std::str::from_utf8(&bytes).ok();
        let number = number.and_then(|text| text.parse().ok());
        if number.is_none() {
            tracing::warn!(name, "a sum of what a tenant uses is no number");
        }
        Ok(number.unwrap_or(0))
    }

    /// Writes down what this instance has counted: every few seconds, and before it ends.
    ///
    /// # Errors
    /// [`CatalogError::Engine`]; what was not written is kept for the next time.
    pub async fn flush_usage(&self) -> Result<(), CatalogError> {
        let _one_flushes = self.usage.flushing.lock().await;
        let view = self.view().await?;
        let began = Instant::now();
        let there: Vec<RootId> = view.counted().map(|r| r.id).collect();
        let newest = view.active()?;
        let dirty: Vec<(RootId, TenantName)> = {
            let mut sums = self.usage.sums.lock();
            // A root that this view does not know yet is not gone.
            sums.own
                .retain(|(root, _), _| there.contains(root) || *root > newest);
            let dirty = sums.own.iter().filter(|(_, own)| own.dirty);
            dirty.map(|(key, _)| key.clone()).collect()
        };
        let mut written = BTreeSet::new();
        for (root, tenant) in dirty {
            written.insert(root);
            self.own_sum(root, &tenant).await?;
            let key = (root, tenant);
            let sum = {
                let mut sums = self.usage.sums.lock();
                let Some(own) = sums.own.get_mut(&key) else {
                    continue;
                };
                own.dirty = false;
                own.base.unwrap_or(0).saturating_add(own.delta)
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
        let mut settle = self.options.settle;
        if !self.exclusive() {
            settle = settle.saturating_sub(self.options.roots_ttl);
        }
        if began.elapsed() >= settle {
            // Held up for so long that a root may have gone meanwhile.
            let now = self.fresh_view().await?;
            for root in written {
                self.clean_up_if_gone(&now, root).await?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_several_instances_gives_back_no_more_than_so_much_between_two_counts() {
        let usage = Usage::default();
        let tenant: TenantName = "t".parse().unwrap();
        let sum = || usage.sums.lock().own[&(RootId::FIRST, tenant.clone())].delta;
        let most = GIVEN_BACK as u32;
        usage.give_back(RootId::FIRST, &tenant, most - 1, false);
        usage.give_back(RootId::FIRST, &tenant, 2, false);
        assert_eq!(sum(), -i64::from(most - 1));
        usage.was_counted(RootId::FIRST, &tenant, 5);
        usage.give_back(RootId::FIRST, &tenant, 2, false);
        assert_eq!(sum(), -i64::from(most) - 1);
        usage.give_back(RootId::FIRST, &tenant, most, true);
        assert_eq!(sum(), -2 * i64::from(most) - 1);
    }
}
