//! What the administration of a store is asked for, over HTTP.

use std::time::Duration;

use lazyimg_store::tenants::TenantsError;
use reqwest::{Certificate, Client, Method, StatusCode, Url};
use serde::Deserialize;
use serde_json::Value;

use crate::args::StoreAddress;
use crate::exit::{Error, chain};

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(10);

/// How long an answer may take, but that of a pass of garbage collection, which may take hours.
const ANSWER: Duration = Duration::from_secs(60);

/// How often a connection without traffic is looked at: a machine that is gone sends no answer, ever.
const KEEPALIVE: Duration = Duration::from_secs(30);

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
        let base = base(url)?;
        let mut builder = Client::builder()
            .connect_timeout(CONNECT)
            .tcp_keepalive(KEEPALIVE)
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
        self.ask(Method::GET, path, None, Some(ANSWER)).await
    }

    /// What a `POST` gives; null for an answer without a body.
    ///
    /// # Errors
    /// What the store or the way to it says.
    pub async fn post(&self, path: &str) -> Result<Value, Error> {
        self.ask(Method::POST, path, None, Some(ANSWER)).await
    }

    /// What a `POST` of this gives, however long it takes.
    ///
    /// # Errors
    /// What the store or the way to it says.
    pub async fn post_and_wait(&self, path: &str, body: Value) -> Result<Value, Error> {
        self.ask(Method::POST, path, Some(body), None).await
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        limit: Option<Duration>,
    ) -> Result<Value, Error> {
        let unreachable = |e: reqwest::Error| {
            let store = &self.base;
            Error::Unreachable(match limit {
                Some(limit) if e.is_timeout() && !e.is_connect() => {
                    format!("store {store}: no whole answer within {limit:?}")
                }
                _ => {
                    let text = chain(&e.without_url());
                    let hint = match text.contains("certificate") {
                        true => "; name a file with that of its authority with --store-ca",
                        false => "",
                    };
                    format!("store {store}: {text}{hint}")
                }
            })
        };
        let url = address(&self.base, path);
        let mut request = self.client.request(method, url);
        if let Some(limit) = limit {
            request = request.timeout(limit);
        }
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

/// The store's address, which may have a path where it is behind a proxy.
fn base(url: &str) -> Result<Url, Error> {
    // A password in it must not be printed: there should be none, but people try.
    let shown = match url.rsplit_once('@') {
        Some((_, host)) => format!("…@{host}"),
        None => url.to_owned(),
    };
    let wrong = |why: &str| {
        Error::Usage(format!(
            "--store {shown}: {why}; write http://HOST:PORT or https://HOST:PORT"
        ))
    };
    let plain = url.strip_prefix("dns+").unwrap_or(url);
    let base = Url::parse(plain).map_err(|e| wrong(&e.to_string()))?;
    if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
        return Err(wrong("that is no URL of a store"));
    }
    if !base.username().is_empty() || base.password().is_some() {
        return Err(wrong(
            "it has a user or password; the token comes from --store-token-file",
        ));
    }
    if base.query().is_some() || base.fragment().is_some() {
        return Err(wrong("it has a query or a fragment"));
    }
    Ok(base)
}

/// A path of the protocol below `base`.
fn address(base: &Url, path: &str) -> Url {
    let mut url = base.clone();
    // Addresses of http and https always have a path.
    if let Ok(mut segments) = url.path_segments_mut() {
        let path = path.trim_start_matches('/').split('/');
        segments.pop_if_empty().extend(path);
    }
    url
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    fn admin(url: &str) -> Result<Admin, Error> {
        Admin::new(&StoreAddress {
            store: vec![url.to_owned()],
            store_token_file: None,
            store_ca: None,
        })
    }

    #[test]
    fn the_path_of_an_address_is_kept() {
        for (url, asked) in [
            ("http://h:1", "http://h:1/v1/admin/roots"),
            ("http://h:1/", "http://h:1/v1/admin/roots"),
            ("https://h/a/b", "https://h/a/b/v1/admin/roots"),
            ("dns+https://h/a/", "https://h/a/v1/admin/roots"),
        ] {
            let base = base(url).unwrap();
            assert_eq!(address(&base, "/v1/admin/roots").as_str(), asked);
        }
    }

    #[test]
    fn an_address_with_a_password_is_refused_and_the_password_not_printed() {
        for url in [
            "http://me:secret@h:1",
            "http://me:secret@h:x",
            "http://me:secret@h/?q",
        ] {
            let Err(error @ Error::Usage(_)) = admin(url) else {
                panic!("{url} was taken");
            };
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_store_that_does_not_answer_is_waited_for_only_so_long() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let admin = admin(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        let limit = Some(Duration::from_millis(200));
        let asking = admin.ask(Method::GET, "/v1/admin/roots", None, limit);
        let error = tokio::time::timeout(Duration::from_secs(30), asking);
        let Err(error @ Error::Unreachable(_)) = error.await.unwrap() else {
            panic!("nobody has answered");
        };
        assert!(error.to_string().contains("within 200ms"), "{error}");
        // Nor for the rest of an answer.
        let half = std::thread::spawn(move || {
            // The first connection is the one above.
            for stream in listener.incoming().take(2) {
                let mut stream = stream.unwrap();
                let _ = stream.read(&mut [0; 1000]);
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{");
                std::thread::spawn(move || stream.read_to_end(&mut Vec::new()));
            }
        });
        let asking = admin.ask(Method::GET, "/v1/admin/roots", None, limit);
        let error = tokio::time::timeout(Duration::from_secs(30), asking);
        assert!(matches!(error.await.unwrap(), Err(Error::Unreachable(_))));
        half.join().unwrap();
    }
}
