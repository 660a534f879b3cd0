use super::*;
use proptest::prelude::*;
use serde_json::json;

fn typed(content_type: Option<&str>, document: serde_json::Value) -> Result<String, SourceError> {
    media_type("it", content_type, document.to_string().as_bytes())
}

fn descriptor(name: &str) -> serde_json::Value {
    json!({"mediaType": IMAGE_LAYER_MEDIA_TYPE, "digest": Digest::of(name.as_bytes()), "size": 1})
}

#[test]
fn the_server_s_type_counts_then_the_document_s_then_its_shape() {
    let image = json!({"schemaVersion": 2, "config": {}, "layers": []});
    assert_eq!(
        typed(
            Some("application/vnd.docker.distribution.manifest.v2+json; charset=utf-8"),
            image.clone()
        )
        .unwrap(),
        IMAGE_MANIFEST_MEDIA_TYPE
    );
    assert_eq!(
        typed(Some("application/json"), image.clone()).unwrap(),
        OCI_IMAGE_MEDIA_TYPE
    );
    assert_eq!(
        typed(None, json!({"manifests": []})).unwrap(),
        OCI_IMAGE_INDEX_MEDIA_TYPE
    );
    assert_eq!(
        typed(
            None,
            json!({"mediaType": IMAGE_MANIFEST_LIST_MEDIA_TYPE, "manifests": []})
        )
        .unwrap(),
        IMAGE_MANIFEST_LIST_MEDIA_TYPE
    );
}

#[test]
fn a_document_that_could_be_read_in_two_ways_is_refused() {
    let both = json!({"schemaVersion": 2, "layers": [], "manifests": []});
    assert!(matches!(
        typed(None, both),
        Err(SourceError::Malformed { .. })
    ));
    let lie = json!({"mediaType": OCI_IMAGE_INDEX_MEDIA_TYPE, "manifests": []});
    let error = typed(Some(OCI_IMAGE_MEDIA_TYPE), lie)
        .unwrap_err()
        .to_string();
    assert!(error.contains("calls itself"), "{error}");
}

#[test]
fn schema_1_is_refused_with_a_way_out() {
    let old = json!({"schemaVersion": 1, "name": "x", "fsLayers": [], "history": []});
    for content_type in [
        None,
        Some("application/vnd.docker.distribution.manifest.v1+prettyjws"),
        Some("application/json"),
    ] {
        let error = typed(content_type, old.clone()).unwrap_err();
        assert!(
            matches!(error, SourceError::UnsupportedMediaType { .. }),
            "{error}"
        );
        assert!(error.to_string().contains("schema 1"), "{error}");
    }
}

#[test]
fn what_is_no_json_is_shown_by_its_beginning() {
    let error = media_type(
        "manifest v1",
        Some("text/html"),
        b"<html>\x1b[31mlogin please",
    )
    .unwrap_err()
    .to_string();
    assert!(
        error.contains("<html>") && !error.contains('\x1b'),
        "{error}"
    );
}

#[test]
fn other_digest_algorithms_are_named_in_images_and_left_out_of_indexes() {
    let mut layer = descriptor("x");
    layer["digest"] = json!(format!("sha512:{}", "0".repeat(128)));
    let image =
        json!({"schemaVersion": 2, "config": descriptor("c"), "layers": [descriptor("l"), layer]});
    let error = parse("image x", OCI_IMAGE_MEDIA_TYPE, &image.to_string().into()).unwrap_err();
    assert!(
        matches!(&error, SourceError::UnsupportedDigest { what, .. } if what == "layer 1 of image x"),
        "{error}"
    );
    let index = json!({"manifests": [layer, descriptor("good")]});
    let index = parse_index("it", index.to_string().as_bytes()).unwrap();
    assert_eq!(
        index.manifests.iter().map(|d| d.digest).collect::<Vec<_>>(),
        [Digest::of(b"good")]
    );
}

#[test]
fn how_many_layers_an_image_may_have_is_for_the_conversion_to_say() {
    let many = vec![descriptor("l"); 20_000];
    let image = json!({"schemaVersion": 2, "config": descriptor("c"), "layers": many}).to_string();
    assert!(image.len() as u64 <= MAX_MANIFEST_BYTES);
    let Document::Image(image) = parse("it", OCI_IMAGE_MEDIA_TYPE, &image.into()).unwrap() else {
        panic!("it is an image");
    };
    assert_eq!(image.layers.len(), 20_000);
}

#[test]
fn sizes_and_numbers_are_bounded() {
    let mut negative = descriptor("l");
    negative["size"] = json!(-1);
    let image = json!({"schemaVersion": 2, "config": descriptor("c"), "layers": [negative]});
    assert!(matches!(
        parse("it", OCI_IMAGE_MEDIA_TYPE, &image.to_string().into()),
        Err(SourceError::Malformed { .. })
    ));
    let index = json!({"manifests": vec![json!({}); MAX_INDEX_ENTRIES + 1]});
    assert!(matches!(
        parse_index("it", index.to_string().as_bytes()),
        Err(SourceError::TooLarge { .. })
    ));
    assert!(
        parse_index("it", br#"{"manifests": null}"#)
            .unwrap()
            .manifests
            .is_empty()
    );
}

#[test]
fn layers_that_cannot_be_unpacked_say_why() {
    for good in [
        IMAGE_LAYER_MEDIA_TYPE,
        IMAGE_LAYER_GZIP_MEDIA_TYPE,
        LAYER_ZSTD_MEDIA_TYPE,
        IMAGE_DOCKER_LAYER_GZIP_MEDIA_TYPE,
    ] {
        check_layer_media_type("it", good).unwrap();
    }
    for (bad, why) in [
        (
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "foreign",
        ),
        (
            "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
            "foreign",
        ),
        (
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            "encrypted",
        ),
        (
            "application/vnd.wasm.content.layer.v1+wasm",
            "no container image",
        ),
        ("application/vnd.oci.image.layer.v1.tar+xz", "tar+zstd"),
    ] {
        let error = check_layer_media_type("layer 3", bad)
            .unwrap_err()
            .to_string();
        assert!(error.contains(why) && error.contains("layer 3"), "{error}");
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), content_type in prop::option::of("[a-z/.+]{0,40}")) {
        if let Ok(media_type) = media_type("it", content_type.as_deref(), &bytes) {
            let _ = parse("it", &media_type, &Bytes::from(bytes));
        }
    }
}
