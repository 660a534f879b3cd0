//! `/healthz`, `/readyz`, `/metrics`: for those who watch the store.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Response, header};
use tokio::sync::Mutex;

use super::call::Call;
use super::error::ApiError;
use super::{Answer, App, set};
use crate::catalog::{CatalogError, RootInfo};
use crate::engine::EngineError;
use crate::metrics::{Observed, TEXT_TYPE};

/// How long an answer of the engine is good for those who ask whether the store is ready.
const FRESH: Duration = Duration::from_secs(1);

/// How long its roots and bytes are good for those who read the metrics.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// How long the engine may take to say that it works.
const PATIENCE: Duration = Duration::from_secs(5);

/// When the engine last said that it works, or did not. Anybody may ask for it: the engine is not
/// asked each time.
#[derive(Debug, Default)]
pub(super) struct Readiness(Mutex<Option<(Instant, bool)>>);

/// The process lives.
pub(super) async fn health(_: Call) -> Answer {
    Ok(text("ok\n"))
}

/// It takes requests, and its engine works.
pub(super) async fn ready(call: Call) -> Answer {
    let app = &call.app;
    if app.draining.is_cancelled() {
        return Err(ApiError::Draining);
    }
    // Those who ask at the same time wait for one answer.
    let mut last = app.ready.0.lock().await;
    let known = last.filter(|(at, _)| at.elapsed() < FRESH);
    let works = match known {
        Some((_, works)) => works,
        None => {
            let checked = tokio::time::timeout(PATIENCE, app.catalog.check()).await;
            let checked = checked.unwrap_or_else(|_| {
                let slow = format!("no answer in {} s", PATIENCE.as_secs());
                Err(EngineError::Unavailable(slow).into())
            });
            let error = checked.map_err(ApiError::from).err();
            *last = Some((Instant::now(), error.is_none()));
            if let Some(error) = error {
                return Err(error);
            }
            true
        }
    };
    match works {
        true => Ok(text("ready\n")),
        false => Err(CatalogError::from(EngineError::Unavailable(
            "it did not work a moment ago".to_owned(),
        ))
        .into()),
    }
}

/// What the engine last said of its roots and its bytes. To look at them costs more than to count: it
/// is not done for each who asks.
#[derive(Debug, Default)]
pub(super) struct Looked(Mutex<Option<(Instant, Look)>>);

type Look = (Option<Vec<RootInfo>>, Option<u64>);

impl Looked {
    async fn at(&self, app: &App) -> Look {
        // Those who ask at the same time wait for one look.
        let mut last = self.0.lock().await;
        if let Some((at, look)) = &*last
            && at.elapsed() < LOOK_AGAIN
        {
            return look.clone();
        }
        let asked = async { tokio::join!(app.catalog.roots(), app.engine.used_bytes()) };
        // Counters are wanted most when the engine is in trouble.
        let look = match tokio::time::timeout(PATIENCE, asked).await {
            Ok((roots, used)) => (roots.ok(), used.ok().flatten()),
            Err(_) => (None, None),
        };
        *last = Some((Instant::now(), look.clone()));
        look
    }
}

/// What it counts.
pub(super) async fn metrics(call: Call) -> Answer {
    let app = &call.app;
    let (roots, used) = app.looked.at(app).await;
    let observed = Observed {
        memory: app.memory.taken(),
        leases: app.leases.held(),
        tenants: app.tenants.count(),
        engine_bytes: used,
        roots,
        hot: app.hot.as_deref().map(|hot| {
            let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            [
                ("hit", read(&hot.hits)),
                ("miss", read(&hot.misses)),
                ("failure", read(&hot.failures)),
                ("skipped", read(&hot.skipped)),
                ("wrong", read(&hot.wrong)),
                ("fill", read(&hot.fills)),
            ]
        }),
    };
    let body = app.metrics.text(&observed);
    let body = body.map_err(|e| ApiError::Internal(e.to_string()))?;
    let mut response = Response::new(Body::from(body));
    set(&mut response, header::CONTENT_TYPE, TEXT_TYPE);
    Ok(response)
}

fn text(text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    set(&mut response, header::CONTENT_TYPE, "text/plain");
    response
}
