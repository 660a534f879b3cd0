//! Which error is which status, and what a client is told of it. The table is in `docs/store.md`.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use lazyimg_convergent::ChunkId;
use serde::Serialize;

use crate::catalog::CatalogError;
use crate::engine::EngineError;
use crate::tenants::Right;

/// The most chunks that a 409 lists.
const MAX_LISTED: usize = 10_000;

/// When to try again, in seconds.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Not of this protocol.
    #[error("{0}")]
    BadRequest(String),
    /// A method that the path does not have.
    #[error("this path does not have that method: docs/store.md lists them")]
    Method,
    /// No token, or one that is not known.
    #[error("a known token is needed, as `Authorization: Bearer TOKEN`")]
    Unauthorized,
    /// The token's rights do not reach.
    #[error("the right to {0} is needed, and the token does not give it: ask who runs the store")]
    Forbidden(Right),
    /// A web page on a store that needs no token.
    #[error("a store without tenants takes no requests of web pages: use a store with tenants")]
    Origin,
    /// Not there, or not the asker's.
    #[error("{0} is not there, or not yours")]
    NotFound(&'static str),
    /// A manifest names chunks that the tenant has not put.
    #[error("{} chunks of the manifest must be put first; the first {} are listed", .0.len(), .0.len().min(MAX_LISTED))]
    Missing(Vec<ChunkId>),
    /// A condition of the request does not hold.
    #[error("it was changed by somebody else: read it again, then decide")]
    Precondition,
    /// Longer than the store takes.
    #[error("{what} is longer than {limit} bytes, the most that is taken")]
    TooLarge {
        /// What.
        what: &'static str,
        /// How long it may be.
        limit: usize,
    },
    /// Too many requests under way.
    #[error("too many requests are under way: try again in a moment")]
    Busy,
    /// The store is about to end.
    #[error("this store is being shut down: ask another one, or try again")]
    Draining,
    /// The catalog did not do it.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// Something in the store broke.
    #[error("{0}")]
    Internal(String),
}

/// How an error is told.
struct Told {
    status: StatusCode,
    code: &'static str,
    /// Whether trying again may help.
    retry: bool,
    /// Whether the text is the store's own business: it may name files and hosts.
    private: bool,
}

impl ApiError {
    fn told(&self) -> Told {
        let told = |status, code| Told {
            status,
            code,
            retry: false,
            private: false,
        };
        let retry = |status, code| Told {
            retry: true,
            ..told(status, code)
        };
        let trouble = Told {
            private: true,
            ..retry(StatusCode::SERVICE_UNAVAILABLE, "unavailable")
        };
        match self {
            Self::BadRequest(_) => told(StatusCode::BAD_REQUEST, "bad_request"),
            Self::Method => told(StatusCode::METHOD_NOT_ALLOWED, "bad_request"),
            Self::Unauthorized => told(StatusCode::UNAUTHORIZED, "unauthorized"),
            Self::Forbidden(_) | Self::Origin => told(StatusCode::FORBIDDEN, "forbidden"),
            Self::NotFound(_) => told(StatusCode::NOT_FOUND, "not_found"),
            Self::Missing(_) => told(StatusCode::CONFLICT, "missing"),
            Self::Precondition => told(StatusCode::PRECONDITION_FAILED, "precondition"),
            Self::TooLarge { .. } => told(StatusCode::PAYLOAD_TOO_LARGE, "too_large"),
            Self::Busy => retry(StatusCode::TOO_MANY_REQUESTS, "busy"),
            Self::Draining => retry(StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
            Self::Internal(_) => trouble,
            Self::Catalog(error) => match error {
                CatalogError::Engine(EngineError::Full(_)) => Told {
                    private: true,
                    ..told(StatusCode::INSUFFICIENT_STORAGE, "full")
                },
                CatalogError::Engine(
                    EngineError::Unavailable(_) | EngineError::Damaged(_) | EngineError::Setup(_),
                )
                | CatalogError::Damaged { .. }
                | CatalogError::Setup(_) => trouble,
                CatalogError::RootsMove => retry(StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
                CatalogError::Quota { .. } => told(StatusCode::FORBIDDEN, "quota"),
                CatalogError::BadManifest(_) | CatalogError::BadName { .. } => {
                    told(StatusCode::BAD_REQUEST, "bad_request")
                }
                CatalogError::TooLarge { .. } => told(StatusCode::PAYLOAD_TOO_LARGE, "too_large"),
                CatalogError::TooMany { .. }
                | CatalogError::Conflict { .. }
                | CatalogError::GcUnderWay => told(StatusCode::CONFLICT, "conflict"),
                CatalogError::NotLive(_) | CatalogError::NoSuchRoot(_) => {
                    told(StatusCode::NOT_FOUND, "not_found")
                }
                CatalogError::Precondition => told(StatusCode::PRECONDITION_FAILED, "precondition"),
            },
        }
    }

    /// The word for it in the protocol, in the log and in the audit log.
    pub fn code(&self) -> &'static str {
        self.told().code
    }

    /// What the engine's trouble is called in metrics, if it is that.
    pub fn engine_trouble(&self) -> Option<&'static str> {
        match self {
            Self::Catalog(CatalogError::Engine(error)) => Some(match error {
                EngineError::Full(_) => "full",
                EngineError::Unavailable(_) => "unavailable",
                EngineError::Damaged(_) => "damaged",
                EngineError::Setup(_) => "setup",
            }),
            Self::Catalog(CatalogError::Damaged { .. }) => Some("damaged"),
            _ => None,
        }
    }

    /// Whether something that the engine holds is damaged.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Catalog(CatalogError::Engine(EngineError::Damaged(_)))
        )
    }

    /// Whether the log should say what it was: the client is not told.
    pub fn is_private(&self) -> bool {
        self.told().private
    }

    /// As an answer.
    pub fn response(&self) -> Response<Body> {
        #[derive(Serialize)]
        struct Document {
            error: &'static str,
            message: String,
            #[serde(skip_serializing_if = "Option::is_none")]
            chunks: Option<Vec<String>>,
        }
        let Told {
            status,
            code,
            retry,
            private,
        } = self.told();
        let message = match private {
            false => self.to_string(),
            true if code == "full" => "the store has no room left: ask who runs it".to_owned(),
            true => "the store is in trouble; its log says why, under this request's id".to_owned(),
        };
        let chunks = match self {
            Self::Missing(ids) => Some(ids.iter().take(MAX_LISTED).map(|id| id.hex()).collect()),
            _ => None,
        };
        let document = Document {
            error: code,
            message,
            chunks,
        };
        // Strings always have a JSON form.
        let body = serde_json::to_vec(&document).unwrap_or_default();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        let json = HeaderValue::from_static("application/json");
        headers.insert(header::CONTENT_TYPE, json);
        if retry {
            headers.insert(header::RETRY_AFTER, RETRY_AFTER);
        }
        if status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            headers.insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_engine_says_stays_in_the_store() {
        for error in [
            EngineError::Unavailable("secret-host:6379".into()),
            EngineError::Full("secret-host".into()),
            EngineError::Damaged("secret-host".into()),
        ] {
            let error = ApiError::from(CatalogError::from(error));
            assert!(error.is_private() && error.engine_trouble().is_some());
            assert!(error.to_string().contains("secret-host"), "for the log");
            let said = format!("{:?}", error.response());
            assert!(!said.contains("secret-host"), "{said}");
        }
    }

    #[test]
    fn trouble_that_passes_says_when_to_try_again() {
        for (error, status) in [
            (ApiError::Busy, 429),
            (ApiError::Draining, 503),
            (CatalogError::RootsMove.into(), 503),
        ] {
            let response = error.response();
            assert_eq!(response.status(), status);
            assert!(response.headers().contains_key("retry-after"), "{error}");
        }
        let response = ApiError::Unauthorized.response();
        assert!(response.headers().contains_key("www-authenticate"));
    }
}
