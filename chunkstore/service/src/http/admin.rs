//! `/v1/admin`: roots, garbage collection, statistics. What changes something is noted in the audit log.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use axum::http::StatusCode;
use serde::{Deserialize, Serialize};

use super::call::Call;
use super::error::ApiError;
use super::{Answer, MAX_JSON, empty, json};
use crate::audit::Act;
use crate::catalog::{GcOptions, RootStats};
use crate::engine::RootId;

/// `GET /v1/admin/stats`.
pub(super) async fn stats(call: Call) -> Answer {
    #[derive(Serialize)]
    struct Document {
        engine: String,
        engine_bytes: Option<u64>,
        roots: Vec<RootStats>,
        tenants: Vec<TenantDocument>,
    }
    #[derive(Default, Serialize)]
    struct TenantDocument {
        tenant: String,
        bytes: u64,
        quota: Option<u64>,
    }
    let stats = call.app.catalog.stats().await?;
    // Those that have put something, and those that may.
    let mut tenants: BTreeMap<String, TenantDocument> = BTreeMap::new();
    for used in stats.tenants {
        let name = used.tenant.to_string();
        tenants.entry(name).or_default().bytes = used.bytes;
    }
    for known in call.app.tenants.all() {
        tenants.entry(known.name.to_string()).or_default().quota = known.quota;
    }
    let named = |(tenant, rest)| TenantDocument { tenant, ..rest };
    json(&Document {
        engine: stats.engine,
        engine_bytes: stats.engine_bytes,
        roots: stats.roots,
        tenants: tenants.into_iter().map(named).collect(),
    })
}

/// `GET /v1/admin/roots`.
pub(super) async fn roots(call: Call) -> Answer {
    json(&call.app.catalog.roots().await?)
}

/// `POST /v1/admin/roots/rotate`.
pub(super) async fn rotate(call: Call) -> Answer {
    #[derive(Serialize)]
    struct Document {
        root: String,
    }
    act(call, None, async |call| {
        let root = call.app.catalog.rotate().await?.to_string();
        json(&Document { root })
    })
    .await
}

/// `POST /v1/admin/roots/ROOT/acknowledge`.
pub(super) async fn acknowledge(mut call: Call) -> Answer {
    #[derive(Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Document {
        ignore_alarms: bool,
    }
    let root = call.path::<String>().await?;
    let root: RootId = root
        .parse()
        .map_err(|e| ApiError::BadRequest(format!("{e}")))?;
    let (body, _held) = call.body("the JSON body", MAX_JSON).await?;
    let Document { ignore_alarms } = match body.is_empty() {
        true => Document::default(),
        false => serde_json::from_slice(&body)
            .map_err(|e| ApiError::BadRequest(format!("the JSON body: {e}")))?,
    };
    let on = match ignore_alarms {
        true => format!("{root} ignore_alarms"),
        false => root.to_string(),
    };
    act(call, Some(on), async move |call| {
        call.app.catalog.acknowledge(root, ignore_alarms).await?;
        Ok(empty(StatusCode::NO_CONTENT))
    })
    .await
}

/// `POST /v1/admin/gc`.
pub(super) async fn gc(mut call: Call) -> Answer {
    let (body, _held) = call.body("the JSON body", MAX_JSON).await?;
    let options: GcOptions = match body.is_empty() {
        true => GcOptions::default(),
        false => serde_json::from_slice(&body)
            .map_err(|e| ApiError::BadRequest(format!("the JSON body: {e}")))?,
    };
    if options.dry_run {
        return json(&call.app.catalog.gc(options).await?);
    }
    let on = format!(
        "grace_seconds={:?} unused_seconds={:?}",
        options.grace_seconds, options.unused_seconds
    );
    act(call, Some(on), async move |call| {
        let begun = Instant::now();
        let result = call.app.catalog.gc(options).await;
        call.app.metrics.gc(result.as_ref().ok(), begun.elapsed());
        json(&result?)
    })
    .await
}

/// Does something that must not stop half-way because its client went away, and notes it.
async fn act<F, Fut>(call: Call, on: Option<String>, act: F) -> Answer
where
    F: FnOnce(Arc<Call>) -> Fut + Send + 'static,
    Fut: Future<Output = Answer> + Send,
{
    let what = call.entry.route.act().unwrap_or("administer");
    let doing = tokio::spawn(async move {
        let call = Arc::new(call);
        let result = act(Arc::clone(&call)).await;
        let noted = Act {
            who: call.tenant.name.to_string(),
            what,
            on,
            request: Some(call.entry.id.as_str().to_owned()),
            outcome: result.as_ref().map_or_else(ApiError::code, |_| "done"),
        };
        call.app.audit.record(noted).await;
        result
    });
    match doing.await {
        Ok(result) => result,
        Err(e) => Err(ApiError::Internal(format!("{what}: {e}"))),
    }
}
