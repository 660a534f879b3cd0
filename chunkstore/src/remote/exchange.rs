//! One request to one instance.

use std::time::Duration;

use bytes::Bytes;
use lazyimg_convergent::{ChunkId, Digest};
use reqwest::header::{AUTHORIZATION, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::{Method, Response, Url};
use serde::Deserialize;

use super::error::{StoreError, StoreErrorCode};
use super::instances::Instance;
use super::token::TokenFile;
use crate::wire::{MAX_WAIT_MS, REQUEST_ID_HEADER, WAIT_HEADER};

/// Length of an error's body that is read, in bytes: a list of 10,000 chunks fits.
const MAX_ERROR: usize = 1 << 20;
/// Length of the store's words that are passed on, in characters.
const MAX_MESSAGE: usize = 300;

/// A request, as often as it is sent.
pub(super) struct Ask {
    /// For messages.
    pub what: &'static str,
    pub method: Method,
    /// Segments of the path behind `/v1`.
    pub path: Vec<String>,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub body: Bytes,
    /// How long the head of the answer may take once connected, and each piece of its body.
    pub stall: Duration,
}

impl Ask {
    /// Says that the asker can bring what is missing, and waits so long for others who do.
    pub fn wait_for_others(&mut self, wait: Duration) {
        let millis = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let millis = millis.min(MAX_WAIT_MS);
        let name = HeaderName::from_static(WAIT_HEADER);
        self.headers.push((name, HeaderValue::from(millis)));
        self.stall += Duration::from_millis(millis);
    }
}

/// Sends `ask`; `http` is one of the instance's clients. An answer of another status than 2xx is an
/// error.
pub(super) async fn send(
    instance: &Instance,
    http: &reqwest::Client,
    token: Option<&TokenFile>,
    ask: &Ask,
) -> Result<Response, StoreError> {
    let mut authorization = match token {
        Some(token) => Some(token.header(false).await?),
        None => None,
    };
    let mut again = false;
    loop {
        let (response, request) = once(instance, http, authorization.as_ref(), ask).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        if response.status() == reqwest::StatusCode::UNAUTHORIZED
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
    instance: &Instance,
    http: &reqwest::Client,
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
    let response = tokio::time::timeout(ask.stall, builder.send())
        .await
        .map_err(|_| timed_out(instance, ask))?
        .map_err(|error| transport(instance, ask, error))?;
    Ok((response, request))
}

/// The next piece of an answer's body.
pub(super) async fn piece(
    instance: &Instance,
    ask: &Ask,
    response: &mut Response,
) -> Result<Option<Bytes>, StoreError> {
    tokio::time::timeout(ask.stall, response.chunk())
        .await
        .map_err(|_| timed_out(instance, ask))?
        .map_err(|error| transport(instance, ask, error))
}

/// A whole body of at most `limit` bytes.
pub(super) async fn body(
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
    let mut all = Vec::new();
    while let Some(piece) = piece(instance, ask, &mut response).await? {
        if all.len() + piece.len() > limit {
            return Err(too_long());
        }
        all.extend_from_slice(&piece);
    }
    Ok(all.into())
}

fn address(root: &Url, path: &[String]) -> Url {
    let mut url = root.clone();
    // Addresses of http and https always have a path.
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().push("v1").extend(path);
    }
    url
}

fn timed_out(instance: &Instance, ask: &Ask) -> StoreError {
    StoreError::TimedOut {
        instance: instance.name.clone(),
        what: ask.what,
        limit: ask.stall,
    }
}

fn transport(instance: &Instance, ask: &Ask, error: reqwest::Error) -> StoreError {
    StoreError::Transport {
        instance: instance.name.clone(),
        what: ask.what,
        source: Box::new(error.without_url()),
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
