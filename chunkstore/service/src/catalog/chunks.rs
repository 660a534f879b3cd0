//! Chunks: put, read, and brought from an older root into the active one.

use std::collections::HashSet;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use lazyimg_convergent::{ChunkId, MAX_STORED_LEN};
use tokio::time::Instant;

use crate::engine::{EngineError, RootId};

use super::images::TRIES;
use super::roots::View;
use super::types::{Put, RootState, TenantName};
use super::{Catalog, CatalogError};

/// Chunks that are looked up at once while an image is brought along.
const BATCH: usize = 1024;
/// Chunks that are copied at once; each is in memory while it is.
const COPIES: usize = 8;

/// What is wanted of a chunk.
#[derive(Clone, Copy)]
enum Ask {
    Bytes,
    Length,
}

enum Found {
    Bytes(Bytes),
    Length(u32),
}

/// What it took to have an image's chunks in the active root.
#[derive(Debug, Default)]
pub(super) struct Brought {
    pub copied: u64,
    pub copied_bytes: u64,
    /// Chunks that can't be had, in the order asked.
    pub missing: Vec<ChunkId>,
    /// A chunk whose length is another than was said, and that length.
    pub wrong_length: Option<(ChunkId, u32, u32)>,
}

impl Brought {
    /// Whether the root has all of them now.
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.wrong_length.is_none()
    }
}

/// Whose chunks are brought.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Right {
    /// Of one who asks: a grant must be found.
    Asked,
    /// Of a live image: its tenant had all grants when it was put.
    Live,
}

impl Catalog {
    /// Keeps a chunk for a tenant. **The caller has verified** that `id` is the hash of `bytes`. With
    /// `repair` the store's copy is looked at, and replaced if it is bad.
    ///
    /// # Errors
    /// [`CatalogError::Quota`], [`CatalogError::TooLarge`], [`CatalogError::Engine`].
    pub async fn put_chunk(
        &self,
        tenant: &TenantName,
        quota: Option<u64>,
        id: &ChunkId,
        bytes: Bytes,
        repair: bool,
    ) -> Result<Put, CatalogError> {
        let len = checked_len(&bytes)?;
        for _ in 0..TRIES {
            let view = self.view().await?;
            let root = view.active()?;
            let put = self
                .put_into(&view, tenant, quota, id, (bytes.clone(), len), repair)
                .await?;
            if self.view().await?.living().any(|living| living == root) {
                return Ok(put);
            }
            let now = self.fresh_view().await?;
            self.clean_up_if_gone(&now, root).await?;
        }
        Err(CatalogError::RootsMove)
    }

    /// [`Catalog::put_chunk`] into the active root of `view`.
    async fn put_into(
        &self,
        view: &View,
        tenant: &TenantName,
        quota: Option<u64>,
        id: &ChunkId,
        (bytes, len): (Bytes, u32),
        repair: bool,
    ) -> Result<Put, CatalogError> {
        let active = view.active()?;
        if self.granted_one(active, tenant, id).await? {
            return Ok(match self.keep(active, id, bytes, repair).await? {
                Kept::WasThere => Put::Known,
                Kept::New | Kept::Replaced => Put::Repaired,
            });
        }
        let mut before = None;
        for root in view.living().rev().filter(|root| *root != active) {
            if self.granted_one(root, tenant, id).await? {
                before = Some(root);
                break;
            }
        }
        let new_bytes = if before.is_some() { 0 } else { len.into() };
        let _room = self.reserve(view, tenant, quota, new_bytes).await?;
        let kept = self.keep(active, id, bytes, repair).await?;
        if self.grant(active, tenant, id, len).await? {
            self.usage.add(active, tenant, len.into());
            if let Some(root) = before {
                self.usage.add(root, tenant, -i64::from(len));
            }
        }
        Ok(match (before, kept) {
            (_, Kept::Replaced) => Put::Repaired,
            (Some(_), _) => Put::Known,
            (None, _) => Put::New,
        })
    }

    async fn keep(
        &self,
        root: RootId,
        id: &ChunkId,
        bytes: Bytes,
        repair: bool,
    ) -> Result<Kept, CatalogError> {
        if repair {
            let bad = match self.engine.get_chunk(root, id).await {
                Ok(copy) => copy.is_some_and(|copy| ChunkId::of(&copy) != *id),
                Err(EngineError::Damaged(_)) => true,
                Err(error) => return Err(error.into()),
            };
            if bad {
                self.engine.replace_chunk(root, id, bytes).await?;
                return Ok(Kept::Replaced);
            }
        }
        Ok(match self.engine.put_chunk(root, id, bytes).await? {
            true => Kept::New,
            false => Kept::WasThere,
        })
    }

    async fn granted_one(
        &self,
        root: RootId,
        tenant: &TenantName,
        id: &ChunkId,
    ) -> Result<bool, CatalogError> {
        let granted = self.granted(root, tenant, std::slice::from_ref(id)).await?;
        Ok(granted.first() == Some(&true))
    }

    /// A chunk that the tenant has put. One that is found in an expired root only raises its alarm.
    ///
    /// # Errors
    /// [`CatalogError::Engine`]; damage only if no root has a copy that is not.
    pub async fn get_chunk(
        &self,
        tenant: &TenantName,
        id: &ChunkId,
    ) -> Result<Option<Bytes>, CatalogError> {
        Ok(match self.find(tenant, id, Ask::Bytes).await? {
            Some(Found::Bytes(bytes)) => Some(bytes),
            _ => None,
        })
    }

    /// The length of a chunk that [`Catalog::get_chunk`] would give; alarms are raised alike.
    ///
    /// # Errors
    /// [`CatalogError::Engine`].
    pub async fn stat_chunk(
        &self,
        tenant: &TenantName,
        id: &ChunkId,
    ) -> Result<Option<u32>, CatalogError> {
        Ok(match self.find(tenant, id, Ask::Length).await? {
            Some(Found::Length(len)) => Some(len),
            _ => None,
        })
    }

    async fn find(
        &self,
        tenant: &TenantName,
        id: &ChunkId,
        ask: Ask,
    ) -> Result<Option<Found>, CatalogError> {
        let mut view = self.view().await?;
        let mut damage = None;
        loop {
            let began = Instant::now();
            for root in view.readable() {
                if !self.granted_one(root.id, tenant, id).await? {
                    continue;
                }
                let found = match self.ask(root.id, id, ask).await {
                    Ok(Some(found)) => found,
                    Ok(None) => continue,
                    Err(EngineError::Damaged(what)) => {
                        damage = Some(EngineError::Damaged(what));
                        continue;
                    }
                    Err(error) => return Err(error.into()),
                };
                let given = root.state != RootState::Expired
                    || self.raise_alarm(root.id, tenant, id).await?;
                if given {
                    return Ok(Some(found));
                }
            }
            match self.newer_view(&view, began).await? {
                Some(newer) => view = newer,
                None => return damage.map_or(Ok(None), |damage| Err(damage.into())),
            }
        }
    }

    async fn ask(
        &self,
        root: RootId,
        id: &ChunkId,
        ask: Ask,
    ) -> Result<Option<Found>, EngineError> {
        Ok(match ask {
            Ask::Bytes => self.engine.get_chunk(root, id).await?.map(Found::Bytes),
            Ask::Length => {
                let ids = std::slice::from_ref(id);
                let lengths = self.engine.stat_chunks(root, ids).await?;
                lengths.first().copied().flatten().map(Found::Length)
            }
        })
    }

    /// For each chunk, whether the tenant has put it and need not again before it puts a manifest.
    ///
    /// # Errors
    /// [`CatalogError::Engine`].
    pub async fn has_chunks(
        &self,
        tenant: &TenantName,
        ids: &[ChunkId],
    ) -> Result<Vec<bool>, CatalogError> {
        let view = self.view().await?;
        let mut has = vec![false; ids.len()];
        for root in view.living().rev() {
            let mut open: Vec<usize> = (0..ids.len()).filter(|&i| !has[i]).collect();
            let asked: Vec<ChunkId> = open.iter().map(|&i| ids[i]).collect();
            let granted = self.granted(root, tenant, &asked).await?;
            let mut granted = granted.into_iter();
            open.retain(|_| granted.next() == Some(true));
            if open.is_empty() {
                continue;
            }
            let asked: Vec<ChunkId> = open.iter().map(|&i| ids[i]).collect();
            let lengths = self.engine.stat_chunks(root, &asked).await?;
            for (i, len) in open.into_iter().zip(lengths) {
                has[i] = len.is_some();
            }
        }
        Ok(has)
    }

    /// Sees to it that the active root of `view` has these chunks and the tenant's grants for them;
    /// copies what lies in older roots. Each chunk is named once.
    pub(super) async fn bring(
        &self,
        view: &View,
        tenant: &TenantName,
        chunks: &[(ChunkId, u32)],
        right: Right,
    ) -> Result<Brought, CatalogError> {
        let mut brought = Brought::default();
        for batch in chunks.chunks(BATCH) {
            self.bring_batch(view, tenant, batch, right, &mut brought)
                .await?;
            if brought.wrong_length.is_some() {
                break;
            }
        }
        Ok(brought)
    }

    async fn bring_batch(
        &self,
        view: &View,
        tenant: &TenantName,
        chunks: &[(ChunkId, u32)],
        right: Right,
        brought: &mut Brought,
    ) -> Result<(), CatalogError> {
        let active = view.active()?;
        let ids: Vec<ChunkId> = chunks.iter().map(|(id, _)| *id).collect();
        let granted = self.granted(active, tenant, &ids).await?;
        let lengths = self.engine.stat_chunks(active, &ids).await?;

        // Where the tenant's right comes from, of those that it does not have in the active root.
        let mut from: Vec<Option<RootId>> = vec![None; ids.len()];
        let older: Vec<RootId> = match right {
            Right::Asked => view.living().rev().filter(|r| *r != active).collect(),
            Right::Live => view
                .readable()
                .map(|r| r.id)
                .filter(|r| *r != active)
                .collect(),
        };
        for root in &older {
            let open: Vec<usize> = (0..ids.len())
                .filter(|&i| !granted[i] && from[i].is_none())
                .collect();
            let asked: Vec<ChunkId> = open.iter().map(|&i| ids[i]).collect();
            let there = self.granted(*root, tenant, &asked).await?;
            for (i, _) in open.iter().zip(there).filter(|(_, there)| *there) {
                from[*i] = Some(*root);
            }
        }
        let may = |i: usize| right == Right::Live || granted[i] || from[i].is_some();

        for (i, (id, says)) in chunks.iter().enumerate() {
            match lengths[i] {
                Some(actual) if may(i) && actual != *says => {
                    brought.wrong_length = Some((*id, *says, actual));
                    return Ok(());
                }
                _ => {}
            }
        }
        let copies: Vec<usize> = (0..ids.len())
            .filter(|&i| may(i) && lengths[i].is_none())
            .collect();
        let copied: HashSet<usize> = stream::iter(copies)
            .map(|i| {
                let (older, chunk) = (&older, chunks[i]);
                async move {
                    let copied = self.copy(older, active, &chunk).await?;
                    Ok::<_, CatalogError>(copied.then_some(i))
                }
            })
            .buffer_unordered(COPIES)
            .try_filter_map(|i| async move { Ok(i) })
            .try_collect()
            .await?;

        let mut grants = Vec::new();
        let mut moved = Vec::new();
        for (i, (id, len)) in chunks.iter().enumerate() {
            if copied.contains(&i) {
                brought.copied += 1;
                brought.copied_bytes += u64::from(*len);
            } else if !may(i) || lengths[i].is_none() {
                brought.missing.push(*id);
                continue;
            }
            if !granted[i] {
                grants.push((*id, *len));
                moved.push((from[i], i64::from(*len)));
            }
        }
        self.grant_all(active, tenant, &grants).await?;
        for (from, len) in moved {
            self.usage.add(active, tenant, len);
            if let Some(root) = from {
                self.usage.add(root, tenant, -len);
            }
        }
        Ok(())
    }

    /// Copies a chunk out of one of `older`; false when none of them has it whole.
    async fn copy(
        &self,
        older: &[RootId],
        to: RootId,
        (id, len): &(ChunkId, u32),
    ) -> Result<bool, CatalogError> {
        for root in older {
            match self.engine.get_chunk(*root, id).await {
                Ok(Some(bytes)) if bytes.len() == *len as usize && ChunkId::of(&bytes) == *id => {
                    self.engine.put_chunk(to, id, bytes).await?;
                    return Ok(true);
                }
                Ok(None) => {}
                Ok(Some(_)) | Err(EngineError::Damaged(_)) => {
                    tracing::warn!(%root, chunk = id.hex(), "this copy of a chunk is damaged");
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(false)
    }
}

enum Kept {
    New,
    WasThere,
    Replaced,
}

fn checked_len(bytes: &Bytes) -> Result<u32, CatalogError> {
    let wrong = || CatalogError::TooLarge {
        what: "a chunk",
        len: bytes.len() as u64,
        limit: MAX_STORED_LEN as u64,
    };
    match bytes.len() {
        1..=MAX_STORED_LEN => u32::try_from(bytes.len()).map_err(|_| wrong()),
        0 => Err(CatalogError::BadName {
            what: "chunk",
            text: String::new(),
            rule: "it has no bytes",
        }),
        _ => Err(wrong()),
    }
}
