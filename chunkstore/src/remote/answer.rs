//! Get many: one request, its hedge, and the frames of its answer.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use lazyimg_convergent::ChunkId;
use reqwest::header::{CONTENT_TYPE, HeaderValue};
use reqwest::{Client, Method, Response};
use tokio::sync::mpsc;

use super::client::{Got, Shared};
use super::error::StoreError;
use super::exchange::{self, Ask};
use super::fetch::Wanted;
use super::frames::{Frame, FrameParser};
use super::instances::{Instance, List};
use crate::guard::Pass;
use crate::wire::{FRAMES_TYPE, FrameKind, IDS_TYPE, write_ids};

/// For messages.
pub(super) const WHAT: &str = "get chunks";
/// How long an answer that only finds out whether an instance is back may take.
const LONGEST_PROBE: Duration = Duration::from_secs(10);

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
            let limit = self.ask.stall;
            match exchange::piece(&self.instance, &self.ask, &mut self.response, limit).await? {
                Some(piece) => {
                    self.pass.heard();
                    self.parser.push(piece);
                }
                None => {
                    self.parser.finish().map_err(frames)?;
                    return Ok(None);
                }
            }
        }
    }

    /// Tells the guard how it went, after so many frames that were of use and that were not.
    fn end(self, result: &Result<(), StoreError>, good: usize, failed: usize) {
        match result {
            Err(error) => error.tell(self.pass),
            Ok(()) if failed > 0 && good == 0 => self.pass.failed(&"it cannot read its chunks"),
            Ok(()) => self.pass.succeeded(),
        }
    }
}

/// Asks one instance for a group of chunks, and sends what it says of each; tells of which it did.
pub(super) async fn deliver(
    shared: &Shared,
    list: &List,
    at: usize,
    group: &[Wanted],
    wait: Option<Duration>,
    sink: &mpsc::Sender<(usize, Got)>,
) -> (Result<(), StoreError>, Vec<bool>) {
    let mut come = vec![false; group.len()];
    let (mut answer, first) = match open_hedged(shared, list, at, group, wait).await {
        Ok(opened) => opened,
        Err(error) => return (Err(error), come),
    };
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
    answer.end(&result, good, failed);
    (result, come)
}

/// Asks an instance that has rested for a chunk that nobody waits for.
pub(super) async fn probe(shared: &Shared, instance: &Arc<Instance>, pass: Pass, id: ChunkId) {
    let probing = async {
        let http = &instance.clients.http;
        let (mut answer, first) = open(shared, instance, http, pass, &[id], None).await?;
        let failed = usize::from(first.kind == FrameKind::Failed);
        let result = loop {
            match answer.next().await {
                Ok(Some(_)) => {}
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        answer.end(&result, 1 - failed, failed);
        result
    };
    // Given up, it says of itself what it has heard.
    if let Ok(Err(error)) = tokio::time::timeout(LONGEST_PROBE, probing).await {
        tracing::debug!(%error, "an instance that rests is not back yet");
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
    let ids: Vec<ChunkId> = group.iter().map(|one| one.id).collect();
    let mut first = std::pin::pin!(enter(shared, instance, &instance.clients.http, &ids, wait));
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
        Some(other) => (&list[*other], &list[*other].clients.http),
        None => (instance, &instance.clients.hedge),
    };
    let mut second = std::pin::pin!(enter(shared, other, http, &ids, wait));
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

async fn enter(
    shared: &Shared,
    instance: &Arc<Instance>,
    http: &Client,
    ids: &[ChunkId],
    wait: Option<Duration>,
) -> Result<(Answer, Frame), StoreError> {
    let pass = instance.guard.enter().map_err(StoreError::Resting)?;
    open(shared, instance, http, pass, ids, wait).await
}

/// Sends the request and waits for its first frame.
async fn open(
    shared: &Shared,
    instance: &Arc<Instance>,
    http: &Client,
    mut pass: Pass,
    ids: &[ChunkId],
    wait: Option<Duration>,
) -> Result<(Answer, Frame), StoreError> {
    shared.counters.sent.fetch_add(1, Relaxed);
    let begun = Instant::now();
    let ask = ask(shared, ids, wait);
    pass.waits(ask.by_intent);
    let opened = async {
        let response = exchange::send(shared, instance, http, &ask).await?;
        let is_frames = response
            .headers()
            .get(CONTENT_TYPE)
            .is_some_and(|value| value == FRAMES_TYPE);
        match is_frames {
            true => Ok(response),
            false => Err(StoreError::Protocol {
                instance: instance.name.clone(),
                what: WHAT,
                reason: "it is not made of frames".to_owned(),
            }),
        }
    };
    let response = match opened.await {
        Ok(response) => response,
        Err(error) => {
            error.tell(pass);
            return Err(error);
        }
    };
    let mut answer = Answer {
        instance: Arc::clone(instance),
        ask,
        response,
        parser: FrameParser::new(ids.len()),
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
    error.tell(answer.pass);
    Err(error)
}

fn ask(shared: &Shared, ids: &[ChunkId], wait: Option<Duration>) -> Ask {
    let ids_type = HeaderValue::from_static(IDS_TYPE);
    let mut ask = Ask {
        what: WHAT,
        method: Method::POST,
        path: vec!["chunks".into(), "get".into()],
        headers: vec![(CONTENT_TYPE, ids_type)],
        body: write_ids(ids).into(),
        stall: shared.settings.stall_timeout,
        by_intent: Duration::ZERO,
    };
    if let Some(wait) = wait {
        ask.wait_for_others(wait);
    }
    ask
}
