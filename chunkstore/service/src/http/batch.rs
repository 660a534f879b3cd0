//! `POST /v1/chunks/get`: many chunks in the order asked, and who brings those that are missing.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use axum::http::{Response, header};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use lazyimg_chunkstore::wire::{FRAMES_TYPE, FrameHead, FrameKind};
use lazyimg_convergent::{ChunkId, MAX_STORED_LEN};
use tokio::time::Instant;

use super::call::Call;
use super::memory::Held;
use super::{Answer, ApiError, Wanted, chunks, set};
use crate::leases::Asked;

/// Chunks of one request that are read at a time, ahead of the connection.
const AHEAD: usize = 8;

/// Answers with frames.
pub(super) async fn get(mut call: Call) -> Answer {
    let deadline = call.wait()?;
    let ids = chunks::ids(&mut call).await?;
    let mut response = Response::new(Body::from_stream(frames(Arc::new(call), ids, deadline)));
    set(&mut response, header::CONTENT_TYPE, FRAMES_TYPE);
    Ok(response)
}

/// What became of one chunk.
enum Frame {
    Chunk(Bytes),
    Bare(FrameKind),
}

impl Frame {
    /// The frame's head and what follows it.
    fn parts(self) -> [Option<Bytes>; 2] {
        let (head, body) = match self {
            Self::Bare(kind) => (FrameHead::bare(kind), None),
            Self::Chunk(bytes) => {
                let head = FrameHead {
                    kind: FrameKind::Chunk,
                    len: bytes.len() as u32,
                };
                (head, Some(bytes))
            }
        };
        [Some(Bytes::copy_from_slice(&head.to_bytes())), body]
    }
}

fn frames(
    call: Arc<Call>,
    ids: Vec<ChunkId>,
    deadline: Option<Instant>,
) -> impl Stream<Item = Result<Bytes, Infallible>> {
    // Memory is taken in the order of the answer, one chunk after the other: those before it in this
    // answer have theirs, so they go on, and give it back.
    let taker = Arc::clone(&call);
    let with_memory = stream::iter(ids).then(move |id| {
        let call = Arc::clone(&taker);
        async move { (id, call.memory(MAX_STORED_LEN).await) }
    });
    let fetched = with_memory.map(move |(id, held)| {
        let call = Arc::clone(&call);
        async move {
            match held {
                Ok(held) => fetch(&call, id, held, deadline).await,
                Err(_) => Frame::Bare(FrameKind::Failed),
            }
        }
    });
    let end = stream::once(async { Frame::Bare(FrameKind::End) });
    fetched
        .buffered(AHEAD)
        .chain(end)
        .flat_map(|frame| stream::iter(frame.parts().into_iter().flatten().map(Ok)))
}

async fn fetch(call: &Call, id: ChunkId, held: Held, deadline: Option<Instant>) -> Frame {
    let app = &call.app;
    let mut held = Some(held);
    // Whether it was looked for since somebody was told to bring it.
    let mut again = false;
    loop {
        let memory = match (held.take(), deadline) {
            (Some(held), _) => held,
            // It was given back while waiting. No longer wait than for the chunk: others may hold
            // what this one needs, and wait for memory as it does.
            (None, Some(deadline)) => {
                match tokio::time::timeout_at(deadline, call.memory(MAX_STORED_LEN)).await {
                    Ok(Ok(held)) => held,
                    _ => return Frame::Bare(FrameKind::Coming),
                }
            }
            (None, None) => return Frame::Bare(FrameKind::Failed),
        };
        match look(call, &id).await {
            Ok(Some(bytes)) => {
                app.metrics.chunk_hits.inc();
                return Frame::Chunk(memory.with(bytes));
            }
            Ok(None) => drop(memory),
            Err(error) => {
                call.entry.failed(&error);
                return Frame::Bare(match error.is_damage() {
                    true => FrameKind::Damaged,
                    false => FrameKind::Failed,
                });
            }
        }
        let Some(deadline) = deadline else {
            app.metrics.chunk_misses.inc();
            return Frame::Bare(FrameKind::Missing);
        };
        let wanted = Wanted::Chunk(call.tenant.name.clone(), id);
        match app.leases.ask(&wanted, again) {
            Asked::Yours => {
                app.metrics.chunk_misses.inc();
                app.metrics.leases_granted.inc();
                return Frame::Bare(FrameKind::Yours);
            }
            Asked::Look => {}
            Asked::Wait(wait) => {
                let came = tokio::select! {
                    came = wait.until(deadline) => came,
                    () = app.draining.cancelled() => false,
                };
                if !came {
                    app.metrics.chunk_misses.inc();
                    return Frame::Bare(FrameKind::Coming);
                }
            }
        }
        again = true;
    }
}

/// The chunk, if it can be a frame.
async fn look(call: &Call, id: &ChunkId) -> Result<Option<Bytes>, ApiError> {
    let found = call.app.catalog.get_chunk(&call.tenant.name, id).await?;
    match found {
        Some(bytes) if bytes.is_empty() || bytes.len() > MAX_STORED_LEN => Err(ApiError::Internal(
            format!("chunk {id} has {} bytes, which no chunk has", bytes.len()),
        )),
        found => Ok(found),
    }
}
