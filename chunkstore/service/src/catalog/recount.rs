//! What tenants use, counted from what lies there: now and then, by passes of garbage collection.
//!
//! Sums that instances keep as they go miss what a crash took with it, and what several of them did at
//! the same moment. A count is written down with the sums as they were, in one document for each root
//! and tenant: whoever counts last is right, and nobody corrects twice. What comes or goes while it is
//! counted may be counted twice, until the next count.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use lazyimg_convergent::ChunkId;

use crate::engine::{RootId, When, parse_chunk_id};

use super::names;
use super::roots::{View, json};
use super::types::TenantName;
use super::usage::Counted;
use super::{Catalog, CatalogError};

/// A tenant is counted again after so long, in milliseconds.
const EVERY_MS: u64 = 6 * 3600 * 1000;
/// Names or chunks that are listed, or whose lengths are asked for, at once.
const PAGE: usize = 1000;
/// A page of a root's chunks is listed for the lengths of so many of them; for fewer, each is asked for.
const WORTH: usize = 8;

type Sums = BTreeMap<RootId, BTreeMap<String, i64>>;

/// A tenant's grants in a root, one after the other.
struct Walk {
    root: RootId,
    prefix: String,
    page: VecDeque<ChunkId>,
    after: Option<String>,
    ended: bool,
}

impl Walk {
    fn new(root: RootId, tenant: &TenantName) -> Self {
        Self {
            root,
            prefix: names::grants_of_tenant(root, tenant),
            page: VecDeque::new(),
            after: None,
            ended: false,
        }
    }

    /// The next one.
    async fn peek(&mut self, catalog: &Catalog) -> Result<Option<ChunkId>, CatalogError> {
        while self.page.is_empty() && !self.ended {
            let after = self.after.as_deref();
            let page = catalog.engine.list_docs(&self.prefix, after, PAGE).await?;
            self.ended = page.len() < PAGE;
            self.after = page.last().cloned().or(self.after.take());
            let id = |name: &String| parse_chunk_id(&name[self.prefix.len()..]);
            self.page.extend(page.iter().filter_map(id));
        }
        Ok(self.page.front().copied())
    }
}

impl Catalog {
    /// Counts what was not counted for long.
    pub(super) async fn recount(&self) -> Result<(), CatalogError> {
        self.flush_usage().await?;
        let view = self.fresh_view().await?;
        for tenant in self.all_tenants(&view).await? {
            if self.is_due(&view, &tenant).await? {
                self.recount_tenant(&view, &tenant).await?;
            }
        }
        Ok(())
    }

    /// Everybody of whom something lies there.
    pub(super) async fn all_tenants(
        &self,
        view: &View,
    ) -> Result<BTreeSet<TenantName>, CatalogError> {
        let mut tenants: BTreeSet<TenantName> = self.usage.tenants().into_iter().collect();
        for root in view.counted() {
            for prefix in names::by_tenant(root.id) {
                let mut after: Option<String> = None;
                loop {
                    let after_this = after.as_deref();
                    let found = self.engine.list_docs(&prefix, after_this, 1).await?;
                    let Some(name) = found.first() else { break };
                    let rest = &name[prefix.len()..];
                    let tenant = rest.split('/').next().unwrap_or_default();
                    // All that is a tenant's has `/` after the name; `0` is the byte after that.
                    after = Some(format!("{prefix}{tenant}0"));
                    tenants.extend(tenant.parse::<TenantName>());
                }
            }
        }
        Ok(tenants)
    }

    async fn is_due(&self, view: &View, tenant: &TenantName) -> Result<bool, CatalogError> {
        let now = self.now_ms();
        for root in view.counted() {
            let counted = self.counted(root.id, tenant).await?;
            let young = |c: &Counted| c.at_ms <= now && now - c.at_ms < EVERY_MS;
            if !counted.is_some_and(|c| young(&c)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn recount_tenant(&self, view: &View, tenant: &TenantName) -> Result<(), CatalogError> {
        let before = self.sums(view, tenant).await?;
        let found = self.count(view, tenant).await?;
        let mut sums = self.sums(view, tenant).await?;
        let at_ms = self.now_ms();
        for (root, bytes) in found {
            // What was put or moved meanwhile may be in `bytes` or not. It shall not be left out.
            let mut sums = sums.remove(&root).unwrap_or_default();
            for (instance, sum) in &mut sums {
                let then = before.get(&root).and_then(|of| of.get(instance));
                *sum = then.map_or(0, |then| *then).min(*sum);
            }
            let counted = Counted { at_ms, bytes, sums };
            let name = names::counted(root, tenant);
            self.engine
                .put_doc(&name, json(&counted)?, When::Always)
                .await?;
        }
        self.usage.forget_others(tenant);
        let now = self.fresh_view().await?;
        for root in view.counted() {
            self.clean_up_if_gone(&now, root.id).await?;
        }
        Ok(())
    }

    /// The sums of all instances.
    async fn sums(&self, view: &View, tenant: &TenantName) -> Result<Sums, CatalogError> {
        let mut all = Sums::new();
        for root in view.counted() {
            let mut sums = self.sums_of_others(root.id, tenant).await?;
            let own = self.own_sum(root.id, tenant).await?;
            sums.insert(self.options.instance.clone(), own);
            all.insert(root.id, sums);
        }
        Ok(all)
    }

    /// The bytes that a tenant has in each root. A chunk counts in the newest root with a grant for it.
    async fn count(
        &self,
        view: &View,
        tenant: &TenantName,
    ) -> Result<BTreeMap<RootId, u64>, CatalogError> {
        let mut bytes = BTreeMap::new();
        let mut walks = Vec::new();
        let mut open: BTreeMap<RootId, Vec<ChunkId>> = BTreeMap::new();
        for root in view.counted() {
            bytes.insert(root.id, self.count_docs(root.id, tenant).await?);
            walks.push(Walk::new(root.id, tenant));
        }
        loop {
            let mut first: Option<(ChunkId, Reverse<RootId>)> = None;
            for walk in &mut walks {
                if let Some(id) = walk.peek(self).await? {
                    let this = (id, Reverse(walk.root));
                    first = Some(first.map_or(this, |first| first.min(this)));
                }
            }
            let Some((id, Reverse(root))) = first else {
                break;
            };
            for walk in &mut walks {
                if walk.page.front() == Some(&id) {
                    walk.page.pop_front();
                }
            }
            let ids = open.entry(root).or_default();
            ids.push(id);
            if ids.len() >= PAGE {
                *bytes.entry(root).or_default() += self.chunk_bytes(root, ids).await?;
                ids.clear();
            }
        }
        for (root, ids) in open {
            *bytes.entry(root).or_default() += self.chunk_bytes(root, &ids).await?;
        }
        Ok(bytes)
    }

    /// Bytes in those of some chunks, in their order, that a root has.
    async fn chunk_bytes(&self, root: RootId, ids: &[ChunkId]) -> Result<u64, CatalogError> {
        let mut sum = 0;
        let mut rest = ids;
        while let Some(first) = rest.first() {
            let before = before(first);
            let page = self.engine.list_chunks(root, before.as_ref(), PAGE).await?;
            let (here, later) = match page.last() {
                Some((last, _)) if page.len() == PAGE => {
                    rest.split_at(rest.partition_point(|id| id <= last))
                }
                _ => (rest, &rest[rest.len()..]),
            };
            let lengths: BTreeMap<ChunkId, u32> = page.into_iter().collect();
            let here_sum = here.iter().filter_map(|id| lengths.get(id));
            sum += here_sum.map(|len| u64::from(*len)).sum::<u64>();
            rest = later;
            if here.len() < WORTH && !rest.is_empty() {
                let lengths = self.engine.stat_chunks(root, rest).await?;
                let there = lengths.into_iter().flatten();
                return Ok(sum + there.map(u64::from).sum::<u64>());
            }
        }
        Ok(sum)
    }

    /// Bytes in manifests and profiles.
    async fn count_docs(&self, root: RootId, tenant: &TenantName) -> Result<u64, CatalogError> {
        let mut sum = 0;
        // A profile may be called as it likes: its name says nothing.
        for (prefix, is_profile) in [
            (names::manifests_of_tenant(root, tenant), false),
            (names::cached_of_tenant(root, tenant), false),
            (names::profiles_of_tenant(root, tenant), true),
        ] {
            let mut after: Option<String> = None;
            loop {
                let page = self.engine.list_docs(&prefix, after.as_deref(), PAGE);
                let page = page.await?;
                for name in &page {
                    sum += match is_profile {
                        true => self.profile_len(name).await?,
                        false => names::version_of(name).map_or(0, |version| version.len.into()),
                    };
                }
                if page.len() < PAGE {
                    break;
                }
                after = page.last().cloned();
            }
        }
        Ok(sum)
    }
}

/// The id before this one.
fn before(id: &ChunkId) -> Option<ChunkId> {
    let mut id = *id;
    for byte in id.0.iter_mut().rev() {
        let borrowed;
        (*byte, borrowed) = byte.overflowing_sub(1);
        if !borrowed {
            return Some(id);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_but_the_first_has_one_before_it() {
        let mut id = ChunkId([0; 32]);
        assert_eq!(before(&id), None);
        id.0[30] = 1;
        let mut less = ChunkId([0; 32]);
        less.0[31] = 0xff;
        assert_eq!(before(&id), Some(less));
    }
}
