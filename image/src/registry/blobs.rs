//! Reading blobs: whole, in part, as a stream that survives broken connections.

use bytes::{Bytes, BytesMut};
use futures_util::stream;
use lazyimg_convergent::Digest;
use reqwest::header::{CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, StatusCode};

use super::Registry;
use super::auth::Access;
use super::body::BodyReader;
use super::endpoint::shown;
use super::http::label;
use super::retry::{Failure, Label, backoff};
use crate::source::options::MIN_WINDOW_BYTES;
use crate::source::{BlobStream, RetryPolicy, SourceError};

/// The longest range that is fetched in one piece, in bytes: it is held in memory.
pub const MAX_RANGE_BYTES: u64 = 64 << 20;

/// How much is read and dropped at most to reach a range, where a server answers a range request
/// with the whole blob, in bytes. A second at 1 Gbit/s; beyond it lazy reading makes no sense.
pub const MAX_SKIPPED_BYTES: u64 = 128 << 20;

impl Registry {
    pub(crate) async fn blob_exists(&self, digest: &Digest) -> Result<bool, SourceError> {
        let url = self.0.endpoint.blob(&digest.to_string());
        let what = format!("blob {digest}");
        self.small(&label("HEAD", &url), 0, || async {
            let request = || Some(self.0.http.request(Method::HEAD, url.clone()));
            let response = self.send(&Access::Pull, &what, request).await?;
            match response.status() {
                // A redirect to the blob store: it is there. The target may sign GET alone.
                status if status.is_success() || status.is_redirection() => Ok(true),
                StatusCode::NOT_FOUND => Ok(false),
                _ => Err(self.refusal(&Method::HEAD, &what, response).await),
            }
        })
        .await
    }

    pub(crate) async fn blob(&self, digest: &Digest, max: u64) -> Result<Bytes, SourceError> {
        let what = format!("blob {digest}");
        let max = max.min(MAX_RANGE_BYTES);
        let bytes = self
            .small(&self.blob_label(digest), max, || async {
                let (body, _) = self.open_blob(digest, None).await?;
                body.all(&what, max).await
            })
            .await?;
        let actual = Digest::of(&bytes);
        if actual != *digest {
            return Err(SourceError::DigestMismatch {
                what,
                expected: digest.to_string(),
                actual: actual.to_string(),
            });
        }
        Ok(bytes)
    }

    pub(crate) async fn blob_range(
        &self,
        digest: &Digest,
        offset: u64,
        len: u64,
    ) -> Result<Bytes, SourceError> {
        self.range(&self.0.options.retry, digest, offset, len).await
    }

    pub(crate) async fn blob_range_once(
        &self,
        digest: &Digest,
        offset: u64,
        len: u64,
    ) -> Result<Bytes, SourceError> {
        let once = RetryPolicy {
            attempts: 1,
            ..self.0.options.retry
        };
        self.range(&once, digest, offset, len).await
    }

    async fn range(
        &self,
        policy: &RetryPolicy,
        digest: &Digest,
        offset: u64,
        len: u64,
    ) -> Result<Bytes, SourceError> {
        if len > MAX_RANGE_BYTES {
            return Err(SourceError::TooLarge {
                what: format!("a range of blob {digest}"),
                limit: MAX_RANGE_BYTES,
                unit: "bytes",
            });
        }
        if len == 0 {
            return Ok(Bytes::new());
        }
        if offset.checked_add(len).is_none() {
            return Err(SourceError::malformed(
                format!("a range of blob {digest}"),
                "it ends beyond 2^64",
            ));
        }
        // What arrived before a connection broke is kept: only the rest is asked for again.
        let got = parking_lot::Mutex::new(BytesMut::new());
        self.small_with(policy, &self.blob_label(digest), len, || async {
            let have = got.lock().len() as u64;
            let (mut body, skip) = self
                .open_blob(digest, Some((offset + have, Some(len - have))))
                .await?;
            if skip > MAX_SKIPPED_BYTES {
                let url = shown(body.url());
                return Err(SourceError::RangesUnsupported {
                    url,
                    offset: skip,
                    limit: MAX_SKIPPED_BYTES,
                }
                .into());
            }
            let mut piece = body.skip(skip).await?;
            loop {
                {
                    let mut got = got.lock();
                    if got.is_empty() && piece.len() as u64 == len {
                        // One piece, no copy.
                        break;
                    }
                    let room = (len - got.len() as u64).min(piece.len() as u64) as usize;
                    if got.capacity() == 0 {
                        got.reserve(len as usize);
                    }
                    got.extend_from_slice(&piece[..room]);
                    if got.len() as u64 == len {
                        piece = std::mem::take(&mut *got).freeze();
                        break;
                    }
                }
                piece = match body.next().await? {
                    Some(piece) => piece,
                    None => {
                        return Err(Failure::passing(SourceError::Transport {
                            text: "the body ended early".into(),
                        }));
                    }
                };
            }
            if skip == 0 {
                // The end of the body is read, so that the connection can be used again. More bytes
                // than promised are not looked at.
                let _ = body.next().await;
            }
            Ok(piece)
        })
        .await
    }

    pub(crate) async fn blob_stream(
        &self,
        digest: &Digest,
        size: u64,
    ) -> Result<BlobStream, SourceError> {
        let what = format!("blob {digest}");
        let first = self
            .small(&self.blob_label(digest), 0, || async {
                let (body, _) = self.open_blob(digest, None).await?;
                match body.announced() {
                    Some(actual) if actual != size => Err(SourceError::SizeMismatch {
                        what: what.clone(),
                        expected: size,
                        actual,
                    }
                    .into()),
                    _ => Ok(body),
                }
            })
            .await?;
        let state = Download {
            registry: self.clone(),
            digest: *digest,
            size,
            offset: 0,
            body: Some(first),
            failures: 0,
            since_failure: 0,
        };
        Ok(BlobStream::new(stream::try_unfold(
            state,
            |mut state| async { Ok(state.next().await?.map(|piece| (piece, state))) },
        )))
    }

    /// Opens a blob, from an offset on and up to a length if so asked. With the body comes how many
    /// bytes to skip: a server that ignores ranges sends everything.
    async fn open_blob(
        &self,
        digest: &Digest,
        range: Option<(u64, Option<u64>)>,
    ) -> Result<(BodyReader, u64), Failure> {
        let what = format!("blob {digest}");
        let url = self.0.endpoint.blob(&digest.to_string());
        let request = || {
            let mut request = self.0.http.request(Method::GET, url.clone());
            request.headers = range_header(range);
            Some(request)
        };
        let response = self.send(&Access::Pull, &what, request).await?;
        let skip = match (response.status(), range) {
            (StatusCode::OK, None) => 0,
            (StatusCode::OK, Some((offset, _))) => offset,
            (StatusCode::PARTIAL_CONTENT, Some((offset, len))) => {
                let answered = response
                    .headers()
                    .get(CONTENT_RANGE)
                    .and_then(|v| v.to_str().ok())
                    .and_then(content_range);
                match answered {
                    Some((first, last))
                        if first == offset && len.is_none_or(|len| last - first < len) =>
                    {
                        0
                    }
                    _ => {
                        return Err(SourceError::malformed(
                            format!("the answer for a range of {what}"),
                            "it is another range",
                        )
                        .into());
                    }
                }
            }
            (StatusCode::RANGE_NOT_SATISFIABLE, Some((offset, _))) => {
                let reason =
                    format!("it ends before byte {offset}, where a range of it should begin");
                return Err(SourceError::malformed(what, reason).into());
            }
            _ => return Err(self.refusal(&Method::GET, &what, response).await),
        };
        Ok((BodyReader::new(response, self.0.options.timeouts), skip))
    }

    fn blob_label(&self, digest: &Digest) -> Label {
        label("GET", &self.0.endpoint.blob(&digest.to_string()))
    }
}

fn range_header(range: Option<(u64, Option<u64>)>) -> HeaderMap {
    let text = match range {
        None => return HeaderMap::new(),
        Some((offset, None)) => format!("bytes={offset}-"),
        Some((offset, Some(len))) => format!("bytes={offset}-{}", offset + len - 1),
    };
    HeaderValue::from_str(&text)
        .map(|value| HeaderMap::from_iter([(RANGE, value)]))
        .unwrap_or_default()
}

/// First and last byte of `bytes FIRST-LAST/TOTAL`.
fn content_range(text: &str) -> Option<(u64, u64)> {
    let (range, _) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.trim().split_once('-')?;
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last).then_some((first, last))
}

/// A blob on its way.
struct Download {
    registry: Registry,
    digest: Digest,
    size: u64,
    offset: u64,
    body: Option<BodyReader>,
    /// Failures in a row, none of which brought much.
    failures: u32,
    since_failure: u64,
}

impl Download {
    async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        loop {
            let failure = match self.step().await {
                Ok(Some(piece)) => return Ok(Some(piece)),
                Ok(None) if self.offset == self.size => return Ok(None),
                Ok(None) => Failure::passing(SourceError::Transport {
                    text: format!("the body ended at byte {} of {}", self.offset, self.size),
                }),
                Err(failure) => failure,
            };
            self.body = None;
            self.pause(failure).await?;
        }
    }

    /// The next piece of the open body, or of one opened where the last one broke.
    async fn step(&mut self) -> Result<Option<Bytes>, Failure> {
        if self.offset == self.size {
            // The end is read as well: more bytes than promised are an error, and a body read to
            // its end gives the connection back.
            return match self.body.take() {
                Some(mut body) => match body.next().await {
                    Ok(Some(more)) if !more.is_empty() => Err(self.too_long(more.len()).into()),
                    _ => Ok(None),
                },
                None => Ok(None),
            };
        }
        let (mut body, mut piece) = match self.body.take() {
            Some(body) => (body, Bytes::new()),
            None => {
                tracing::debug!(digest = %self.digest, offset = self.offset, "resuming");
                let (mut body, skip) = self
                    .registry
                    .open_blob(&self.digest, Some((self.offset, None)))
                    .await?;
                let rest = body.skip(skip).await?;
                (body, rest)
            }
        };
        if piece.is_empty() {
            match body.next().await? {
                Some(next) => piece = next,
                None => return Ok(None),
            }
        }
        if piece.len() as u64 > self.size - self.offset {
            return Err(self.too_long(piece.len()).into());
        }
        self.offset += piece.len() as u64;
        self.since_failure += piece.len() as u64;
        self.body = Some(body);
        Ok(Some(piece))
    }

    /// Waits before the next attempt, or gives up. Progress wins new attempts.
    async fn pause(&mut self, failure: Failure) -> Result<(), SourceError> {
        let policy = &self.registry.0.options.retry;
        let (cause, retry_after) = match failure {
            Failure::Final(cause) => return Err(cause),
            Failure::Passing { cause, retry_after } => (cause, retry_after),
        };
        if self.since_failure >= MIN_WINDOW_BYTES {
            self.failures = 0;
        }
        self.since_failure = 0;
        self.failures += 1;
        if self.failures >= policy.attempts
            || retry_after.is_some_and(|asked| asked > policy.longest_retry_after)
        {
            return Err(cause);
        }
        tracing::debug!(digest = %self.digest, offset = self.offset, %cause, "the download broke");
        let own = backoff(policy, self.failures, fastrand::f64());
        tokio::time::sleep(own.max(retry_after.unwrap_or_default())).await;
        Ok(())
    }

    fn too_long(&self, more: usize) -> SourceError {
        SourceError::SizeMismatch {
            what: format!("blob {}", self.digest),
            expected: self.size,
            actual: self.offset + more as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_asked_for_and_understood_with_both_ends_included() {
        assert_eq!(range_header(Some((10, Some(5))))[RANGE], "bytes=10-14");
        assert_eq!(range_header(Some((10, None)))[RANGE], "bytes=10-");
        assert_eq!(content_range("bytes 10-14/100"), Some((10, 14)));
        assert_eq!(content_range("bytes 10-14/*"), Some((10, 14)));
        for broken in [
            "",
            "bytes */100",
            "bytes 14-10/100",
            "items 1-2/3",
            "bytes 1-2",
        ] {
            assert_eq!(content_range(broken), None, "{broken}");
        }
    }
}
