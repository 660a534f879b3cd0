//! One repository of a registry, by the OCI distribution specification 1.1 over HTTP.
//!
//! oci-client gives the grammar of references, the manifest types and their media types. Its HTTP
//! client is not used: it pings `/v2/` before it authenticates (a round trip of a mount that has
//! four), asks for credentials once and for all, does not come back from a 401 when a token runs
//! out, and neither retries nor bounds what it reads.
//!
//! * [`endpoint`]: addresses; [`challenge`], [`auth`]: who we are; [`retry`]: trying again;
//! * [`http`], [`body`]: one exchange; [`blobs`], [`upload`], [`manifests`], [`referrers`]: the API.
//!
//! Connections belong to the tokio runtime that made them: use a repository from one runtime.

mod auth;
mod blobs;
mod body;
mod challenge;
mod endpoint;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod http;
mod manifests;
mod referrers;
mod retry;
mod upload;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use std::time::Duration;

use reqwest::header::HeaderValue;
use reqwest::{Method, Response, StatusCode};
use tokio::sync::Semaphore;

use auth::{Access, Authenticator};
use endpoint::{Endpoint, same_origin};
use http::{Http, Request};
use retry::{Failure, Label};

use crate::credentials::{CredentialPlaces, CredentialStore};
use crate::reference::RegistryRef;
use crate::source::{RetryPolicy, SourceError, SourceOptions};

pub use blobs::{MAX_RANGE_BYTES, MAX_SKIPPED_BYTES};

/// The pace at which a transfer of known length may at worst run, in bytes per second. Added to the
/// deadline of a request that moves much.
const SLOWEST_BYTES_PER_SECOND: u64 = 128 * 1024;

/// The most connections that [`Registry::preconnect`] opens.
const MAX_PRECONNECT: usize = 16;

/// A repository. Clones share everything.
#[derive(Clone)]
pub(crate) struct Registry(Arc<Inner>);

struct Inner {
    name: String,
    endpoint: Endpoint,
    http: Http,
    auth: Authenticator,
    options: SourceOptions,
    /// Requests whose answer fits into memory, in flight.
    small: Semaphore,
    /// What is known of the Referrers API.
    referrers_api: AtomicU8,
    /// Read-modify-write of the fallback tag is one at a time within the process.
    writing_referrers: tokio::sync::Mutex<()>,
}

impl Registry {
    pub(crate) fn open(
        reference: &RegistryRef,
        options: &SourceOptions,
    ) -> Result<Self, SourceError> {
        let name = reference.name();
        let endpoint = Endpoint::new(
            &reference.registry,
            &reference.repository,
            options.plain_http,
        )?;
        let store = CredentialStore::new(
            &reference.registry,
            &reference.repository,
            options
                .credentials
                .clone()
                .unwrap_or_else(|| CredentialPlaces::here(options.docker_config.as_deref())),
            options.timeouts.helper,
        );
        Ok(Self(Arc::new(Inner {
            http: Http::new(&endpoint, options)?,
            auth: Authenticator::new(endpoint.clone(), &reference.repository, &name, store),
            endpoint,
            small: Semaphore::new(options.parallelism.0.max(1)),
            referrers_api: AtomicU8::new(referrers::UNKNOWN),
            writing_referrers: tokio::sync::Mutex::new(()),
            options: options.clone(),
            name,
        })))
    }

    pub(crate) fn name(&self) -> &str {
        &self.0.name
    }

    /// Opens connections in the background; must run inside a tokio runtime.
    pub(crate) fn preconnect(&self, connections: usize) {
        for _ in 0..connections.min(MAX_PRECONNECT) {
            let inner = self.0.clone();
            tokio::spawn(async move {
                let request = inner
                    .http
                    .request(Method::GET, inner.endpoint.root().clone());
                // Without authorization: whatever the answer is, the connection stays.
                if let Ok(response) = inner.http.exchange(request, None).await {
                    let _ = inner.http.small_body(response).await;
                }
            });
        }
    }

    /// Sends a request with whatever authorization it takes. `make` is called again after a 401; it
    /// returns `None` when its body can't be had twice. The answer has any status but 401.
    async fn send(
        &self,
        access: &Access,
        what: &str,
        mut make: impl FnMut() -> Option<Request>,
    ) -> Result<Response, Failure> {
        let inner = &*self.0;
        let spent = || {
            Failure::Final(SourceError::malformed(
                what,
                "the upload was refused and can't be repeated",
            ))
        };
        let request = make().ok_or_else(spent)?;
        let (method, ours) = (
            request.method.clone(),
            same_origin(inner.endpoint.root(), &request.url),
        );
        if !ours {
            // An upload session may lie on another host; our credentials don't go there.
            return inner.http.exchange(request, None).await;
        }
        let used = inner.auth.authorize(&inner.http, access).await?;
        let response = inner.http.exchange(request, used.clone()).await?;
        let status = response.status();
        // What a redirect's target wants is not the registry's word: its challenge could name a
        // token service of its own and would get the registry's password.
        let theirs = !same_origin(inner.endpoint.root(), response.url());
        if theirs
            || status.is_success()
            || status.is_redirection()
            || status == StatusCode::NOT_FOUND
        {
            inner.auth.accepted(used.as_ref());
            return Ok(response);
        }
        let next = if status == StatusCode::UNAUTHORIZED {
            let headers = response.headers().clone();
            let message = inner
                .http
                .refusal(&method, what, self.name(), response)
                .await
                .into_error();
            let next = inner
                .auth
                .challenged(&inner.http, access, &headers, used.as_ref())
                .await?;
            if next.is_none() {
                return Err(Failure::Final(self.unauthorized(what, message).await));
            }
            next
        } else if matches!(status, StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST)
            && inner.auth.is_unasked(used.as_ref())
        {
            // It does not take a password that it did not ask for.
            let _ = inner.http.small_body(response).await;
            None
        } else {
            return Ok(response);
        };
        self.send_again(access, what, make().ok_or_else(spent)?, next)
            .await
    }

    /// The second and, after an unasked password was refused, third try.
    async fn send_again(
        &self,
        access: &Access,
        what: &str,
        request: Request,
        next: Option<HeaderValue>,
    ) -> Result<Response, Failure> {
        let inner = &*self.0;
        let method = request.method.clone();
        let again = Request {
            method: method.clone(),
            url: request.url.clone(),
            headers: request.headers.clone(),
            body: None,
            answer_within: request.answer_within,
        };
        let repeatable = request.body.is_none();
        let mut response = inner.http.exchange(request, next.clone()).await?;
        if response.status() == StatusCode::UNAUTHORIZED && next.is_none() && repeatable {
            let next = inner
                .auth
                .challenged(&inner.http, access, response.headers(), None)
                .await?;
            response = inner.http.exchange(again, next).await?;
        }
        if response.status() == StatusCode::UNAUTHORIZED
            && same_origin(inner.endpoint.root(), response.url())
        {
            let message = inner
                .http
                .refusal(&method, what, self.name(), response)
                .await
                .into_error();
            return Err(Failure::Final(self.unauthorized(what, message).await));
        }
        Ok(response)
    }

    async fn unauthorized(&self, what: &str, cause: SourceError) -> SourceError {
        let message = match cause {
            SourceError::Unauthorized { hint, .. } => hint,
            other => other.to_string(),
        };
        self.0.auth.still_refused(what, &message).await
    }

    /// A request whose answer is small, with retries; `attempt` does it once, body included.
    async fn small<T, F, Fut>(
        &self,
        label: &Label,
        bytes: u64,
        attempt: F,
    ) -> Result<T, SourceError>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, Failure>>,
    {
        self.small_with(&self.0.options.retry, label, bytes, attempt)
            .await
    }

    /// As [`Self::small`], with a retry policy of the caller's.
    async fn small_with<T, F, Fut>(
        &self,
        policy: &RetryPolicy,
        label: &Label,
        bytes: u64,
        mut attempt: F,
    ) -> Result<T, SourceError>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, Failure>>,
    {
        let limit =
            self.0.options.timeouts.request + Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND);
        retry::run(policy, limit, label, || {
            let once = attempt();
            async {
                // The pause between attempts holds no permit.
                let _permit = self.0.small.acquire().await;
                once.await
            }
        })
        .await
    }

    /// The failure for an answer that is not the wanted one.
    async fn refusal(&self, method: &Method, what: &str, response: Response) -> Failure {
        self.0
            .http
            .refusal(method, what, self.name(), response)
            .await
    }
}
