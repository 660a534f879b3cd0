//! Whether anything moves on a connection: a socket that watches itself, and the rules by which it is
//! closed.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// How long a connection may do nothing.
#[derive(Debug, Clone)]
pub struct Patience {
    /// From the first byte of a request's head to its last; from the connection to its first request.
    pub head: Duration,
    /// Between requests.
    pub idle: Duration,
    /// Between bytes of an answer that the client takes; with HTTP/2, between pieces of answers, each at
    /// most a chunk.
    pub stall: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(10),
            idle: Duration::from_secs(300),
            stall: Duration::from_secs(60),
        }
    }
}

/// What should be done with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing.
    Fine,
    /// It is not used: tell the client, and close it.
    Idle,
    /// The client does not keep up its side: close it.
    Stalled(&'static str),
}

/// No head has begun.
const NONE: u64 = u64::MAX;

/// What moved last, and when, in milliseconds since the connection began.
#[derive(Debug)]
pub(crate) struct Activity {
    begun: Instant,
    moved: AtomicU64,
    written: AtomicU64,
    /// When the head that is not complete began, or [`NONE`].
    head: AtomicU64,
    requests: AtomicUsize,
    bodies: AtomicUsize,
    /// HTTP/2: frames come and go that belong to no request, so only requests and answers count.
    multiplexed: AtomicBool,
}

impl Activity {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            begun: Instant::now(),
            moved: AtomicU64::new(0),
            written: AtomicU64::new(0),
            head: AtomicU64::new(0),
            requests: AtomicUsize::new(0),
            bodies: AtomicUsize::new(0),
            multiplexed: AtomicBool::new(false),
        })
    }

    fn now(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }

    /// A request's head is complete.
    pub fn request(self: &Arc<Self>, multiplexed: bool) -> UnderWay {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.head.store(NONE, Ordering::Relaxed);
        self.moved.store(self.now(), Ordering::Relaxed);
        if multiplexed {
            self.multiplexed.store(true, Ordering::Relaxed);
        }
        UnderWay {
            of: Arc::clone(self),
            body: false,
        }
    }

    /// What should be done with the connection now.
    pub fn verdict(&self, patience: &Patience) -> Verdict {
        let now = self.now();
        let since = |then: &AtomicU64| {
            Duration::from_millis(now.saturating_sub(then.load(Ordering::Relaxed)))
        };
        if self.bodies.load(Ordering::Relaxed) > 0 && since(&self.written) > patience.stall {
            return Verdict::Stalled("the client does not take its answer");
        }
        if self.requests.load(Ordering::Relaxed) > 0 {
            return Verdict::Fine;
        }
        let begun = self.head.load(Ordering::Relaxed) != NONE;
        if begun && since(&self.head) > patience.head {
            return Verdict::Stalled("the head of a request does not come");
        }
        match since(&self.moved) > patience.idle {
            true => Verdict::Idle,
            false => Verdict::Fine,
        }
    }

    /// Bytes came.
    pub fn read(&self) {
        if self.multiplexed.load(Ordering::Relaxed) {
            return;
        }
        let now = self.now();
        self.moved.store(now, Ordering::Relaxed);
        if self.requests.load(Ordering::Relaxed) == 0 && self.head.load(Ordering::Relaxed) == NONE {
            self.head.store(now, Ordering::Relaxed);
        }
    }

    /// Bytes went.
    pub fn wrote(&self) {
        if !self.multiplexed.load(Ordering::Relaxed) {
            self.progress();
        }
    }

    /// An answer goes on.
    fn progress(&self) {
        let now = self.now();
        self.moved.store(now, Ordering::Relaxed);
        self.written.store(now, Ordering::Relaxed);
    }
}

/// A request under way, until it is dropped.
#[derive(Debug)]
pub(crate) struct UnderWay {
    of: Arc<Activity>,
    body: bool,
}

impl UnderWay {
    /// Its answer begins.
    pub fn answer(&mut self) {
        if !self.body {
            self.body = true;
            // What was written before was another answer.
            self.of.progress();
            self.of.bodies.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A piece of an answer, until the connection has let go of it.
struct Piece {
    bytes: Bytes,
    under_way: Arc<UnderWay>,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.under_way.of.progress();
    }
}

impl UnderWay {
    /// A piece of the answer is wanted: gives it on. With HTTP/2 the answer is under way until the
    /// connection has let go of all pieces; with HTTP/1 that is when the answer is dropped.
    pub fn piece(self: &Arc<Self>, bytes: Bytes) -> Bytes {
        if bytes.is_empty() || !self.of.multiplexed.load(Ordering::Relaxed) {
            return bytes;
        }
        self.of.progress();
        Bytes::from_owner(Piece {
            bytes,
            under_way: Arc::clone(self),
        })
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.of.progress();
        self.of.requests.fetch_sub(1, Ordering::Relaxed);
        if self.body {
            self.of.bodies.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// [`UnderWay`] on its way through a request's extensions, which must be such as can be cloned.
#[derive(Debug, Clone)]
pub(crate) struct Shared(Arc<Mutex<Option<UnderWay>>>);

impl Shared {
    pub fn new(under_way: UnderWay) -> Self {
        Self(Arc::new(Mutex::new(Some(under_way))))
    }

    /// Out of it, once.
    pub fn take(&self) -> Option<UnderWay> {
        self.0.lock().take()
    }
}

/// A socket that notes when bytes move.
#[derive(Debug)]
pub(crate) struct Socket<S> {
    socket: S,
    /// What was read from it already.
    before: BytesMut,
    activity: Arc<Activity>,
}

impl<S> Socket<S> {
    pub fn new(socket: S, before: BytesMut, activity: Arc<Activity>) -> Self {
        Self {
            socket,
            before,
            activity,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Socket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.before.is_empty() {
            let len = self.before.len().min(buf.remaining());
            buf.put_slice(&self.before.split_to(len));
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let done = Pin::new(&mut self.socket).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.activity.read();
        }
        done
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.socket).poll_write(cx, buf);
        if matches!(done, Poll::Ready(Ok(1..))) {
            self.activity.wrote();
        }
        done
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.socket).poll_write_vectored(cx, bufs);
        if matches!(done, Poll::Ready(Ok(1..))) {
            self.activity.wrote();
        }
        done
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::advance;

    const SECOND: Duration = Duration::from_secs(1);

    fn patience() -> Patience {
        Patience {
            head: SECOND * 10,
            idle: SECOND * 300,
            stall: SECOND * 60,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_must_come_in_time_and_between_requests_there_is_more_of_it() {
        let activity = Activity::new();
        let verdict = || activity.verdict(&patience());
        advance(SECOND * 9).await;
        assert_eq!(verdict(), Verdict::Fine);
        advance(SECOND * 2).await;
        assert!(matches!(verdict(), Verdict::Stalled(_)), "no first request");
        drop(activity.request(false));
        advance(SECOND * 200).await;
        assert_eq!(verdict(), Verdict::Fine, "nothing has begun");
        activity.read();
        advance(SECOND * 9).await;
        activity.read();
        advance(SECOND * 2).await;
        assert!(
            matches!(verdict(), Verdict::Stalled(_)),
            "a byte now and then is no head"
        );
        drop(activity.request(true));
        advance(SECOND * 200).await;
        activity.read();
        activity.wrote();
        assert_eq!(
            verdict(),
            Verdict::Fine,
            "frames without a request are no head"
        );
        advance(SECOND * 101).await;
        assert_eq!(
            verdict(),
            Verdict::Idle,
            "and pings no use of the connection"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn with_http_2_an_answer_goes_on_when_its_pieces_do_and_not_because_others_move() {
        let activity = Activity::new();
        let verdict = || activity.verdict(&patience());
        let mut under_way = activity.request(true);
        under_way.answer();
        let under_way = Arc::new(under_way);
        let pieces: Vec<_> = (0..2)
            .map(|_| under_way.piece(Bytes::from_static(b"piece")))
            .collect();
        drop(under_way);
        for piece in pieces {
            for _ in 0..5 {
                advance(SECOND * 11).await;
                activity.read();
                activity.wrote();
            }
            assert_eq!(verdict(), Verdict::Fine);
            let held = piece.clone();
            drop(piece);
            advance(SECOND * 6).await;
            assert!(matches!(verdict(), Verdict::Stalled(_)), "it is held still");
            drop(held);
            assert_eq!(verdict(), Verdict::Fine);
        }
        advance(SECOND * 301).await;
        assert_eq!(verdict(), Verdict::Idle, "nothing is under way");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_may_take_long_to_begin_but_then_it_must_be_taken() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let activity = Activity::new();
        let mut socket = Socket::new(ours, BytesMut::new(), Arc::clone(&activity));
        let verdict = || activity.verdict(&patience());
        let mut under_way = activity.request(false);
        advance(SECOND * 1000).await;
        assert_eq!(
            verdict(),
            Verdict::Fine,
            "the store is slow, not the client"
        );
        under_way.answer();
        for _ in 0..5 {
            advance(SECOND * 50).await;
            socket.write_all(b"x").await.unwrap();
            theirs.read_u8().await.unwrap();
            assert_eq!(verdict(), Verdict::Fine);
        }
        advance(SECOND * 61).await;
        assert!(matches!(verdict(), Verdict::Stalled(_)));
        drop(under_way);
        assert_eq!(verdict(), Verdict::Fine);
    }
}
