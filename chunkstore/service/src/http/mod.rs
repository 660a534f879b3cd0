//! The protocol of `docs/store.md` over HTTP. [`error`] says which failure is which status, [`call`] what
//! every request goes through; the other modules are one group of routes each.

mod admin;
mod batch;
mod call;
mod chunks;
mod error;
mod images;
mod lease;
mod memory;
mod probe;
mod refs;
mod route;
mod shares;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use axum::routing::{MethodRouter, get, post};
use bytes::Bytes;
use lazyimg_convergent::{ChunkId, Digest, KeyId};
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::audit::Audit;
use crate::catalog::{Catalog, TenantName};
use crate::engine::hot::HotCounters;
use crate::engine::{Engine, FilePart};
use crate::leases::Leases;
use crate::metrics::Metrics;
use crate::tenants::{Right, Rights, Tenant, Tenants};

use call::{Call, Need};
use memory::Memory;
use shares::Shares;

pub(crate) use call::Account;
pub use error::ApiError;
pub use route::Route;

/// Bounds on what clients may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Requests under way; what is above is told to come again.
    pub max_requests: usize,
    /// Bytes of bodies in memory; requests wait for it.
    pub max_memory: u64,
    /// How long a body may stand still.
    pub body_idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_requests: 1024,
            max_memory: 256 << 20,
            body_idle: Duration::from_secs(60),
        }
    }
}

/// Manifests that are read at a time without knowing their length.
const UNMEASURED: usize = 16;

/// What a store is made of.
pub struct Parts {
    /// What is in it.
    pub catalog: Arc<Catalog>,
    /// Where that lies: asked how much room it takes.
    pub engine: Arc<dyn Engine>,
    /// Who may ask.
    pub tenants: Arc<Tenants>,
    /// Where administrative acts are noted.
    pub audit: Audit,
    /// What clients may take.
    pub limits: Limits,
    /// What the engine's hot tier was good for, where it has one.
    pub hot: Option<Arc<HotCounters>>,
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts")
            .field("engine", &self.engine.name())
            .field("tenants", &self.tenants)
            .field("audit", &self.audit)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// What a lease is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Wanted {
    Chunk(TenantName, ChunkId),
    Reference(TenantName, Arc<str>),
    Manifest(TenantName, Digest, KeyId),
}

/// The store as its routes see it.
pub(crate) struct App {
    pub catalog: Arc<Catalog>,
    pub engine: Arc<dyn Engine>,
    pub tenants: Arc<Tenants>,
    pub audit: Audit,
    pub limits: Limits,
    pub hot: Option<Arc<HotCounters>>,
    pub metrics: Metrics,
    /// One for each request under way that is no probe.
    pub requests: Arc<Semaphore>,
    /// Cancelled when the store begins to end.
    pub draining: CancellationToken,
    leases: Leases<Wanted>,
    memory: Memory,
    shares: Shares,
    /// Manifests that are read without knowing their length.
    unmeasured: Semaphore,
    ready: probe::Readiness,
    looked: probe::Looked,
    refusals: call::Refusals,
    /// Who asks for what needs no token, and has none. May do nothing.
    nobody: Arc<Tenant>,
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").finish_non_exhaustive()
    }
}

impl App {
    /// A store of these parts, with all counters at zero.
    pub fn new(parts: Parts) -> Result<Self, String> {
        let metrics = Metrics::new().map_err(|e| e.to_string())?;
        let nobody = Tenant {
            name: "nobody".parse().map_err(|e| format!("{e}"))?,
            rights: Rights::default(),
            quota: None,
        };
        // More than tokio's semaphores have are no bound.
        let requests = parts.limits.max_requests.min(Semaphore::MAX_PERMITS);
        let memory = Memory::new(parts.limits.max_memory);
        Ok(Self {
            catalog: parts.catalog,
            engine: parts.engine,
            audit: parts.audit,
            metrics,
            requests: Arc::new(Semaphore::new(requests)),
            draining: CancellationToken::new(),
            leases: Leases::default(),
            shares: Shares::new(requests, memory.total(), !parts.tenants.need_tokens()),
            memory,
            unmeasured: Semaphore::new(UNMEASURED),
            ready: probe::Readiness::default(),
            looked: probe::Looked::default(),
            refusals: call::Refusals::default(),
            limits: parts.limits,
            hot: parts.hot,
            nobody: Arc::new(nobody),
            tenants: parts.tenants,
        })
    }

    /// Waits until no request is under way. Nobody else is let in from then on.
    pub async fn idle(&self) {
        let all = self.limits.max_requests.min(Semaphore::MAX_PERMITS);
        let all = u32::try_from(all).unwrap_or(u32::MAX);
        if let Ok(permits) = self.requests.acquire_many(all).await {
            permits.forget();
        }
    }
}

/// All routes.
pub(crate) fn router(app: Arc<App>) -> Router {
    use Right::{Administer, Observe, Read, Write};
    let a = &app;
    Router::new()
        .add(
            Route::Chunk,
            |r| {
                get(run(a, r, Need::Right(Read), chunks::get))
                    .head(run(a, r, Need::Right(Read), chunks::head))
                    .put(run(a, r, Need::Right(Write), chunks::put))
            },
            a,
        )
        .add(
            Route::HasChunks,
            |r| post(run(a, r, Need::Right(Read), chunks::has)),
            a,
        )
        .add(
            Route::GetChunks,
            |r| post(run(a, r, Need::Right(Read), batch::get)),
            a,
        )
        .add(
            Route::Images,
            |r| get(run(a, r, Need::Right(Read), images::list)),
            a,
        )
        .add(
            Route::Manifests,
            |r| get(run(a, r, Need::Right(Read), images::manifests)),
            a,
        )
        .add(
            Route::Manifest,
            |r| {
                get(run(a, r, Need::Right(Read), images::get_manifest))
                    .head(run(a, r, Need::Right(Read), images::head_manifest))
                    .put(run(a, r, Need::Right(Write), images::put_manifest))
                    .delete(run(a, r, Need::Right(Write), images::delete_manifest))
            },
            a,
        )
        .add(
            Route::Profile,
            |r| {
                get(run(a, r, Need::Right(Read), images::get_profile))
                    .put(run(a, r, Need::Right(Write), images::put_profile))
                    .delete(run(a, r, Need::Right(Write), images::delete_profile))
            },
            a,
        )
        .add(
            Route::Reference,
            |r| {
                get(run(a, r, Need::Right(Read), refs::get))
                    .put(run(a, r, Need::Right(Write), refs::put))
                    .delete(run(a, r, Need::Right(Write), refs::delete))
            },
            a,
        )
        .add(
            Route::Stats,
            |r| get(run(a, r, Need::Right(Administer), admin::stats)),
            a,
        )
        .add(
            Route::Roots,
            |r| get(run(a, r, Need::Right(Administer), admin::roots)),
            a,
        )
        .add(
            Route::Rotate,
            |r| post(run(a, r, Need::Right(Administer), admin::rotate)),
            a,
        )
        .add(
            Route::Acknowledge,
            |r| post(run(a, r, Need::Right(Administer), admin::acknowledge)),
            a,
        )
        .add(
            Route::Gc,
            |r| post(run(a, r, Need::Right(Administer), admin::gc)),
            a,
        )
        .add(
            Route::Health,
            |r| get(run(a, r, Need::Nothing, probe::health)),
            a,
        )
        .add(
            Route::Ready,
            |r| get(run(a, r, Need::Nothing, probe::ready)),
            a,
        )
        .add(
            Route::Metrics,
            |r| get(run(a, r, Need::Right(Observe), probe::metrics)),
            a,
        )
        .fallback(run(a, Route::Other, Need::Nothing, no_route))
}

/// A router that gets a route with all its methods; other methods are refused in the protocol's words.
trait Add {
    fn add(self, route: Route, methods: impl FnOnce(Route) -> MethodRouter, app: &Arc<App>)
    -> Self;
}

impl Add for Router {
    fn add(
        self,
        route: Route,
        methods: impl FnOnce(Route) -> MethodRouter,
        app: &Arc<App>,
    ) -> Self {
        let methods = methods(route).fallback(run(app, route, Need::Nothing, no_method));
        self.route(route.path(), methods)
    }
}

/// What axum calls a handler.
fn run<F, Fut>(
    app: &Arc<App>,
    route: Route,
    need: Need,
    handler: F,
) -> impl FnOnce(Request) -> std::pin::Pin<Box<dyn Future<Output = Response<Body>> + Send>>
+ Clone
+ Send
+ Sync
+ 'static
where
    F: FnOnce(Call) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<Response<Body>, ApiError>> + Send + 'static,
{
    let app = Arc::clone(app);
    move |request| {
        Box::pin(async move {
            let answered = call::serve(app, route, need, request, handler).await;
            answered.into_response()
        })
    }
}

/// What [`get_chunk`] gives.
pub(crate) enum Direct {
    /// A chunk that is to be sent from a file, and the head of the answer, without its length.
    Part(Response<()>, FilePart, Account),
    /// An answer like any other.
    Whole(Response<Body>),
}

/// `GET /v1/chunks/ID` for who can send files; the router does the same for everybody else.
pub(crate) async fn get_chunk(app: Arc<App>, id: ChunkId, request: Request) -> Direct {
    let handler = |call: Call| async move { chunks::give(&call, &id, chunks::Form::Either).await };
    let need = Need::Right(Right::Read);
    let answered = call::serve(app, Route::Chunk, need, request, handler).await;
    match answered.into_part() {
        Ok((head, part, account)) => Direct::Part(head, part, account),
        Err(response) => Direct::Whole(response),
    }
}

async fn no_route(_: Call) -> Answer {
    Err(ApiError::NotFound("this path"))
}

async fn no_method(_: Call) -> Answer {
    Err(ApiError::Method)
}

type Answer = Result<Response<Body>, ApiError>;

/// An answer without a body.
fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

/// An answer of bytes.
fn octets(bytes: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::from(bytes));
    set(
        &mut response,
        header::CONTENT_TYPE,
        "application/octet-stream",
    );
    response
}

fn set(response: &mut Response<Body>, name: HeaderName, value: &'static str) {
    let value = HeaderValue::from_static(value);
    response.headers_mut().insert(name, value);
}

/// An answer in JSON.
fn json(value: &impl Serialize) -> Answer {
    let text = serde_json::to_vec(value).map_err(|e| ApiError::Internal(e.to_string()))?;
    let mut response = Response::new(Body::from(text));
    set(&mut response, header::CONTENT_TYPE, "application/json");
    Ok(response)
}

/// The longest JSON body, in bytes.
const MAX_JSON: usize = 64 << 10;

/// A request's JSON body.
async fn from_json<T: serde::de::DeserializeOwned>(call: &mut Call) -> Result<T, ApiError> {
    let (body, _held) = call.body("the JSON body", MAX_JSON).await?;
    serde_json::from_slice(&body).map_err(|e| ApiError::BadRequest(format!("the JSON body: {e}")))
}

/// An image's digest in a path.
fn digest(text: &str) -> Result<Digest, ApiError> {
    text.parse()
        .map_err(|e| ApiError::BadRequest(format!("{e}")))
}

/// An `ETag` of a text without quotes and controls.
fn etag(text: &str) -> Result<HeaderValue, ApiError> {
    HeaderValue::from_str(&format!("\"{text}\"")).map_err(|e| ApiError::Internal(e.to_string()))
}

/// The ETags in a header such as `If-None-Match`, without quotes; `*` for any. Weak ones count like others:
/// nothing here has two forms.
fn etags<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let lists = headers.get_all(name).into_iter();
    let tags = lists
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','));
    tags.map(|tag| {
        let tag = tag.trim();
        tag.strip_prefix("W/").unwrap_or(tag).trim_matches('"')
    })
}
