//! Which manifests refer to another: the Referrers API, or the fallback tag that clients keep
//! (distribution specification 1.1, "Listing Referrers", "Referrers Tag Schema").

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use lazyimg_convergent::Digest;
use oci_client::manifest::OCI_IMAGE_INDEX_MEDIA_TYPE;
use reqwest::header::{CONTENT_TYPE, LINK};
use reqwest::{Method, StatusCode, Url};
use tokio::time::Instant;

use super::Registry;
use super::auth::Access;
use super::body::BodyReader;
use super::endpoint::next_link;
use super::http::label;
use super::manifests::header;
use crate::reference::ManifestRef;
use crate::source::document::{self, Descriptor, MAX_MANIFEST_BYTES};
use crate::source::{SourceError, referrers_tag};

/// Nothing is known of the registry's Referrers API.
pub(super) const UNKNOWN: u8 = 0;
/// It has one.
pub(super) const PRESENT: u8 = 1;
/// It has none.
pub(super) const ABSENT: u8 = 2;

/// The most pages of referrers that are read.
const MAX_PAGES: usize = 32;

/// How often a contended fallback tag is written.
const MAX_WRITE_ATTEMPTS: u32 = 12;

/// What one page of the API says.
enum Page {
    Referrers(Vec<Descriptor>, Option<Url>),
    NoApi,
}

impl Registry {
    pub(crate) async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: &str,
    ) -> Result<Vec<Descriptor>, SourceError> {
        match self.0.referrers_api.load(Ordering::Relaxed) {
            PRESENT => self
                .ask_api(subject, artifact_type)
                .await
                .map(Option::unwrap_or_default),
            ABSENT => self.read_tag(subject).await.map(|(list, _)| list),
            // Both at once, on two connections: one round trip whichever it is.
            _ => {
                let (api, tag) =
                    tokio::join!(self.ask_api(subject, artifact_type), self.read_tag(subject));
                match (api, tag) {
                    (Ok(Some(list)), _) => Ok(list),
                    (Ok(None), tag) => tag.map(|(list, _)| list),
                    // Some registries answer strangely where the API would be; what the tag lists is
                    // true all the same.
                    (Err(e), Ok((list, _))) if !list.is_empty() => {
                        tracing::debug!(error = %e, "the Referrers API gave no answer; using the fallback tag");
                        Ok(list)
                    }
                    (Err(e), _) => Err(e),
                }
            }
        }
    }

    pub(crate) async fn add_referrer(
        &self,
        subject: &Digest,
        descriptor: &Descriptor,
    ) -> Result<(), SourceError> {
        let inner = &*self.0;
        if inner.referrers_api.load(Ordering::Relaxed) == UNKNOWN {
            self.ask_api(subject, "").await?;
        }
        if inner.referrers_api.load(Ordering::Relaxed) == PRESENT {
            return Ok(());
        }
        let listed = |list: &[Descriptor]| list.iter().any(|d| d.digest == descriptor.digest);
        self.write_tag(subject, listed, |what, index| {
            with_entry(what, index, descriptor)
        })
        .await
        .map(|_| ())
    }

    pub(crate) async fn remove_referrer(
        &self,
        subject: &Digest,
        referrer: &Digest,
    ) -> Result<bool, SourceError> {
        let unlisted = |list: &[Descriptor]| list.iter().all(|d| d.digest != *referrer);
        self.write_tag(subject, unlisted, |what, index| {
            without_entry(what, index, referrer)
        })
        .await
    }

    /// Reads the fallback tag, changes the index with `edit`, writes it, and reads it again, until
    /// `is_done` stays true of what it lists: registries have no conditional writes. False when it
    /// was true at once.
    async fn write_tag(
        &self,
        subject: &Digest,
        is_done: impl Fn(&[Descriptor]) -> bool,
        edit: impl Fn(&str, Option<&[u8]>) -> Result<Bytes, SourceError>,
    ) -> Result<bool, SourceError> {
        let _one_at_a_time = self.0.writing_referrers.lock().await;
        let tag = ManifestRef::Tag(referrers_tag(subject));
        for attempt in 0..MAX_WRITE_ATTEMPTS {
            let begun = Instant::now();
            let (list, bytes) = self.read_tag(subject).await?;
            if is_done(&list) {
                return Ok(attempt > 0);
            }
            let what = format!("the list of referrers {}", referrers_tag(subject));
            let bytes = edit(&what, bytes.as_deref())?;
            let digest = Digest::of(&bytes);
            self.push_manifest(&tag, OCI_IMAGE_INDEX_MEDIA_TYPE, bytes, digest)
                .await?;
            // Somebody who read before we wrote may write after us, without our change. Whoever did
            // so takes about as long as we did: look again after several times that.
            let window =
                (begun.elapsed() * 3).clamp(Duration::from_millis(30), Duration::from_secs(2));
            let mut stayed = true;
            for _ in 0..2 {
                tokio::time::sleep(window.mul_f64(0.4 + fastrand::f64() * 0.2)).await;
                let (list, _) = self.read_tag(subject).await?;
                stayed &= is_done(&list);
            }
            if stayed {
                return Ok(true);
            }
            tracing::debug!(%subject, attempt, "another writer replaced the list of referrers");
            // Spread the writers out before the next round.
            tokio::time::sleep(window.mul_f64(fastrand::f64() * f64::from(attempt + 1))).await;
        }
        Err(SourceError::Contended {
            subject: subject.to_string(),
            place: self.name().into(),
        })
    }

    /// Keeps what an answer told of the API.
    pub(super) fn learned(&self, state: u8) {
        self.0.referrers_api.store(state, Ordering::Relaxed);
    }

    /// What the API lists; `None` when the registry has none.
    async fn ask_api(
        &self,
        subject: &Digest,
        artifact_type: &str,
    ) -> Result<Option<Vec<Descriptor>>, SourceError> {
        let mut url = self
            .0
            .endpoint
            .referrers(&subject.to_string(), artifact_type);
        let mut all = Vec::new();
        for _ in 0..MAX_PAGES {
            match self.page(subject, &url).await? {
                Page::NoApi => {
                    self.learned(ABSENT);
                    return Ok(None);
                }
                Page::Referrers(page, next) => {
                    self.learned(PRESENT);
                    all.extend(page);
                    match next {
                        Some(next) => url = next,
                        None => break,
                    }
                }
            }
        }
        Ok(Some(all))
    }

    async fn page(&self, subject: &Digest, url: &Url) -> Result<Page, SourceError> {
        let what = format!("the referrers of {subject}");
        self.small(&label("GET", url), 0, || async {
            let request = || Some(self.0.http.request(Method::GET, url.clone()));
            let response = self.send(&Access::Pull, &what, request).await?;
            let content_type =
                header(response.headers(), CONTENT_TYPE.as_str()).unwrap_or_default();
            let is_index = content_type.split(';').next().unwrap_or_default().trim()
                == OCI_IMAGE_INDEX_MEDIA_TYPE;
            match response.status() {
                StatusCode::OK if is_index => {
                    let next = header(response.headers(), LINK.as_str())
                        .and_then(|link| next_link(url, link));
                    let bytes = BodyReader::new(response, self.0.options.timeouts)
                        .all(&what, MAX_MANIFEST_BYTES)
                        .await?;
                    let index = document::parse_index(&what, &bytes)?;
                    Ok(Page::Referrers(index.manifests, next))
                }
                // Registries without the API answer 404; old ones and proxies also so.
                StatusCode::OK
                | StatusCode::NOT_FOUND
                | StatusCode::METHOD_NOT_ALLOWED
                | StatusCode::NOT_IMPLEMENTED => {
                    let _ = self.0.http.small_body(response).await;
                    Ok(Page::NoApi)
                }
                _ => Err(self.refusal(&Method::GET, &what, response).await),
            }
        })
        .await
    }

    /// What the fallback tag lists, and the index it is; nothing when there is none.
    async fn read_tag(
        &self,
        subject: &Digest,
    ) -> Result<(Vec<Descriptor>, Option<Bytes>), SourceError> {
        let tag = referrers_tag(subject);
        let manifest = match self
            .manifest(&ManifestRef::Tag(tag.clone()), MAX_MANIFEST_BYTES)
            .await
        {
            Ok(manifest) => manifest,
            Err(e) if e.is_not_found() => return Ok((Vec::new(), None)),
            Err(e) => return Err(e),
        };
        let index =
            document::parse_index(&format!("the list of referrers {tag}"), &manifest.bytes)?;
        Ok((index.manifests, Some(manifest.bytes)))
    }
}

/// An index with one entry more; all that others wrote stays as it is.
fn with_entry(
    what: &str,
    index: Option<&[u8]>,
    descriptor: &Descriptor,
) -> Result<Bytes, SourceError> {
    let malformed = |e: serde_json::Error| SourceError::malformed(what, e);
    let mut index: serde_json::Map<String, serde_json::Value> = match index {
        Some(bytes) => serde_json::from_slice(bytes).map_err(malformed)?,
        None => serde_json::Map::from_iter([
            ("schemaVersion".to_owned(), 2.into()),
            ("mediaType".to_owned(), OCI_IMAGE_INDEX_MEDIA_TYPE.into()),
        ]),
    };
    let entry = serde_json::to_value(descriptor).map_err(malformed)?;
    match index
        .entry("manifests")
        .or_insert_with(|| serde_json::Value::Array(Vec::new()))
    {
        serde_json::Value::Array(entries) => entries.push(entry),
        other => *other = serde_json::Value::Array(vec![entry]),
    }
    let bytes = serde_json::to_vec(&index).map_err(malformed)?;
    if bytes.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(SourceError::TooLarge {
            what: what.into(),
            limit: MAX_MANIFEST_BYTES,
            unit: "bytes",
        });
    }
    Ok(bytes.into())
}

/// An index without the entry of one manifest; all else stays as it is.
fn without_entry(what: &str, index: Option<&[u8]>, digest: &Digest) -> Result<Bytes, SourceError> {
    let malformed = |e: serde_json::Error| SourceError::malformed(what, e);
    let mut index: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(index.unwrap_or_default()).map_err(malformed)?;
    let digest = digest.to_string();
    if let Some(serde_json::Value::Array(entries)) = index.get_mut("manifests") {
        entries.retain(|e| e["digest"] != digest.as_str());
    }
    Ok(serde_json::to_vec(&index).map_err(malformed)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_added_and_foreign_fields_stay() {
        let descriptor = Descriptor::new("a/b", Digest::of(b"x"), 1);
        let old = br#"{"schemaVersion":2,"annotations":{"k":"v"},"manifests":[{"digest":"sha512:00","x":1}]}"#;
        let new: serde_json::Value =
            serde_json::from_slice(&with_entry("it", Some(old), &descriptor).unwrap()).unwrap();
        assert_eq!(new["annotations"]["k"], "v");
        assert_eq!(new["manifests"][0]["x"], 1);
        assert_eq!(new["manifests"][1]["digest"], Digest::of(b"x").to_string());
        let fresh: serde_json::Value =
            serde_json::from_slice(&with_entry("it", None, &descriptor).unwrap()).unwrap();
        assert_eq!(fresh["mediaType"], OCI_IMAGE_INDEX_MEDIA_TYPE);
        assert_eq!(fresh["manifests"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn an_entry_is_taken_out_and_foreign_fields_stay() {
        let (gone, stays) = (Digest::of(b"x"), Digest::of(b"y"));
        let old = format!(
            r#"{{"schemaVersion":2,"annotations":{{"k":"v"}},"manifests":[{{"digest":"{gone}"}},{{"digest":"{stays}","x":1}}]}}"#
        );
        let new: serde_json::Value =
            serde_json::from_slice(&without_entry("it", Some(old.as_bytes()), &gone).unwrap())
                .unwrap();
        assert_eq!(new["annotations"]["k"], "v");
        assert_eq!(new["manifests"][0]["x"], 1);
        assert_eq!(new["manifests"].as_array().unwrap().len(), 1);
    }
}
