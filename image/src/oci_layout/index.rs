//! `index.json`: finding and putting entries. No I/O.

use std::collections::BTreeMap;

use lazyimg_convergent::Digest;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::source::{Descriptor, SourceError};

/// The annotation that holds a tag (OCI image specification, "Pre-Defined Annotation Keys").
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// How many tags a message lists.
const LISTED_TAGS: usize = 20;

/// What of the index is meant.
#[derive(Debug, PartialEq)]
pub(super) enum Chosen {
    /// One entry.
    Entry(Descriptor),
    /// The index itself: its entries are the platforms of one image.
    Whole,
    /// Nothing.
    Nothing,
}

/// What a manifest says of its place among others.
#[derive(Debug, PartialEq)]
pub(super) struct About {
    /// What it refers to.
    pub(super) subject: Option<Digest>,
    /// What kind of artifact it is; none for an image.
    pub(super) artifact_type: Option<String>,
    /// Its annotations, which a list of referrers repeats (distribution specification).
    pub(super) annotations: BTreeMap<String, String>,
}

/// Reads what matters to an index from a manifest. The artifact type of an artifact without one is
/// the media type of its configuration (distribution specification, "Listing Referrers").
pub(super) fn about(what: &str, manifest: &[u8]) -> Result<About, SourceError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Fields {
        subject: Option<Target>,
        artifact_type: Option<String>,
        config: Option<Target>,
        annotations: Option<BTreeMap<String, String>>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Target {
        #[serde(default)]
        digest: String,
        media_type: Option<String>,
    }
    let fields: Fields =
        serde_json::from_slice(manifest).map_err(|e| SourceError::malformed(what, e))?;
    let subject = fields.subject.and_then(|s| s.digest.parse().ok());
    let artifact_type = fields.artifact_type.filter(|t| !t.is_empty());
    let by_config = || {
        fields
            .config
            .and_then(|c| c.media_type)
            .filter(|_| subject.is_some())
    };
    Ok(About {
        artifact_type: artifact_type.or_else(by_config),
        annotations: fields.annotations.unwrap_or_default(),
        subject,
    })
}

/// The entry with a tag.
pub(super) fn by_tag(entries: Vec<Descriptor>, tag: &str) -> Result<Chosen, String> {
    let mut tagged = entries
        .into_iter()
        .filter(|d| d.annotations.get(REF_NAME).is_some_and(|t| t == tag));
    match (tagged.next(), tagged.next()) {
        (None, _) => Ok(Chosen::Nothing),
        (Some(only), None) => Ok(Chosen::Entry(only)),
        (Some(first), Some(other)) if first.digest == other.digest => Ok(Chosen::Entry(first)),
        (Some(_), Some(_)) => Err(format!(
            "several manifests have the tag {tag}; name one by its digest"
        )),
    }
}

/// The only image, or the whole index when all images in it name a platform and none a tag.
pub(super) fn sole(entries: Vec<Descriptor>) -> Result<Chosen, String> {
    let mut images: Vec<Descriptor> = entries
        .into_iter()
        .filter(|d| d.artifact_type.is_none())
        .collect();
    images.dedup_by(|a, b| a.digest == b.digest);
    if images.len() > 1
        && images
            .iter()
            .all(|d| d.platform.is_some() && !d.annotations.contains_key(REF_NAME))
    {
        return Ok(Chosen::Whole);
    }
    match (images.pop(), images.len()) {
        (None, _) => Ok(Chosen::Nothing),
        (Some(only), 0) => Ok(Chosen::Entry(only)),
        (Some(last), others) => {
            images.push(last);
            let tags = images.iter().filter_map(|d| d.annotations.get(REF_NAME));
            let tags: Vec<&str> = tags.take(LISTED_TAGS).map(String::as_str).collect();
            let tags = if tags.is_empty() {
                "none has a tag".to_owned()
            } else {
                format!("tags: {}", tags.join(", "))
            };
            Err(format!(
                "it holds {} images ({tags}); name one: oci:DIR:TAG or oci:DIR@DIGEST",
                others + 1
            ))
        }
    }
}

/// Puts an entry in: a tag moves to it from whatever had it; an untagged entry that is there already
/// stays as it is. All else in the index is left alone.
pub(super) fn put(index: &mut Map<String, Value>, entry: &Descriptor, tag: Option<&str>) {
    let digest = entry.digest.to_string();
    let mut entry = entry.clone();
    let manifests = index
        .entry("manifests")
        .or_insert_with(|| Value::Array(Vec::new()));
    if !manifests.is_array() {
        *manifests = Value::Array(Vec::new());
    }
    let Some(entries) = manifests.as_array_mut() else {
        return;
    };
    match tag {
        Some(tag) => {
            entries.retain(|e| e["annotations"][REF_NAME] != tag);
            entry.annotations.insert(REF_NAME.into(), tag.into());
        }
        None if entries.iter().any(|e| e["digest"] == digest.as_str()) => return,
        None => {}
    }
    // An untagged entry of the same manifest is superseded by the tagged one.
    entries.retain(|e| e["digest"] != digest.as_str() || e["annotations"].get(REF_NAME).is_some());
    // Plain strings, numbers and maps: this can't fail.
    if let Ok(value) = serde_json::to_value(&entry) {
        entries.push(value);
    }
}

/// Takes a manifest's entries out, with whatever tags they have; false when there was none.
pub(super) fn remove(index: &mut Map<String, Value>, digest: &Digest) -> bool {
    let Some(entries) = index.get_mut("manifests").and_then(Value::as_array_mut) else {
        return false;
    };
    let (before, digest) = (entries.len(), digest.to_string());
    entries.retain(|e| e["digest"] != digest.as_str());
    entries.len() < before
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn descriptor(name: &str, tag: Option<&str>) -> Descriptor {
        let mut d = Descriptor::new(
            "application/vnd.oci.image.manifest.v1+json",
            Digest::of(name.as_bytes()),
            1,
        );
        d.annotations
            .extend(tag.map(|t| (REF_NAME.to_owned(), t.to_owned())));
        d
    }

    fn entries(index: &Map<String, Value>) -> Vec<Descriptor> {
        serde_json::from_value(index["manifests"].clone()).unwrap()
    }

    #[test]
    fn a_tag_moves_and_what_others_wrote_stays() {
        let foreign = json!({"schemaVersion": 2, "x-tool": {"a": 1}, "manifests": [
            {"mediaType": "m", "digest": Digest::of(b"old").to_string(), "size": 1, "annotations": {REF_NAME: "v1"}},
            {"mediaType": "m", "digest": Digest::of(b"other").to_string(), "size": 1, "x-field": true},
        ]});
        let Value::Object(mut index) = foreign else {
            unreachable!()
        };
        put(&mut index, &descriptor("new", None), Some("v1"));
        assert_eq!(index["x-tool"]["a"], 1);
        assert_eq!(index["manifests"][0]["x-field"], true);
        assert_eq!(entries(&index)[1].digest, Digest::of(b"new"));
        assert_eq!(entries(&index).len(), 2);
    }

    #[test]
    fn the_same_manifest_may_have_two_tags_and_is_listed_once_without() {
        let mut index = Map::new();
        put(&mut index, &descriptor("a", None), None);
        put(&mut index, &descriptor("a", None), None);
        assert_eq!(entries(&index).len(), 1);
        put(&mut index, &descriptor("a", None), Some("v1"));
        put(&mut index, &descriptor("a", None), Some("v2"));
        put(&mut index, &descriptor("a", None), None);
        let tags: Vec<_> = entries(&index)
            .iter()
            .map(|d| d.annotations[REF_NAME].clone())
            .collect();
        assert_eq!(tags, ["v1", "v2"]);
    }

    #[test]
    fn a_removed_manifest_loses_all_its_entries_and_others_none() {
        let mut index = Map::new();
        for tag in [Some("v1"), Some("v2")] {
            put(&mut index, &descriptor("a", None), tag);
        }
        put(&mut index, &descriptor("b", None), None);
        assert!(remove(&mut index, &Digest::of(b"a")));
        assert!(!remove(&mut index, &Digest::of(b"a")));
        assert_eq!(entries(&index), [descriptor("b", None)]);
        assert!(!remove(&mut Map::new(), &Digest::of(b"a")));
    }

    #[test]
    fn the_only_image_is_found_beside_its_referrers() {
        let mut artifact = descriptor("artifact", None);
        artifact.artifact_type = Some("application/x".into());
        let image = descriptor("image", Some("v1"));
        assert_eq!(
            sole(vec![artifact.clone(), image.clone()]),
            Ok(Chosen::Entry(image.clone()))
        );
        assert_eq!(sole(vec![artifact]), Ok(Chosen::Nothing));
        let error = sole(vec![image, descriptor("b", Some("v2"))]).unwrap_err();
        assert!(error.contains("v1, v2"), "{error}");
    }

    #[test]
    fn untagged_platforms_are_one_image() {
        let platform = |name, p: &str| Descriptor {
            platform: Some(p.parse().unwrap()),
            ..descriptor(name, None)
        };
        let both = vec![platform("a", "linux/amd64"), platform("b", "linux/arm64")];
        assert_eq!(sole(both), Ok(Chosen::Whole));
    }

    #[test]
    fn an_artifact_is_known_by_its_type_or_its_configuration() {
        let digest = Digest::of(b"s").to_string();
        let read = |value: Value| about("it", value.to_string().as_bytes()).unwrap();
        let typed = read(
            json!({"artifactType": "a/t", "config": {"mediaType": "c/t"}, "subject": {"digest": digest}}),
        );
        assert_eq!(
            typed,
            About {
                subject: Some(Digest::of(b"s")),
                artifact_type: Some("a/t".into()),
                annotations: BTreeMap::new(),
            }
        );
        assert_eq!(
            read(json!({"config": {"mediaType": "c/t"}, "subject": {"digest": digest}}))
                .artifact_type,
            Some("c/t".into())
        );
        assert_eq!(
            read(json!({"config": {"mediaType": "c/t"}})),
            About {
                subject: None,
                artifact_type: None,
                annotations: BTreeMap::new(),
            }
        );
    }
}
