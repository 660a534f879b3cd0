//! Where the store is and how it is spoken to.

use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;

/// Instances in a list, at most.
const MAX_INSTANCES: usize = 64;

/// Which version of HTTP is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Http2 {
    /// What TLS agrees on (ALPN); HTTP/1.1 in clear.
    #[default]
    Negotiated,
    /// HTTP/2, also in clear.
    Always,
    /// HTTP/1.1.
    Never,
}

/// Settings of a [`crate::remote::StoreClient`].
#[derive(Debug, Clone)]
pub struct StoreSettings {
    /// The instances: a list of `http://` and `https://` addresses, or one of `dns+http://NAME:PORT`
    /// and `dns+https://NAME:PORT`, whose addresses are looked up again every 30 s.
    pub urls: Vec<String>,
    /// A file with the tenant's token. It is read again when it changes. `None`: no token.
    pub token_file: Option<PathBuf>,
    /// A file of PEM certificates of authorities that are trusted beside the system's. It is read
    /// again when it changes.
    pub ca_file: Option<PathBuf>,
    /// Which version of HTTP.
    pub http2: Http2,
    /// A connection must be there within this.
    pub connect_timeout: Duration,
    /// A request for chunks gives up when this long nothing has come, after connecting too.
    pub stall_timeout: Duration,
    /// The same for documents, and for what is put: the store may have to wait for its disks. What is
    /// long has a second more for each 128 KiB.
    pub document_timeout: Duration,
    /// How long documents and what is put are tried while instances fail, rest or are busy. Zero: a
    /// few times at once, then somebody else is asked.
    pub patience: Duration,
    /// A request for chunks whose first has not come when most have, and not before this, is sent to
    /// a second instance, as long as such hedges are at most 5 % of an instance's requests.
    pub hedge_floor: Duration,
}

impl StoreSettings {
    /// Defaults with these addresses.
    pub fn new(urls: Vec<String>) -> Self {
        Self {
            urls,
            token_file: None,
            ca_file: None,
            http2: Http2::default(),
            connect_timeout: Duration::from_secs(1),
            stall_timeout: Duration::from_secs(2),
            document_timeout: Duration::from_secs(10),
            patience: Duration::ZERO,
            hedge_floor: Duration::from_millis(20),
        }
    }
}

/// Why settings can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// No address.
    #[error("the list of the store's addresses is empty")]
    Empty,
    /// Too many.
    #[error(
        "{0} addresses of the store; at most {MAX_INSTANCES} are used: name them in DNS and use `dns+https://NAME:PORT`"
    )]
    TooMany(usize),
    /// Not an address.
    #[error(
        "`{url}` is not an address of a store: {reason}; expected `https://HOST:PORT` or `dns+https://NAME:PORT`"
    )]
    Url {
        /// The text.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// DNS and something else.
    #[error("`{0}` gives all instances; name no other address beside it")]
    Mixed(String),
}

/// Where instances come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// These.
    List(Vec<Url>),
    /// Those that the name of this address has.
    Dns(Url),
}

pub(super) fn parse(urls: &[String]) -> Result<Place, SettingsError> {
    if urls.is_empty() {
        return Err(SettingsError::Empty);
    }
    if urls.len() > MAX_INSTANCES {
        return Err(SettingsError::TooMany(urls.len()));
    }
    if let Some(text) = urls.iter().find(|url| url.starts_with("dns+")) {
        if urls.len() > 1 {
            return Err(SettingsError::Mixed(text.clone()));
        }
        let url = address(text.trim_start_matches("dns+"), text)?;
        return Ok(Place::Dns(url));
    }
    let mut list = urls
        .iter()
        .map(|text| address(text, text))
        .collect::<Result<Vec<_>, _>>()?;
    list.sort();
    list.dedup();
    Ok(Place::List(list))
}

fn bad(text: &str, reason: impl ToString) -> SettingsError {
    // A password in it must not be printed: there should be none, but people try.
    let shown = match text.rsplit_once('@') {
        Some((_, host)) => format!("…@{host}"),
        None => text.to_owned(),
    };
    SettingsError::Url {
        url: shown,
        reason: reason.to_string(),
    }
}

fn address(text: &str, whole: &str) -> Result<Url, SettingsError> {
    let mut url: Url = text.parse().map_err(|e| bad(whole, e))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(bad(whole, "it is neither http nor https"));
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err(bad(whole, "it names no host"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad(
            whole,
            "it has a user or password; the token comes from a file",
        ));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(bad(whole, "it has a query or a fragment"));
    }
    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(&path);
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(urls: &[&str]) -> Result<Place, SettingsError> {
        parse(&urls.iter().map(|u| (*u).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn lists_and_names_are_told_apart_and_order_does_not_matter() {
        let a = parsed(&["http://b:1", "https://a", "http://b:1/"]).unwrap();
        assert_eq!(a, parsed(&["https://a/", "http://b:1"]).unwrap());
        assert!(matches!(&a, Place::List(list) if list.len() == 2));
        assert!(matches!(
            parsed(&["dns+https://store.test:8443"]),
            Ok(Place::Dns(_))
        ));
    }

    #[test]
    fn addresses_that_cannot_work_are_refused_and_passwords_not_printed() {
        for urls in [
            &[][..],
            &["store"],
            &["ftp://store"],
            &["http://"],
            &["http://store/?x"],
            &["dns+ftp://store:1"],
            &["dns+http://a:1", "http://b:1"],
        ] {
            assert!(parsed(urls).is_err(), "{urls:?}");
        }
        let error = parsed(&["http://me:secret@store:1"])
            .unwrap_err()
            .to_string();
        assert!(!error.contains("secret"), "{error}");
        assert!(parsed(&["http://a"; 65]).is_err());
    }
}
