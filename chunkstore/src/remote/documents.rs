//! The client: manifests, references, profiles.

use std::time::Duration;

use bytes::Bytes;
use lazyimg_convergent::{ChunkId, Digest, KeyId};
use reqwest::header::{
    CONTENT_TYPE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_MATCH, IF_NONE_MATCH,
};
use reqwest::{Method, StatusCode};
use serde::{Deserialize, Serialize};

use super::client::{PutOutcome, StoreClient};
use super::error::{StoreError, StoreErrorCode};
use super::exchange::{Answer, Ask};
use crate::wire::{CACHED_HEADER, LEASE_HEADER, MAX_PROFILE};

/// Length of the longest manifest and JSON document, in bytes.
const MAX_MANIFEST: usize = 64 << 20;
const MAX_JSON: usize = 64 << 10;
/// Length of a list of manifests of one image, in bytes.
const MAX_LIST: usize = 4 << 20;
/// Length of the longest reference, in bytes.
const MAX_REFERENCE: usize = 1024;

/// What a tag meant when its image was converted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefRecord {
    /// The image.
    pub image: Digest,
    /// When that was noted, in seconds since 1970.
    pub at: u64,
    /// Names this state, for [`RefCondition::Is`].
    pub etag: Option<String>,
}

/// What the store says of a reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RefAnswer {
    /// What it means.
    Found(RefRecord),
    /// It is not there.
    Missing,
    /// It is not there, and we are to bring it.
    Yours,
    /// It is not there, and had not come when the wait was over.
    Coming,
}

/// What the store says of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ManifestAnswer {
    /// Its bytes, **unverified**.
    Found(Bytes),
    /// It is not there.
    Missing,
    /// It is not there, and we are to bring it.
    Yours,
    /// It is not there, and had not come when the wait was over.
    Coming,
}

/// When a reference may be changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RefCondition {
    /// Whatever it means now.
    Always,
    /// When there is none.
    IsNew,
    /// When it still is the record with this [`RefRecord::etag`].
    Is(String),
}

/// A manifest in the store.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct StoredManifest {
    /// The tenant key that it is sealed for, in hex.
    pub key: String,
    /// Its length, in bytes.
    pub bytes: u64,
    /// The root it lies in.
    pub root: String,
}

#[derive(Serialize, Deserialize)]
struct RefDocument {
    image: Digest,
    #[serde(default, skip_serializing)]
    at: u64,
}

/// Documents are spread over the instances as chunks are.
fn key_of(name: &str) -> ChunkId {
    ChunkId::of(name.as_bytes())
}

fn not_found<T>(error: StoreError) -> Result<Option<T>, StoreError> {
    match error.code() {
        Some(StoreErrorCode::NotFound) => Ok(None),
        _ => Err(error),
    }
}

fn image_path(image: &Digest, rest: &[&str]) -> Vec<String> {
    let mut path = vec!["images".to_owned(), image.to_string()];
    path.extend(rest.iter().map(|segment| (*segment).to_owned()));
    path
}

impl StoreClient {
    /// The manifest of an image, sealed for a tenant key; **unverified**.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn get_manifest(
        &self,
        image: &Digest,
        key: &KeyId,
    ) -> Result<Option<Bytes>, StoreError> {
        let path = image_path(image, &["manifests", &key.to_string()]);
        let ask = self.ask("get a manifest", Method::GET, path);
        self.document(&key_of(&image.to_string()), &ask, MAX_MANIFEST)
            .await
    }

    /// [`StoreClient::get_manifest`] for those who can bring what is missing: the store tells who is to,
    /// and waits so long for others.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn await_manifest(
        &self,
        image: &Digest,
        key: &KeyId,
        wait: Duration,
    ) -> Result<ManifestAnswer, StoreError> {
        let path = image_path(image, &["manifests", &key.to_string()]);
        let mut ask = self.ask("get a manifest", Method::GET, path);
        ask.wait_for_others(wait);
        let rank = key_of(&image.to_string());
        match self.call(&rank, &ask, MAX_MANIFEST).await {
            Ok(answer) => Ok(ManifestAnswer::Found(answer.body)),
            Err(StoreError::Refused {
                code: StoreErrorCode::NotFound,
                lease,
                ..
            }) => Ok(match lease.as_deref() {
                Some("yours") => ManifestAnswer::Yours,
                Some("coming") => ManifestAnswer::Coming,
                _ => ManifestAnswer::Missing,
            }),
            Err(error) => Err(error),
        }
    }

    /// Puts a manifest for others to find, though its chunks may not be there: it does not make the
    /// image live.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn put_cached_manifest(
        &self,
        image: &Digest,
        key: &KeyId,
        manifest: Bytes,
    ) -> Result<(), StoreError> {
        let path = image_path(image, &["manifests", &key.to_string()]);
        let mut ask = self.ask("put a manifest", Method::PUT, path);
        within(manifest.len(), MAX_MANIFEST, "manifest")?;
        ask.body = manifest;
        let name = HeaderName::from_static(CACHED_HEADER);
        ask.headers.push((name, HeaderValue::from_static("1")));
        self.put_document(&key_of(&image.to_string()), &ask)
            .await
            .map(|_| ())
    }

    /// Puts a manifest; then the image is live. All chunks that it names must be put before: else the
    /// error is [`StoreErrorCode::Missing`] with those that are not.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn put_manifest(
        &self,
        image: &Digest,
        key: &KeyId,
        manifest: Bytes,
    ) -> Result<PutOutcome, StoreError> {
        let path = image_path(image, &["manifests", &key.to_string()]);
        let mut ask = self.ask("put a manifest", Method::PUT, path);
        within(manifest.len(), MAX_MANIFEST, "manifest")?;
        ask.body = manifest;
        self.put_document(&key_of(&image.to_string()), &ask).await
    }

    /// Takes an image's manifest away; false when there was none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn delete_manifest(&self, image: &Digest, key: &KeyId) -> Result<bool, StoreError> {
        let path = image_path(image, &["manifests", &key.to_string()]);
        let ask = self.ask("delete a manifest", Method::DELETE, path);
        self.delete(&key_of(&image.to_string()), &ask).await
    }

    /// The manifests of an image.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn manifests(&self, image: &Digest) -> Result<Vec<StoredManifest>, StoreError> {
        let ask = self.ask(
            "list manifests",
            Method::GET,
            image_path(image, &["manifests"]),
        );
        let list = self
            .document(&key_of(&image.to_string()), &ask, MAX_LIST)
            .await?;
        match list {
            Some(list) => self.json(&ask, &list),
            None => Ok(Vec::new()),
        }
    }

    /// A start profile of an image, as the client sealed it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn get_profile(
        &self,
        image: &Digest,
        name: &str,
    ) -> Result<Option<Bytes>, StoreError> {
        let path = image_path(image, &["profiles", name]);
        let ask = self.ask("get a profile", Method::GET, path);
        self.document(&key_of(&image.to_string()), &ask, MAX_PROFILE)
            .await
    }

    /// Puts a start profile of a live image.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn put_profile(
        &self,
        image: &Digest,
        name: &str,
        profile: Bytes,
    ) -> Result<(), StoreError> {
        within(profile.len(), MAX_PROFILE, "profile")?;
        let path = image_path(image, &["profiles", name]);
        let mut ask = self.ask("put a profile", Method::PUT, path);
        ask.body = profile;
        let key = key_of(&image.to_string());
        self.call(&key, &ask, MAX_JSON).await.map(|_| ())
    }

    /// Takes a start profile away; false when there was none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn delete_profile(&self, image: &Digest, name: &str) -> Result<bool, StoreError> {
        let path = image_path(image, &["profiles", name]);
        let ask = self.ask("delete a profile", Method::DELETE, path);
        self.delete(&key_of(&image.to_string()), &ask).await
    }

    /// What a reference meant when its image was converted. With `wait` as in
    /// [`StoreClient::get_many`].
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn get_ref(
        &self,
        reference: &str,
        wait: Option<Duration>,
    ) -> Result<RefAnswer, StoreError> {
        let mut ask = self.ref_ask("get a reference", Method::GET, reference)?;
        if let Some(wait) = wait {
            ask.wait_for_others(wait);
        }
        let Answer { headers, body, .. } = match self.call(&key_of(reference), &ask, MAX_JSON).await
        {
            Ok(answer) => answer,
            Err(StoreError::Refused {
                code: StoreErrorCode::NotFound,
                lease,
                ..
            }) => {
                return Ok(match lease.as_deref() {
                    Some("yours") => RefAnswer::Yours,
                    Some("coming") => RefAnswer::Coming,
                    _ => RefAnswer::Missing,
                });
            }
            Err(error) => return Err(error),
        };
        let etag = etag(&headers);
        let RefDocument { image, at } = self.json(&ask, &body)?;
        Ok(RefAnswer::Found(RefRecord { image, at, etag }))
    }

    /// Notes what a reference means. An error of [`StoreErrorCode::Precondition`] says that the
    /// condition does not hold.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn put_ref(
        &self,
        reference: &str,
        image: &Digest,
        condition: &RefCondition,
    ) -> Result<(), StoreError> {
        let mut ask = self.ref_ask("put a reference", Method::PUT, reference)?;
        let (name, value) = match condition {
            RefCondition::Always => (None, HeaderValue::from_static("*")),
            RefCondition::IsNew => (Some(IF_NONE_MATCH), HeaderValue::from_static("*")),
            RefCondition::Is(etag) => {
                let value = HeaderValue::from_str(etag)
                    .map_err(|_| StoreError::Limit("an ETag with odd characters".to_owned()))?;
                (Some(IF_MATCH), value)
            }
        };
        if let Some(name) = name {
            ask.headers.push((name, value));
        }
        let json = HeaderValue::from_static("application/json");
        ask.headers.push((CONTENT_TYPE, json));
        let document = RefDocument {
            image: *image,
            at: 0,
        };
        ask.body = serde_json::to_vec(&document)
            .map_err(|e| StoreError::Limit(e.to_string()))?
            .into();
        self.call(&key_of(reference), &ask, MAX_JSON)
            .await
            .map(|_| ())
    }

    /// Takes a reference away; false when there was none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn delete_ref(&self, reference: &str) -> Result<bool, StoreError> {
        let ask = self.ref_ask("delete a reference", Method::DELETE, reference)?;
        self.delete(&key_of(reference), &ask).await
    }

    fn ref_ask(
        &self,
        what: &'static str,
        method: Method,
        reference: &str,
    ) -> Result<Ask, StoreError> {
        within(reference.len(), MAX_REFERENCE, "reference")?;
        let path = vec!["refs".to_owned(), reference.to_owned()];
        Ok(self.ask(what, method, path))
    }

    async fn document(
        &self,
        key: &ChunkId,
        ask: &Ask,
        limit: usize,
    ) -> Result<Option<Bytes>, StoreError> {
        match self.call(key, ask, limit).await {
            Ok(answer) => Ok(Some(answer.body)),
            Err(error) => not_found(error),
        }
    }

    async fn put_document(&self, key: &ChunkId, ask: &Ask) -> Result<PutOutcome, StoreError> {
        let answer = self.call(key, ask, MAX_JSON).await?;
        Ok(match answer.status {
            StatusCode::CREATED => PutOutcome::Put,
            _ => PutOutcome::Had,
        })
    }

    async fn delete(&self, key: &ChunkId, ask: &Ask) -> Result<bool, StoreError> {
        match self.call(key, ask, MAX_JSON).await {
            Ok(_) => Ok(true),
            Err(error) => not_found::<()>(error).map(|_| false),
        }
    }

    fn json<T: for<'de> Deserialize<'de>>(&self, ask: &Ask, body: &[u8]) -> Result<T, StoreError> {
        serde_json::from_slice(body).map_err(|e| StoreError::Protocol {
            instance: self.origin().to_owned(),
            what: ask.what,
            reason: e.to_string(),
        })
    }
}

fn etag(headers: &HeaderMap) -> Option<String> {
    Some(headers.get(ETAG)?.to_str().ok()?.to_owned())
}

pub(super) fn lease(headers: &HeaderMap) -> Option<String> {
    Some(headers.get(LEASE_HEADER)?.to_str().ok()?.to_owned())
}

fn within(len: usize, most: usize, what: &str) -> Result<(), StoreError> {
    if (1..=most).contains(&len) {
        return Ok(());
    }
    Err(StoreError::Limit(format!(
        "a {what} of {len} bytes; the store takes 1 to {most}"
    )))
}
