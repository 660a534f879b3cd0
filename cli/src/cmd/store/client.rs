//! What the administration of a store is asked for, over HTTP.

use std::time::Duration;

use lazyimg_store::tenants::TenantsError;
use reqwest::{Certificate, Client, Method, StatusCode, Url};
use serde::Deserialize;
use serde_json::Value;

use crate::args::StoreAddress;
use crate::exit::{Error, chain};

/// How long a connection may take. Answers may take as long as a pass of garbage collection.
const CONNECT: Duration = Duration::from_secs(10);

/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 64 << 20;

/// A client of one store.
pub struct Admin {
    client: Client,
    base: Url,
    token: Option<zeroize::Zeroizing<String>>,
}

#[derive(Deserialize)]
struct Refusal {
    error: String,
    message: String,
}

impl Admin {
    /// A client of the store that is meant.
    ///
    /// # Errors
    /// Wrong settings.
    pub fn new(at: &StoreAddress) -> Result<Self, Error> {
        let Some(url) = at.store.first() else {
            return Err(Error::Usage(
                "say which store with --store URL, such as http://127.0.0.1:7070".into(),
            ));
        };
        let wrong = |why: &str| {
            Error::Usage(format!(
                "--store {url}: {why}; write http://HOST:PORT or https://HOST:PORT"
            ))
        };
        let plain = url.strip_prefix("dns+").unwrap_or(url);
        let base = Url::parse(plain).map_err(|e| wrong(&e.to_string()))?;
        if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
            return Err(wrong("that is no URL of a store"));
        }
        let mut builder = Client::builder()
            .connect_timeout(CONNECT)
            .redirect(reqwest::redirect::Policy::none());
        if let Some(path) = &at.store_ca {
            let name = path.display().to_string();
            let pem = std::fs::read(path).map_err(Error::io(name.clone()))?;
            let certs = Certificate::from_pem_bundle(&pem)
                .map_err(|e| Error::Usage(format!("{name} holds no certificates: {e}")))?;
            builder = builder.tls_certs_merge(certs);
        }
        let client = builder.build().map_err(|e| Error::Other(chain(&e)))?;
        let token = at
            .store_token_file
            .as_deref()
            .map(lazyimg_store::tenants::read_token);
        let token = token
            .transpose()
            .map_err(|e: TenantsError| Error::Credentials(e.to_string()))?;
        Ok(Self {
            client,
            base,
            token,
        })
    }

    /// What a `GET` gives.
    ///
    /// # Errors
    /// What the store or the way to it says.
    pub async fn get(&self, path: &str) -> Result<Value, Error> {
        self.ask(Method::GET, path, None).await
    }

    /// What a `POST` gives; null for an answer without a body.
    ///
    /// # Errors
    /// What the store or the way to it says.
    pub async fn post(&self, path: &str, body: Option<Value>) -> Result<Value, Error> {
        self.ask(Method::POST, path, body).await
    }

    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value, Error> {
        let unreachable = |e: reqwest::Error| {
            Error::Unreachable(format!("store {}: {}", self.base, chain(&e.without_url())))
        };
        let url = self
            .base
            .join(path)
            .map_err(|e| Error::Other(e.to_string()))?;
        let mut request = self.client.request(method, url);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.as_str());
        }
        if let Some(body) = body {
            request = request.body(body.to_string());
        }
        let mut response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        let mut text = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(unreachable)? {
            if text.len() + piece.len() > MAX_ANSWER {
                return Err(Error::Other(format!(
                    "store {}: an answer of more than {MAX_ANSWER} bytes is not one of a store",
                    self.base
                )));
            }
            text.extend_from_slice(&piece);
        }
        if !status.is_success() {
            return Err(self.refused(status, &text));
        }
        if text.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&text).map_err(|e| {
            Error::Other(format!(
                "store {}: the answer is not one of a store: {e}",
                self.base
            ))
        })
    }

    fn refused(&self, status: StatusCode, text: &[u8]) -> Error {
        let said = match serde_json::from_slice::<Refusal>(text) {
            Ok(Refusal { error, message }) => format!("store {}: {error}: {message}", self.base),
            Err(_) => format!(
                "store {}: {status}; is there a lazyimg store behind this URL?",
                self.base
            ),
        };
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Error::Credentials(match &self.token {
                    None => format!("{said}; name a token with --store-token-file"),
                    Some(_) => said,
                })
            }
            StatusCode::NOT_FOUND => Error::Missing(said),
            StatusCode::TOO_MANY_REQUESTS => Error::Unreachable(said),
            status if status.is_server_error() => Error::Unreachable(said),
            _ => Error::Other(said),
        }
    }
}
