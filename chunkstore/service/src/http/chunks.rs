//! `/v1/chunks/ID` and `/v1/chunks/has`.

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use bytes::Bytes;
use lazyimg_chunkstore::wire::{MAX_BATCH, REPAIR_HEADER, parse_ids};
use lazyimg_convergent::{ChunkId, Digest, MAX_STORED_LEN};

use super::call::Call;
use super::error::ApiError;
use super::{Answer, Wanted, empty, etags, octets, set};
use crate::catalog::Put;

/// Longer bodies are hashed beside the threads that serve connections, in bytes.
const HASH_INLINE: usize = 64 << 10;

const FOREVER: &str = "private, immutable, max-age=31536000";

/// An id in a path.
fn chunk_id(text: &str) -> Result<ChunkId, ApiError> {
    let digest = match text.starts_with("sha256:") {
        true => text.parse::<Digest>(),
        false => format!("sha256:{text}").parse(),
    };
    match digest {
        Ok(Digest(id)) => Ok(ChunkId(id)),
        Err(e) => Err(ApiError::BadRequest(e.to_string())),
    }
}

/// `GET`.
pub(super) async fn get(mut call: Call) -> Answer {
    let id = chunk_id(&call.path::<String>().await?)?;
    give(&call, &id, Form::Bytes).await
}

/// How an answer may have a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// As its body.
    Bytes,
    /// As a [`FilePart`] among its extensions, with nothing as its body; or as its body.
    Either,
}

/// The answer to `GET` of a chunk.
pub(super) async fn give(call: &Call, id: &ChunkId, form: Form) -> Answer {
    if asks_for_another(&call.parts.headers, id) {
        return match call.app.catalog.stat_chunk(&call.tenant.name, id).await? {
            Some(_) => Ok(with_name(empty(StatusCode::NOT_MODIFIED), id)),
            None => Err(ApiError::NotFound("the chunk")),
        };
    }
    if form == Form::Either
        && let Some(part) = call.app.catalog.ready_chunk(&call.tenant.name, id)
    {
        call.app.metrics.chunk_hits.inc();
        call.app.metrics.chunks_from_files.inc();
        let mut response = with_name(octets(Bytes::new()), id);
        response.extensions_mut().insert(part);
        return Ok(response);
    }
    let held = call.memory(MAX_STORED_LEN).await?;
    match call.app.catalog.get_chunk(&call.tenant.name, id).await? {
        Some(bytes) => {
            call.app.metrics.chunk_hits.inc();
            Ok(with_name(octets(held.with(bytes)), id))
        }
        None => {
            call.app.metrics.chunk_misses.inc();
            Err(ApiError::NotFound("the chunk"))
        }
    }
}

/// `HEAD`.
pub(super) async fn head(mut call: Call) -> Answer {
    let id = chunk_id(&call.path::<String>().await?)?;
    let found = call.app.catalog.stat_chunk(&call.tenant.name, &id).await?;
    let len = found.ok_or(ApiError::NotFound("the chunk"))?;
    let status = match asks_for_another(&call.parts.headers, &id) {
        true => StatusCode::NOT_MODIFIED,
        false => StatusCode::OK,
    };
    let mut response = with_name(empty(status), &id);
    if status == StatusCode::OK {
        set(
            &mut response,
            header::CONTENT_TYPE,
            "application/octet-stream",
        );
        response
            .headers_mut()
            .insert(header::CONTENT_LENGTH, HeaderValue::from(len));
    }
    Ok(response)
}

/// Whether the client has this chunk: `If-None-Match`.
fn asks_for_another(headers: &HeaderMap, id: &ChunkId) -> bool {
    if !headers.contains_key(header::IF_NONE_MATCH) {
        return false;
    }
    let hex = id.hex();
    etags(headers, &header::IF_NONE_MATCH)
        .any(|tag| tag == "*" || tag.strip_prefix("sha256:").unwrap_or(tag) == hex)
}

fn with_name(mut response: Response<Body>, id: &ChunkId) -> Response<Body> {
    // 64 hex digits and two quotes are a header's value.
    if let Ok(etag) = HeaderValue::from_str(&format!("\"{}\"", id.hex())) {
        response.headers_mut().insert(header::ETAG, etag);
    }
    set(&mut response, header::CACHE_CONTROL, FOREVER);
    response
}

/// `PUT`.
pub(super) async fn put(mut call: Call) -> Answer {
    let id = chunk_id(&call.path::<String>().await?)?;
    let repair = match call.parts.headers.get(REPAIR_HEADER) {
        None => false,
        Some(value) if value == "1" => true,
        Some(_) => {
            return Err(ApiError::BadRequest(format!(
                "{REPAIR_HEADER} is 1 or not there"
            )));
        }
    };
    let (body, held) = call.body("the chunk", MAX_STORED_LEN).await?;
    if body.is_empty() {
        return Err(ApiError::BadRequest(
            "a chunk has at least one byte".to_owned(),
        ));
    }
    let (body, actual) = hashed(body).await?;
    if actual != id {
        return Err(ApiError::BadRequest(format!(
            "the body's SHA-256 is {actual}, not the id: it was damaged on its way, or is another chunk"
        )));
    }
    // It is written to the end, whether or not the client waits for that.
    let body = held.with(body);
    let tenant = &call.tenant;
    let put = call
        .app
        .catalog
        .put_chunk(&tenant.name, tenant.quota, &id, body, repair)
        .await?;
    let wanted = Wanted::Chunk(tenant.name.clone(), id);
    call.app.leases.brought(&wanted);
    Ok(empty(match put {
        Put::New => StatusCode::CREATED,
        Put::Known | Put::Repaired => StatusCode::OK,
    }))
}

async fn hashed(body: Bytes) -> Result<(Bytes, ChunkId), ApiError> {
    if body.len() <= HASH_INLINE {
        let id = ChunkId::of(&body);
        return Ok((body, id));
    }
    let hash = move || {
        let id = ChunkId::of(&body);
        (body, id)
    };
    let done = tokio::task::spawn_blocking(hash).await;
    done.map_err(|e| ApiError::Internal(format!("hashing a chunk: {e}")))
}

/// `POST /v1/chunks/has`.
pub(super) async fn has(mut call: Call) -> Answer {
    let ids = ids(&mut call).await?;
    let has = call.app.catalog.has_chunks(&call.tenant.name, &ids).await?;
    let flags: Vec<u8> = has.into_iter().map(u8::from).collect();
    Ok(octets(Bytes::from(flags)))
}

/// The ids of a request's body.
pub(super) async fn ids(call: &mut Call) -> Result<Vec<ChunkId>, ApiError> {
    let (body, _held) = call.body("the list of ids", 32 * MAX_BATCH).await?;
    parse_ids(&body).map_err(|e| ApiError::BadRequest(e.to_string()))
}
