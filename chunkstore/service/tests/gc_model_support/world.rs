//! Two instances of the catalog over one engine, and what must be true of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use lazyimg_convergent::ChunkId;
use lazyimg_image::manifest::Manifest;
use lazyimg_store::catalog::{
    Catalog, CatalogError, CatalogOptions, GcOptions, RootInfo, RootState,
};
use lazyimg_store::engine::memory::MemoryEngine;
use lazyimg_store::engine::{EngineError, RootId};

use super::images::{
    CHUNKS, IMAGES, TENANTS, chunk, chunk_id, convert, image, key, manifest, tenant,
};
use super::mortal::{Mortal, TestClock};
use super::turns::{Death, Op, SETTLE, TTL, Turn};

/// Longer than what tenants use goes uncounted.
const RECOUNT: Duration = Duration::from_secs(7 * 3600);

/// What must be true of a tenant's image.
#[derive(Debug, Clone, Default)]
pub struct Image {
    /// One of these is in force, if any.
    versions: Vec<BTreeSet<usize>>,
    /// It is there for sure.
    live: bool,
    /// It is gone for sure.
    dead: bool,
}

/// What an operation told.
#[derive(Debug)]
pub enum Outcome {
    Done,
    /// Refused: nothing has changed.
    Refused,
    /// It failed with its process, or with the roots moving: it happened or not.
    Open,
}

pub struct World {
    engine: Arc<MemoryEngine>,
    clock: Arc<TestClock>,
    dice: Arc<AtomicU64>,
    instances: Vec<(Catalog, Arc<Mortal>)>,
    images: BTreeMap<(usize, usize), Image>,
    /// Chunks that a tenant may have put.
    put: BTreeSet<(usize, usize)>,
    /// What the roots with an alarm held when it was first seen.
    alarmed: BTreeMap<RootId, BTreeSet<ChunkId>>,
}

impl World {
    pub async fn new() -> Self {
        let mut world = Self {
            engine: Arc::new(MemoryEngine::new()),
            clock: Arc::new(TestClock(tokio::time::Instant::now())),
            dice: Arc::default(),
            instances: Vec::new(),
            images: BTreeMap::new(),
            put: BTreeSet::new(),
            alarmed: BTreeMap::new(),
        };
        for tenant in 0..TENANTS {
            for image in 0..IMAGES {
                let dead = Image {
                    dead: true,
                    ..Image::default()
                };
                world.images.insert((tenant, image), dead);
            }
        }
        for who in 0..2 {
            let instance = world.open(who, None).await;
            world.instances.push(instance);
        }
        world
    }

    async fn open(&self, who: usize, death: Option<Death>) -> (Catalog, Arc<Mortal>) {
        let mortal = Arc::new(Mortal {
            engine: self.engine.clone(),
            calls_left: AtomicI64::new(-1),
            last_is_done: death.is_some_and(|d| d.last_is_done),
            calls_to_gate: AtomicI64::new(-1),
            gate: tokio::sync::Semaphore::new(0),
            dice: self.dice.clone(),
        });
        let options = CatalogOptions {
            roots_ttl: TTL,
            settle: SETTLE,
            clock: self.clock.clone(),
            ..CatalogOptions::shared(format!("i{who}"))
        };
        let catalog = Catalog::open(mortal.clone(), options).await.unwrap();
        let calls = death.map_or(-1, |d| d.calls);
        mortal.calls_left.store(calls, Ordering::SeqCst);
        (catalog, mortal)
    }

    /// Whose process is to die is a new one, so that it can be told how.
    async fn prepare(&mut self, who: usize, death: Option<Death>) {
        if death.is_some() {
            self.instances[who] = self.open(who, death).await;
        }
    }

    async fn restart_the_dead(&mut self) {
        for who in 0..2 {
            if self.instances[who].1.calls_left.load(Ordering::SeqCst) >= 0 {
                self.instances[who] = self.open(who, None).await;
            }
        }
    }

    async fn run(&self, who: usize, op: &Op, certain: bool) -> Outcome {
        let catalog = &self.instances[who].0;
        let result = match op {
            Op::Convert {
                tenant: t,
                image: i,
                chunks,
                partial,
            } => convert(catalog, *t, *i, chunks, *partial).await,
            Op::Delete {
                tenant: t,
                image: i,
            } => catalog
                .delete_manifest(&tenant(*t), &image(*i), key())
                .await
                .map(|_| true),
            Op::Mount {
                tenant: t,
                image: i,
            } => {
                let state = &self.images[&(*t, *i)];
                self.mount(catalog, *t, *i, state, certain).await
            }
            Op::Read {
                tenant: t,
                chunk: c,
            } => {
                let found = catalog.get_chunk(&tenant(*t), &chunk_id(*c)).await;
                found.map(|found| {
                    if let Some(found) = found {
                        assert!(self.put.contains(&(*t, *c)));
                        assert_eq!(found, chunk(*c));
                        return true;
                    }
                    false
                })
            }
            Op::Rotate => catalog.rotate().await.map(|_| true),
            Op::Gc => {
                let options = GcOptions {
                    grace_seconds: Some(0),
                    ..GcOptions::default()
                };
                let report = catalog.gc(options).await;
                report.and_then(|report| {
                    let stuck = report.roots.iter().find(|r| !r.stuck.is_empty());
                    assert!(stuck.is_none(), "nothing is damaged here: {stuck:?}");
                    let failed = report.roots.iter().filter_map(|r| r.error.clone());
                    let failed: Vec<String> = failed.collect();
                    let moving = CatalogError::RootsMove.to_string();
                    assert!(failed.iter().all(|f| *f == moving), "{failed:?}");
                    match failed.is_empty() {
                        true => Ok(true),
                        false => Err(CatalogError::RootsMove),
                    }
                })
            }
        };
        match result {
            Ok(true) => Outcome::Done,
            Ok(false) => Outcome::Refused,
            Err(CatalogError::TooMany { .. }) => Outcome::Refused,
            Err(CatalogError::Engine(EngineError::Unavailable(_)) | CatalogError::RootsMove) => {
                Outcome::Open
            }
            Err(error) => panic!("{op:?}: {error}"),
        }
    }

    /// A mount by one instance: the manifest and every chunk that it names.
    async fn mount(
        &self,
        catalog: &Catalog,
        t: usize,
        i: usize,
        state: &Image,
        certain: bool,
    ) -> Result<bool, CatalogError> {
        let bytes = catalog.get_manifest(&tenant(t), &image(i), key()).await?;
        let Some(bytes) = bytes else {
            assert!(
                !(state.live && certain),
                "tenant {t} image {i} is live but not found"
            );
            return Ok(true);
        };
        if certain {
            assert!(!state.dead, "tenant {t} image {i} was deleted but is there");
            let known = state.versions.iter().any(|v| manifest(i, v) == bytes);
            assert!(known, "tenant {t} image {i} has a manifest of another time");
        }
        for stored in Manifest::parse(&bytes).unwrap().stored() {
            let found = catalog.get_chunk(&tenant(t), &stored.id).await?;
            // Deleted meanwhile, it may lose its chunks; not within this turn, in which no time passes.
            let found = found.unwrap_or_else(|| panic!("a chunk of tenant {t} image {i} is gone"));
            assert_eq!(ChunkId::of(&found), stored.id);
        }
        Ok(true)
    }

    /// Notes what two operations at once, or one, can have changed.
    fn note(&mut self, ops: &[(Op, Outcome)]) {
        let unlucky = ops.iter().any(|(_, o)| matches!(o, Outcome::Open));
        let mut touched: BTreeMap<(usize, usize), Vec<(&Op, &Outcome)>> = BTreeMap::new();
        for (op, outcome) in ops {
            if let Op::Convert { tenant, image, .. } | Op::Delete { tenant, image } = op {
                touched
                    .entry((*tenant, *image))
                    .or_default()
                    .push((op, outcome));
            }
        }
        for (at, ops) in touched {
            let before = self.images[&at].clone();
            let mut possible = before.clone();
            let (mut put, mut deleted, mut delete_open) = (false, false, false);
            for (op, outcome) in &ops {
                match (op, outcome) {
                    (_, Outcome::Refused) => {}
                    (Op::Convert { chunks, .. }, outcome) => {
                        possible.versions.push(chunks.clone());
                        put |= matches!(outcome, Outcome::Done);
                    }
                    (_, Outcome::Done) => deleted = true,
                    (_, Outcome::Open) => delete_open = true,
                }
            }
            let alone = ops.len() == 1;
            possible.live = (before.live || put) && !deleted && !delete_open;
            possible.dead = match (put || possible_put(&ops), deleted) {
                // A collector that died on the way may have left a copy behind the deletion's back.
                (false, true) => alone && !unlucky,
                (false, false) => before.dead,
                (true, _) => false,
            };
            if alone && put && !unlucky {
                possible.versions.drain(..possible.versions.len() - 1);
            }
            self.images.insert(at, possible);
        }
    }

    /// What must hold after every turn, whichever instance is asked.
    async fn check(&mut self) {
        for (catalog, _) in &self.instances {
            for ((t, i), state) in &self.images {
                self.mount(catalog, *t, *i, state, true).await.unwrap();
            }
            for t in 0..TENANTS {
                for c in (0..CHUNKS).filter(|c| !self.put.contains(&(t, *c))) {
                    let found = catalog.get_chunk(&tenant(t), &chunk_id(c)).await.unwrap();
                    assert!(
                        found.is_none(),
                        "tenant {t} reads chunk {c}, which it never put"
                    );
                }
            }
        }
        let (docs, chunks) = self.engine.contents();
        let of = |root: RootId| {
            chunks
                .iter()
                .filter(move |(r, _)| *r == root)
                .map(|(_, id)| *id)
        };
        let alarm = |name: &String| {
            let root = name.strip_prefix("roots/")?.strip_suffix("/alarm")?;
            root.parse::<RootId>().ok()
        };
        let now: BTreeSet<RootId> = docs.iter().filter_map(alarm).collect();
        self.alarmed.retain(|root, _| now.contains(root));
        for root in now {
            let held = self
                .alarmed
                .entry(root)
                .or_insert_with(|| of(root).collect());
            assert!(
                of(root).collect::<BTreeSet<_>>().is_superset(held),
                "{root} has an alarm"
            );
        }
    }

    pub async fn turn(&mut self, turn: &Turn) {
        for op in turn.ops() {
            if let Op::Convert { tenant, chunks, .. } = op {
                self.put.extend(chunks.iter().map(|c| (*tenant, *c)));
            }
        }
        match turn {
            Turn::One(who, op, death) => {
                self.prepare(*who, *death).await;
                let outcome = self.run(*who, op, true).await;
                self.note(&[(op.clone(), outcome)]);
            }
            Turn::Both(ops, dice) => {
                let [(a, a_dies), (b, b_dies)] = ops;
                self.prepare(0, *a_dies).await;
                self.prepare(1, *b_dies).await;
                self.dice.store(*dice, Ordering::SeqCst);
                tokio::time::advance(TTL).await;
                let alarms = [self.must_alarm(a), self.must_alarm(b)];
                let sure = |other: &Op| !matches!(other, Op::Convert { .. } | Op::Delete { .. });
                let (of_a, of_b) = tokio::join!(self.run(0, a, sure(b)), self.run(1, b, sure(a)));
                for (roots, outcome) in alarms.into_iter().zip([&of_a, &of_b]) {
                    if matches!(outcome, Outcome::Done) {
                        self.assert_alarm(roots);
                    }
                }
                self.note(&[(a.clone(), of_a), (b.clone(), of_b)]);
            }
            Turn::Stall(op, calls, meanwhile) => {
                tokio::time::advance(TTL).await;
                let roots = self.must_alarm(op);
                let held = self.instances[0].1.clone();
                held.calls_to_gate.store(*calls, Ordering::SeqCst);
                let others = async {
                    for _ in 0..1000 {
                        tokio::task::yield_now().await;
                    }
                    for (pause, op) in meanwhile {
                        tokio::time::advance(*pause).await;
                        self.run(1, op, false).await;
                    }
                    held.gate.add_permits(1);
                };
                let (outcome, ()) = tokio::join!(self.run(0, op, true), others);
                if matches!(outcome, Outcome::Done) {
                    self.assert_alarm(roots);
                }
                held.calls_to_gate.store(-1, Ordering::SeqCst);
                self.note(&[(op.clone(), outcome)]);
                self.instances[0] = self.open(0, None).await;
            }
            Turn::ReadStale { who, tenant, chunk } => self.read_stale(*who, *tenant, *chunk).await,
            Turn::Acknowledge => {
                let catalog = &self.instances[0].0;
                for root in catalog.roots().await.unwrap() {
                    if root.alarm.is_some() {
                        catalog.acknowledge(root.root, false).await.unwrap();
                    }
                }
            }
            Turn::Pass(time) => tokio::time::advance(*time).await,
        }
        self.restart_the_dead().await;
        self.check().await;
    }

    /// If this is a read of what lies in expired roots only, those roots: one of them gets an alarm
    /// before the read is answered.
    fn must_alarm(&self, op: &Op) -> Option<Vec<RootId>> {
        let Op::Read {
            tenant: t,
            chunk: c,
        } = op
        else {
            return None;
        };
        let (docs, _) = self.engine.contents();
        let end = format!("/grants/{}/{}", tenant(*t), chunk_id(*c).hex());
        let root = |doc: &String| doc.strip_prefix("held/")?.strip_suffix(&end)?.parse().ok();
        let holders: Vec<RootId> = docs.iter().filter_map(root).collect();
        let expired = |root: &RootId| docs.contains(&format!("roots/{root}/expired"));
        (!holders.is_empty() && holders.iter().all(expired)).then_some(holders)
    }

    fn assert_alarm(&self, roots: Option<Vec<RootId>>) {
        let Some(roots) = roots else {
            return;
        };
        let (docs, chunks) = self.engine.contents();
        let alarm = |root: &RootId| {
            let there = |mark: &str| docs.contains(&format!("roots/{root}/{mark}"));
            there("alarm") && there("active") && chunks.iter().any(|(r, _)| r == root)
        };
        assert!(
            roots.iter().any(alarm),
            "a read of {roots:?} was answered and stops nothing"
        );
    }

    async fn read_stale(&self, who: usize, t: usize, c: usize) {
        tokio::time::advance(TTL).await;
        let catalog = &self.instances[who].0;
        let (docs, _) = self.engine.contents();
        let granted = |root: RootId| {
            docs.contains(&format!(
                "held/{root}/grants/{}/{}",
                tenant(t),
                chunk_id(c).hex()
            ))
        };
        let roots = catalog.roots().await.unwrap();
        let holders: Vec<_> = roots.iter().filter(|r| granted(r.root)).collect();
        let found = catalog.get_chunk(&tenant(t), &chunk_id(c)).await.unwrap();
        let living = holders.iter().any(|r| r.state <= RootState::Retired);
        let expired = holders.iter().any(|r| r.state == RootState::Expired);
        assert_eq!(found.is_some(), living || expired);
        if !living && expired {
            let roots = catalog.roots().await.unwrap();
            let alarm = |r: &&RootInfo| r.alarm.is_some() && granted(r.root);
            assert!(
                roots.iter().any(|r| alarm(&r)),
                "nobody was told of the read"
            );
        }
    }

    /// Without deaths, everything but the active root goes in the end, and nothing that lives.
    pub async fn settle(&mut self) {
        for _ in 0..5 {
            self.turn(&Turn::Acknowledge).await;
            self.turn(&Turn::Pass(SETTLE + TTL)).await;
            self.turn(&Turn::One(1, Op::Gc, None)).await;
        }
        let roots = self.instances[0].0.roots().await.unwrap();
        assert_eq!(roots.len(), 1, "{roots:?}");
        let (docs, chunks) = self.engine.contents();
        assert!(chunks.iter().all(|(root, _)| *root == roots[0].root));
        let held = format!("held/{}/", roots[0].root);
        let stray = docs
            .iter()
            .find(|d| d.starts_with("held/") && !d.starts_with(&held));
        assert_eq!(stray, None);
        self.check_usage().await;
    }

    /// Whatever was forgotten or counted twice on the way, the next count is right.
    async fn check_usage(&mut self) {
        for (catalog, _) in &self.instances {
            catalog.flush_usage().await.unwrap();
        }
        self.turn(&Turn::Pass(RECOUNT)).await;
        self.turn(&Turn::One(1, Op::Gc, None)).await;
        let (docs, _) = self.engine.contents();
        let mut used: BTreeMap<String, u64> = BTreeMap::new();
        for doc in docs.iter().filter(|d| d.starts_with("held/")) {
            let parts: Vec<&str> = doc.split('/').collect();
            let bytes = match parts[2] {
                "grants" => {
                    let of = (0..CHUNKS).find(|c| chunk_id(*c).hex() == parts[4]);
                    chunk(of.unwrap()).len() as u64
                }
                "manifests" => {
                    let len = parts[6].split('-').nth(2).unwrap();
                    u64::from_str_radix(len, 16).unwrap()
                }
                _ => continue,
            };
            *used.entry(parts[3].to_owned()).or_default() += bytes;
        }
        let stats = self.instances[1].0.stats().await.unwrap();
        let said = stats.tenants.iter().filter(|t| t.bytes > 0);
        let said = said.map(|t| (t.tenant.to_string(), t.bytes));
        assert_eq!(said.collect::<BTreeMap<_, _>>(), used);
    }
}

fn possible_put(ops: &[(&Op, &Outcome)]) -> bool {
    let put = |(op, outcome): &(&Op, &Outcome)| {
        matches!(op, Op::Convert { .. }) && !matches!(outcome, Outcome::Refused)
    };
    ops.iter().any(put)
}
