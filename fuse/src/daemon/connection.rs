//! One connection: lines in, lines out.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

use super::Daemon;
use crate::protocol::{Envelope, ErrorCode, HEARTBEAT, MAX_REQUEST_BYTES, Reply, Request, VERSION};
use crate::rendezvous;

/// A peer that has connected and says nothing is let go, so that it does not keep a daemon.
const REQUEST_PATIENCE: Duration = Duration::from_secs(10);

/// A peer that does not take its reply is let go.
const REPLY_PATIENCE: Duration = Duration::from_secs(10);

/// How far a request has come: done and total.
pub(super) type Progress = mpsc::Sender<(u64, u64)>;

/// Answers requests until the peer has no more.
pub(super) async fn serve(daemon: &Arc<Daemon>, stream: UnixStream) -> io::Result<()> {
    let peer = rendezvous::peer_uid(&stream)?;
    let (read, mut write) = stream.into_split();
    if peer != 0 && peer != rustix::process::geteuid().as_raw() {
        let message = format!("this daemon belongs to another user than you (user {peer})");
        return send(
            &mut write,
            &Reply::Error {
                code: ErrorCode::Forbidden,
                message,
            },
        )
        .await;
    }
    let mut read = BufReader::new(read);
    while let Some(line) = next_line(&mut read).await? {
        let request = match parse(&line) {
            Ok(request) => request,
            Err(reply) => return send(&mut write, &reply).await,
        };
        answer(daemon, request, &mut write).await?;
    }
    Ok(())
}

/// Says one thing and hangs up.
pub(super) async fn refuse(stream: UnixStream, reply: Reply) -> io::Result<()> {
    let (_read, mut write) = stream.into_split();
    send(&mut write, &reply).await
}

async fn next_line(read: &mut BufReader<OwnedReadHalf>) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let mut bounded = read.take(MAX_REQUEST_BYTES as u64 + 1);
    match tokio::time::timeout(REQUEST_PATIENCE, bounded.read_until(b'\n', &mut line)).await {
        Ok(Ok(0)) | Err(_) => Ok(None),
        Ok(Ok(_)) => Ok(Some(line)),
        Ok(Err(error)) => Err(error),
    }
}

/// A line as a request, or what to answer instead.
fn parse(line: &[u8]) -> Result<Request, Reply> {
    let error = |code, message: String| Reply::Error { code, message };
    if !line.ends_with(b"\n") {
        return Err(error(
            ErrorCode::BadRequest,
            format!("a request is one line of at most {MAX_REQUEST_BYTES} bytes"),
        ));
    }
    #[derive(serde::Deserialize)]
    struct Version {
        v: u32,
    }
    match serde_json::from_slice::<Version>(line) {
        Ok(Version { v: VERSION }) => {}
        Ok(Version { v }) => {
            return Err(error(
                ErrorCode::Version,
                format!(
                    "the running daemon speaks version {VERSION} of the protocol and this program version {v}: \
                     unmount everything that the daemon serves, it ends then"
                ),
            ));
        }
        Err(cause) => return Err(error(ErrorCode::BadRequest, cause.to_string())),
    }
    serde_json::from_slice::<Envelope<Request>>(line)
        .map(|envelope| envelope.message)
        .map_err(|cause| error(ErrorCode::BadRequest, cause.to_string()))
}

/// Answers one request, with heartbeats while it takes its time. A peer that hangs up does not end
/// a mount half way: what was begun is brought to its end.
async fn answer(
    daemon: &Arc<Daemon>,
    request: Request,
    write: &mut OwnedWriteHalf,
) -> io::Result<()> {
    let (progress, mut steps) = mpsc::channel(1);
    let daemon = Arc::clone(daemon);
    let mut work = tokio::spawn(async move { daemon.handle(request, progress).await });
    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    heartbeat.tick().await;
    let mut state = (0, 0);
    let reply = loop {
        tokio::select! {
            reply = &mut work => break reply,
            Some(step) = steps.recv() => state = step,
            _ = heartbeat.tick() => {
                if let Err(error) = send(write, &Reply::Working { done: state.0, total: state.1 }).await {
                    // Nobody listens; wait for the end so that the daemon stays for it.
                    drop(steps);
                    let _ = work.await;
                    return Err(error);
                }
            }
        }
    };
    let reply = reply.unwrap_or_else(|panic| Reply::Error {
        code: ErrorCode::Internal,
        message: panic.to_string(),
    });
    send(write, &reply).await
}

async fn send(write: &mut OwnedWriteHalf, reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(&Envelope::new(reply))?;
    line.push(b'\n');
    tokio::time::timeout(REPLY_PATIENCE, write.write_all(&line))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(line: &[u8]) -> ErrorCode {
        match parse(line) {
            Err(Reply::Error { code, .. }) => code,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_no_request_is_refused_with_a_code() {
        assert_eq!(parse(b"{\"v\":1,\"op\":\"status\"}\n"), Ok(Request::Status));
        assert_eq!(
            refused(b"{\"v\":1,\"op\":\"status\"}"),
            ErrorCode::BadRequest
        );
        assert_eq!(refused(b"{\"v\":2,\"op\":\"new\"}\n"), ErrorCode::Version);
        assert_eq!(
            refused(b"{\"v\":1,\"op\":\"new\"}\n"),
            ErrorCode::BadRequest
        );
        assert_eq!(refused(b"GET / HTTP/1.1\n"), ErrorCode::BadRequest);
        assert_eq!(refused(b"\n"), ErrorCode::BadRequest);
        assert_eq!(
            refused("[".repeat(60_000).as_bytes()),
            ErrorCode::BadRequest
        );
    }
}
