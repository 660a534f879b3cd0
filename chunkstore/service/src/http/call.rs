//! What every request goes through: an id, the bounds, the token, and a line in the log at the end.

use std::collections::HashMap;
use std::future::Future;
use std::hash::BuildHasher as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::RequestPartsExt as _;
use axum::body::{Body, HttpBody};
use axum::extract::{Path, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, Response, header};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use hyper::body::{Frame, SizeHint};
use lazyimg_chunkstore::wire::{MAX_WAIT_MS, REQUEST_ID_HEADER, WAIT_HEADER};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use tokio::sync::OwnedSemaphorePermit;

use super::App;
use super::error::ApiError;
use super::memory::Held;
use super::route::Route;
use super::shares::Share;
use crate::activity::{Shared, UnderWay};
use crate::audit::Act;
use crate::catalog::TenantName;
use crate::engine::FilePart;
use crate::tenants::{Right, Tenant};

/// The longest head of a request, in bytes.
const MAX_HEAD: usize = 32 << 10;

/// Between two lines of what a tenant was refused.
const REFUSAL_LINES: Duration = Duration::from_secs(10);

/// Bodies come faster than that, in bytes per second, beside the time that they may stand still.
const SLOWEST_LINK: usize = 64 << 10;

/// What a request must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Nothing.
    Nothing,
    /// A token with this right.
    Right(Right),
}

/// A request that was let in.
#[derive(Debug)]
pub(super) struct Call {
    pub app: Arc<App>,
    pub tenant: Arc<Tenant>,
    /// What the tenant may take of what all share.
    pub share: Arc<Share>,
    pub parts: Parts,
    pub entry: Arc<Entry>,
    /// Behind a lock only because a body can't be shared.
    body: Mutex<Option<Body>>,
}

/// An answer, and what accounts for it.
pub(super) struct Answered {
    response: Response<Body>,
    account: Account,
}

/// A request that is accounted for when this is dropped, as are its bytes until then.
pub(crate) struct Account {
    entry: Arc<Entry>,
    under_way: Option<Arc<UnderWay>>,
}

impl Account {
    /// The client has this many more bytes of its answer.
    pub fn went(&self, bytes: u64) {
        self.entry.bytes_out.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The client has all of it.
    pub fn complete(&self) {
        self.entry.complete.store(true, Ordering::Relaxed);
    }
}

impl Answered {
    /// The answer, which accounts for itself.
    pub fn into_response(self) -> Response<Body> {
        let account = self.account;
        self.response
            .map(|body| Body::new(Accounted { body, account }))
    }

    /// The answer's chunk and its head, if it is one that lies in a file.
    pub fn into_part(mut self) -> Result<(Response<()>, FilePart, Account), Response<Body>> {
        match self.response.extensions_mut().remove::<FilePart>() {
            Some(part) => Ok((self.response.map(|_| ()), part, self.account)),
            None => Err(self.into_response()),
        }
    }
}

/// Lets a request in, has it done, and accounts for it.
pub(super) async fn serve<F, Fut>(
    app: Arc<App>,
    route: Route,
    need: Need,
    request: Request,
    handler: F,
) -> Answered
where
    F: FnOnce(Call) -> Fut,
    Fut: Future<Output = Result<Response<Body>, ApiError>>,
{
    let (mut parts, body) = request.into_parts();
    let shared: Option<Shared> = parts.extensions.remove();
    let mut under_way = shared.and_then(|shared| shared.take());
    let entry = Arc::new(Entry::begin(&app, route, &parts));
    let result = match admit(&app, need, parts, body, &entry) {
        Ok(call) => handler(call).await,
        Err(error) => {
            note_refusal(&app, &entry, &error).await;
            Err(error)
        }
    };
    let mut response = match result {
        Ok(response) => response,
        Err(error) => {
            entry.failed(&error);
            error.response()
        }
    };
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID_HEADER, entry.id.header());
    entry
        .status
        .store(response.status().as_u16(), Ordering::Relaxed);
    if entry.method == Method::HEAD {
        // Nobody will ask for the body.
        entry.complete.store(true, Ordering::Relaxed);
    }
    if let Some(under_way) = &mut under_way {
        under_way.answer();
    }
    let account = Account {
        entry,
        under_way: under_way.map(Arc::new),
    };
    Answered { response, account }
}

/// Everything that is decided without the request's body.
fn admit(
    app: &Arc<App>,
    need: Need,
    parts: Parts,
    body: Body,
    entry: &Arc<Entry>,
) -> Result<Call, ApiError> {
    let line = parts.uri.path().len() + parts.uri.query().map_or(0, str::len);
    let fields = parts
        .headers
        .iter()
        .map(|(k, v)| k.as_str().len() + v.len());
    if fields.sum::<usize>() + line > MAX_HEAD {
        return Err(ApiError::TooLarge {
            what: "the head of the request",
            limit: MAX_HEAD,
        });
    }
    if app.draining.is_cancelled() && !entry.route.is_probe() {
        return Err(ApiError::Draining);
    }
    // A browser says where a request that is not its user's own comes from.
    if !app.tenants.need_tokens() && parts.headers.contains_key(header::ORIGIN) {
        return Err(ApiError::Origin);
    }
    let tenant = match (need, app.tenants.find(bearer(&parts.headers))) {
        (Need::Nothing, found) => found.unwrap_or_else(|| Arc::clone(&app.nobody)),
        (_, None) => return Err(ApiError::Unauthorized),
        (_, Some(tenant)) => {
            let _ = entry.tenant.set(Arc::clone(&tenant));
            tenant
        }
    };
    if let Need::Right(right) = need
        && !tenant.rights.allow(right)
    {
        return Err(ApiError::Forbidden(right));
    }
    let share = app.shares.of(&tenant.name);
    // Last: who may not ask takes nobody's place.
    if !entry.route.is_probe() {
        let own = share.request()?;
        let permit = Arc::clone(&app.requests).try_acquire_owned();
        let permit = permit.map_err(|_| ApiError::Busy)?;
        // It is set here only, and only once.
        let _ = entry.permit.set([own, permit]);
    }
    Ok(Call {
        app: Arc::clone(app),
        tenant,
        share,
        parts,
        entry: Arc::clone(entry),
        body: Mutex::new(Some(body)),
    })
}

/// Somebody known who may not do what they tried to is worth a line.
async fn note_refusal(app: &App, entry: &Entry, error: &ApiError) {
    if let (Some(what), Some(tenant), ApiError::Forbidden(_)) =
        (entry.route.act(), entry.tenant.get(), error)
        && let Some(since) = app.refusals.worth_a_line(&tenant.name)
    {
        let act = Act {
            who: tenant.name.to_string(),
            what,
            on: (since > 0).then(|| format!("and {since} more since the last line")),
            request: Some(entry.id.as_str().to_owned()),
            outcome: error.code(),
        };
        app.audit.record(act).await;
    }
}

/// Acts that were refused: a tenant that tries again and again gets a line now and then.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<HashMap<TenantName, (Instant, u64)>>);

impl Refusals {
    /// How many were refused since the tenant's last line, if it is time for another.
    fn worth_a_line(&self, tenant: &TenantName) -> Option<u64> {
        let mut last = self.0.lock();
        match last.get_mut(tenant) {
            Some((at, since)) if at.elapsed() < REFUSAL_LINES => {
                *since += 1;
                None
            }
            Some((at, since)) => {
                *at = Instant::now();
                Some(std::mem::take(since))
            }
            None => {
                last.insert(tenant.clone(), (Instant::now(), 0));
                Some(0)
            }
        }
    }
}

/// The token of `Authorization: Bearer TOKEN`.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked(7)?;
    scheme
        .eq_ignore_ascii_case(b"bearer ")
        .then(|| token.trim_ascii())
}

impl Call {
    /// The parameters of the path.
    pub async fn path<T: DeserializeOwned + Send + 'static>(&mut self) -> Result<T, ApiError> {
        let found: Result<Path<T>, _> = self.parts.extract().await;
        let Path(found) = found.map_err(|e| ApiError::BadRequest(e.body_text()))?;
        Ok(found)
    }

    /// Waits for memory for so many bytes.
    pub async fn memory(&self, bytes: usize) -> Result<Held, ApiError> {
        self.app.memory.take(&self.share, bytes).await
    }

    /// The request's body, of at most `limit` bytes, in one piece. [`Held`] is the memory that it takes.
    pub async fn body(
        &mut self,
        what: &'static str,
        limit: usize,
    ) -> Result<(Bytes, Held), ApiError> {
        let too_large = || ApiError::TooLarge { what, limit };
        let body = self.body.get_mut().take().unwrap_or_default();
        let hint = body.size_hint();
        if hint.lower() > limit as u64 {
            return Err(too_large());
        }
        let declared = hint.exact().map_or(limit, |len| len as usize);
        let mut held = self.memory(declared).await?;
        let mut frames = body.into_data_stream();
        let idle = self.app.limits.body_idle;
        // A byte now and then is no body either.
        let seconds = declared as f64 / SLOWEST_LINK as f64;
        let end = tokio::time::Instant::now() + idle + Duration::from_secs_f64(seconds);
        let mut first = Bytes::new();
        let mut rest = BytesMut::new();
        loop {
            let idle_until = tokio::time::Instant::now() + idle;
            let next = tokio::time::timeout_at(end.min(idle_until), frames.next()).await;
            let next = next.map_err(|_| {
                let seconds = idle.as_secs_f64();
                ApiError::BadRequest(match idle_until <= end {
                    true => format!("no byte of the body came in {seconds} s"),
                    false => "the body comes too slowly: send it over a faster link".to_owned(),
                })
            })?;
            let Some(next) = next else { break };
            let next = next.map_err(|_| {
                ApiError::BadRequest("the body broke off before its end".to_owned())
            })?;
            self.entry.came(next.len());
            if first.len() + rest.len() + next.len() > limit {
                return Err(too_large());
            }
            // One frame is taken as it is, several are copied together.
            match (first.is_empty(), rest.is_empty()) {
                (true, true) => first = next,
                (false, true) => {
                    rest.reserve(declared.max(first.len() + next.len()));
                    rest.extend_from_slice(&first);
                    rest.extend_from_slice(&next);
                    first = Bytes::new();
                }
                _ => rest.extend_from_slice(&next),
            }
        }
        let whole = if rest.is_empty() {
            first
        } else {
            rest.freeze()
        };
        held.shrink_to(whole.len());
        Ok((whole, held))
    }

    /// Until when what is missing may be waited for, if the client wants that and could bring it.
    pub fn wait(&self) -> Result<Option<tokio::time::Instant>, ApiError> {
        let Some(value) = self.parts.headers.get(WAIT_HEADER) else {
            return Ok(None);
        };
        let text = value.to_str().ok();
        let millis = text.and_then(|text| text.parse::<u64>().ok());
        match millis.filter(|millis| *millis <= MAX_WAIT_MS) {
            // Who may not write can't bring anything.
            Some(_) if !self.tenant.rights.write => Ok(None),
            Some(millis) => Ok(Some(
                tokio::time::Instant::now() + Duration::from_millis(millis),
            )),
            None => Err(ApiError::BadRequest(format!(
                "{WAIT_HEADER} is a number of milliseconds up to {MAX_WAIT_MS}"
            ))),
        }
    }
}

/// 16 hex digits: the client's own, or random.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestId([u8; 16]);

impl RequestId {
    fn of(headers: &HeaderMap) -> Self {
        let hex = |b: &u8| b.is_ascii_digit() || (b'a'..=b'f').contains(b);
        let own = headers.get(REQUEST_ID_HEADER).map(HeaderValue::as_bytes);
        match own.and_then(|id| <[u8; 16]>::try_from(id).ok()) {
            Some(id) if id.iter().all(hex) => Self(id),
            _ => Self::random(),
        }
    }

    /// It need not be secret, only another one each time: std's hasher has random keys.
    fn random() -> Self {
        let number = std::hash::RandomState::new().hash_one(std::thread::current().id());
        let mut id = [0; 16];
        for (place, digit) in id.iter_mut().enumerate() {
            *digit = b"0123456789abcdef"[(number >> (60 - 4 * place)) as usize & 15];
        }
        Self(id)
    }

    pub fn as_str(&self) -> &str {
        // It is made of ASCII only.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }

    fn header(&self) -> HeaderValue {
        HeaderValue::from_bytes(&self.0).unwrap_or(HeaderValue::from_static(""))
    }
}

/// A request in the log and in the counters. It ends when the last of its parts is dropped: the
/// handler, the body of the answer, and what was begun for it and goes on without it.
#[derive(Debug)]
pub(super) struct Entry {
    pub id: RequestId,
    pub route: Route,
    app: Arc<App>,
    method: Method,
    begun: Instant,
    permit: OnceLock<[OwnedSemaphorePermit; 2]>,
    tenant: OnceLock<Arc<Tenant>>,
    status: AtomicU16,
    error: OnceLock<&'static str>,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    complete: AtomicBool,
}

impl Entry {
    fn begin(app: &Arc<App>, route: Route, parts: &Parts) -> Self {
        app.metrics.under_way.inc();
        Self {
            id: RequestId::of(&parts.headers),
            route,
            app: Arc::clone(app),
            method: parts.method.clone(),
            begun: Instant::now(),
            permit: OnceLock::new(),
            tenant: OnceLock::new(),
            status: AtomicU16::new(0),
            error: OnceLock::new(),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            complete: AtomicBool::new(false),
        }
    }

    fn came(&self, bytes: usize) {
        self.bytes_in.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Notes why it failed; tells the log what the client is not told.
    pub fn failed(&self, error: &ApiError) {
        let _ = self.error.set(error.code());
        if let Some(kind) = error.engine_trouble() {
            self.app.metrics.engine_error(kind);
        }
        if error.is_private() {
            tracing::warn!(
                request = self.id.as_str(),
                route = self.route.path(),
                "{error}"
            );
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let took = self.begun.elapsed();
        let (came, went) = (*self.bytes_in.get_mut(), *self.bytes_out.get_mut());
        let complete = *self.complete.get_mut();
        let status = Some(*self.status.get_mut()).filter(|_| complete);
        let metrics = &self.app.metrics;
        metrics.under_way.dec();
        metrics.request(self.route, status, took);
        metrics.bytes_in(self.route, came);
        metrics.bytes_out(self.route, went);
        // Probes come every few seconds for ever.
        macro_rules! line {
            ($level:expr) => {
                tracing::event!(
                    target: "lazyimg_store::request",
                    $level,
                    method = self.method.as_str(),
                    route = self.route.path(),
                    status = self.status.get_mut(),
                    error = self.error.get(),
                    complete,
                    bytes_in = came,
                    bytes_out = went,
                    micros = took.as_micros() as u64,
                    tenant = self.tenant.get().map(|t| t.name.as_str()),
                    request = self.id.as_str(),
                )
            };
        }
        match self.route.is_probe() {
            true => line!(tracing::Level::DEBUG),
            false => line!(tracing::Level::INFO),
        }
    }
}

/// The body of an answer that is counted while it goes.
struct Accounted {
    body: Body,
    account: Account,
}

impl Drop for Accounted {
    fn drop(&mut self) {
        if self.body.is_end_stream() {
            self.account.complete();
        }
    }
}

impl HttpBody for Accounted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let next = Pin::new(&mut self.body).poll_frame(cx);
        match next {
            Poll::Ready(Some(Ok(frame))) => {
                let len = frame.data_ref().map_or(0, Bytes::len) as u64;
                self.account.went(len);
                let frame = match &self.account.under_way {
                    Some(under_way) => frame.map_data(|bytes| under_way.piece(bytes)),
                    None => frame,
                };
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                self.account.complete();
                Poll::Ready(None)
            }
            other => other,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        headers
    }

    #[test]
    fn a_token_is_what_follows_bearer() {
        for (value, token) in [
            ("Bearer abc", Some(&b"abc"[..])),
            ("bearer  abc ", Some(b"abc")),
            ("Basic abc", None),
            ("Bearer", None),
            ("", None),
        ] {
            assert_eq!(bearer(&headers("authorization", value)), token, "{value}");
        }
        assert_eq!(bearer(&HeaderMap::new()), None);
    }

    #[test]
    fn only_ids_of_our_form_are_taken_from_clients() {
        let own = "0123456789abcdef";
        assert_eq!(
            RequestId::of(&headers(REQUEST_ID_HEADER, own)).as_str(),
            own
        );
        let mut seen = std::collections::BTreeSet::new();
        for other in ["", "0123456789ABCDEF", "0123456789abcde", "\"; drop table"] {
            let id = RequestId::of(&headers(REQUEST_ID_HEADER, other));
            assert_eq!(id.as_str().len(), 16);
            assert!(id.as_str().bytes().all(|b| b.is_ascii_hexdigit()));
            assert!(seen.insert(id.as_str().to_owned()), "a new one each time");
        }
    }
}
