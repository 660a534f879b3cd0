use super::*;
use base64::Engine as _;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(10);

/// What was found, in a form that can be compared.
fn shown(found: Option<Credentials>) -> Option<String> {
    found.map(|c| match c {
        Credentials::Password { username, password } => format!("{username}:{}", *password),
        Credentials::IdentityToken(token) => format!("identity {}", *token),
        Credentials::RegistryToken(token) => format!("registry {}", *token),
    })
}

fn auth(text: &str) -> Value {
    json!({"auth": base64::engine::general_purpose::STANDARD.encode(text)})
}

fn at(path: &Path) -> CredentialPlaces {
    CredentialPlaces::here(Some(path))
}

fn stored(
    config: &Value,
    registry: &str,
    repository: &str,
) -> Result<Option<String>, CredentialsError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    CredentialStore::new(registry, repository, at(dir.path()), SOON)
        .stored()
        .map(shown)
}

#[test]
fn every_way_of_writing_a_registry_matches() {
    for (key, registry) in [
        ("quay.io", "quay.io"),
        ("https://quay.io", "quay.io"),
        ("https://quay.io/v1/", "quay.io"),
        ("http://127.0.0.1:5000/v2/", "127.0.0.1:5000"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
        ("registry-1.docker.io", "docker.io"),
    ] {
        let config = json!({"auths": {key: auth("u:p")}});
        assert_eq!(
            stored(&config, registry, "a/b").unwrap().as_deref(),
            Some("u:p"),
            "{key}"
        );
    }
    let other = json!({"auths": {"quay.io:443": auth("u:p"), "quay.io.evil.org": auth("u:p")}});
    assert_eq!(stored(&other, "quay.io", "a").unwrap(), None);
}

#[test]
fn the_entry_of_the_longest_namespace_wins() {
    let config = json!({"auths": {"h": auth("host:p"), "h/a": auth("space:p"), "h/a/b": auth("repository:p")}});
    let found = |repository| stored(&config, "h", repository).unwrap().unwrap();
    assert_eq!(found("a/b"), "repository:p");
    assert_eq!(found("a/c/d"), "space:p");
    assert_eq!(found("ab"), "host:p");
}

#[test]
fn all_forms_of_entries_are_read() {
    for (entry, expected) in [
        (auth("u:p:with:colons"), "u:p:with:colons"),
        (json!({"auth": "dTpw"}), "u:p"),
        (
            json!({"auth": base64::engine::general_purpose::STANDARD.encode("u:p\0\0")}),
            "u:p",
        ),
        (json!({"username": "u", "password": "p"}), "u:p"),
        (json!({"auth": "dTpw", "identitytoken": "t"}), "identity t"),
        (json!({"registrytoken": "t"}), "registry t"),
    ] {
        let config = json!({"auths": {"h": entry}});
        assert_eq!(
            stored(&config, "h", "a").unwrap().as_deref(),
            Some(expected)
        );
    }
    let empty = json!({"auths": {"h": {}}, "HttpHeaders": {"User-Agent": "x"}, "credsStore": ""});
    assert_eq!(stored(&empty, "h", "a").unwrap(), None);
}

#[test]
fn a_broken_file_is_named_and_its_content_is_not() {
    for config in [
        json!({"auths": {"h": {"auth": "!secret!"}}}).to_string(),
        json!({"auths": {"h": {"auth": 5, "password": "secret"}}}).to_string(),
        json!({"auths": {"h": auth("secret-without-colon")}}).to_string(),
        r#"{"auths": {"h": {"password": "secret""#.to_owned(),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, &config).unwrap();
        let error = CredentialStore::new("h", "a", at(&path), SOON)
            .stored()
            .err()
            .expect(&config);
        let text = format!("{error} {error:?}");
        assert!(
            text.contains("config.json") && !text.contains("secret"),
            "{text}"
        );
    }
}

#[test]
fn a_missing_or_empty_file_knows_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let missing = CredentialStore::new("h", "a", at(&dir.path().join("none")), SOON);
    assert!(missing.stored().unwrap().is_none());
    std::fs::write(dir.path().join("config.json"), "\n").unwrap();
    assert!(
        CredentialStore::new("h", "a", at(dir.path()), SOON)
            .stored()
            .unwrap()
            .is_none()
    );
}

#[test]
fn the_usual_places_follow_the_environment() {
    let places = |set: &[(&str, &str)]| {
        let set: Vec<(String, String)> = set
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect();
        let found =
            usual_places(|name| Some(set.iter().find(|(k, _)| k == name)?.1.clone().into()));
        found
            .iter()
            .map(|p| p.display().to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(places(&[]), Vec::<String>::new());
    assert_eq!(
        places(&[("HOME", "/h")]),
        ["/h/.docker/config.json", "/h/.config/containers/auth.json"]
    );
    assert_eq!(
        places(&[
            ("HOME", "/h"),
            ("DOCKER_CONFIG", "/d"),
            ("REGISTRY_AUTH_FILE", "/r"),
            ("XDG_RUNTIME_DIR", "/run/u")
        ]),
        [
            "/r",
            "/d/config.json",
            "/run/u/containers/auth.json",
            "/h/.config/containers/auth.json"
        ]
    );
    assert_eq!(
        places(&[("HOME", ""), ("DOCKER_CONFIG", "")]),
        Vec::<String>::new()
    );
}

#[tokio::test]
async fn a_helper_whose_name_is_a_path_is_not_run() {
    for name in ["../../tmp/x", "a/b", "a b", "a;b", ""] {
        let error = helper::get(name, "h", None, SOON)
            .await
            .err()
            .expect(name)
            .to_string();
        assert!(
            error.contains("docker-credential-") && error.contains("docker login h"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_helper_that_is_missing_is_an_error_only_when_it_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({"credHelpers": {"h": "lazyimg-missing"}, "auths": {"g": auth("u:p")}});
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let store = |registry| CredentialStore::new(registry, "a", at(dir.path()), SOON);
    assert!(store("h").stored().unwrap().is_none());
    assert!(
        store("h")
            .look_up()
            .await
            .err()
            .unwrap()
            .to_string()
            .contains("lazyimg-missing")
    );
    assert_eq!(
        shown(store("g").look_up().await.unwrap()).as_deref(),
        Some("u:p")
    );
}

#[tokio::test]
async fn a_helper_is_looked_for_and_run_in_the_environment_it_was_given() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let (bin, home) = (dir.path().join("bin"), dir.path().join("home"));
    std::fs::create_dir(&bin).unwrap();
    let helper = bin.join("docker-credential-lazyimg-env");
    let script = "#!/bin/sh\nprintf '{\"Username\":\"%s\",\"Secret\":\"%s\"}' \"$HOME\" \"${GNUPGHOME-none}\"\n";
    std::fs::write(&helper, script).unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    let config = dir.path().join("config.json");
    std::fs::write(&config, json!({"credsStore": "lazyimg-env"}).to_string()).unwrap();
    let mut places = at(&config);
    let found = |places: &CredentialPlaces| CredentialStore::new("h", "a", places.clone(), SOON);
    assert!(found(&places).look_up().await.is_err(), "not on our PATH");
    let path = format!("{}:/usr/bin:/bin", bin.display());
    places.helper_env = Some(vec![
        ("PATH".into(), path.into()),
        ("HOME".into(), home.clone().into()),
        ("LD_PRELOAD".into(), "not for helpers".into()),
    ]);
    assert_eq!(
        shown(found(&places).look_up().await.unwrap()),
        Some(format!("{}:none", home.display()))
    );
}

#[test]
fn places_for_another_process_are_absolute_and_have_its_variables() {
    let places = CredentialPlaces::for_another_process(Some(Path::new("some/file"))).unwrap();
    let here = std::env::current_dir().unwrap();
    assert_eq!(places.files, [here.join("some/file")]);
    let env = places.helper_env.unwrap();
    let path = &env.iter().find(|(name, _)| name == "PATH").unwrap().1;
    assert!(std::env::split_paths(path).all(|dir| dir.is_absolute()));
}

#[test]
fn what_a_file_names_is_told_without_its_secrets() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "auths": {"https://quay.io/v1/": auth("alice:hunter2"), "bob:pw@ghcr.io": auth("b:c"), "empty.example": {}},
        "credHelpers": {"gcr.io": "gcloud"},
        "credsStore": "desktop",
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let all = found(Some(dir.path())).unwrap();
    assert_eq!(
        all,
        [Found {
            path: dir.path().join("config.json"),
            registries: vec!["ghcr.io".into(), "quay.io".into()],
            helpers: vec![
                (Some("gcr.io".into()), "docker-credential-gcloud".into()),
                (None, "docker-credential-desktop".into()),
            ],
        }]
    );
    assert_eq!(found(Some(&dir.path().join("gone"))).unwrap(), []);
}
