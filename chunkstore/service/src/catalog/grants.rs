//! Grants: which tenant may read which chunk of a root. Who has put a chunk has one.
//!
//! A grant is never taken back while its root is there, so one that was seen may be remembered.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;

use bytes::Bytes;
use futures_util::{TryStreamExt, stream};
use lazyimg_convergent::ChunkId;
use lru::LruCache;
use parking_lot::Mutex;

use crate::engine::{RootId, When};

use super::names;
use super::types::TenantName;
use super::{Catalog, CatalogError};

/// Grants that are written at once.
const AT_ONCE: usize = 128;

type Known = LruCache<(TenantName, ChunkId), ()>;

/// Grants that were seen.
pub(super) struct Grants {
    most: NonZeroUsize,
    roots: Mutex<HashMap<RootId, Known>>,
}

impl Grants {
    pub fn new(most: usize) -> Self {
        Self {
            most: NonZeroUsize::new(most).unwrap_or(NonZeroUsize::MIN),
            roots: Mutex::default(),
        }
    }

    /// Whether a grant was seen, and is remembered.
    pub fn knows(&self, root: RootId, tenant: &TenantName, id: &ChunkId) -> bool {
        let mut roots = self.roots.lock();
        let known = roots.get_mut(&root);
        known.is_some_and(|known| known.get(&(tenant.clone(), *id)).is_some())
    }

    fn remember(&self, root: RootId, tenant: &TenantName, id: &ChunkId) {
        let mut roots = self.roots.lock();
        let known = roots
            .entry(root)
            .or_insert_with(|| LruCache::unbounded_with_hasher(Default::default()));
        known.put((tenant.clone(), *id), ());
        while known.len() > self.most.get() {
            known.pop_lru();
        }
    }

    /// Forgets all roots but these.
    pub fn keep_only(&self, roots: &[RootId]) {
        let there: HashSet<&RootId> = roots.iter().collect();
        self.roots.lock().retain(|root, _| there.contains(root));
    }
}

impl Catalog {
    /// For each chunk, whether the tenant has a grant in this root.
    pub(super) async fn granted(
        &self,
        root: RootId,
        tenant: &TenantName,
        ids: &[ChunkId],
    ) -> Result<Vec<bool>, CatalogError> {
        let mut granted: Vec<bool> = ids
            .iter()
            .map(|id| self.grants.knows(root, tenant, id))
            .collect();
        let unknown: Vec<usize> = (0..ids.len()).filter(|&i| !granted[i]).collect();
        if unknown.is_empty() {
            return Ok(granted);
        }
        let names: Vec<String> = unknown
            .iter()
            .map(|&i| names::grant(root, tenant, &ids[i]))
            .collect();
        let there = self.engine.has_docs(&names).await?;
        for (i, there) in unknown.into_iter().zip(there) {
            granted[i] = there;
            if there {
                self.grants.remember(root, tenant, &ids[i]);
            }
        }
        Ok(granted)
    }

    /// Grants a chunk that is in the root; false when the tenant had the grant.
    pub(super) async fn grant(
        &self,
        root: RootId,
        tenant: &TenantName,
        id: &ChunkId,
        len: u32,
    ) -> Result<bool, CatalogError> {
        let name = names::grant(root, tenant, id);
        let new = self
            .engine
            .put_doc(&name, content(len), When::Absent)
            .await?;
        self.grants.remember(root, tenant, id);
        Ok(new)
    }

    /// Grants chunks that are in the root, and counts those for which the tenant had no grant there;
    /// each comes with the older root in which it was counted before, if it was.
    pub(super) async fn grant_all(
        &self,
        root: RootId,
        tenant: &TenantName,
        chunks: Vec<(ChunkId, u32, Option<RootId>)>,
    ) -> Result<(), CatalogError> {
        if chunks.is_empty() {
            return Ok(());
        }
        let tenant = tenant.clone();
        self.unbroken(move |this| async move {
            let (this, tenant) = (&this, &tenant);
            stream::iter(chunks.into_iter().map(Ok))
                .try_for_each_concurrent(AT_ONCE, |(id, len, before)| async move {
                    if this.grant(root, tenant, &id, len).await? {
                        this.count_chunk(root, tenant, len, before);
                    }
                    Ok(())
                })
                .await
        })
        .await
    }

    /// Counts a chunk that was granted; its bytes move here from an older root with a grant for it.
    pub(super) fn count_chunk(
        &self,
        root: RootId,
        tenant: &TenantName,
        len: u32,
        before: Option<RootId>,
    ) {
        self.usage.add(root, tenant, len.into());
        if let Some(before) = before {
            self.usage.add(before, tenant, -i64::from(len));
        }
    }
}

fn content(len: u32) -> Bytes {
    Bytes::copy_from_slice(&len.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_grants_are_remembered_than_allowed_and_none_of_a_root_that_is_gone() {
        let grants = Grants::new(2);
        let tenant: TenantName = "t".parse().unwrap();
        let other: TenantName = "u".parse().unwrap();
        let id = |n: u8| ChunkId([n; 32]);
        for n in 1..=3 {
            grants.remember(RootId::FIRST, &tenant, &id(n));
        }
        assert!(!grants.knows(RootId::FIRST, &tenant, &id(1)));
        assert!(grants.knows(RootId::FIRST, &tenant, &id(3)));
        assert!(!grants.knows(RootId::FIRST, &other, &id(3)));
        let next = RootId::FIRST.next().unwrap();
        grants.remember(next, &tenant, &id(3));
        grants.keep_only(&[next]);
        assert!(!grants.knows(RootId::FIRST, &tenant, &id(3)));
        assert!(grants.knows(next, &tenant, &id(3)));
    }
}
