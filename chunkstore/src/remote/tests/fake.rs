//! A small store in memory that has the faults it is told to have.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use lazyimg_convergent::ChunkId;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::LONG;
use crate::testing::{TestChunk, flipped};
use crate::wire::{FRAMES_TYPE, FrameHead, FrameKind, parse_ids};

/// What is wrong with the store.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Mode {
    Good,
    /// 503.
    Down,
    /// No answer.
    Hang,
    /// 429, and when to come again, in seconds.
    Busy(u64),
    /// Gets and documents end after half of their bytes.
    CutOff,
    /// Flipped bits.
    Wrong,
    /// Puts are 403.
    ReadOnly,
    /// Answers to all but gets come a byte at a time, without end.
    Trickle,
    /// The same, and they are 503.
    TrickleDown,
    /// Something that is no store.
    WebPage,
}

pub struct Fake {
    pub url: String,
    pub chunks: Mutex<HashMap<ChunkId, Bytes>>,
    pub mode: Mutex<Mode>,
    /// So many gets hang first.
    pub hang_first: AtomicUsize,
    /// So many requests are 429 first, with the wish to come again a second later.
    pub busy_first: AtomicUsize,
    /// How long a put takes.
    pub put_takes: Mutex<Duration>,
    /// What every document is.
    pub document: Mutex<Vec<u8>>,
    pub token: Mutex<Option<String>>,
    /// Method, path, and whether it was a repair.
    pub asked: Mutex<Vec<(String, bool)>>,
}

impl Fake {
    pub async fn start(chunks: &[TestChunk]) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fake = Arc::new(Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            chunks: Mutex::new(
                chunks
                    .iter()
                    .map(|c| (*c.spec.id(), c.stored.clone()))
                    .collect(),
            ),
            mode: Mutex::new(Mode::Good),
            hang_first: AtomicUsize::new(0),
            busy_first: AtomicUsize::new(0),
            put_takes: Mutex::default(),
            document: Mutex::default(),
            token: Mutex::default(),
            asked: Mutex::default(),
        });
        let serving = Arc::clone(&fake);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let fake = Arc::clone(&serving);
                tokio::spawn(async move { fake.serve(stream).await });
            }
        });
        fake
    }

    pub fn set(&self, mode: Mode) {
        *self.mode.lock() = mode;
    }

    pub fn asked(&self, what: &str) -> usize {
        self.asked
            .lock()
            .iter()
            .filter(|(line, _)| line.starts_with(what))
            .count()
    }

    async fn serve(&self, mut stream: TcpStream) -> Option<()> {
        let mut request = Vec::new();
        let head = loop {
            if stream.read_buf(&mut request).await.ok()? == 0 {
                return None;
            }
            if let Some(at) = request.windows(4).position(|w| w == b"\r\n\r\n") {
                break at;
            }
        };
        let text = String::from_utf8(request[..head].to_vec()).unwrap();
        let header = |name: &str| {
            text.lines().find_map(|line| {
                let (n, value) = line.split_once(':')?;
                n.eq_ignore_ascii_case(name)
                    .then(|| value.trim().to_owned())
            })
        };
        let len = header("content-length").map_or(0, |n| n.parse().unwrap());
        let mut body = request[head + 4..].to_vec();
        while body.len() < len {
            if stream.read_buf(&mut body).await.ok()? == 0 {
                return None;
            }
        }
        let line = text.lines().next().unwrap();
        let line = line.strip_suffix(" HTTP/1.1").unwrap().to_owned();
        let repair = header("lazyimg-repair").is_some();
        self.asked.lock().push((line.clone(), repair));
        let mode = *self.mode.lock();
        let is_get = line.starts_with("POST /v1/chunks/get");
        let is_document = line.starts_with("GET ");
        let one_of = |first: &AtomicUsize| {
            let less = first.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1));
            less.is_ok()
        };
        let busy = match mode {
            Mode::Busy(wish) => Some(wish),
            _ => one_of(&self.busy_first).then_some(1),
        };
        let hangs = is_get && one_of(&self.hang_first);
        if mode == Mode::Hang || hangs {
            tokio::time::sleep(LONG * 4).await;
            return None;
        }
        if !is_get && matches!(mode, Mode::Trickle | Mode::TrickleDown) {
            return trickle(stream, mode == Mode::TrickleDown).await;
        }
        let wanted = self.token.lock().clone().map(|t| format!("Bearer {t}"));
        let (status, kind, answer) = if wanted.is_some() && header("authorization") != wanted {
            refusal(401, "unauthorized")
        } else if busy.is_some() {
            refusal(429, "busy")
        } else if mode == Mode::Down {
            refusal(503, "unavailable")
        } else if mode == Mode::WebPage {
            (200, "text/html", b"<html>".to_vec())
        } else if let Some(id) = line.strip_prefix("PUT /v1/chunks/") {
            let id = ChunkId(
                format!("sha256:{id}")
                    .parse::<lazyimg_convergent::Digest>()
                    .unwrap()
                    .0,
            );
            assert_eq!(ChunkId::of(&body), id);
            let takes = *self.put_takes.lock();
            tokio::time::sleep(takes).await;
            if mode == Mode::ReadOnly {
                refusal(403, "forbidden")
            } else {
                let had = self.chunks.lock().insert(id, body.into()).is_some();
                (if had { 200 } else { 201 }, "text/plain", Vec::new())
            }
        } else if line.starts_with("POST /v1/chunks/has") {
            let chunks = self.chunks.lock();
            let ids = parse_ids(&body).unwrap();
            let flags = ids
                .iter()
                .map(|id| u8::from(chunks.contains_key(id)))
                .collect();
            (200, "application/octet-stream", flags)
        } else if is_document {
            (200, "application/json", self.document.lock().clone())
        } else {
            assert!(is_get, "{line}");
            let leases = header("lazyimg-wait-ms").is_some();
            (
                200,
                FRAMES_TYPE,
                self.frames(&parse_ids(&body).unwrap(), leases, mode),
            )
        };
        let full = answer.len();
        let sent = if mode == Mode::CutOff && (is_get || is_document) {
            full / 2
        } else {
            full
        };
        let again = busy.map_or(String::new(), |wish| format!("retry-after: {wish}\r\n"));
        let head = format!(
            "HTTP/1.1 {status} x\r\ncontent-type: {kind}\r\ncontent-length: {full}\r\n{again}connection: close\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.ok()?;
        stream.write_all(&answer[..sent]).await.ok()?;
        stream.shutdown().await.ok()
    }

    fn frames(&self, ids: &[ChunkId], leases: bool, mode: Mode) -> Vec<u8> {
        let chunks = self.chunks.lock();
        let mut out = Vec::new();
        for id in ids {
            match chunks.get(id) {
                Some(bytes) => {
                    let (kind, len) = (FrameKind::Chunk, bytes.len() as u32);
                    out.extend(FrameHead { kind, len }.to_bytes());
                    match mode {
                        Mode::Wrong => out.extend(flipped(bytes)),
                        _ => out.extend(bytes),
                    }
                }
                None if leases => out.extend(FrameHead::bare(FrameKind::Yours).to_bytes()),
                None => out.extend(FrameHead::bare(FrameKind::Missing).to_bytes()),
            }
        }
        out.extend(FrameHead::bare(FrameKind::End).to_bytes());
        out
    }
}

fn refusal(status: u16, code: &str) -> (u16, &'static str, Vec<u8>) {
    let body = format!(r#"{{"error": "{code}", "message": "told to say so"}}"#);
    (status, "application/json", body.into_bytes())
}

/// A byte now and then, until nobody takes it.
async fn trickle(mut stream: TcpStream, refuses: bool) -> Option<()> {
    let status = if refuses { 503 } else { 200 };
    let head = format!("HTTP/1.1 {status} x\r\ncontent-length: 50000\r\n\r\n");
    stream.write_all(head.as_bytes()).await.ok()?;
    loop {
        stream.write_all(b" ").await.ok()?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
