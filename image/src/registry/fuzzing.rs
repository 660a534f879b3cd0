//! What a registry and its token service say, read by the functions that do so here: see
//! [`crate::fuzzing`].

use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{StatusCode, Url};
use zeroize::Zeroizing;

use super::auth::token::parse;
use super::challenge::{Challenge, from_headers};
use super::endpoint::{follow, next_link};
use super::http::message_of;

/// Where a registry at `registry` sends us for a token, by the values of its `WWW-Authenticate`.
pub fn token_service(registry: &Url, values: &[&[u8]]) -> Option<Url> {
    let mut headers = HeaderMap::new();
    for value in values {
        headers.append(WWW_AUTHENTICATE, HeaderValue::from_bytes(value).ok()?);
    }
    match from_headers(&headers)? {
        Challenge::Basic => None,
        Challenge::Bearer { realm, .. } => follow(registry, &realm).ok(),
    }
}

/// The token in the answer of a token service, and how long it is used.
pub fn token(service: &Url, answer: &[u8]) -> Option<(Zeroizing<String>, Duration)> {
    let token = parse(service, answer).ok()?;
    Some((token.token, token.lifetime))
}

/// The next page by a `Link` header of the page at `from`.
pub fn next_page(from: &Url, header: &str) -> Option<Url> {
    next_link(from, header)
}

/// What is shown of the body of an answer with an error's status.
pub fn error_message(body: &[u8], status: u16) -> Option<String> {
    Some(message_of(body, StatusCode::from_u16(status).ok()?))
}
