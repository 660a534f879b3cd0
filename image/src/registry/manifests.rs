//! Manifests and tags.

use bytes::Bytes;
use lazyimg_convergent::Digest;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue, LINK};
use reqwest::{Method, Response, StatusCode};
use serde::Deserialize;

use super::Registry;
use super::auth::Access;
use super::body::BodyReader;
use super::endpoint::next_link;
use super::http::label;
use super::referrers;
use super::retry::Failure;
use crate::reference::ManifestRef;
use crate::source::document::{self, ACCEPT_MANIFEST, MAX_MANIFEST_BYTES};
use crate::source::{Deletion, Manifest, Pushed, SourceError};

/// How many tags one page asks for.
const TAGS_PER_PAGE: usize = 1000;

/// The largest page of tags, in bytes: 128 bytes a tag, and room for a server that ignores the count.
const MAX_TAGS_PAGE: u64 = 4 << 20;

/// The header by which a registry tells the digest of a manifest.
const CONTENT_DIGEST: &str = "docker-content-digest";

/// The header by which a registry tells that it lists a manifest as a referrer of its subject.
const OCI_SUBJECT: &str = "oci-subject";

#[derive(Deserialize)]
struct TagPage {
    tags: Option<Vec<String>>,
}

impl Registry {
    pub(crate) async fn manifest(
        &self,
        reference: &ManifestRef,
        max: u64,
    ) -> Result<Manifest, SourceError> {
        let text = self.reference_text(reference)?;
        let url = self.0.endpoint.manifest(&text);
        let what = format!("manifest {text}");
        let (bytes, headers) = self
            .small(&label("GET", &url), 0, || async {
                let request = || {
                    let mut request = self.0.http.request(Method::GET, url.clone());
                    request
                        .headers
                        .insert(ACCEPT, HeaderValue::from_static(ACCEPT_MANIFEST));
                    Some(request)
                };
                let response = self.send(&Access::Pull, &what, request).await?;
                if response.status() != StatusCode::OK {
                    return Err(self.refusal(&Method::GET, &what, response).await);
                }
                let headers = response.headers().clone();
                let max = max.min(MAX_MANIFEST_BYTES);
                Ok((
                    BodyReader::new(response, self.0.options.timeouts)
                        .all(&what, max)
                        .await?,
                    headers,
                ))
            })
            .await?;
        let digest = Digest::of(&bytes);
        let promised = match reference {
            ManifestRef::Digest(digest) => Some(*digest),
            // The registry's own word for a tag; a broken proxy shows here.
            _ => header(&headers, CONTENT_DIGEST).and_then(|text| text.parse().ok()),
        };
        if let Some(expected) = promised.filter(|expected| *expected != digest) {
            return Err(SourceError::DigestMismatch {
                what,
                expected: expected.to_string(),
                actual: digest.to_string(),
            });
        }
        let media_type =
            document::media_type(&what, header(&headers, CONTENT_TYPE.as_str()), &bytes)?;
        Ok(Manifest {
            bytes,
            media_type,
            digest,
        })
    }

    pub(crate) async fn push_manifest(
        &self,
        reference: &ManifestRef,
        media_type: &str,
        bytes: Bytes,
        digest: Digest,
    ) -> Result<Pushed, SourceError> {
        let text = self.reference_text(reference)?;
        let url = self.0.endpoint.manifest(&text);
        let what = format!("manifest {text}");
        let content_type =
            HeaderValue::from_str(media_type).map_err(|e| SourceError::malformed(&*what, e))?;
        let size = bytes.len() as u64;
        let response: Response = self
            .small(&label("PUT", &url), size, || async {
                let request = || {
                    let mut request = self.0.http.request(Method::PUT, url.clone());
                    request.headers.insert(CONTENT_TYPE, content_type.clone());
                    request.body = Some(bytes.clone().into());
                    Some(request)
                };
                let response = self.send(&Access::Push, &what, request).await?;
                if !response.status().is_success() {
                    return Err(self.refusal(&Method::PUT, &what, response).await);
                }
                Ok(response)
            })
            .await?;
        let headers = response.headers().clone();
        let _ = self.0.http.small_body(response).await;
        let stored = header(&headers, CONTENT_DIGEST).and_then(|text| text.parse::<Digest>().ok());
        if let Some(stored) = stored.filter(|stored| *stored != digest) {
            return Err(SourceError::DigestMismatch {
                what,
                expected: digest.to_string(),
                actual: stored.to_string(),
            });
        }
        let subject_listed = headers.contains_key(OCI_SUBJECT);
        if subject_listed {
            self.learned(referrers::PRESENT);
        }
        Ok(Pushed {
            digest,
            subject_listed,
        })
    }

    pub(crate) async fn delete_manifest(&self, digest: &Digest) -> Result<Deletion, SourceError> {
        let url = self.0.endpoint.manifest(&digest.to_string());
        let what = format!("to delete manifest {digest}");
        self.small(&label("DELETE", &url), 0, || async {
            let request = || Some(self.0.http.request(Method::DELETE, url.clone()));
            let response = self.send(&Access::Delete, &what, request).await?;
            match deletion(response.status()) {
                Some(told) => {
                    let _ = self.0.http.small_body(response).await;
                    Ok(told)
                }
                None => Err(self.refusal(&Method::DELETE, &what, response).await),
            }
        })
        .await
    }

    pub(crate) async fn tags(&self, limit: usize) -> Result<Vec<String>, SourceError> {
        let mut url = self.0.endpoint.tags(limit.clamp(1, TAGS_PER_PAGE));
        let what = "the list of tags";
        let mut tags = Vec::new();
        // Each page brings at least one tag or is the last.
        while tags.len() < limit {
            let (bytes, next) = self
                .small(&label("GET", &url), 0, || async {
                    let request = || Some(self.0.http.request(Method::GET, url.clone()));
                    let response = self.send(&Access::Pull, what, request).await?;
                    if response.status() != StatusCode::OK {
                        return Err(self.refusal(&Method::GET, what, response).await);
                    }
                    let next = header(response.headers(), LINK.as_str())
                        .and_then(|link| next_link(&url, link));
                    let bytes = BodyReader::new(response, self.0.options.timeouts)
                        .all(what, MAX_TAGS_PAGE)
                        .await?;
                    Ok::<_, Failure>((bytes, next))
                })
                .await?;
            let page: TagPage =
                serde_json::from_slice(&bytes).map_err(|e| SourceError::malformed(what, e))?;
            let page = page.tags.unwrap_or_default();
            let last = page.is_empty();
            tags.extend(page);
            match next {
                Some(next) if !last => url = next,
                _ => break,
            }
        }
        tags.truncate(limit);
        Ok(tags)
    }

    fn reference_text(&self, reference: &ManifestRef) -> Result<String, SourceError> {
        match reference {
            ManifestRef::Tag(tag) => Ok(tag.clone()),
            ManifestRef::Digest(digest) => Ok(digest.to_string()),
            ManifestRef::Sole => Err(SourceError::Unsupported {
                what: "a reference without tag and digest",
                place: self.name().into(),
            }),
        }
    }
}

/// What the answer to a deletion means; `None` for a failure. Registries that delete nothing answer
/// 405 (distribution specification, "Content Management"), some 400 or 501.
fn deletion(status: StatusCode) -> Option<Deletion> {
    match status {
        status if status.is_success() => Some(Deletion::Deleted),
        StatusCode::NOT_FOUND | StatusCode::GONE => Some(Deletion::WasGone),
        StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED | StatusCode::BAD_REQUEST => {
            Some(Deletion::Unsupported)
        }
        _ => None,
    }
}

pub(super) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}
