//! Chunks over plain HTTP/1.1, sent by the kernel from the files in which they lie: no copy of the bytes,
//! and no thread but the connection's own. Most of what a store does for clients that ask for one chunk
//! at a time is this.
//!
//! A connection begins here. The first request that is for anything but a chunk takes it to the HTTP
//! library for good, with the bytes that were read.

mod head;

use std::io;
use std::sync::Arc;

use axum::body::Body;
use axum::http::{Request, Response, Version};
use bytes::{Buf as _, BytesMut};
use futures_util::StreamExt as _;
use hyper::body::Body as _;
use lazyimg_convergent::ChunkId;
use rustix::net::SendFlags;
use tokio::io::Interest;
use tokio::net::TcpStream;

use self::head::{MAX_HEAD, Read, Wanted};
use crate::activity::{Activity, Shared, UnderWay};
use crate::engine::FilePart;
use crate::http::{self, App, Direct};

/// How it ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The connection can be closed.
    Closed,
    /// These bytes begin a request that is for another.
    Other(BytesMut),
}

/// Answers requests for chunks.
///
/// # Errors
/// Those of the connection, and of the disk in the middle of an answer.
pub(crate) async fn serve(
    app: &Arc<App>,
    stream: &TcpStream,
    activity: &Arc<Activity>,
) -> io::Result<Ended> {
    let mut buffer = BytesMut::new();
    loop {
        match head::read(&buffer) {
            Read::Partial => {
                if !read(app, stream, activity, &mut buffer).await? {
                    return Ok(Ended::Closed);
                }
            }
            Read::Other => return Ok(Ended::Other(buffer)),
            Read::Chunk(wanted, len) => {
                buffer.advance(len);
                let under_way = activity.request(false);
                let (id, request) = request(wanted, under_way)?;
                let answer = http::get_chunk(Arc::clone(app), id, request).await;
                // Who is told to go elsewhere is not to come back on this connection.
                let last = app.draining.is_cancelled();
                let to = Client { stream, activity };
                match answer {
                    Direct::Part(head, part, account) => {
                        let len = u64::from(part.len());
                        let head = head::answer(head.status(), head.headers(), len, last);
                        // Alone: a packet that has both the head and pages of a file makes those behind it
                        // slower, several times over loopback.
                        to.send(&head).await?;
                        to.send_part(part, &account).await?;
                        account.complete();
                    }
                    Direct::Whole(response) => to.send_whole(response, last).await?,
                }
                if last {
                    return Ok(Ended::Closed);
                }
                // A client that is as fast as this, or asks for more before the answer, is not the only one.
                tokio::task::yield_now().await;
            }
        }
    }
}

/// The request as the store's other parts know it.
fn request(wanted: Wanted, under_way: UnderWay) -> io::Result<(ChunkId, Request<Body>)> {
    let mut request = Request::new(Body::empty());
    *request.version_mut() = Version::HTTP_11;
    *request.uri_mut() = wanted.path().parse().map_err(io::Error::other)?;
    *request.headers_mut() = wanted.headers;
    request.extensions_mut().insert(Shared::new(under_way));
    Ok((wanted.id, request))
}

/// Reads some bytes; false when there are no more, or when the store ends and nothing has begun.
async fn read(
    app: &App,
    stream: &TcpStream,
    activity: &Activity,
    buffer: &mut BytesMut,
) -> io::Result<bool> {
    loop {
        buffer.reserve(MAX_HEAD);
        match stream.try_read_buf(buffer) {
            Ok(0) => return Ok(false),
            Ok(_) => {
                activity.read();
                return Ok(true);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
        tokio::select! {
            ready = stream.readable() => ready?,
            () = app.draining.cancelled(), if buffer.is_empty() => return Ok(false),
        }
    }
}

/// Where answers go.
struct Client<'a> {
    stream: &'a TcpStream,
    activity: &'a Activity,
}

impl Client<'_> {
    async fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let sent = || Ok(rustix::net::send(self.stream, bytes, SendFlags::NOSIGNAL)?);
            match self.stream.try_io(Interest::WRITABLE, sent) {
                Ok(sent) => {
                    self.activity.wrote();
                    bytes = &bytes[sent..];
                }
                Err(e) => self.wait(e).await?,
            }
        }
        Ok(())
    }

    async fn send_part(&self, part: FilePart, account: &http::Account) -> io::Result<()> {
        let mut at = part.offset();
        let end = at + u64::from(part.len());
        while at < end {
            let before = at;
            let sent = || {
                let left = usize::try_from(end - at).unwrap_or(usize::MAX);
                Ok(rustix::fs::sendfile(
                    self.stream,
                    part.file(),
                    Some(&mut at),
                    left,
                )?)
            };
            match self.stream.try_io(Interest::WRITABLE, sent) {
                Ok(0) => {
                    part.doubt();
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(_) => {
                    self.activity.wrote();
                    account.went(at - before);
                }
                Err(e) if e.raw_os_error() == Some(libc::EIO) => {
                    part.doubt();
                    return Err(e);
                }
                Err(e) => {
                    self.wait(e).await?;
                    // A client may have taken its time, and the page cache have lost the rest.
                    if !part.is_cached(at) {
                        let rest = part.clone();
                        let warm = tokio::task::spawn_blocking(move || rest.warm(at)).await;
                        warm.map_err(io::Error::other)?
                            .inspect_err(|_| part.doubt())?;
                    }
                }
            }
        }
        Ok(())
    }

    /// An answer whose body is in memory.
    async fn send_whole(&self, response: Response<Body>, last: bool) -> io::Result<()> {
        let (head, body) = response.into_parts();
        let len = body.size_hint().exact().unwrap_or_default();
        let head = head::answer(head.status, &head.headers, len, last);
        self.send(&head).await?;
        let mut left = len;
        let mut frames = body.into_data_stream();
        while let Some(bytes) = frames.next().await {
            let bytes = bytes.map_err(io::Error::other)?;
            left = left
                .checked_sub(bytes.len() as u64)
                .ok_or(io::ErrorKind::InvalidData)?;
            self.send(&bytes).await?;
        }
        match left {
            0 => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Waits until there is room, if that is what was the matter.
    async fn wait(&self, why: io::Error) -> io::Result<()> {
        match why.kind() {
            io::ErrorKind::WouldBlock => self.stream.writable().await,
            io::ErrorKind::Interrupted => Ok(()),
            _ => Err(why),
        }
    }
}
