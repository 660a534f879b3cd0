//! One HTTP exchange: deadlines, redirects, and what a transport failure means.

use std::error::Error as StdError;
use std::sync::OnceLock;
use std::time::Duration;

use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Body, Client, Method, Response, StatusCode, Url};

use super::endpoint::{Endpoint, follow, same_origin, shown};
use super::retry::{Failure, Label, retry_after};
use crate::source::{SourceError, SourceOptions, Timeouts};

/// The most redirects that are followed for one request. Registries use one, to their blob store.
const MAX_REDIRECTS: usize = 5;

/// How much of an error's body is read, in bytes.
const MAX_ERROR_BODY: u64 = 16 * 1024;

/// How much of a registry's own message is passed on, in characters.
const MAX_MESSAGE: usize = 300;

/// How long an idle connection is kept. Registries close theirs after one to three minutes.
const POOL_IDLE: Duration = Duration::from_secs(60);

/// A request without its authorization.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    pub(super) body: Option<Body>,
    /// How long the head of the answer may take once the request is sent.
    pub(super) answer_within: Duration,
}

/// The HTTP client of one repository.
#[derive(Debug, Clone)]
pub(super) struct Http {
    /// For `http:`: without root certificates, which take some 30 ms to load.
    plain: Client,
    /// For `https:`; made when it is first needed, at once for a registry that speaks it.
    tls: OnceLock<Client>,
    make: ClientOptions,
    pub(super) timeouts: Timeouts,
}

/// What both clients have in common.
#[derive(Debug, Clone)]
struct ClientOptions {
    connect_timeout: Duration,
    max_idle: usize,
    loopback: bool,
}

impl ClientOptions {
    fn client(&self, tls: bool) -> Result<Client, SourceError> {
        let mut builder = Client::builder()
            .user_agent(concat!("lazyimg/", env!("CARGO_PKG_VERSION")))
            // Redirects are followed here, where it is known whose credentials are whose.
            .redirect(reqwest::redirect::Policy::none())
            // Ranges in parallel use the windows of several TCP connections; one HTTP/2 connection
            // would share one.
            .http1_only()
            .connect_timeout(self.connect_timeout)
            .pool_idle_timeout(POOL_IDLE)
            .pool_max_idle_per_host(self.max_idle)
            .tcp_keepalive(Duration::from_secs(30))
            .referer(false);
        if self.loopback {
            builder = builder.no_proxy();
        }
        if !tls {
            builder = builder.tls_certs_only([]);
        }
        builder
            .build()
            .map_err(|e| SourceError::Setup { cause: Box::new(e) })
    }
}

impl Http {
    pub(super) fn new(endpoint: &Endpoint, options: &SourceOptions) -> Result<Self, SourceError> {
        let make = ClientOptions {
            connect_timeout: options.timeouts.connect,
            max_idle: options.parallelism.0.max(1),
            loopback: endpoint.is_loopback(),
        };
        let http = Self {
            plain: make.client(false)?,
            tls: OnceLock::new(),
            make,
            timeouts: options.timeouts,
        };
        if endpoint.root().scheme() == "https" {
            http.client(endpoint.root())?;
        }
        Ok(http)
    }

    /// The client for an address: a redirect or a token service may speak TLS where the registry
    /// does not.
    fn client(&self, url: &Url) -> Result<&Client, SourceError> {
        if url.scheme() != "https" {
            return Ok(&self.plain);
        }
        if let Some(client) = self.tls.get() {
            return Ok(client);
        }
        let client = self.make.client(true)?;
        Ok(self.tls.get_or_init(|| client))
    }

    /// A request with this client's deadline for the answer.
    pub(super) fn request(&self, method: Method, url: Url) -> Request {
        Request {
            method,
            url,
            headers: HeaderMap::new(),
            body: None,
            answer_within: self.timeouts.connect + self.timeouts.response,
        }
    }

    /// Sends a request and returns the head of the final answer, of whatever status. `GET` follows
    /// redirects; `authorization` goes to the request's own origin and is dropped for good at the
    /// first step to another.
    pub(super) async fn exchange(
        &self,
        request: Request,
        authorization: Option<HeaderValue>,
    ) -> Result<Response, Failure> {
        let Request {
            method,
            mut url,
            headers,
            mut body,
            answer_within,
        } = request;
        let origin = url.clone();
        let mut authorization = authorization;
        for _ in 0..=MAX_REDIRECTS {
            let mut headers = headers.clone();
            headers
                .entry(ACCEPT_ENCODING)
                .or_insert(HeaderValue::from_static("identity"));
            if let Some(value) = &authorization {
                headers.insert(AUTHORIZATION, value.clone());
            }
            let mut builder = self
                .client(&url)
                .map_err(Failure::Final)?
                .request(method.clone(), url.clone())
                .headers(headers);
            if let Some(body) = body.take() {
                builder = builder.body(body);
            }
            let response = match tokio::time::timeout(answer_within, builder.send()).await {
                Ok(Ok(response)) => response,
                Ok(Err(e)) => return Err(transport(&method, &url, e)),
                Err(_) => return Err(timed_out(&method, &url, "the answer", answer_within)),
            };
            if !is_redirect(response.status()) || method != Method::GET {
                return Ok(response);
            }
            let refused = |reason: String| SourceError::Redirect {
                url: shown(&url),
                reason,
            };
            let target = response
                .headers()
                .get(LOCATION)
                .and_then(|v| v.to_str().ok());
            let target = target.ok_or_else(|| refused("it names no target".into()))?;
            let next = follow(&url, target).map_err(refused)?;
            if !same_origin(&origin, &next) {
                authorization = None;
            }
            tracing::trace!(from = %shown(&url), to = %shown(&next), "redirect");
            url = next;
        }
        Err(Failure::Final(SourceError::Redirect {
            url: shown(&origin),
            reason: format!("more than {MAX_REDIRECTS} times"),
        }))
    }

    /// Turns an answer that is not the wanted one into a failure: the registry's words, and whether
    /// it may pass. Reading the body to its end gives the connection back.
    pub(super) async fn refusal(
        &self,
        method: &Method,
        what: &str,
        place: &str,
        response: Response,
    ) -> Failure {
        let status = response.status();
        let url = shown(response.url());
        let retry_after = retry_after(response.headers(), std::time::SystemTime::now());
        let message = message_of(&self.small_body(response).await, status);
        let cause = match status {
            StatusCode::NOT_FOUND => {
                return Failure::Final(SourceError::NotFound {
                    what: what.into(),
                    place: place.into(),
                });
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                return Failure::Final(SourceError::Unauthorized {
                    what: what.into(),
                    place: place.into(),
                    hint: message,
                });
            }
            StatusCode::TOO_MANY_REQUESTS => SourceError::RateLimited {
                url,
                retry_after,
                attempts: 1,
            },
            _ => SourceError::Status {
                method: method.to_string(),
                url,
                status: status.as_u16(),
                message,
            },
        };
        if cause.is_retryable() {
            Failure::Passing { cause, retry_after }
        } else {
            Failure::Final(cause)
        }
    }

    /// The beginning of a body that only matters for its message; never fails, never takes long.
    pub(super) async fn small_body(&self, mut response: Response) -> Vec<u8> {
        let mut out = Vec::new();
        let read = async {
            while let Ok(Some(piece)) = response.chunk().await {
                out.extend_from_slice(&piece);
                if out.len() as u64 > MAX_ERROR_BODY {
                    break;
                }
            }
        };
        // A short deadline: an error's text is not worth more, and the answer is known already.
        let _ = tokio::time::timeout(Duration::from_secs(5).min(self.timeouts.idle), read).await;
        out.truncate(MAX_ERROR_BODY as usize);
        out
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// For messages.
pub(super) fn label(method: &'static str, url: &Url) -> Label {
    Label {
        method,
        url: shown(url),
    }
}

pub(super) fn timed_out(
    method: &Method,
    url: &Url,
    phase: &'static str,
    limit: Duration,
) -> Failure {
    Failure::passing(SourceError::TimedOut {
        method: method.to_string(),
        url: shown(url),
        phase,
        limit,
    })
}

/// A failure below HTTP. All may pass but those of certificates and of protocols.
pub(super) fn transport(method: &Method, url: &Url, error: reqwest::Error) -> Failure {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(&format!(": {source}"));
        next = source.source();
    }
    let hint = if text.contains("InvalidContentType") || text.contains("received corrupt message") {
        Some("the registry does not speak TLS; if it serves plain HTTP, say so with --plain-http")
    } else if text.contains("certificate") {
        Some(
            "its certificate is not trusted; add its CA to the system's, or name a bundle with SSL_CERT_FILE",
        )
    } else {
        None
    };
    let unreachable = |cause: crate::source::error::Cause| SourceError::Unreachable {
        method: method.to_string(),
        url: shown(url),
        attempts: 1,
        elapsed: Duration::ZERO,
        cause,
    };
    match hint {
        Some(hint) => Failure::Final(unreachable(format!("{hint} ({text})").into())),
        None if error.is_builder() => Failure::Final(unreachable(text.into())),
        None => Failure::passing(SourceError::Transport { text }),
    }
}

/// A registry's words: the messages of its JSON (distribution specification, "Error Codes"), else
/// the beginning of the text, without control characters.
pub(super) fn message_of(body: &[u8], status: StatusCode) -> String {
    #[derive(serde::Deserialize)]
    struct Envelope {
        errors: Vec<One>,
    }
    #[derive(serde::Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let text = match serde_json::from_slice::<Envelope>(body) {
        Ok(envelope) => {
            let each = envelope
                .errors
                .iter()
                .take(5)
                .map(|e| match e.message.as_str() {
                    "" => e.code.clone(),
                    message => format!("{message} ({})", e.code),
                });
            each.collect::<Vec<_>>().join("; ")
        }
        Err(_) => String::from_utf8_lossy(body).trim().to_owned(),
    };
    let clean: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_MESSAGE)
        .collect();
    match clean.trim() {
        "" => status
            .canonical_reason()
            .unwrap_or("no reason given")
            .to_owned(),
        clean => clean.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registrys_words_are_cut_and_cleaned() {
        let json = br#"{"errors":[{"code":"DENIED","message":"not\u001b[31m yours","detail":null},{"code":"UNKNOWN"}]}"#;
        assert_eq!(
            message_of(json, StatusCode::FORBIDDEN),
            "not [31m yours (DENIED); UNKNOWN"
        );
        assert_eq!(message_of(b"", StatusCode::BAD_GATEWAY), "Bad Gateway");
        assert_eq!(
            message_of(&[b'x'; 5000], StatusCode::BAD_GATEWAY).len(),
            MAX_MESSAGE
        );
    }
}
