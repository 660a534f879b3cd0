//! References: what a tag meant when the image was converted.

use lazyimg_convergent::Digest;
use serde::{Deserialize, Serialize};

use crate::engine::When;

use super::names;
use super::roots::json;
use super::types::{Condition, Reference, TenantName};
use super::{Catalog, CatalogError, MAX_REFERENCE, MAX_REFERENCES};

#[derive(Serialize, Deserialize)]
struct Doc {
    reference: String,
    image: String,
    at: u64,
}

impl Catalog {
    /// Says what a reference means. `If-Match` between two instances that write the same reference
    /// at the same time is not watertight: the later one wins.
    ///
    /// # Errors
    /// [`CatalogError::Precondition`]; [`CatalogError::BadName`], [`CatalogError::TooLarge`],
    /// [`CatalogError::TooMany`].
    pub async fn put_ref(
        &self,
        tenant: &TenantName,
        reference: &str,
        image: &Digest,
        condition: &Condition,
    ) -> Result<Reference, CatalogError> {
        check(reference)?;
        let name = names::reference(tenant, reference);
        let doc = Doc {
            reference: reference.to_owned(),
            image: image.to_string(),
            at: self.now_ms() / 1000,
        };
        let bytes = json(&doc)?;
        let etag = etag(&bytes);
        let _one_changes = self.references.lock(name.clone()).await;
        let may_be_new = !matches!(condition, Condition::Match(_));
        if may_be_new && !self.has_doc(name.clone()).await? {
            self.check_room_for_ref(tenant).await?;
        }
        let when = match condition {
            Condition::Always => When::Always,
            Condition::Absent => When::Absent,
            Condition::Match(_) => {
                self.check_ref(&name, condition).await?;
                When::Always
            }
        };
        let written = self.engine.put_doc(&name, bytes, when).await?;
        if !written && when == When::Absent {
            return Err(CatalogError::Precondition);
        }
        Ok(Reference {
            image: *image,
            at: doc.at,
            etag,
        })
    }

    /// What a reference means.
    ///
    /// # Errors
    /// [`CatalogError::Engine`], [`CatalogError::Damaged`].
    pub async fn get_ref(
        &self,
        tenant: &TenantName,
        reference: &str,
    ) -> Result<Option<Reference>, CatalogError> {
        check(reference)?;
        self.read_ref(&names::reference(tenant, reference)).await
    }

    /// Forgets a reference; false when there was none.
    ///
    /// # Errors
    /// [`CatalogError::Precondition`], [`CatalogError::Engine`].
    pub async fn delete_ref(
        &self,
        tenant: &TenantName,
        reference: &str,
        condition: &Condition,
    ) -> Result<bool, CatalogError> {
        check(reference)?;
        let name = names::reference(tenant, reference);
        let _one_changes = self.references.lock(name.clone()).await;
        let there = self.check_ref(&name, condition).await?;
        if there {
            self.engine.delete_doc(&name).await?;
        }
        Ok(there)
    }

    /// Whether one more is allowed. Some that come at the same moment may be too many.
    async fn check_room_for_ref(&self, tenant: &TenantName) -> Result<(), CatalogError> {
        let there = self.all_docs(&names::references(tenant)).await?.len();
        match there < MAX_REFERENCES {
            true => Ok(()),
            false => Err(CatalogError::TooMany {
                what: "references",
                limit: MAX_REFERENCES,
            }),
        }
    }

    /// Whether the reference is there; an error if the condition does not hold.
    async fn check_ref(&self, name: &str, condition: &Condition) -> Result<bool, CatalogError> {
        let doc = self.engine.get_doc(name).await?;
        let etag = doc.map(|bytes| etag(&bytes));
        let holds = match condition {
            Condition::Always => true,
            Condition::Absent => etag.is_none(),
            Condition::Match(wanted) => etag.as_ref() == Some(wanted),
        };
        match holds {
            true => Ok(etag.is_some()),
            false => Err(CatalogError::Precondition),
        }
    }

    async fn read_ref(&self, name: &str) -> Result<Option<Reference>, CatalogError> {
        let Some(bytes) = self.engine.get_doc(name).await? else {
            return Ok(None);
        };
        let damaged = |why: String| CatalogError::Damaged {
            name: name.to_owned(),
            why,
        };
        let doc: Doc = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        Ok(Some(Reference {
            image: doc.image.parse().map_err(|_| damaged("no image".into()))?,
            at: doc.at,
            etag: etag(&bytes),
        }))
    }
}

fn check(reference: &str) -> Result<(), CatalogError> {
    match reference.len() {
        1..=MAX_REFERENCE => Ok(()),
        0 => Err(CatalogError::BadName {
            what: "reference",
            text: String::new(),
            rule: "it is empty",
        }),
        len => Err(CatalogError::TooLarge {
            what: "a reference",
            len: len as u64,
            limit: MAX_REFERENCE as u64,
        }),
    }
}

fn etag(bytes: &[u8]) -> String {
    Digest::of(bytes).hex()[..32].to_owned()
}
