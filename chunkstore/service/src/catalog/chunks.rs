//! Chunks: put, read, and brought from an older root into the active one.

use std::collections::HashSet;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use lazyimg_convergent::{ChunkId, MAX_STORED_LEN};
use parking_lot::Mutex;

use crate::engine::{EngineError, FilePart, RootId};

use super::images::TRIES;
use super::roots::{RootView, View};
use super::types::{Put, RootState, TenantName};
use super::{Catalog, CatalogError, MAX_MISSING};

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
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    /// Of one who asks: a grant must be found.
    Asked,
    /// Of a live image: its tenant had all grants when it was put. The older root may go when it has
    /// moved: so copies that are in the active root already are looked at, and replaced if they are
    /// bad, while there is a good one.
    Live(&'a Verified),
}

impl Right<'_> {
    fn is_live(self) -> bool {
        matches!(self, Self::Live(_))
    }
}

/// Copies in the active root that a pass of garbage collection has found good, or has written.
#[derive(Debug, Default)]
pub(super) struct Verified(Mutex<HashSet<(RootId, ChunkId)>>);

/// So many are remembered; then it begins anew.
const MAX_VERIFIED: usize = 1 << 20;

impl Verified {
    fn has(&self, root: RootId, id: &ChunkId) -> bool {
        self.0.lock().contains(&(root, *id))
    }

    fn add(&self, root: RootId, id: &ChunkId) {
        let mut verified = self.0.lock();
        if verified.len() >= MAX_VERIFIED {
            verified.clear();
        }
        verified.insert((root, *id));
    }
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
        let (tenant, id) = (tenant.clone(), *id);
        self.unbroken(move |this| async move {
            for _ in 0..TRIES {
                let view = this.view().await?;
                let root = view.active()?;
                let put = this
                    .put_into(&view, &tenant, quota, &id, (bytes.clone(), len), repair)
                    .await?;
                if this.view().await?.living().any(|living| living == root) {
                    return Ok(put);
                }
                let now = this.fresh_view().await?;
                this.clean_up_if_gone(&now, root).await?;
            }
            Err(CatalogError::RootsMove)
        })
        .await
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
        // Where it is counted, and whether the tenant need not have put it again.
        let (mut before, mut known) = (None, false);
        for root in view.readable().filter(|root| root.id != active) {
            if self.granted_one(root.id, tenant, id).await? {
                before = before.or(Some(root.id));
                known = root.state <= RootState::Retired;
                if known {
                    break;
                }
            }
        }
        let new_bytes = if before.is_some() { 0 } else { len.into() };
        let _room = self.reserve(view, tenant, quota, new_bytes).await?;
        let kept = self.keep(active, id, bytes, repair).await?;
        if self.grant(active, tenant, id, len).await? {
            self.count_chunk(active, tenant, len, before);
        }
        // The tenant's own puts decide: whether others had the chunk, and in what state, is not told.
        Ok(match (known, kept) {
            (false, _) => Put::New,
            (true, Kept::Replaced) => Put::Repaired,
            (true, _) => Put::Known,
        })
    }

    async fn keep(
        &self,
        root: RootId,
        id: &ChunkId,
        bytes: Bytes,
        repair: bool,
    ) -> Result<Kept, CatalogError> {
        if repair && self.is_bad(root, id).await? {
            self.engine.replace_chunk(root, id, bytes).await?;
            return Ok(Kept::Replaced);
        }
        Ok(match self.engine.put_chunk(root, id, bytes).await? {
            true => Kept::New,
            false => Kept::WasThere,
        })
    }

    /// Whether the copy that a root keeps is not what its id says.
    async fn is_bad(&self, root: RootId, id: &ChunkId) -> Result<bool, CatalogError> {
        match self.engine.get_kept_chunk(root, id).await {
            Ok(copy) => Ok(copy.is_some_and(|copy| ChunkId::of(&copy) != *id)),
            Err(EngineError::Damaged(_)) => Ok(true),
            Err(error) => Err(error.into()),
        }
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

    /// A chunk that [`Catalog::get_chunk`] would give, where it is known without asking the engine that
    /// the tenant may have it, and the engine can have it sent from a file. Does not block.
    pub fn ready_chunk(&self, tenant: &TenantName, id: &ChunkId) -> Option<FilePart> {
        let view = self.known_view()?;
        // Reads from an expired root raise alarms.
        let usual = view
            .readable()
            .filter(|root| root.state != RootState::Expired);
        usual
            .filter(|root| self.grants.knows(root.id, tenant, id))
            .find_map(|root| self.engine.ready_chunk(root.id, id))
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
        let mut look = self.look().await?;
        let mut damage = None;
        loop {
            for root in look.view.readable() {
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
            if !self.look_again(&mut look).await? {
                return damage.map_or(Ok(None), |damage| Err(damage.into()));
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
        right: Right<'_>,
    ) -> Result<Brought, CatalogError> {
        let mut brought = Brought::default();
        for batch in chunks.chunks(BATCH) {
            self.bring_batch(view, tenant, batch, right, &mut brought)
                .await?;
            // Who asks is not told of more: a manifest may name a million that nobody has.
            let enough = !right.is_live() && brought.missing.len() > MAX_MISSING;
            if brought.wrong_length.is_some() || enough {
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
        right: Right<'_>,
        brought: &mut Brought,
    ) -> Result<(), CatalogError> {
        let active = view.active()?;
        let ids: Vec<ChunkId> = chunks.iter().map(|(id, _)| *id).collect();
        let granted = self.granted(active, tenant, &ids).await?;

        // Where those are counted that have no grant in the active root, and whether that is a right:
        // what was put and not named before its root expired must be put again.
        let lives = |root: &RootView| right.is_live() || root.state <= RootState::Retired;
        let mut from: Vec<Option<RootId>> = vec![None; ids.len()];
        let mut rightful = granted.clone();
        let older = || view.readable().filter(|root| root.id != active);
        for root in older() {
            let open: Vec<usize> = (0..ids.len()).filter(|&i| !rightful[i]).collect();
            let asked: Vec<ChunkId> = open.iter().map(|&i| ids[i]).collect();
            let there = self.granted(root.id, tenant, &asked).await?;
            for (i, _) in open.iter().zip(there).filter(|(_, there)| *there) {
                from[*i] = from[*i].or(Some(root.id));
                rightful[*i] = lives(&root);
            }
        }
        let may = |i: usize| right.is_live() || rightful[i];

        let asked: Vec<usize> = (0..ids.len()).filter(|&i| may(i)).collect();
        let asked_ids: Vec<ChunkId> = asked.iter().map(|&i| ids[i]).collect();
        let found = self.engine.stat_chunks(active, &asked_ids).await?;
        let mut lengths: Vec<Option<u32>> = vec![None; ids.len()];
        for (i, len) in asked.iter().zip(found) {
            lengths[*i] = len;
        }
        let mut bad = HashSet::new();
        match right {
            Right::Live(verified) => {
                bad = self.bad_copies(active, chunks, &lengths, verified).await?;
            }
            Right::Asked => {
                for ((id, says), actual) in chunks.iter().zip(&lengths) {
                    if let Some(actual) = actual.filter(|actual| actual != says) {
                        brought.wrong_length = Some((*id, *says, actual));
                        return Ok(());
                    }
                }
            }
        }

        let sources: Vec<RootId> = older().filter(lives).map(|root| root.id).collect();
        let wanted = |i: &usize| lengths[*i].is_none() || bad.contains(i);
        let copies: Vec<usize> = asked.iter().copied().filter(wanted).collect();
        let copied: HashSet<usize> = stream::iter(copies)
            .map(|i| {
                let (sources, chunk, replace) = (&sources, chunks[i], bad.contains(&i));
                async move {
                    let copied = self.copy(sources, active, &chunk, replace).await?;
                    Ok::<_, CatalogError>(copied.then_some(i))
                }
            })
            .buffer_unordered(COPIES)
            .try_filter_map(|i| async move { Ok(i) })
            .try_collect()
            .await?;

        let mut grants = Vec::new();
        for (i, (id, len)) in chunks.iter().enumerate() {
            if copied.contains(&i) {
                brought.copied += 1;
                brought.copied_bytes += u64::from(*len);
                if let Right::Live(verified) = right {
                    verified.add(active, id);
                }
            } else if !may(i) || wanted(&i) {
                brought.missing.push(*id);
                continue;
            }
            if !granted[i] {
                grants.push((*id, *len, from[i]));
            }
        }
        self.grant_all(active, tenant, grants).await
    }

    /// Which of a root's copies of chunks, of those that it has, are not what they should be.
    async fn bad_copies(
        &self,
        root: RootId,
        chunks: &[(ChunkId, u32)],
        lengths: &[Option<u32>],
        verified: &Verified,
    ) -> Result<HashSet<usize>, CatalogError> {
        let there = chunks.iter().zip(lengths).enumerate();
        let there: Vec<(usize, ChunkId, bool)> = there
            .filter_map(|(i, ((id, says), actual))| Some((i, *id, (*actual)? == *says)))
            .filter(|(_, id, _)| !verified.has(root, id))
            .collect();
        stream::iter(there)
            .map(|(i, id, right_length)| async move {
                if right_length && !self.is_bad(root, &id).await? {
                    verified.add(root, &id);
                    return Ok(None);
                }
                tracing::warn!(%root, chunk = id.hex(), "this copy of a chunk is damaged");
                Ok::<_, CatalogError>(Some(i))
            })
            .buffer_unordered(COPIES)
            .try_filter_map(|bad| async move { Ok(bad) })
            .try_collect()
            .await
    }

    /// Copies a chunk out of one of `older`, in the place of a bad copy with `replace`; false when none
    /// of them has it whole.
    async fn copy(
        &self,
        older: &[RootId],
        to: RootId,
        (id, len): &(ChunkId, u32),
        replace: bool,
    ) -> Result<bool, CatalogError> {
        for root in older {
            match self.engine.get_chunk(*root, id).await {
                Ok(Some(bytes)) if bytes.len() == *len as usize && ChunkId::of(&bytes) == *id => {
                    match replace {
                        true => self.engine.replace_chunk(to, id, bytes).await?,
                        false => drop(self.engine.put_chunk(to, id, bytes).await?),
                    }
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
