//! Get many: chunks from many instances, with another try and hedges.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lazyimg_convergent::ChunkId;
use reqwest::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use reqwest::{Client, Method, Response};
use tokio::sync::mpsc;

use super::client::{Got, Shared};
use super::error::{StoreError, StoreErrorCode};
use super::exchange::{self, Ask};
use super::frames::{Frame, FrameParser};
use super::instances::{Instance, List, ranked};
use crate::guard::{Pass, retry};
use crate::wire::{FRAMES_TYPE, FrameKind, IDS_TYPE, MAX_WAIT_MS, WAIT_HEADER, write_ids};

/// Chunks in one request: their answers share a connection, one after another.
const MAX_IDS: usize = 64;
/// Requests of one call under way at once.
const REQUESTS: usize = 4;
const WHAT: &str = "get chunks";

/// A chunk that has not come.
struct Wanted {
    index: usize,
    id: ChunkId,
    /// Instances in rank.
    rank: Vec<usize>,
    /// How often it was asked for.
    tried: usize,
    error: Option<Arc<StoreError>>,
}

pub(super) async fn get_many(
    shared: &Shared,
    ids: &[ChunkId],
    wait: Option<Duration>,
    attempts: u32,
    sink: &mpsc::Sender<(usize, Got)>,
) {
    let list = match shared.instances.list().await {
        Ok(list) => list,
        Err(error) => {
            let error = Arc::new(error);
            for index in 0..ids.len() {
                let _ = sink.send((index, Got::Failed(Arc::clone(&error)))).await;
            }
            return;
        }
    };
    let mut wanted: Vec<Wanted> = ids
        .iter()
        .enumerate()
        .map(|(index, id)| Wanted {
            index,
            id: *id,
            rank: usable_first(&list, ranked(&list, id)),
            tried: 0,
            error: None,
        })
        .collect();
    for attempt in 1..=attempts {
        let groups = grouped(wanted, &list);
        let left: Vec<Vec<Wanted>> = futures_util::stream::iter(groups)
            .map(|(at, group)| ask_group(shared, &list, at, group, wait, sink))
            .buffer_unordered(REQUESTS)
            .collect()
            .await;
        wanted = Vec::new();
        for one in left.into_iter().flatten() {
            let passing = one.error.as_ref().is_some_and(|e| e.is_passing());
            // The same instance again only for those who have nobody else to ask.
            let another = one.tried < one.rank.len();
            if attempt < attempts && passing && (another || attempts > 2) {
                wanted.push(one);
            } else if !fail(sink, one).await {
                return;
            }
        }
        if wanted.is_empty() {
            return;
        }
        // One token for all: they go out together again.
        let asked = wanted
            .iter()
            .filter(|w| !matches!(w.error.as_deref(), Some(StoreError::Resting(_))));
        if let Some(first) = asked.map(|w| w.rank[(w.tried - 1) % w.rank.len()]).next() {
            if !list[first].guard.may_retry() {
                break;
            }
            shared.counters.retries.fetch_add(1, Relaxed);
        }
        if wanted.iter().any(|w| w.tried >= w.rank.len())
            && let Some(pause) = retry::pause(attempt, None, retry::random())
        {
            tokio::time::sleep(pause).await;
        }
    }
    for one in wanted {
        if !fail(sink, one).await {
            return;
        }
    }
}

async fn fail(sink: &mpsc::Sender<(usize, Got)>, one: Wanted) -> bool {
    let got = match one.error {
        Some(error) => Got::Failed(error),
        None => Got::Missing,
    };
    sink.send((one.index, got)).await.is_ok()
}

/// Instances whose breaker is open come last.
fn usable_first(list: &List, mut rank: Vec<usize>) -> Vec<usize> {
    rank.sort_by_key(|at| !list[*at].guard.is_closed());
    rank
}

/// One group for each request: its instance, and its chunks in the order asked for.
fn grouped(wanted: Vec<Wanted>, list: &List) -> Vec<(usize, Vec<Wanted>)> {
    let mut by_instance: BTreeMap<usize, Vec<Wanted>> = BTreeMap::new();
    for one in wanted {
        if let Some(at) = one.rank.get(one.tried % list.len().max(1)) {
            by_instance.entry(*at).or_default().push(one);
        }
    }
    let mut groups = Vec::new();
    for (at, group) in by_instance {
        let mut group = group.into_iter().peekable();
        while group.peek().is_some() {
            groups.push((at, group.by_ref().take(MAX_IDS).collect()));
        }
    }
    groups
}

/// Asks one instance, with a hedge; gives back what did not come, with why.
async fn ask_group(
    shared: &Shared,
    list: &List,
    at: usize,
    mut group: Vec<Wanted>,
    wait: Option<Duration>,
    sink: &mpsc::Sender<(usize, Got)>,
) -> Vec<Wanted> {
    let mut come = vec![false; group.len()];
    let result = deliver(shared, list, at, &group, &mut come, wait, sink).await;
    let error = Arc::new(match result {
        Err(error) => error,
        // What the instance could not read.
        Ok(()) => StoreError::Refused {
            instance: list[at].name.clone(),
            what: WHAT,
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
        one.tried += 1;
        one.error = Some(Arc::clone(&error));
    }
    group
}

async fn deliver(
    shared: &Shared,
    list: &List,
    at: usize,
    group: &[Wanted],
    come: &mut [bool],
    wait: Option<Duration>,
    sink: &mpsc::Sender<(usize, Got)>,
) -> Result<(), StoreError> {
    let (mut answer, first) = open_hedged(shared, list, at, group, wait).await?;
    let mut frame = Some(first);
    let (mut good, mut failed) = (0, 0);
    let result = loop {
        let next = match frame.take() {
            Some(frame) => Ok(Some(frame)),
            None => answer.next().await,
        };
        let Frame { index, kind, chunk } = match next {
            Ok(Some(frame)) => frame,
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        };
        let got = match kind {
            FrameKind::Chunk => Got::Chunk(chunk),
            FrameKind::Missing => Got::Missing,
            FrameKind::Yours => Got::Yours,
            FrameKind::Coming => Got::Coming,
            FrameKind::Damaged => Got::Damaged,
            FrameKind::Failed | FrameKind::End => {
                failed += 1;
                continue;
            }
        };
        good += 1;
        come[index] = true;
        if sink.send((group[index].index, got)).await.is_err() {
            break Ok(());
        }
    };
    match &result {
        Err(error) => answer.pass.failed(error),
        Ok(()) if failed > 0 && good == 0 => {
            answer.pass.failed(&"it cannot read its chunks");
        }
        Ok(()) => answer.pass.succeeded(),
    }
    result
}

/// An answer that has begun.
struct Answer {
    instance: Arc<Instance>,
    ask: Ask,
    response: Response,
    parser: FrameParser,
    pass: Pass,
}

impl Answer {
    async fn next(&mut self) -> Result<Option<Frame>, StoreError> {
        loop {
            let frames = |e| StoreError::frames(&self.instance.name, WHAT, &e);
            if let Some(frame) = self.parser.next_frame().map_err(frames)? {
                return Ok(Some(frame));
            }
            // An end frame is the end, whenever the connection says so.
            if self.parser.is_ended() {
                return Ok(None);
            }
            match exchange::piece(&self.instance, &self.ask, &mut self.response).await? {
                Some(piece) => self.parser.push(piece),
                None => {
                    self.parser.finish().map_err(frames)?;
                    return Ok(None);
                }
            }
        }
    }
}

/// The answer of the instance, or of another one that was asked beside it because it was slow.
async fn open_hedged(
    shared: &Shared,
    list: &List,
    at: usize,
    group: &[Wanted],
    wait: Option<Duration>,
) -> Result<(Answer, Frame), StoreError> {
    let instance = &list[at];
    let mut first = std::pin::pin!(open(shared, instance, &instance.http, group, wait));
    // Who waits for others to bring something is slow by intent.
    let after = match wait {
        None => instance.guard.hedge_after(shared.settings.hedge_floor),
        Some(_) => None,
    };
    let Some(after) = after else {
        return first.await;
    };
    if let Ok(answer) = tokio::time::timeout(after, first.as_mut()).await {
        return answer;
    }
    if !instance.guard.may_hedge() {
        return first.await;
    }
    shared.counters.hedges.fetch_add(1, Relaxed);
    let other = group[0]
        .rank
        .iter()
        .find(|other| **other != at && list[**other].guard.is_closed());
    let (other, http) = match other {
        Some(other) => (&list[*other], &list[*other].http),
        None => (instance, &instance.hedge_http),
    };
    let mut second = std::pin::pin!(open(shared, other, http, group, wait));
    tokio::select! {
        answer = first.as_mut() => match answer {
            Ok(answer) => Ok(answer),
            Err(error) => second.await.map_err(|_| error),
        },
        answer = second.as_mut() => match answer {
            Ok((answer, frame)) if frame.kind == FrameKind::Chunk => {
                shared.counters.hedges_won.fetch_add(1, Relaxed);
                Ok((answer, frame))
            }
            _ => first.await,
        },
    }
}

/// Sends the request and waits for its first frame.
async fn open(
    shared: &Shared,
    instance: &Arc<Instance>,
    http: &Client,
    group: &[Wanted],
    wait: Option<Duration>,
) -> Result<(Answer, Frame), StoreError> {
    let pass = instance.guard.enter().map_err(StoreError::Resting)?;
    shared.counters.sent.fetch_add(1, Relaxed);
    let begun = Instant::now();
    let opened = async {
        let ask = ask(shared, group, wait);
        let response = exchange::send(instance, http, shared.token.as_ref(), &ask).await?;
        let is_frames = response
            .headers()
            .get(CONTENT_TYPE)
            .is_some_and(|value| value == FRAMES_TYPE);
        if !is_frames {
            return Err(StoreError::Protocol {
                instance: instance.name.clone(),
                what: WHAT,
                reason: "it is not made of frames".to_owned(),
            });
        }
        Ok((ask, response))
    };
    let (ask, response) = match opened.await {
        Ok(opened) => opened,
        Err(error) => {
            match error.is_passing() {
                true => pass.failed(&error),
                false => pass.succeeded(),
            }
            return Err(error);
        }
    };
    let mut answer = Answer {
        instance: Arc::clone(instance),
        ask,
        response,
        parser: FrameParser::new(group.len()),
        pass,
    };
    let error = match answer.next().await {
        Ok(Some(frame)) => {
            if frame.kind == FrameKind::Chunk {
                instance.guard.first_byte(begun.elapsed());
            }
            return Ok((answer, frame));
        }
        // Of a request for nothing.
        Ok(None) => StoreError::Limit("no chunk was asked for".to_owned()),
        Err(error) => error,
    };
    answer.pass.failed(&error);
    Err(error)
}

fn ask(shared: &Shared, group: &[Wanted], wait: Option<Duration>) -> Ask {
    let ids_type = HeaderValue::from_static(IDS_TYPE);
    let mut headers = vec![(CONTENT_TYPE, ids_type)];
    let mut stall = shared.settings.stall_timeout;
    if let Some(wait) = wait {
        let millis = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let millis = millis.min(MAX_WAIT_MS);
        headers.push((
            HeaderName::from_static(WAIT_HEADER),
            HeaderValue::from(millis),
        ));
        stall += Duration::from_millis(millis);
    }
    Ask {
        what: WHAT,
        method: Method::POST,
        path: vec!["chunks".into(), "get".into()],
        headers,
        body: write_ids(group.iter().map(|one| &one.id)).into(),
        stall,
    }
}
