//! One request to one instance.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lazyimg_convergent::{ChunkId, Digest};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::{Client, Method, Response, StatusCode, Url};
use serde::Deserialize;

use super::client::Shared;
use super::error::{StoreError, StoreErrorCode};
use super::instances::Instance;
use crate::wire::{MAX_WAIT_MS, REQUEST_ID_HEADER, WAIT_HEADER};

/// Length of an error's body that is read, in bytes: a list of 10,000 chunks fits.
const MAX_ERROR: usize = 1 << 20;
/// Length of the store's words that are passed on, in characters.
const MAX_MESSAGE: usize = 300;

/// The slowest link on which documents and what is put still go through, in bytes per second.
const SLOWEST_LINK: u64 = 128 << 10;

/// A request, as often as it is sent.
pub(super) struct Ask {
    /// For messages.
    pub what: &'static str,
    pub method: Method,
    /// Segments of the path behind `/v1`.
    pub path: Vec<String>,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub body: Bytes,
    /// How long the head of the answer may take once connected, and each piece of its body. What is
    /// put has as much longer as the slowest link takes.
    pub stall: Duration,
    /// How much of that the store was asked to take.
    pub by_intent: Duration,
}

/// An answer and its whole body.
pub(super) struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Ask {
    /// Says that the asker can bring what is missing, and waits so long for others who do.
    pub fn wait_for_others(&mut self, wait: Duration) {
        let millis = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let millis = millis.min(MAX_WAIT_MS);
        let name = HeaderName::from_static(WAIT_HEADER);
        self.headers.push((name, HeaderValue::from(millis)));
        self.by_intent = Duration::from_millis(millis);
        self.stall += self.by_intent;
    }
}

/// Sends `ask`; `http` is one of the instance's clients. An answer of another status than 2xx is an
/// error.
pub(super) async fn send(
    shared: &Shared,
    instance: &Instance,
    http: &Client,
    ask: &Ask,
) -> Result<Response, StoreError> {
    let token = shared.token.as_ref();
    let mut authorization = match token {
        Some(token) => Some(token.header(false).await?),
        None => None,
    };
    let mut again = false;
    loop {
        let (response, request) = once(shared, instance, http, authorization.as_ref(), ask).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        if response.status() == StatusCode::UNAUTHORIZED
            && !again
            && let Some(token) = token
        {
            // It may have been changed a moment ago.
            let fresh = token.header(true).await?;
            if authorization.as_ref() != Some(&fresh) {
                authorization = Some(fresh);
                again = true;
                continue;
            }
        }
        return Err(refusal(instance, ask, request, response).await);
    }
}

async fn once(
    shared: &Shared,
    instance: &Instance,
    http: &Client,
    authorization: Option<&HeaderValue>,
    ask: &Ask,
) -> Result<(Response, String), StoreError> {
    let request = format!(
        "{:016x}",
        (crate::guard::retry::random() * 2f64.powi(63)) as u64
    );
    let mut builder = http
        .request(ask.method.clone(), address(&instance.url, &ask.path))
        .header(REQUEST_ID_HEADER, &request);
    for (name, value) in &ask.headers {
        builder = builder.header(name, value);
    }
    if let Some(value) = authorization {
        builder = builder.header(AUTHORIZATION, value);
    }
    if ask.method != Method::GET {
        builder = builder.body(ask.body.clone());
    }
    // What is put at once shares one link.
    let uploading = (ask.method == Method::PUT).then(|| Uploading::new(shared, ask.body.len()));
    let most = || match &uploading {
        Some(uploading) => ask.stall + uploading.time(),
        None => ask.stall,
    };
    let begun = Instant::now();
    let mut limit = most();
    let mut sending = std::pin::pin!(builder.send());
    let response = loop {
        let left = limit.saturating_sub(begun.elapsed());
        if let Ok(response) = tokio::time::timeout(left, sending.as_mut()).await {
            break response.map_err(|error| transport(instance, ask, error))?;
        }
        // Others may have begun to send meanwhile.
        let longer = most();
        if longer <= limit {
            return Err(timed_out(instance, ask, limit));
        }
        limit = longer;
    };
    Ok((response, request))
}

/// A body on its way, counted among those of the client.
struct Uploading<'a> {
    all: &'a AtomicU64,
    len: u64,
}

impl<'a> Uploading<'a> {
    fn new(shared: &'a Shared, len: usize) -> Self {
        let (all, len) = (&shared.uploading, len as u64);
        all.fetch_add(len, Relaxed);
        Self { all, len }
    }

    /// What all that are on their way take on the slowest link.
    fn time(&self) -> Duration {
        on_the_slowest_link(self.all.load(Relaxed))
    }
}

impl Drop for Uploading<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(self.len, Relaxed);
    }
}

fn on_the_slowest_link(len: u64) -> Duration {
    Duration::from_millis(len.saturating_mul(1000) / SLOWEST_LINK)
}

/// The next piece of an answer's body.
pub(super) async fn piece(
    instance: &Instance,
    ask: &Ask,
    response: &mut Response,
    limit: Duration,
) -> Result<Option<Bytes>, StoreError> {
    tokio::time::timeout(limit, response.chunk())
        .await
        .map_err(|_| timed_out(instance, ask, limit))?
        .map_err(|error| transport(instance, ask, error))
}

/// A whole body of at most `limit` bytes. However it trickles, it takes no longer than it would on
/// the slowest link.
async fn body(
    instance: &Instance,
    ask: &Ask,
    mut response: Response,
    limit: usize,
) -> Result<Bytes, StoreError> {
    let too_long = || StoreError::Protocol {
        instance: instance.name.clone(),
        what: ask.what,
        reason: format!("it is longer than {limit} bytes"),
    };
    if response.content_length().is_some_and(|n| n > limit as u64) {
        return Err(too_long());
    }
    let begun = Instant::now();
    let mut all = Vec::new();
    loop {
        let whole = ask.stall + on_the_slowest_link(all.len() as u64);
        let left = whole.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Err(timed_out(instance, ask, whole));
        }
        let patience = left.min(ask.stall);
        let Some(piece) = piece(instance, ask, &mut response, patience).await? else {
            return Ok(all.into());
        };
        if all.len() + piece.len() > limit {
            return Err(too_long());
        }
        all.extend_from_slice(&piece);
    }
}

/// [`send`] and the whole of the answer, at most `limit` bytes, under the instance's guard.
pub(super) async fn whole(
    shared: &Shared,
    instance: &Instance,
    ask: &Ask,
    limit: usize,
) -> Result<Answer, StoreError> {
    let mut pass = instance.guard.enter().map_err(StoreError::Resting)?;
    pass.waits(ask.by_intent);
    shared.counters.sent.fetch_add(1, Relaxed);
    let answer = async {
        let response = send(shared, instance, &instance.clients.http, ask).await?;
        Ok(Answer {
            status: response.status(),
            headers: response.headers().clone(),
            body: body(instance, ask, response, limit).await?,
        })
    };
    let answer: Result<Answer, StoreError> = answer.await;
    match &answer {
        Ok(_) => pass.succeeded(),
        Err(error) => error.tell(pass),
    }
    answer
}

fn address(root: &Url, path: &[String]) -> Url {
    let mut url = root.clone();
    // Addresses of http and https always have a path.
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().push("v1").extend(path);
    }
    url
}

fn timed_out(instance: &Instance, ask: &Ask, limit: Duration) -> StoreError {
    StoreError::TimedOut {
        instance: instance.name.clone(),
        what: ask.what,
        limit,
    }
}

fn transport(instance: &Instance, ask: &Ask, error: reqwest::Error) -> StoreError {
    let error = error.without_url();
    let cause = crate::error::chain(&error);
    let (instance, what) = (instance.name.clone(), ask.what);
    let advice = if cause.contains("InvalidContentType") || cause.contains("corrupt message") {
        "the store does not speak TLS; if it is meant to serve in clear, write http://"
    } else if cause.contains("certificate") {
        "its certificate is not trusted; name a file with that of its authority with --store-ca"
    } else {
        return StoreError::Transport {
            instance,
            what,
            source: Box::new(error),
        };
    };
    StoreError::Tls {
        instance,
        what,
        advice,
        cause,
    }
}

#[derive(Deserialize)]
struct Told {
    error: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    chunks: Vec<String>,
}

async fn refusal(
    instance: &Instance,
    ask: &Ask,
    request: String,
    response: Response,
) -> StoreError {
    let status = response.status();
    let retry_after = response
        .headers()
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.trim().parse().ok())
        .map(Duration::from_secs);
    let request = match response.headers().get(REQUEST_ID_HEADER) {
        Some(id) => id.to_str().unwrap_or_default().chars().take(16).collect(),
        None => request,
    };
    let lease = super::documents::lease(response.headers());
    let body = body(instance, ask, response, MAX_ERROR)
        .await
        .unwrap_or_default();
    let told = serde_json::from_slice::<Told>(&body).unwrap_or_else(|_| Told {
        error: String::new(),
        message: format!("status {status} without the store's words: is a proxy between?"),
        chunks: Vec::new(),
    });
    let Some(code) = StoreErrorCode::of(&told.error, status.as_u16()) else {
        return StoreError::Protocol {
            instance: instance.name.clone(),
            what: ask.what,
            reason: format!("status {status}"),
        };
    };
    StoreError::Refused {
        instance: instance.name.clone(),
        what: ask.what,
        code,
        // Words from outside go to logs and terminals.
        message: told
            .message
            .chars()
            .filter(|c| !c.is_control())
            .take(MAX_MESSAGE)
            .collect(),
        retry_after,
        request,
        chunks: told.chunks.iter().filter_map(|id| chunk_id(id)).collect(),
        lease,
    }
}

fn chunk_id(text: &str) -> Option<ChunkId> {
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    let digest: Digest = format!("sha256:{hex}").parse().ok()?;
    Some(ChunkId(digest.0))
}
