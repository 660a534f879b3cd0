//! `/v1/images`: manifests and profiles.

use axum::extract::Query;
use axum::http::{HeaderValue, StatusCode, header};
use bytes::Bytes;
use lazyimg_chunkstore::wire::CACHED_HEADER;
use lazyimg_convergent::{Digest, KeyId};
use serde::Deserialize;

use super::call::Call;
use super::error::ApiError;
use super::lease::Search;
use super::memory::PATIENCE;
use super::{Answer, Wanted, digest, empty, json, octets, set};
use crate::catalog::{MAX_MANIFEST, MAX_PROFILE, ManifestPut};

/// Images in one page of the list.
const PAGE: usize = 1000;

/// A tenant key's id in a path.
fn key_id(text: &str) -> Result<KeyId, ApiError> {
    let ours = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    let number = (text.len() == 16 && text.bytes().all(ours))
        .then(|| u64::from_str_radix(text, 16).ok())
        .flatten();
    match number {
        Some(number) => Ok(KeyId(number.to_be_bytes())),
        None => Err(ApiError::BadRequest(format!(
            "{:?} is no key's id: it has 16 lower-case hex digits",
            text.chars().take(40).collect::<String>()
        ))),
    }
}

/// Image and key of a manifest's path.
async fn manifest_of(call: &mut Call) -> Result<(Digest, KeyId), ApiError> {
    let (image, key) = call.path::<(String, String)>().await?;
    Ok((digest(&image)?, key_id(&key)?))
}

/// `PUT …/manifests/KEY`.
pub(super) async fn put_manifest(mut call: Call) -> Answer {
    let (image, key) = manifest_of(&mut call).await?;
    let cached = match call.parts.headers.get(CACHED_HEADER) {
        None => false,
        Some(value) if value == "1" => true,
        Some(_) => {
            let text = format!("{CACHED_HEADER} is 1, or absent");
            return Err(ApiError::BadRequest(text));
        }
    };
    let (body, held) = call.body("the manifest", MAX_MANIFEST).await?;
    // It is written to the end, whether or not the client waits for that.
    let body = held.with(body);
    let (catalog, tenant) = (&call.app.catalog, &call.tenant);
    let (name, quota) = (&tenant.name, tenant.quota);
    let status = if cached {
        catalog
            .put_cached_manifest(name, quota, &image, key, body)
            .await?;
        StatusCode::OK
    } else {
        match catalog.put_manifest(name, quota, &image, key, body).await? {
            ManifestPut::Created => StatusCode::CREATED,
            ManifestPut::Known => StatusCode::OK,
            ManifestPut::Missing(chunks) => return Err(ApiError::Missing(chunks)),
        }
    };
    let wanted = Wanted::Manifest(name.clone(), image, key);
    call.app.leases.brought(&wanted);
    Ok(empty(status))
}

/// `GET …/manifests/KEY`.
pub(super) async fn get_manifest(mut call: Call) -> Answer {
    let deadline = call.wait()?;
    let (image, key) = manifest_of(&mut call).await?;
    let wanted = Wanted::Manifest(call.tenant.name.clone(), image, key);
    let mut search = Search::new(wanted, deadline, "the manifest");
    loop {
        if let Some(bytes) = look(&call, &image, key).await? {
            return Ok(octets(bytes));
        }
        if let Some(answer) = search.missed(&call).await {
            return answer;
        }
    }
}

/// The manifest, live or not, with the memory that it takes.
async fn look(call: &Call, image: &Digest, key: KeyId) -> Result<Option<Bytes>, ApiError> {
    let (app, name) = (&call.app, &call.tenant.name);
    if let Some(len) = app.catalog.stat_manifest(name, image, key).await? {
        let held = call.memory(len as usize).await?;
        if let Some(bytes) = app.catalog.get_manifest(name, image, key).await? {
            return Ok(Some(held.with(bytes)));
        }
    }
    // Nobody knows how long it is, and mostly there is none: no memory is kept for it beforehand.
    let few = tokio::time::timeout(PATIENCE, app.unmeasured.acquire()).await;
    let few = few.map_err(|_| ApiError::Busy)?;
    let few = few.map_err(|_| ApiError::Draining)?;
    let Some(bytes) = app.catalog.get_cached_manifest(name, image, key).await? else {
        return Ok(None);
    };
    let held = call.memory(bytes.len()).await?;
    drop(few);
    Ok(Some(held.with(bytes)))
}

/// `HEAD …/manifests/KEY`.
pub(super) async fn head_manifest(mut call: Call) -> Answer {
    let (image, key) = manifest_of(&mut call).await?;
    let catalog = &call.app.catalog;
    let len = catalog
        .stat_manifest(&call.tenant.name, &image, key)
        .await?
        .ok_or(ApiError::NotFound("the manifest"))?;
    let mut response = empty(StatusCode::OK);
    set(
        &mut response,
        header::CONTENT_TYPE,
        "application/octet-stream",
    );
    response
        .headers_mut()
        .insert(header::CONTENT_LENGTH, HeaderValue::from(len));
    Ok(response)
}

/// `DELETE …/manifests/KEY`.
pub(super) async fn delete_manifest(mut call: Call) -> Answer {
    let (image, key) = manifest_of(&mut call).await?;
    let catalog = &call.app.catalog;
    match catalog
        .delete_manifest(&call.tenant.name, &image, key)
        .await?
    {
        true => Ok(empty(StatusCode::NO_CONTENT)),
        false => Err(ApiError::NotFound("the manifest")),
    }
}

/// `GET …/manifests`.
pub(super) async fn manifests(mut call: Call) -> Answer {
    let image = digest(&call.path::<String>().await?)?;
    let catalog = &call.app.catalog;
    json(&catalog.list_manifests(&call.tenant.name, &image).await?)
}

/// `GET /v1/images`.
pub(super) async fn list(call: Call) -> Answer {
    #[derive(Deserialize)]
    struct Page {
        after: Option<String>,
    }
    let query = Query::<Page>::try_from_uri(&call.parts.uri);
    let Query(page) = query.map_err(|e| ApiError::BadRequest(e.body_text()))?;
    let after = page.after.as_deref().map(digest).transpose()?;
    let catalog = &call.app.catalog;
    let images = catalog
        .list_images(&call.tenant.name, after.as_ref(), PAGE)
        .await?;
    json(&images)
}

/// Image and name of a profile's path.
async fn profile_of(call: &mut Call) -> Result<(Digest, String), ApiError> {
    let (image, name) = call.path::<(String, String)>().await?;
    Ok((digest(&image)?, name))
}

/// `PUT …/profiles/NAME`.
pub(super) async fn put_profile(mut call: Call) -> Answer {
    let (image, name) = profile_of(&mut call).await?;
    let (body, held) = call.body("the profile", MAX_PROFILE).await?;
    let (catalog, tenant) = (&call.app.catalog, &call.tenant);
    catalog
        .put_profile(&tenant.name, tenant.quota, &image, &name, held.with(body))
        .await?;
    Ok(empty(StatusCode::OK))
}

/// `GET …/profiles/NAME`.
pub(super) async fn get_profile(mut call: Call) -> Answer {
    let (image, name) = profile_of(&mut call).await?;
    let held = call.memory(MAX_PROFILE).await?;
    let catalog = &call.app.catalog;
    let found = catalog
        .get_profile(&call.tenant.name, &image, &name)
        .await?;
    let bytes = found.ok_or(ApiError::NotFound("the profile"))?;
    Ok(octets(held.with(bytes)))
}

/// `DELETE …/profiles/NAME`.
pub(super) async fn delete_profile(mut call: Call) -> Answer {
    let (image, name) = profile_of(&mut call).await?;
    let catalog = &call.app.catalog;
    match catalog
        .delete_profile(&call.tenant.name, &image, &name)
        .await?
    {
        true => Ok(empty(StatusCode::NO_CONTENT)),
        false => Err(ApiError::NotFound("the profile")),
    }
}
