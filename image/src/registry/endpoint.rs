//! Addresses of one repository: which scheme, which host, which paths. No I/O.

use reqwest::Url;

use crate::source::SourceError;

/// Where one repository's API is.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    base: Url,
    repository: String,
}

impl Endpoint {
    /// For a registry as references name it. Loopback hosts speak plain HTTP, others only when
    /// `plain_http` says so.
    pub(super) fn new(
        registry: &str,
        repository: &str,
        plain_http: bool,
    ) -> Result<Self, SourceError> {
        let host = match registry {
            // Docker Hub's references and its API have different names.
            "docker.io" | "index.docker.io" => "registry-1.docker.io",
            other => other,
        };
        let scheme = if plain_http || is_loopback(host) {
            "http"
        } else {
            "https"
        };
        let base = Url::parse(&format!("{scheme}://{host}/v2/"))
            .map_err(|e| SourceError::malformed(format!("the registry name `{registry}`"), e))?;
        Ok(Self {
            base,
            repository: repository.to_owned(),
        })
    }

    /// The API's root.
    pub(super) fn root(&self) -> &Url {
        &self.base
    }

    /// Whether requests go out in the clear.
    pub(super) fn is_plain(&self) -> bool {
        self.base.scheme() == "http"
    }

    /// Whether the host is this machine.
    pub(super) fn is_loopback(&self) -> bool {
        self.base.host_str().is_some_and(is_loopback)
    }

    pub(super) fn manifest(&self, reference: &str) -> Url {
        self.path(&["manifests", reference])
    }

    pub(super) fn blob(&self, digest: &str) -> Url {
        self.path(&["blobs", digest])
    }

    pub(super) fn uploads(&self) -> Url {
        self.path(&["blobs", "uploads", ""])
    }

    pub(super) fn mount(&self, digest: &str, from: &str) -> Url {
        let mut url = self.uploads();
        url.query_pairs_mut()
            .append_pair("mount", digest)
            .append_pair("from", from);
        url
    }

    pub(super) fn referrers(&self, digest: &str, artifact_type: &str) -> Url {
        let mut url = self.path(&["referrers", digest]);
        if !artifact_type.is_empty() {
            url.query_pairs_mut()
                .append_pair("artifactType", artifact_type);
        }
        url
    }

    pub(super) fn tags(&self, page: usize) -> Url {
        let mut url = self.path(&["tags", "list"]);
        url.query_pairs_mut().append_pair("n", &page.to_string());
        url
    }

    fn path(&self, rest: &[&str]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty()
                .extend(self.repository.split('/'))
                .extend(rest);
        }
        url
    }
}

/// `localhost`, `127.0.0.0/8` or `::1`, with or without a port.
pub(super) fn is_loopback(host: &str) -> bool {
    let bare = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None if host.parse::<std::net::Ipv6Addr>().is_ok() => host,
        None => host.split(':').next().unwrap_or_default(),
    };
    let named =
        bare.eq_ignore_ascii_case("localhost") || bare.to_ascii_lowercase().ends_with(".localhost");
    named
        || bare
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

/// Whether two addresses have scheme, host and port in common: only then may one's credentials go
/// to the other.
pub(super) fn same_origin(a: &Url, b: &Url) -> bool {
    a.origin() == b.origin() && a.origin().is_tuple()
}

/// An address for messages: signed redirect targets hold secrets in their query, some URLs a
/// password in front of the host.
pub(super) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.to_string()
}

/// Where a `Location` leads from `from`, if we go there: absolute or relative, HTTP or HTTPS, never
/// from HTTPS down to HTTP, never with credentials of its own.
pub(super) fn follow(from: &Url, location: &str) -> Result<Url, String> {
    let mut next = from
        .join(location)
        .map_err(|e| format!("its target is no address ({e})"))?;
    if !matches!(next.scheme(), "http" | "https") {
        return Err(format!("its target has the scheme {}", next.scheme()));
    }
    if from.scheme() == "https" && next.scheme() == "http" {
        return Err("it leads from HTTPS to plain HTTP".into());
    }
    let _ = next.set_username("");
    let _ = next.set_password(None);
    next.set_fragment(None);
    Ok(next)
}

/// The target of a `Link` header with `rel="next"` (RFC 8288), for pages of tags and referrers.
pub(super) fn next_link(from: &Url, header: &str) -> Option<Url> {
    header.split(',').find_map(|link| {
        let (target, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
        let is_next = parameters.split(';').any(|p| {
            let p = p.trim();
            p.strip_prefix("rel=")
                .is_some_and(|v| v.trim_matches('"').eq_ignore_ascii_case("next"))
        });
        let next = is_next.then(|| follow(from, target).ok())??;
        // A page elsewhere would get our token.
        same_origin(from, &next).then_some(next)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn only_loopback_is_plain_without_a_flag() {
        for (registry, scheme) in [
            ("127.0.0.1:5000", "http"),
            ("127.9.9.9", "http"),
            ("localhost:5000", "http"),
            ("x.localhost", "http"),
            ("[::1]:5000", "http"),
            ("128.0.0.1:5000", "https"),
            ("localhost.example.org", "https"),
            ("127.0.0.1.example.org", "https"),
            ("docker.io", "https"),
        ] {
            let endpoint = Endpoint::new(registry, "x", false).unwrap();
            assert_eq!(endpoint.root().scheme(), scheme, "{registry}");
        }
        assert!(Endpoint::new("example.org", "x", true).unwrap().is_plain());
    }

    #[test]
    fn docker_hub_is_asked_where_its_registry_is() {
        let endpoint = Endpoint::new("docker.io", "library/debian", false).unwrap();
        assert_eq!(
            endpoint.manifest("v1").as_str(),
            "https://registry-1.docker.io/v2/library/debian/manifests/v1"
        );
    }

    #[test]
    fn addresses_are_those_of_the_distribution_specification() {
        let endpoint = Endpoint::new("h:1", "a/b", true).unwrap();
        assert_eq!(
            endpoint.uploads().as_str(),
            "http://h:1/v2/a/b/blobs/uploads/"
        );
        assert_eq!(
            endpoint.blob("sha256:00").as_str(),
            "http://h:1/v2/a/b/blobs/sha256:00"
        );
        assert_eq!(
            endpoint.mount("sha256:00", "c/d").as_str(),
            "http://h:1/v2/a/b/blobs/uploads/?mount=sha256%3A00&from=c%2Fd"
        );
        assert_eq!(
            endpoint.referrers("sha256:00", "a/b+c").as_str(),
            "http://h:1/v2/a/b/referrers/sha256:00?artifactType=a%2Fb%2Bc"
        );
        assert_eq!(endpoint.referrers("sha256:00", "").query(), None);
    }

    #[test]
    fn another_port_or_scheme_is_another_origin() {
        assert!(same_origin(&url("https://h/a"), &url("https://h:443/b?c")));
        for other in ["https://h:444/", "http://h/", "https://g/", "https://h.g/"] {
            assert!(!same_origin(&url("https://h/"), &url(other)), "{other}");
        }
    }

    #[test]
    fn no_secret_of_an_address_is_shown() {
        assert_eq!(shown(&url("https://u:p@h/x?sig=secret#f")), "https://h/x");
    }

    #[test]
    fn redirects_never_step_down_to_plain_http() {
        assert_eq!(
            follow(&url("https://h/a/b"), "../c?d").unwrap().as_str(),
            "https://h/c?d"
        );
        assert_eq!(
            follow(&url("http://h/a"), "https://u:p@g/x")
                .unwrap()
                .as_str(),
            "https://g/x"
        );
        assert!(follow(&url("https://h/a"), "http://h/a").is_err());
        assert!(follow(&url("https://h/a"), "file:///etc/passwd").is_err());
        assert!(follow(&url("https://h/a"), "https://").is_err());
    }

    #[test]
    fn the_next_page_is_taken_from_the_link_header_of_the_same_origin_only() {
        let from = url("http://h/v2/x/tags/list?n=2");
        let next = |header| next_link(&from, header).map(|u| u.to_string());
        assert_eq!(
            next("</v2/x/tags/list?last=b&n=2>; rel=\"next\"").as_deref(),
            Some("http://h/v2/x/tags/list?last=b&n=2")
        );
        assert_eq!(
            next("</a>; rel=prev, </b>; rel=next").as_deref(),
            Some("http://h/b")
        );
        assert_eq!(next("<http://evil/>; rel=next"), None);
        assert_eq!(next("garbage"), None);
    }
}
