//! Get many: which instance is asked for which chunk, and who is asked when it fails.
//!
//! In laps: each chunk is asked of its instances in rank, one after another; those that rest are
//! passed over. When all have failed, somebody else is asked (the next tier), or there is a pause
//! and another lap.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::select_ok;
use lazyimg_convergent::ChunkId;
use tokio::sync::mpsc;

use super::answer;
use super::client::{Got, Shared};
use super::error::{StoreError, StoreErrorCode};
use super::instances::{List, ranked};
use crate::guard::retry;

/// Chunks in one request: their answers share a connection, one after another.
const MAX_IDS: usize = 64;
/// Requests of one call under way at once.
const REQUESTS: usize = 4;
/// Instances that are asked for a chunk where somebody else can be asked too.
const BRIEF_TURNS: usize = 2;
/// How long one that is busy is waited for, where somebody else can be asked.
const BRIEF_WISH: Duration = Duration::from_secs(2);
/// When one that is busy does not say when to come again.
const USUAL_WISH: Duration = Duration::from_millis(500);
/// So many answers that are not of a store are believed, of whoever is asked for long.
const BELIEVED: u32 = 4;

/// How hard chunks are tried for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// Somebody else can be asked: each chunk is asked of two instances. One that has too much to
    /// do is asked once more when it said to come again soon.
    Brief,
    /// Nobody else has them: they are asked for again and again for so long, and instances that
    /// rest are waited for.
    Patient(Duration),
}

/// A chunk that has not come.
pub(super) struct Wanted {
    pub index: usize,
    pub id: ChunkId,
    /// Instances in rank.
    pub rank: Vec<usize>,
    /// Those that were asked in this lap.
    asked: Vec<usize>,
    /// Requests that were sent for it.
    sent: u32,
    /// Answers that were not of a store.
    strange: u32,
    error: Option<Arc<StoreError>>,
}

impl Wanted {
    /// Who is to be asked next; nobody when all that can be were asked.
    fn target(&self, usable: &[bool]) -> Option<usize> {
        let new = |at: &&usize| !self.asked.contains(at);
        let mut rank = self.rank.iter().filter(new);
        match rank.clone().find(|at| usable[**at]) {
            Some(at) => Some(*at),
            // It tells why.
            None if self.asked.is_empty() => rank.next().copied(),
            None => None,
        }
    }

    fn failed(&mut self, at: usize, error: &Arc<StoreError>) {
        self.asked.push(at);
        self.sent += u32::from(error.was_asked());
        self.strange += u32::from(matches!(**error, StoreError::Protocol { .. }));
        self.error = Some(Arc::clone(error));
    }

    fn may_pass(&self) -> bool {
        self.error.as_ref().is_none_or(|error| error.is_passing())
    }

    /// When the instance that was too busy said to come again.
    fn wish(&self) -> Option<Duration> {
        let error = self.error.as_deref()?;
        match error.code() {
            Some(StoreErrorCode::Busy) => Some(error.wish().unwrap_or(USUAL_WISH)),
            _ => None,
        }
    }
}

/// One call.
struct Call<'a> {
    shared: &'a Arc<Shared>,
    wait: Option<Duration>,
    effort: Effort,
    sink: &'a mpsc::Sender<(usize, Got)>,
}

pub(super) async fn get_many(
    shared: &Arc<Shared>,
    ids: &[ChunkId],
    wait: Option<Duration>,
    effort: Effort,
    sink: &mpsc::Sender<(usize, Got)>,
) {
    let call = Call {
        shared,
        wait,
        effort,
        sink,
    };
    let begun = Instant::now();
    let mut wanted: Vec<Wanted> = ids
        .iter()
        .enumerate()
        .map(|(index, id)| Wanted {
            index,
            id: *id,
            rank: Vec::new(),
            asked: Vec::new(),
            sent: 0,
            strange: 0,
            error: None,
        })
        .collect();
    for lap in 1.. {
        let list = match shared.instances.list().await {
            Ok(list) => {
                wanted = call.lap(&list, wanted).await;
                Some(list)
            }
            Err(error) => {
                let error = Arc::new(error);
                for one in &mut wanted {
                    one.error = Some(Arc::clone(&error));
                }
                None
            }
        };
        let (again, over) = call.again(lap, begun, wanted);
        for one in over {
            if !call.fail(one).await {
                return;
            }
        }
        wanted = again;
        if wanted.is_empty() {
            return;
        }
        call.pause(lap, begun, list.as_ref(), &wanted).await;
    }
}

impl Call<'_> {
    /// Asks for each chunk until it comes or nobody is left to ask; gives back those that did not.
    async fn lap(&self, list: &List, mut wanted: Vec<Wanted>) -> Vec<Wanted> {
        let Some(first) = wanted.first() else {
            return wanted;
        };
        probe_resting(self.shared, list, &first.id);
        for one in &mut wanted {
            one.rank = ranked(list, &one.id);
            one.asked.clear();
        }
        let mut over = Vec::new();
        let turns = match self.effort {
            Effort::Brief => BRIEF_TURNS,
            Effort::Patient(_) => list.len(),
        };
        for turn in 0..turns {
            let (groups, nobody) = grouped(wanted, list);
            over.extend(nobody);
            let mut paid = Vec::new();
            for (at, group) in groups {
                match self.may_send(list, turn, at, &group) {
                    true => paid.push((at, group)),
                    false => over.extend(group),
                }
            }
            let left: Vec<Vec<Wanted>> = futures_util::stream::iter(paid)
                .map(|(at, group)| self.ask(list, at, group))
                .buffer_unordered(REQUESTS)
                .collect()
                .await;
            wanted = Vec::new();
            for one in left.into_iter().flatten() {
                match one.may_pass() {
                    true => wanted.push(one),
                    false => over.push(one),
                }
            }
            if wanted.is_empty() {
                break;
            }
        }
        over.extend(wanted);
        over
    }

    /// Whether a request may be sent: one for chunks that were asked for before costs whoever is to
    /// have it a token, unless a pause came before it and more pauses would.
    fn may_send(&self, list: &List, turn: usize, at: usize, group: &[Wanted]) -> bool {
        if group.iter().all(|one| one.sent == 0) {
            return true;
        }
        let paced = turn == 0 && matches!(self.effort, Effort::Patient(_));
        let may = paced || list[at].guard.may_retry();
        self.shared
            .counters
            .retries
            .fetch_add(u64::from(may), Relaxed);
        may
    }

    /// Asks one instance; gives back what did not come, with why.
    async fn ask(&self, list: &List, at: usize, mut group: Vec<Wanted>) -> Vec<Wanted> {
        let (result, come) =
            answer::deliver(self.shared, list, at, &group, self.wait, self.sink).await;
        let error = Arc::new(match result {
            Err(error) => error,
            // What the instance could not read.
            Ok(()) => StoreError::Refused {
                instance: list[at].name.clone(),
                what: answer::WHAT,
                code: StoreErrorCode::Unavailable,
                message: "the store could not read the chunk now".to_owned(),
                retry_after: None,
                request: String::new(),
                chunks: Vec::new(),
                lease: None,
            },
        });
        let mut come = come.into_iter();
        group.retain(|_| !come.next().unwrap_or(false));
        for one in &mut group {
            one.failed(at, &error);
        }
        group
    }

    /// Those that are to have another lap, and those that are not.
    fn again(&self, lap: u32, begun: Instant, wanted: Vec<Wanted>) -> (Vec<Wanted>, Vec<Wanted>) {
        wanted.into_iter().partition(|one| match self.effort {
            Effort::Brief => lap == 1 && one.wish().is_some_and(|wish| wish <= BRIEF_WISH),
            Effort::Patient(patience) => {
                begun.elapsed() < patience && one.may_pass() && one.strange < BELIEVED
            }
        })
    }

    /// The pause before another lap.
    async fn pause(&self, lap: u32, begun: Instant, list: Option<&List>, wanted: &[Wanted]) {
        let wishes = wanted.iter().filter_map(|one| one.error.as_ref()?.wish());
        let wish = match self.effort {
            Effort::Brief => wanted.iter().filter_map(Wanted::wish).max(),
            Effort::Patient(_) => wishes.max(),
        };
        let pause = retry::pause(lap, wish, retry::random()).or(wish);
        let Effort::Patient(patience) = self.effort else {
            tokio::time::sleep(pause.unwrap_or_default()).await;
            return;
        };
        let left = patience.saturating_sub(begun.elapsed());
        tokio::time::sleep(pause.unwrap_or_default().min(left)).await;
        if let Some(list) = list {
            usable(list, begun + patience).await;
        }
    }

    async fn fail(&self, one: Wanted) -> bool {
        let got = match one.error {
            Some(error) => Got::Failed(error),
            None => Got::Missing,
        };
        self.sink.send((one.index, got)).await.is_ok()
    }
}

/// One group for each request: its instance, and its chunks in the order asked for. And the chunks
/// for which nobody is left to ask.
fn grouped(wanted: Vec<Wanted>, list: &List) -> (Vec<(usize, Vec<Wanted>)>, Vec<Wanted>) {
    let usable = askable(list);
    let mut by_instance: BTreeMap<usize, Vec<Wanted>> = BTreeMap::new();
    let mut nobody = Vec::new();
    for one in wanted {
        match one.target(&usable) {
            Some(at) => by_instance.entry(at).or_default().push(one),
            None => nobody.push(one),
        }
    }
    let mut groups = Vec::new();
    for (at, group) in by_instance {
        let mut group = group.into_iter().peekable();
        while group.peek().is_some() {
            groups.push((at, group.by_ref().take(MAX_IDS).collect()));
        }
    }
    (groups, nobody)
}

/// Which instances can be asked: those that are well; with none of them, those that have rested.
pub(super) fn askable(list: &List) -> Vec<bool> {
    let well: Vec<bool> = list.iter().map(|i| i.guard.is_closed()).collect();
    match well.contains(&true) {
        true => well,
        false => list.iter().map(|i| i.guard.is_usable()).collect(),
    }
}

/// Waits until one of these instances can be asked, or it is sure that none can be before `until`.
pub(super) async fn usable(list: &List, until: Instant) {
    let waits = list.iter().map(|instance| {
        Box::pin(async move {
            match instance.guard.usable_until(until).await {
                true => Ok(()),
                false => Err(()),
            }
        })
    });
    if !list.is_empty() {
        let _ = select_ok(waits).await;
    }
}

/// Finds out, with a request of its own, whether instances that have rested are back: while others
/// answer, no reader is to wait for one that may not. With none that is well, whoever asks finds out.
pub(super) fn probe_resting(shared: &Arc<Shared>, list: &List, id: &ChunkId) {
    if !list.iter().any(|instance| instance.guard.is_closed()) {
        return;
    }
    for instance in list.iter() {
        if instance.guard.is_closed() || !instance.guard.is_usable() {
            continue;
        }
        let Ok(pass) = instance.guard.enter() else {
            continue;
        };
        let (shared, instance, id) = (Arc::clone(shared), Arc::clone(instance), *id);
        tokio::spawn(async move { answer::probe(&shared, &instance, pass, id).await });
    }
}
