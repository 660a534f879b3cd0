//! What a registry asks for in `WWW-Authenticate`. No I/O.

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// How a registry wants to be convinced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User and password with each request.
    Basic,
    /// A token from a token service (distribution specification, token authentication).
    Bearer {
        /// Address of the token service.
        realm: String,
        /// Name of the registry there.
        service: Option<String>,
        /// What the refused request would have needed, separated by spaces.
        scope: Option<String>,
    },
}

/// The challenge to answer: a bearer challenge before a basic one; `None` when there is neither.
pub(super) fn from_headers(headers: &HeaderMap) -> Option<Challenge> {
    let mut basic = None;
    for value in headers.get_all(WWW_AUTHENTICATE) {
        let Ok(text) = value.to_str() else { continue };
        // The parser yields what comes before a syntax error, then the error, then nothing.
        for challenge in http_auth::parser::ChallengeParser::new(text).map_while(Result::ok) {
            let parameter = |name: &str| {
                let found = challenge
                    .params
                    .iter()
                    .find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.to_unescaped())
            };
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Challenge::Basic);
            } else if challenge.scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = parameter("realm")
            {
                return Some(Challenge::Bearer {
                    realm,
                    service: parameter("service"),
                    scope: parameter("scope"),
                });
            }
        }
    }
    basic
}

#[cfg(test)]
mod tests {
    use super::*;
    use reqwest::header::HeaderValue;

    fn parsed(values: &[&'static str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_static(value));
        }
        from_headers(&headers)
    }

    #[test]
    fn a_bearer_challenge_keeps_commas_inside_its_scope() {
        let text = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        assert_eq!(
            parsed(&[text]),
            Some(Challenge::Bearer {
                realm: "https://auth.docker.io/token".into(),
                service: Some("registry.docker.io".into()),
                scope: Some("repository:a/b:pull,push".into()),
            })
        );
    }

    #[test]
    fn bearer_wins_over_basic_in_any_order_and_case() {
        let bearer = Some(Challenge::Bearer {
            realm: "https://h/t".into(),
            service: None,
            scope: None,
        });
        assert_eq!(
            parsed(&["Basic realm=\"x\"", "bearer REALM=\"https://h/t\""]),
            bearer
        );
        assert_eq!(
            parsed(&["BEARER realm=\"https://h/t\", Basic realm=\"x\""]),
            bearer
        );
        assert_eq!(
            parsed(&["basic realm=\"Registry Realm\""]),
            Some(Challenge::Basic)
        );
    }

    #[test]
    fn what_cannot_be_answered_is_no_challenge() {
        assert_eq!(parsed(&[]), None);
        assert_eq!(parsed(&["Negotiate"]), None);
        assert_eq!(parsed(&["Bearer service=\"no realm\""]), None);
        assert_eq!(parsed(&["=,=\"\\"]), None);
    }
}
