//! Pushing blobs: a session (`POST`), then everything in one `PUT` (distribution specification,
//! "POST then PUT").

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use lazyimg_convergent::Digest;
use parking_lot::Mutex;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, LOCATION};
use reqwest::{Method, Response, StatusCode, Url};
use tokio::time::Instant;

use super::auth::Access;
use super::endpoint::{follow, shown};
use super::http::{Request, label, timed_out};
use super::retry::{self, Failure};
use super::{Registry, SLOWEST_BYTES_PER_SECOND};
use crate::source::SourceError;
use crate::source::registry_body::Body;

/// How fast a registry at least digests what was uploaded, in bytes per second: some copy the blob
/// within their store before they answer.
const COMMIT_BYTES_PER_SECOND: u64 = 16 << 20;

/// How long a streamed upload may take in all; its pace is watched piece by piece.
const LONGEST_UPLOAD: Duration = Duration::from_secs(7 * 24 * 3600);

impl Registry {
    pub(crate) async fn push_blob_bytes(
        &self,
        digest: &Digest,
        bytes: Bytes,
    ) -> Result<(), SourceError> {
        let size = bytes.len() as u64;
        let limit = self.0.options.timeouts.request
            + Duration::from_secs(size / SLOWEST_BYTES_PER_SECOND + size / COMMIT_BYTES_PER_SECOND);
        retry::run(
            &self.0.options.retry,
            limit,
            &label("PUT", &self.0.endpoint.uploads()),
            || async {
                let location = self.begin(digest).await?;
                let make = || Some(self.put(&location, digest, size, bytes.clone().into()));
                let response = self
                    .send(&Access::Push, &format!("blob {digest}"), make)
                    .await?;
                self.committed(digest, response).await
            },
        )
        .await
    }

    pub(crate) async fn push_blob(
        &self,
        digest: &Digest,
        size: u64,
        body: Body,
    ) -> Result<(), SourceError> {
        let location = self
            .small(&label("POST", &self.0.endpoint.uploads()), 0, || {
                self.begin(digest)
            })
            .await?;
        let progress = Arc::new(Progress::new());
        let mut request = self.put(
            &location,
            digest,
            size,
            reqwest::Body::wrap_stream(watched(body, size, progress.clone())),
        );
        let answer_within = std::mem::replace(&mut request.answer_within, LONGEST_UPLOAD);
        let mut request = Some(request);
        let send = async {
            let response = self
                .send(&Access::Push, &format!("blob {digest}"), || request.take())
                .await?;
            self.committed(digest, response).await
        };
        let result = tokio::select! {
            result = send => result,
            (phase, limit) = progress.stalled(self.0.options.timeouts.idle, answer_within) => {
                Err(timed_out(&Method::PUT, &location, phase, limit))
            }
        };
        // What the caller's stream said is the cause; the connection that broke is its effect.
        let upload_error = progress.error.lock().take();
        result.map_err(|failure| {
            self.abandon(location);
            match upload_error {
                Some(cause) => SourceError::Upload {
                    what: format!("blob {digest}"),
                    cause,
                },
                None => failure.into_error(),
            }
        })
    }

    pub(crate) async fn mount_blob(
        &self,
        digest: &Digest,
        from_repository: &str,
    ) -> Result<bool, SourceError> {
        let url = self.0.endpoint.mount(&digest.to_string(), from_repository);
        let what = format!("blob {digest} of {from_repository}");
        let access = Access::PushFrom(from_repository.to_owned());
        self.small(&label("POST", &url), 0, || async {
            let request = || Some(self.empty(Method::POST, url.clone()));
            let response = self.send(&access, &what, request).await?;
            match response.status() {
                StatusCode::CREATED => Ok(true),
                // It opened an upload instead, which nobody will use.
                StatusCode::ACCEPTED => {
                    if let Ok(location) = location(&url, &response) {
                        self.abandon(location);
                    }
                    Ok(false)
                }
                // Mounting is an offer; a registry that does not know it or does not want to.
                StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => Ok(false),
                _ => Err(self.refusal(&Method::POST, &what, response).await),
            }
        })
        .await
    }

    /// Opens an upload session and returns its address.
    async fn begin(&self, digest: &Digest) -> Result<Url, Failure> {
        let url = self.0.endpoint.uploads();
        let what = format!("an upload of blob {digest}");
        let response = self
            .send(&Access::Push, &what, || {
                Some(self.empty(Method::POST, url.clone()))
            })
            .await?;
        match response.status() {
            StatusCode::ACCEPTED => location(&url, &response),
            _ => Err(self.refusal(&Method::POST, &what, response).await),
        }
    }

    fn put(&self, location: &Url, digest: &Digest, size: u64, body: reqwest::Body) -> Request {
        let mut url = location.clone();
        url.query_pairs_mut()
            .append_pair("digest", &digest.to_string());
        let mut request = self.0.http.request(Method::PUT, url);
        request.headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        );
        request.headers.insert(CONTENT_LENGTH, size.into());
        request.body = Some(body);
        request.answer_within +=
            Duration::from_secs(size / SLOWEST_BYTES_PER_SECOND + size / COMMIT_BYTES_PER_SECOND);
        request
    }

    /// A request without a body that says so: some registries insist on the length.
    fn empty(&self, method: Method, url: Url) -> Request {
        let mut request = self.0.http.request(method, url);
        request
            .headers
            .insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        request
    }

    async fn committed(&self, digest: &Digest, response: Response) -> Result<(), Failure> {
        if response.status().is_success() {
            let _ = self.0.http.small_body(response).await;
            return Ok(());
        }
        Err(
            match self
                .refusal(&Method::PUT, &format!("blob {digest}"), response)
                .await
            {
                // A session lives in one instance of a registry; behind a balancer the next may not
                // know it. A new session may do.
                Failure::Final(cause @ SourceError::NotFound { .. }) => Failure::passing(cause),
                other => other,
            },
        )
    }

    /// Cancels an upload session in the background: kept, it would hold space for a week.
    fn abandon(&self, location: Url) {
        let registry = self.clone();
        tokio::spawn(async move {
            let request = || Some(registry.0.http.request(Method::DELETE, location.clone()));
            if let Ok(response) = registry
                .send(&Access::Push, "the end of an upload", request)
                .await
            {
                let _ = registry.0.http.small_body(response).await;
            }
        });
    }
}

fn location(from: &Url, response: &Response) -> Result<Url, Failure> {
    let target = response
        .headers()
        .get(LOCATION)
        .and_then(|v| v.to_str().ok());
    let target = target.ok_or_else(|| {
        SourceError::malformed(
            format!("the upload session of {}", shown(from)),
            "it has no address",
        )
    })?;
    follow(from, target).map_err(|reason| {
        SourceError::Redirect {
            url: shown(from),
            reason,
        }
        .into()
    })
}

/// How an upload goes on, seen from outside.
struct Progress {
    phase: Mutex<Phase>,
    error: Mutex<Option<io::Error>>,
}

/// Whom an upload waits for, and since when.
#[derive(Clone, Copy)]
enum Phase {
    /// The caller's stream, whose pace is its own.
    Producer,
    /// The network, to take the last piece.
    Network(Instant),
    /// The registry, to answer after the last piece.
    Answer(Instant),
}

impl Progress {
    fn new() -> Self {
        Self {
            phase: Mutex::new(Phase::Network(Instant::now())),
            error: Mutex::new(None),
        }
    }

    fn enter(&self, phase: Phase) {
        *self.phase.lock() = phase;
    }

    /// Ends when the network took nothing for `idle`, or no answer came within `answer`; says what
    /// was waited for, and how long.
    async fn stalled(&self, idle: Duration, answer: Duration) -> (&'static str, Duration) {
        loop {
            let (what, since, limit) = match *self.phase.lock() {
                Phase::Producer => ("", Instant::now(), idle),
                Phase::Network(since) => ("the registry to take more of the upload", since, idle),
                Phase::Answer(since) => ("the answer to the upload", since, answer),
            };
            let wait = (since + limit).saturating_duration_since(Instant::now());
            if wait.is_zero() {
                return (what, limit);
            }
            // Phases change meanwhile: look again soon enough for the shorter limit.
            tokio::time::sleep(wait.min(idle)).await;
        }
    }
}

/// The caller's stream, with its length checked and its progress told.
fn watched(
    body: Body,
    size: u64,
    progress: Arc<Progress>,
) -> impl futures_util::Stream<Item = io::Result<Bytes>> + Send + 'static {
    let state = (body, size, progress, false);
    futures_util::stream::unfold(state, |(mut body, left, progress, done)| async move {
        if done {
            return None;
        }
        progress.enter(Phase::Producer);
        let item = match body.next().await {
            Some(Ok(piece)) if piece.len() as u64 <= left => Ok(piece),
            Some(Ok(_)) => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it is longer than was said",
            )),
            Some(Err(e)) => Err(e),
            None if left == 0 => {
                progress.enter(Phase::Answer(Instant::now()));
                return None;
            }
            None => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("it ends {left} bytes before its end"),
            )),
        };
        match item {
            Ok(piece) => {
                progress.enter(Phase::Network(Instant::now()));
                let left = left - piece.len() as u64;
                Some((Ok(piece), (body, left, progress, false)))
            }
            Err(e) => {
                let shown = io::Error::new(e.kind(), e.to_string());
                *progress.error.lock() = Some(e);
                Some((Err(shown), (body, 0, progress, true)))
            }
        }
    })
}
