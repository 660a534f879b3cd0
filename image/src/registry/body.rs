//! Reading bodies: never more than asked, never slower than allowed.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::{Method, Response, Url};
use tokio::time::Instant;

use super::http::{timed_out, transport};
use super::retry::Failure;
use crate::source::options::MIN_WINDOW_BYTES;
use crate::source::{SourceError, Timeouts};

/// The body of an answer under watch: each piece must come within the idle deadline, and all of them
/// at a pace that no slow drip keeps.
#[derive(Debug)]
pub(super) struct BodyReader {
    response: Response,
    timeouts: Timeouts,
    /// Time waited for the network since the window began; a slow consumer does not count.
    waited: Duration,
    window_bytes: u64,
}

impl BodyReader {
    pub(super) fn new(response: Response, timeouts: Timeouts) -> Self {
        Self {
            response,
            timeouts,
            waited: Duration::ZERO,
            window_bytes: 0,
        }
    }

    pub(super) fn url(&self) -> &Url {
        self.response.url()
    }

    /// The length that the server announced, in bytes.
    pub(super) fn announced(&self) -> Option<u64> {
        self.response.content_length()
    }

    /// The next piece, `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        let begun = Instant::now();
        let piece = tokio::time::timeout(self.timeouts.idle, self.response.chunk()).await;
        self.waited += begun.elapsed();
        let piece = match piece {
            Ok(Ok(piece)) => piece,
            Ok(Err(e)) => return Err(transport(&Method::GET, &self.response.url().clone(), e)),
            Err(_) => {
                return Err(timed_out(
                    &Method::GET,
                    self.response.url(),
                    "the next piece of the body",
                    self.timeouts.idle,
                ));
            }
        };
        self.window_bytes += piece.as_ref().map_or(0, |p| p.len() as u64);
        if self.waited >= self.timeouts.stall_window {
            if piece.is_some() && self.window_bytes < MIN_WINDOW_BYTES {
                let phase = "a body that comes in drips";
                return Err(timed_out(
                    &Method::GET,
                    self.response.url(),
                    phase,
                    self.timeouts.stall_window,
                ));
            }
            self.waited = Duration::ZERO;
            self.window_bytes = 0;
        }
        Ok(piece)
    }

    /// Reads and drops `count` bytes; what is left of the last piece comes back.
    pub(super) async fn skip(&mut self, mut count: u64) -> Result<Bytes, Failure> {
        while count > 0 {
            let Some(mut piece) = self.next().await? else {
                return Err(Failure::passing(SourceError::Transport {
                    text: "the body ended early".into(),
                }));
            };
            let drop = count.min(piece.len() as u64);
            count -= drop;
            if count == 0 {
                return Ok(piece.split_off(drop as usize));
            }
        }
        Ok(Bytes::new())
    }

    /// The whole rest, at most `max` bytes.
    pub(super) async fn all(mut self, what: &str, max: u64) -> Result<Bytes, Failure> {
        let too_large = || SourceError::TooLarge {
            what: what.into(),
            limit: max,
            unit: "bytes",
        };
        let announced = self.response.content_length();
        if announced.is_some_and(|length| length > max) {
            return Err(too_large().into());
        }
        let mut out = BytesMut::new();
        while let Some(piece) = self.next().await? {
            if out.is_empty() && announced == Some(piece.len() as u64) {
                // The common case of a small document: one piece, no copy. The end is read, so
                // that the connection can be used again.
                return match self.next().await? {
                    None => Ok(piece),
                    Some(_) => Err(too_large().into()),
                };
            }
            if (out.len() + piece.len()) as u64 > max {
                return Err(too_large().into());
            }
            out.extend_from_slice(&piece);
        }
        Ok(out.freeze())
    }
}
