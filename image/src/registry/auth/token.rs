//! Getting a token from a token service.

use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderValue};
use reqwest::{Method, Response, Url};
use serde::Deserialize;
use zeroize::Zeroizing;

use super::super::body::BodyReader;
use super::super::endpoint::shown;
use super::super::http::{Http, Request};
use super::super::retry::Failure;
use super::{Service, basic};
use crate::credentials::Credentials;
use crate::source::SourceError;

/// The largest answer of a token service, in bytes. Tokens with many scopes reach some 10 KB.
const MAX_TOKEN_ANSWER: u64 = 1 << 20;

/// How long a token lives when its issuer does not say (token specification).
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);

/// A token and for how long to use it. No `Debug`: it is a secret.
pub(in crate::registry) struct Token {
    pub(in crate::registry) token: Zeroizing<String>,
    pub(in crate::registry) lifetime: Duration,
}

/// What the service answers. No `Debug`: it holds a secret.
#[derive(Deserialize)]
struct Answer {
    token: Option<Zeroizing<String>>,
    access_token: Option<Zeroizing<String>>,
    expires_in: Option<u64>,
}

/// Asks for a token with these scopes: by refresh token when there is one, else with the password
/// or, without any, anonymously.
pub(super) async fn fetch(
    http: &Http,
    service: &Service,
    scopes: &[String],
    credentials: Option<&Credentials>,
) -> Result<Token, Failure> {
    let (request, authorization) = match credentials {
        Some(Credentials::IdentityToken(token)) => {
            (by_refresh_token(http, service, scopes, token), None)
        }
        Some(Credentials::Password { username, password }) => {
            (by_query(http, service, scopes), basic(username, password))
        }
        Some(Credentials::RegistryToken(_)) | None => (by_query(http, service, scopes), None),
    };
    tracing::debug!(realm = %shown(&service.realm), ?scopes, anonymous = credentials.is_none(), "asking for a token");
    let method = request.method.clone();
    let response = http.exchange(request, authorization).await?;
    if !response.status().is_success() {
        return Err(
            match http
                .refusal(&method, "a token", &shown(&service.realm), response)
                .await
            {
                // Some services say 404 or 400 for what they don't let one see.
                Failure::Final(
                    cause @ (SourceError::NotFound { .. } | SourceError::Status { .. }),
                ) => {
                    let (what, place) = ("a token".into(), shown(&service.realm));
                    Failure::Final(SourceError::Unauthorized {
                        what,
                        place,
                        hint: cause.to_string(),
                    })
                }
                other => other,
            },
        );
    }
    read(http, &service.realm, response).await
}

fn by_query(http: &Http, service: &Service, scopes: &[String]) -> Request {
    let mut url = service.realm.clone();
    {
        let mut query = url.query_pairs_mut();
        if let Some(name) = &service.name {
            query.append_pair("service", name);
        }
        for scope in scopes {
            query.append_pair("scope", scope);
        }
    }
    http.request(Method::GET, url)
}

fn by_refresh_token(http: &Http, service: &Service, scopes: &[String], token: &str) -> Request {
    // The form is built by hand into zeroized memory; only the copy that is sent is not.
    let mut form = Zeroizing::new(String::with_capacity(token.len() * 3 + 1024));
    let mut add = |name: &str, value: &str| {
        if !form.is_empty() {
            form.push('&');
        }
        form.push_str(name);
        form.push('=');
        for byte in value.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                    form.push(byte.into())
                }
                _ => form.push_str(&format!("%{byte:02X}")),
            }
        }
    };
    add("grant_type", "refresh_token");
    add("client_id", "lazyimg");
    if let Some(name) = &service.name {
        add("service", name);
    }
    add("scope", &scopes.join(" "));
    add("refresh_token", token);
    let mut request = http.request(Method::POST, service.realm.clone());
    request.headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("application/x-www-form-urlencoded"),
    );
    request.body = Some(form.as_bytes().to_vec().into());
    request
}

async fn read(http: &Http, realm: &Url, response: Response) -> Result<Token, Failure> {
    let what = "the token service's answer";
    let bytes = Zeroizing::new(
        BodyReader::new(response, http.timeouts)
            .all(what, MAX_TOKEN_ANSWER)
            .await?
            .to_vec(),
    );
    parse(realm, &bytes)
}

/// What an answer of the token service `realm` says.
pub(in crate::registry) fn parse(realm: &Url, answer: &[u8]) -> Result<Token, Failure> {
    let broken = |reason: String| {
        Failure::Final(SourceError::malformed(
            format!("the answer of the token service {}", shown(realm)),
            reason,
        ))
    };
    // serde_json's own message could quote the token; the position is enough.
    let answer: Answer = serde_json::from_slice(answer).map_err(|e| {
        broken(format!(
            "not JSON, at line {} column {}",
            e.line(),
            e.column()
        ))
    })?;
    let token = answer
        .token
        .filter(|t| !t.is_empty())
        .or(answer.access_token)
        .filter(|t| !t.is_empty());
    let token = token.ok_or_else(|| broken("it holds no token".into()))?;
    let lifetime = answer
        .expires_in
        .map_or(DEFAULT_LIFETIME, |s| Duration::from_secs(s.min(1 << 20)));
    // Renewed a little early, so that it does not run out on its way.
    Ok(Token {
        token,
        lifetime: lifetime - (lifetime / 4).min(Duration::from_secs(10)),
    })
}
