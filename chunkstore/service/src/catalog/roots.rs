//! Roots: which there are, in which state, and the alarms that stop their deletion.
//!
//! A root's state is the marks that it carries, each a document of its own. The active root is the
//! newest: it stops being active in the moment the next one's first mark is there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use lazyimg_convergent::ChunkId;
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::engine::{EngineError, RootId, When};

use super::names::{self, Mark};
use super::types::{Alarm, RootInfo, RootState, TenantName};
use super::{Catalog, CatalogError, MAX_ROOTS};

/// A root as it was when the view was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RootView {
    pub id: RootId,
    pub state: RootState,
    pub alarm: bool,
    /// Alarms do not stop its deletion: somebody has said so.
    pub ignored: bool,
    /// A crash came between the next root's first mark and this one's being retired.
    pub unsaid: bool,
}

/// The roots as they were some time ago, oldest first.
#[derive(Debug, Default)]
pub(super) struct View {
    sequence: u64,
    at: Option<Instant>,
    roots: Vec<RootView>,
    /// Marks of roots that are gone.
    pub leftovers: Vec<(RootId, Mark)>,
}

impl View {
    /// All roots, oldest first.
    pub fn all(&self) -> &[RootView] {
        &self.roots
    }

    /// Whether the same roots were there in the same states.
    pub fn has_same_roots(&self, other: &Self) -> bool {
        let states = |view: &Self| {
            view.roots
                .iter()
                .map(|r| (r.id, r.state))
                .collect::<Vec<_>>()
        };
        states(self) == states(other)
    }

    /// Whether it was made less than `ttl` ago.
    fn is_young(&self, ttl: Duration) -> bool {
        self.at.is_some_and(|at| at.elapsed() < ttl)
    }

    /// The newest root.
    pub fn active(&self) -> Result<RootId, CatalogError> {
        let gone = || CatalogError::Damaged {
            name: names::ROOTS.to_owned(),
            why: "there is no root".to_owned(),
        };
        Ok(self.roots.last().ok_or_else(gone)?.id)
    }

    /// The roots in which images live, oldest first: a manifest only moves to a newer root, so who
    /// looks in this order does not miss it.
    pub fn living(&self) -> impl DoubleEndedIterator<Item = RootId> {
        let living = |r: &&RootView| r.state <= RootState::Retired;
        self.roots.iter().filter(living).map(|r| r.id)
    }

    /// The roots of which tenants use what is theirs, oldest first: all that are read.
    pub fn counted(&self) -> impl DoubleEndedIterator<Item = RootView> {
        let counted = |r: &&RootView| r.state != RootState::Deleting;
        self.roots.iter().filter(counted).copied()
    }

    /// The roots that are read, newest first.
    pub fn readable(&self) -> impl Iterator<Item = RootView> {
        self.counted().rev()
    }
}

/// What is known of the roots.
#[derive(Debug, Default)]
pub(super) struct Roots {
    view: RwLock<Arc<View>>,
    sequence: AtomicU64,
    /// Held by who renews a view that is too old: the others wait for it. The error of the last who
    /// tried, if it failed.
    renewing: tokio::sync::Mutex<Option<EngineError>>,
    /// How often renewing has failed.
    failures: AtomicU64,
}

/// The content of a mark.
#[derive(Debug, Serialize, Deserialize)]
struct Since {
    at_ms: u64,
}

pub(super) fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_millis().try_into().unwrap_or(u64::MAX)
}

impl Catalog {
    /// Now, in milliseconds since 1970.
    pub(super) fn now_ms(&self) -> u64 {
        millis(self.options.clock.now())
    }

    /// Whether no other instance has the engine.
    pub(super) fn exclusive(&self) -> bool {
        self.options.roots_ttl == Duration::MAX
    }

    /// The roots, as they were [`super::CatalogOptions::roots_ttl`] ago or later.
    pub(super) async fn view(&self) -> Result<Arc<View>, CatalogError> {
        if let Some(view) = self.known_view() {
            return Ok(view);
        }
        let seen = self.roots.failures.load(Ordering::SeqCst);
        let mut failure = self.roots.renewing.lock().await;
        if let Some(view) = self.known_view() {
            return Ok(view);
        }
        // What somebody tried in vain while this one waited is not tried again for each who waited.
        if self.roots.failures.load(Ordering::SeqCst) != seen
            && let Some(error) = &*failure
        {
            return Err(error.clone().into());
        }
        let renewed = self.fresh_view().await;
        *failure = match &renewed {
            Ok(_) => None,
            Err(CatalogError::Engine(error)) => Some(error.clone()),
            Err(other) => Some(EngineError::Unavailable(other.to_string())),
        };
        if failure.is_some() {
            self.roots.failures.fetch_add(1, Ordering::SeqCst);
        }
        renewed
    }

    /// The roots as they were when they were last read.
    pub(super) fn last_view(&self) -> Arc<View> {
        self.roots.view.read().clone()
    }

    /// The same, where they need not be read for it.
    pub(super) fn known_view(&self) -> Option<Arc<View>> {
        let view = self.roots.view.read();
        view.is_young(self.options.roots_ttl).then(|| view.clone())
    }

    /// The roots, as they are after this call has begun.
    pub(super) async fn fresh_view(&self) -> Result<Arc<View>, CatalogError> {
        let sequence = self.roots.sequence.fetch_add(1, Ordering::SeqCst) + 1;
        let at = Instant::now();
        let mut marks: BTreeMap<RootId, Vec<Mark>> = BTreeMap::new();
        for name in self.all_docs(names::ROOTS).await? {
            match names::parse_mark(&name) {
                Some((root, mark)) => marks.entry(root).or_default().push(mark),
                None => tracing::warn!(name, "not a document of this store; left alone"),
            }
        }
        let mut leftovers = Vec::new();
        marks.retain(|root, marks| {
            let exists = marks
                .iter()
                .any(|m| !matches!(m, Mark::Alarm | Mark::Acknowledged | Mark::Ignored));
            if !exists {
                leftovers.extend(marks.iter().map(|m| (*root, *m)));
            }
            exists
        });
        let newest = marks.last_key_value().map(|(root, _)| *root);
        let of = |(id, marks): (&RootId, &Vec<Mark>)| RootView {
            id: *id,
            state: match () {
                () if Some(*id) == newest => RootState::Active,
                () if marks.contains(&Mark::Deleting) => RootState::Deleting,
                () if marks.contains(&Mark::Expired) => RootState::Expired,
                () => RootState::Retired,
            },
            alarm: marks.contains(&Mark::Alarm),
            ignored: marks.contains(&Mark::Ignored),
            unsaid: Some(*id) != newest && !marks.contains(&Mark::Retired),
        };
        let view = Arc::new(View {
            sequence,
            at: Some(at),
            roots: marks.iter().map(of).collect(),
            leftovers,
        });
        let newer = {
            let mut known = self.roots.view.write();
            let newer = known.sequence < sequence;
            if newer {
                *known = view.clone();
            }
            newer
        };
        if newer {
            let there: Vec<RootId> = view.readable().map(|r| r.id).collect();
            self.grants.keep_only(&there);
        }
        Ok(view)
    }

    /// Takes back what was put into a root that, as `now` shows, went while the request was held up.
    pub(super) async fn clean_up_if_gone(
        &self,
        now: &View,
        root: RootId,
    ) -> Result<(), CatalogError> {
        if now.all().iter().any(|r| r.id == root) {
            return Ok(());
        }
        tracing::warn!(%root, "a request was held up for so long that its root is gone");
        self.engine.remove_chunks(root).await?;
        Ok(self.engine.remove_docs(&names::held(root)).await?)
    }

    pub(super) async fn has_doc(&self, name: String) -> Result<bool, CatalogError> {
        let there = self.engine.has_docs(&[name]).await?;
        Ok(there.first().copied().unwrap_or(false))
    }

    /// Every name that begins with `prefix`; for what is never much.
    pub(super) async fn all_docs(&self, prefix: &str) -> Result<Vec<String>, CatalogError> {
        const PAGE: usize = 1000;
        let mut names: Vec<String> = Vec::new();
        loop {
            let after = names.last().cloned();
            let page = self
                .engine
                .list_docs(prefix, after.as_deref(), PAGE)
                .await?;
            let last = page.len() < PAGE;
            names.extend(page);
            if last {
                return Ok(names);
            }
        }
    }

    /// Marks a root; the first to do so says since when.
    pub(super) async fn mark(&self, root: RootId, mark: Mark) -> Result<(), CatalogError> {
        let since = Since {
            at_ms: self.now_ms(),
        };
        let when = match mark {
            Mark::Acknowledged => When::Always,
            _ => When::Absent,
        };
        let name = names::mark(root, mark);
        self.engine.put_doc(&name, json(&since)?, when).await?;
        Ok(())
    }

    /// Since when a root has a mark, in milliseconds since 1970.
    pub(super) async fn marked_at(
        &self,
        root: RootId,
        mark: Mark,
    ) -> Result<Option<u64>, CatalogError> {
        let name = names::mark(root, mark);
        let since: Option<Since> = self.json_doc(&name).await?;
        Ok(since.map(|s| s.at_ms))
    }

    pub(super) async fn json_doc<T: for<'a> Deserialize<'a>>(
        &self,
        name: &str,
    ) -> Result<Option<T>, CatalogError> {
        let Some(bytes) = self.engine.get_doc(name).await? else {
            return Ok(None);
        };
        let value = serde_json::from_slice(&bytes);
        value.map(Some).map_err(|error| CatalogError::Damaged {
            name: name.to_owned(),
            why: error.to_string(),
        })
    }

    /// The first root, where there is none, and what a crash left unsaid.
    pub(super) async fn open_roots(&self) -> Result<(), CatalogError> {
        if self.fresh_view().await?.all().is_empty() {
            self.mark(RootId::FIRST, Mark::Active).await?;
        }
        self.say_retired().await
    }

    /// Marks as retired what a crash or another instance left without.
    pub(super) async fn say_retired(&self) -> Result<(), CatalogError> {
        let view = self.fresh_view().await?;
        for root in view.all().iter().filter(|r| r.unsaid) {
            if root.state == RootState::Retired {
                self.mark(root.id, Mark::Retired).await?;
            }
        }
        Ok(())
    }

    /// The roots, oldest first.
    ///
    /// # Errors
    /// [`CatalogError::Engine`], [`CatalogError::Damaged`].
    pub async fn roots(&self) -> Result<Vec<RootInfo>, CatalogError> {
        let mut infos = Vec::new();
        for root in self.fresh_view().await?.all() {
            infos.push(self.root_info(root).await?);
        }
        Ok(infos)
    }

    pub(super) async fn root_info(&self, root: &RootView) -> Result<RootInfo, CatalogError> {
        let mark = match root.state {
            RootState::Active => Mark::Active,
            RootState::Retired => Mark::Retired,
            RootState::Expired => Mark::Expired,
            RootState::Deleting => Mark::Deleting,
        };
        let seconds = |ms: u64| ms / 1000;
        Ok(RootInfo {
            root: root.id,
            state: root.state,
            since: self.marked_at(root.id, mark).await?.map(seconds),
            acknowledged: self
                .marked_at(root.id, Mark::Acknowledged)
                .await?
                .map(seconds),
            alarms_ignored: match root.ignored {
                true => self.marked_at(root.id, Mark::Ignored).await?.map(seconds),
                false => None,
            },
            alarm: match root.alarm {
                true => self.json_doc(&names::mark(root.id, Mark::Alarm)).await?,
                false => None,
            },
        })
    }

    /// Makes a new active root and retires the one that was; gives the new one. Two that rotate at
    /// once may get the same.
    ///
    /// # Errors
    /// [`CatalogError::TooMany`] while garbage collection is behind; [`CatalogError::Engine`].
    pub async fn rotate(&self) -> Result<RootId, CatalogError> {
        let view = self.fresh_view().await?;
        let too_many = || CatalogError::TooMany {
            what: "roots",
            limit: MAX_ROOTS,
        };
        if view.all().len() >= MAX_ROOTS {
            return Err(too_many());
        }
        let next = view.active()?.next().ok_or_else(too_many)?;
        self.mark(next, Mark::Active).await?;
        self.say_retired().await?;
        self.fresh_view().await?.active()
    }

    /// An alarm was looked into: it no longer stops the root's deletion, and the grace time begins
    /// anew. With `ignore_alarms` none will, whoever reads what: they are noted all the same.
    ///
    /// # Errors
    /// [`CatalogError::NoSuchRoot`]; [`CatalogError::Conflict`] without an alarm, or, with
    /// `ignore_alarms`, while images live in the root.
    pub async fn acknowledge(&self, root: RootId, ignore_alarms: bool) -> Result<(), CatalogError> {
        let view = self.fresh_view().await?;
        let found = view.all().iter().find(|r| r.id == root);
        let found = found.ok_or(CatalogError::NoSuchRoot(root))?;
        let conflict = |why| CatalogError::Conflict {
            root,
            state: found.state,
            why,
        };
        if ignore_alarms && found.state < RootState::Expired {
            return Err(conflict("alarms are raised by reads of expired roots only"));
        }
        if !ignore_alarms && !found.alarm {
            return Err(conflict("it has no alarm, there is nothing to acknowledge"));
        }
        // In this order: without an alarm the root is old enough to go only after the grace time.
        self.mark(root, Mark::Acknowledged).await?;
        if ignore_alarms {
            self.mark(root, Mark::Ignored).await?;
        }
        self.engine
            .delete_doc(&names::mark(root, Mark::Alarm))
            .await?;
        self.fresh_view().await?;
        Ok(())
    }

    /// Raises the alarm for a chunk that was found in an expired root. True: the alarm lies there and
    /// the root stays, the chunk may be given out. False: the root is going, the chunk is not there.
    ///
    /// The reader marks the alarm, then looks whether the root is being deleted; GC marks the deletion,
    /// then looks for an alarm, and only then deletes. So one of them sees the other.
    pub(super) async fn raise_alarm(
        &self,
        root: RootId,
        tenant: &TenantName,
        id: &ChunkId,
    ) -> Result<bool, CatalogError> {
        let [going, alive, alarm] =
            [Mark::Deleting, Mark::Active, Mark::Alarm].map(|m| names::mark(root, m));
        let marks = [going, alive, alarm];
        let stays = |there: &[bool]| matches!(there, [false, true, ..]);
        let there = self.engine.has_docs(&marks).await?;
        if !stays(&there) {
            return Ok(false);
        }
        if there.get(2) != Some(&true) {
            let content = Alarm {
                at: self.now_ms() / 1000,
                tenant: tenant.to_string(),
                chunk: id.hex(),
                instance: self.options.instance.clone(),
            };
            let new = self
                .engine
                .put_doc(&marks[2], json(&content)?, When::Absent)
                .await?;
            if new {
                tracing::error!(
                    %root, %tenant, chunk = id.hex(),
                    "a chunk was read that no live image names: the root is kept until the alarm is \
                     acknowledged, unless its alarms are to be ignored"
                );
            }
        }
        Ok(stays(&self.engine.has_docs(&marks[..2]).await?))
    }
}

/// As a document.
pub(super) fn json(value: &impl Serialize) -> Result<Bytes, CatalogError> {
    let bytes = serde_json::to_vec(value);
    bytes.map(Bytes::from).map_err(|error| {
        CatalogError::Setup(format!("a document can't be written as JSON: {error}"))
    })
}
