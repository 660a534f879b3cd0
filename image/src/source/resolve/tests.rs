use super::*;

fn entry(name: &str, platform: Option<&str>) -> Descriptor {
    let mut d = Descriptor::new(
        "application/vnd.oci.image.manifest.v1+json",
        Digest::of(name.as_bytes()),
        1,
    );
    d.platform = platform.map(|p| p.parse().unwrap());
    d
}

fn chosen(entries: Vec<Descriptor>, wanted: &str) -> Result<Digest, SourceError> {
    choose(
        &Index { manifests: entries },
        Some(&wanted.parse().unwrap()),
        "it",
    )
    .map(|d| d.digest)
}

#[test]
fn the_best_platform_wins_whatever_the_order() {
    let mut entries = vec![
        entry("v1", Some("linux/amd64")),
        entry("v3", Some("linux/amd64/v3")),
        entry("v2", Some("linux/amd64/v2")),
    ];
    for _ in 0..3 {
        entries.rotate_left(1);
        assert_eq!(
            chosen(entries.clone(), "linux/amd64/v3").unwrap(),
            Digest::of(b"v3")
        );
        assert_eq!(
            chosen(entries.clone(), "linux/amd64/v2").unwrap(),
            Digest::of(b"v2")
        );
        assert_eq!(
            chosen(entries.clone(), "linux/amd64").unwrap(),
            Digest::of(b"v1")
        );
    }
}

#[test]
fn an_index_proves_its_image_by_its_own_bytes_only() {
    let image = Digest::of(b"image");
    let text = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json",
        "digest":"{image}","size":1,"platform":{{"os":"linux","architecture":"amd64"}}}}]}}"#
    );
    let digest = Digest::of(text.as_bytes());
    let index = IndexDocument::verified(digest, text.clone().into()).unwrap();
    assert_eq!(index.image(&"linux/amd64".parse().unwrap()).unwrap(), image);
    assert!(matches!(
        index.image(&"linux/s390x".parse().unwrap()),
        Err(SourceError::NoPlatform { .. })
    ));
    let other = text.replace("amd64", "arm64");
    assert!(matches!(
        IndexDocument::verified(digest, other.into()),
        Err(SourceError::DigestMismatch { .. })
    ));
    let nested = text.replace("image.manifest", "image.index");
    let nested = IndexDocument::verified(Digest::of(nested.as_bytes()), nested.into()).unwrap();
    assert!(nested.image(&"linux/amd64".parse().unwrap()).is_err());
    let no_index = IndexDocument::verified(Digest::of(b"[]"), b"[]"[..].into()).unwrap();
    assert!(no_index.image(&"linux/amd64".parse().unwrap()).is_err());
}

#[test]
fn of_equal_entries_the_first_wins() {
    let entries = vec![
        entry("a", Some("linux/amd64")),
        entry("b", Some("linux/amd64")),
    ];
    assert_eq!(chosen(entries, "linux/amd64").unwrap(), Digest::of(b"a"));
}

#[test]
fn a_single_entry_without_platform_is_taken_and_several_are_not() {
    let silent = entry("a", None);
    assert_eq!(
        chosen(
            vec![silent.clone(), entry("x", Some("linux/s390x"))],
            "linux/amd64"
        )
        .unwrap(),
        Digest::of(b"a")
    );
    assert!(chosen(vec![silent.clone(), entry("b", None)], "linux/amd64").is_err());
    let mut artifact = silent;
    artifact.artifact_type = Some("a/t".into());
    assert!(chosen(vec![artifact], "linux/amd64").is_err());
}

#[test]
fn a_configuration_must_have_a_diff_id_for_each_layer() {
    let config = |ids: &str| {
        format!(
            r#"{{"os":"linux","architecture":"arm64","variant":"v8","rootfs":{{"diff_ids":[{ids}]}}}}"#
        )
    };
    let id = format!("\"{}\"", Digest::of(b"x"));
    let (platform, ids) = read_config("it", config(&id).as_bytes(), 1).unwrap();
    assert_eq!(
        (platform.to_string().as_str(), ids),
        ("linux/arm64", vec![Digest::of(b"x")])
    );
    assert!(matches!(
        read_config("it", config(&id).as_bytes(), 2),
        Err(SourceError::Malformed { .. })
    ));
    assert!(matches!(
        read_config("it", config("\"md5:x\"").as_bytes(), 1),
        Err(SourceError::UnsupportedDigest { .. })
    ));
    assert!(matches!(
        read_config("it", b"{}", 0),
        Err(SourceError::Malformed { .. })
    ));
}
