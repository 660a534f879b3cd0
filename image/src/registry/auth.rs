//! Authorization of requests to one repository: anonymous, basic, or tokens from a token service
//! (<https://distribution.github.io/distribution/spec/auth/token/>, `…/auth/oauth/`).
//!
//! The first request goes out without asking whether it may: with the password that a file has for
//! the registry, else anonymously. A 401 says what is wanted. What was learned is kept for the life
//! of the repository; passwords and tokens are kept only as long as stated here, and the credentials
//! behind them are looked up again whenever a new one is needed.

pub(super) mod token;

use std::collections::HashMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use parking_lot::Mutex;
use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderValue};
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::challenge::{Challenge, from_headers};
use super::endpoint::{Endpoint, follow, shown};
use super::http::Http;
use super::retry::Failure;
use crate::credentials::{CredentialStore, Credentials};
use crate::source::SourceError;

/// How long a password is used without looking it up again.
const PASSWORD_KEPT: Duration = Duration::from_secs(60);

/// The longest a token is used, whatever its issuer says.
const TOKEN_KEPT: Duration = Duration::from_secs(3600);

/// What a request needs to be allowed to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Access {
    Pull,
    Push,
    /// Push here, and pull from another repository of the registry.
    PushFrom(String),
    /// Delete a manifest.
    Delete,
}

/// How the registry wants to be convinced, as far as known.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Scheme {
    Unknown,
    Open,
    Basic,
    Bearer(Service),
}

/// A token service.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Service {
    realm: Url,
    name: Option<String>,
}

/// An authorization that worked, or should. No `Debug`: it holds a secret.
struct Kept {
    value: HeaderValue,
    until: Instant,
}

struct State {
    scheme: Scheme,
    kept: HashMap<String, Kept>,
}

/// Authorizes the requests of one repository.
pub(super) struct Authenticator {
    endpoint: Endpoint,
    repository: String,
    place: String,
    store: CredentialStore,
    state: Mutex<State>,
    /// Held while something new is fetched: many requests may need it, one asks.
    flight: tokio::sync::Mutex<()>,
}

impl Authenticator {
    pub(super) fn new(
        endpoint: Endpoint,
        repository: &str,
        place: &str,
        store: CredentialStore,
    ) -> Self {
        Self {
            endpoint,
            repository: repository.to_owned(),
            place: place.to_owned(),
            store,
            state: Mutex::new(State {
                scheme: Scheme::Unknown,
                kept: HashMap::new(),
            }),
            flight: tokio::sync::Mutex::new(()),
        }
    }

    /// What to send with a request, by what is known so far.
    pub(super) async fn authorize(
        &self,
        http: &Http,
        access: &Access,
    ) -> Result<Option<HeaderValue>, Failure> {
        let scheme = self.state.lock().scheme.clone();
        match scheme {
            Scheme::Open => Ok(None),
            Scheme::Unknown => Ok(self.unasked()),
            Scheme::Basic | Scheme::Bearer(_) => {
                if let Some(value) = self.fresh(&scheme, access) {
                    return Ok(Some(value));
                }
                let _flight = self.flight.lock().await;
                match self.fresh(&scheme, access) {
                    Some(value) => Ok(Some(value)),
                    None => self.obtain(http, &scheme, access, None).await,
                }
            }
        }
    }

    /// A request that went out with `used` was answered well.
    pub(super) fn accepted(&self, used: Option<&HeaderValue>) {
        let mut state = self.state.lock();
        if state.scheme == Scheme::Unknown {
            match used {
                None => state.scheme = Scheme::Open,
                Some(value) => {
                    state.scheme = Scheme::Basic;
                    keep(
                        &mut state,
                        Scheme::Basic.key(&self.repository, &Access::Pull),
                        value.clone(),
                        PASSWORD_KEPT,
                    );
                }
            }
        }
    }

    /// Whether `used` was sent before the registry had said what it wants.
    pub(super) fn is_unasked(&self, used: Option<&HeaderValue>) -> bool {
        used.is_some() && self.state.lock().scheme == Scheme::Unknown
    }

    /// A request that went out with `used` was answered 401 with these headers: what to send
    /// instead.
    pub(super) async fn challenged(
        &self,
        http: &Http,
        access: &Access,
        headers: &HeaderMap,
        used: Option<&HeaderValue>,
    ) -> Result<Option<HeaderValue>, Failure> {
        let (scheme, scope) = match from_headers(headers) {
            Some(Challenge::Basic) => (Scheme::Basic, None),
            Some(Challenge::Bearer {
                realm,
                service,
                scope,
            }) => (
                Scheme::Bearer(Service {
                    realm: self.realm(&realm)?,
                    name: service,
                }),
                scope,
            ),
            None => {
                return Err(
                    self.refused("it answers 401 without saying how to authenticate".into())
                );
            }
        };
        let _flight = self.flight.lock().await;
        {
            let mut state = self.state.lock();
            state.scheme = scheme.clone();
            let key = scheme.key(&self.repository, access);
            match state.kept.get(&key) {
                // Somebody else was faster and got another one.
                Some(kept) if Some(&kept.value) != used && kept.until > Instant::now() => {
                    return Ok(Some(kept.value.clone()));
                }
                _ => drop(state.kept.remove(&key)),
            }
        }
        self.obtain(http, &scheme, access, scope.as_deref()).await
    }

    /// The error of a request that stays refused after all this.
    pub(super) async fn still_refused(&self, what: &str, message: &str) -> SourceError {
        let registry = self.place.split('/').next().unwrap_or_default();
        let advice = match self.store.look_up().await {
            Ok(Some(Credentials::Password { username, .. })) => {
                format!(
                    "the credentials found (user {username}) are not enough; check them with `docker login {registry}`"
                )
            }
            Ok(Some(_)) => {
                format!("the token found is not enough; renew it with `docker login {registry}`")
            }
            Ok(None) => format!(
                "no credentials for it were found in {}; if the name is right, log in with `docker login {registry}`",
                self.store.places()
            ),
            Err(e) => format!("{e}"),
        };
        SourceError::Unauthorized {
            what: what.into(),
            place: self.place.clone(),
            hint: format!("{message}; {advice}"),
        }
    }

    /// A password that a file has, before anybody asked for it: saves a round trip with registries
    /// that want one. Broken files matter once credentials are needed.
    fn unasked(&self) -> Option<HeaderValue> {
        match self.store.stored() {
            Ok(Some(Credentials::Password { username, password })) => basic(&username, &password),
            Ok(_) => None,
            Err(e) => {
                tracing::warn!(error = %e, "credentials could not be read; going on without");
                None
            }
        }
    }

    /// What is kept for an access and not too old.
    fn fresh(&self, scheme: &Scheme, access: &Access) -> Option<HeaderValue> {
        let state = self.state.lock();
        let kept = state.kept.get(&scheme.key(&self.repository, access))?;
        (kept.until > Instant::now()).then(|| kept.value.clone())
    }

    /// Gets a new authorization and keeps it.
    async fn obtain(
        &self,
        http: &Http,
        scheme: &Scheme,
        access: &Access,
        scope: Option<&str>,
    ) -> Result<Option<HeaderValue>, Failure> {
        let found = self.store.look_up().await;
        let (value, lifetime) = match scheme {
            Scheme::Unknown | Scheme::Open => return Ok(None),
            Scheme::Basic => match found.map_err(SourceError::from)? {
                Some(Credentials::Password { username, password }) => {
                    (basic(&username, &password), PASSWORD_KEPT)
                }
                // Some clouds' helpers mark a token that works as the password.
                Some(Credentials::IdentityToken(token) | Credentials::RegistryToken(token)) => {
                    (basic("<token>", &token), PASSWORD_KEPT)
                }
                None => return Ok(None),
            },
            Scheme::Bearer(service) => {
                // A public image must not fail for a broken helper: try anonymously, say why.
                let found = found.unwrap_or_else(|e| {
                    tracing::warn!(error = %e, "credentials could not be looked up; trying without");
                    None
                });
                if let Some(Credentials::RegistryToken(token)) = &found {
                    (bearer(token), PASSWORD_KEPT)
                } else {
                    let scopes = scopes(&self.repository, access, scope);
                    let answer = token::fetch(http, service, &scopes, found.as_ref()).await;
                    let answer = answer.map_err(|failure| {
                        self.explain(failure, &service.realm, found.is_some())
                    })?;
                    (bearer(&answer.token), answer.lifetime.min(TOKEN_KEPT))
                }
            }
        };
        let Some(value) = value else {
            return Err(self.refused(
                "the credentials found for it have characters that HTTP can't carry".into(),
            ));
        };
        keep(
            &mut self.state.lock(),
            scheme.key(&self.repository, access),
            value.clone(),
            lifetime,
        );
        Ok(Some(value))
    }

    /// Where tokens come from. The registry names it, and it gets the password: never in the clear
    /// unless the registry itself is reached in the clear.
    fn realm(&self, realm: &str) -> Result<Url, Failure> {
        let url = follow(self.endpoint.root(), realm)
            .map_err(|reason| self.refused(format!("its token service can't be used: {reason}")))?;
        if url.scheme() == "http" && !self.endpoint.is_plain() {
            return Err(self.refused("its token service is reached in plain HTTP".into()));
        }
        Ok(url)
    }

    fn explain(&self, failure: Failure, realm: &Url, had_credentials: bool) -> Failure {
        match failure {
            Failure::Final(SourceError::Unauthorized { hint, .. }) => {
                let registry = self.place.split('/').next().unwrap_or_default();
                let advice = if had_credentials {
                    format!("log in again with `docker login {registry}`")
                } else {
                    format!(
                        "no credentials were found in {}; log in with `docker login {registry}`",
                        self.store.places()
                    )
                };
                self.refused(format!(
                    "its token service {} says: {hint}; {advice}",
                    shown(realm)
                ))
            }
            other => other,
        }
    }

    fn refused(&self, hint: String) -> Failure {
        Failure::Final(SourceError::Unauthorized {
            what: "the request".into(),
            place: self.place.clone(),
            hint,
        })
    }
}

impl Scheme {
    /// Under which name an authorization is kept.
    fn key(&self, repository: &str, access: &Access) -> String {
        match self {
            Self::Bearer(_) => scopes(repository, access, None).join(" "),
            _ => "password".into(),
        }
    }
}

fn keep(state: &mut State, key: String, value: HeaderValue, lifetime: Duration) {
    // A repository has few scopes; mounts from many others could pile up.
    if state.kept.len() >= 64 {
        state.kept.clear();
    }
    state.kept.insert(
        key,
        Kept {
            value,
            until: Instant::now() + lifetime,
        },
    );
}

/// The scopes of an access, with those a challenge names.
fn scopes(repository: &str, access: &Access, challenge: Option<&str>) -> Vec<String> {
    let mut scopes = match access {
        Access::Pull => vec![format!("repository:{repository}:pull")],
        Access::Push => vec![format!("repository:{repository}:pull,push")],
        Access::PushFrom(from) => vec![
            format!("repository:{repository}:pull,push"),
            format!("repository:{from}:pull"),
        ],
        Access::Delete => vec![format!("repository:{repository}:pull,delete")],
    };
    for scope in challenge
        .unwrap_or_default()
        .split_ascii_whitespace()
        .take(8)
    {
        if !scopes.iter().any(|s| s == scope) {
            scopes.push(scope.to_owned());
        }
    }
    scopes
}

fn basic(username: &str, password: &str) -> Option<HeaderValue> {
    let pair = Zeroizing::new(format!("{username}:{password}"));
    let encoded = Zeroizing::new(STANDARD.encode(pair.as_bytes()));
    secret_header(&Zeroizing::new(format!("Basic {}", *encoded)))
}

fn bearer(token: &str) -> Option<HeaderValue> {
    secret_header(&Zeroizing::new(format!("Bearer {token}")))
}

/// A header value that neither `Debug` nor an HTTP library's log shows.
fn secret_header(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_hold_ours_and_the_challenges_once() {
        let challenge = Some("repository:a:pull repository:b:pull");
        assert_eq!(
            scopes("a", &Access::Pull, challenge),
            ["repository:a:pull", "repository:b:pull"]
        );
        assert_eq!(scopes("a", &Access::Push, None), ["repository:a:pull,push"]);
        assert_eq!(
            scopes("a", &Access::Delete, None),
            ["repository:a:pull,delete"]
        );
        assert_eq!(
            scopes("a", &Access::PushFrom("b".into()), None),
            ["repository:a:pull,push", "repository:b:pull"]
        );
    }

    #[test]
    fn debug_output_shows_no_secret() {
        let value = basic("user", "hunter2").unwrap();
        assert_eq!(value.to_str().unwrap(), "Basic dXNlcjpodW50ZXIy");
        assert!(!format!("{value:?}").contains("dXNl"));
        assert!(bearer("bad\ntoken").is_none());
    }
}
