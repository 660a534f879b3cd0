//! `/v1/refs/REFERENCE`: what tags meant.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{Response, StatusCode, header};
use lazyimg_convergent::Digest;
use serde::Deserialize;

use super::call::Call;
use super::error::ApiError;
use super::lease::Search;
use super::{Answer, Wanted, empty, etag, etags, from_json, json};
use crate::catalog::{Condition, MAX_REFERENCE, Reference};

async fn reference_of(call: &mut Call) -> Result<String, ApiError> {
    let reference = call.path::<String>().await?;
    if reference.len() > MAX_REFERENCE {
        return Err(ApiError::TooLarge {
            what: "the reference",
            limit: MAX_REFERENCE,
        });
    }
    Ok(reference)
}

/// `GET`.
pub(super) async fn get(mut call: Call) -> Answer {
    let deadline = call.wait()?;
    let reference = reference_of(&mut call).await?;
    let (catalog, name) = (&call.app.catalog, &call.tenant.name);
    let wanted = Wanted::Reference(name.clone(), Arc::from(reference.as_str()));
    let mut search = Search::new(wanted, deadline, "the reference");
    loop {
        if let Some(found) = catalog.get_ref(name, &reference).await? {
            let mut has = etags(&call.parts.headers, &header::IF_NONE_MATCH);
            return match has.any(|tag| tag == "*" || tag == found.etag) {
                true => tagged(empty(StatusCode::NOT_MODIFIED), &found),
                false => tagged(json(&found)?, &found),
            };
        }
        if let Some(answer) = search.missed(&call).await {
            return answer;
        }
    }
}

fn tagged(mut response: Response<Body>, reference: &Reference) -> Answer {
    let etag = etag(&reference.etag)?;
    response.headers_mut().insert(header::ETAG, etag);
    Ok(response)
}

/// `PUT`.
pub(super) async fn put(mut call: Call) -> Answer {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Document {
        image: Digest,
    }
    let reference = reference_of(&mut call).await?;
    let condition = condition(&call, &reference).await?;
    let Document { image } = from_json(&mut call).await?;
    let name = &call.tenant.name;
    let put = call
        .app
        .catalog
        .put_ref(name, &reference, &image, &condition)
        .await?;
    let wanted = Wanted::Reference(name.clone(), Arc::from(reference));
    call.app.leases.brought(&wanted);
    tagged(json(&put)?, &put)
}

/// `DELETE`.
pub(super) async fn delete(mut call: Call) -> Answer {
    let reference = reference_of(&mut call).await?;
    let condition = condition(&call, &reference).await?;
    let name = &call.tenant.name;
    match call
        .app
        .catalog
        .delete_ref(name, &reference, &condition)
        .await?
    {
        true => Ok(empty(StatusCode::NO_CONTENT)),
        false => Err(ApiError::NotFound("the reference")),
    }
}

/// What `If-Match` and `If-None-Match` say of a change.
async fn condition(call: &Call, reference: &str) -> Result<Condition, ApiError> {
    let headers = &call.parts.headers;
    let mut matches = etags(headers, &header::IF_MATCH);
    let mut differs = etags(headers, &header::IF_NONE_MATCH);
    let all = (
        matches.next(),
        matches.next(),
        differs.next(),
        differs.next(),
    );
    match all {
        (None, _, None, _) => Ok(Condition::Always),
        (None, _, Some("*"), None) => Ok(Condition::Absent),
        (Some("*"), None, None, _) => {
            // That there is one, whichever.
            let catalog = &call.app.catalog;
            let now = catalog.get_ref(&call.tenant.name, reference).await?;
            let now = now.ok_or(ApiError::Precondition)?;
            Ok(Condition::Match(now.etag))
        }
        (Some(tag), None, None, _) => Ok(Condition::Match(tag.to_owned())),
        _ => Err(ApiError::BadRequest(
            "a change takes `If-Match: \"ETAG\"` or `If-None-Match: *`, once".to_owned(),
        )),
    }
}
