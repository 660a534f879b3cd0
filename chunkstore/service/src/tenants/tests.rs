use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::*;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn token(&self, name: &str, text: &str) {
        let path = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// Replaced, not rewritten: as a careful administrator does.
    fn tenants(&self, text: &str) -> PathBuf {
        let new = self.0.path().join("tenants.toml.new");
        fs::write(&new, text).unwrap();
        let path = self.0.path().join("tenants.toml");
        fs::rename(new, &path).unwrap();
        path
    }

    fn error(&self, text: &str) -> String {
        Tenants::load(&self.tenants(text)).unwrap_err().to_string()
    }
}

const ONE: &str = "0123456789abcdef";
const TWO: &str = "fedcba9876543210-and-more";

fn name_of(tenants: &Tenants, token: &str) -> Option<String> {
    tenants
        .find(Some(token.as_bytes()))
        .map(|t| t.name.to_string())
}

#[test]
fn a_token_names_its_tenant_and_no_other_text_does() {
    let place = Place::new();
    place.token("one", &format!("{ONE}\n"));
    place.token("two", TWO);
    let tenants = Tenants::load(&place.tenants(
        r#"
        [tenants.alpha]
        token-files = ["one"]
        rights = ["read"]
        [tenants.beta]
        token-files = ["two"]
        rights = ["read", "write", "administer", "observe"]
        quota = "1KiB"
        "#,
    ))
    .unwrap();
    assert!(tenants.need_tokens());
    assert_eq!(name_of(&tenants, ONE).as_deref(), Some("alpha"));
    let beta = tenants.find(Some(TWO.as_bytes())).unwrap();
    assert_eq!((beta.name.as_str(), beta.quota), ("beta", Some(1024)));
    assert_eq!(beta.rights, Rights::ALL);
    let alpha = tenants.find(Some(ONE.as_bytes())).unwrap();
    assert_eq!(alpha.quota, None);
    assert!(alpha.rights.allow(Right::Read) && !alpha.rights.allow(Right::Write));
    for text in ["", "0123456789abcde", "0123456789abcdeF", "alpha"] {
        assert_eq!(name_of(&tenants, text), None, "{text:?}");
    }
    assert!(tenants.find(None).is_none());
}

#[test]
fn without_tenants_everybody_is_local() {
    let tenants = Tenants::local();
    assert!(!tenants.need_tokens());
    for token in [None, Some(&b"anything"[..])] {
        let local = tenants.find(token).unwrap();
        assert_eq!((local.name.as_str(), local.rights), (LOCAL, Rights::ALL));
    }
}

#[test]
fn a_token_is_rotated_without_a_gap() {
    let place = Place::new();
    place.token("old", ONE);
    let one = r#"tenants.a = { token-files = ["old"], rights = ["read"] }"#;
    let both = r#"tenants.a = { token-files = ["old", "new"], rights = ["read"] }"#;
    let other = r#"tenants.a = { token-files = ["new"], rights = ["read"] }"#;
    let tenants = Tenants::load(&place.tenants(one)).unwrap();
    assert!(!tenants.reload_if_changed().unwrap());
    place.token("new", TWO);
    for (text, old, new) in [(both, true, true), (other, false, true)] {
        place.tenants(text);
        assert!(tenants.reload_if_changed().unwrap());
        assert!(
            !tenants.reload_if_changed().unwrap(),
            "nothing changed since"
        );
        assert_eq!(name_of(&tenants, ONE).is_some(), old);
        assert_eq!(name_of(&tenants, TWO).is_some(), new);
    }
    // The token file itself.
    place.token("new", "a-third-token-of-some-length");
    assert!(tenants.reload_if_changed().unwrap());
    assert!(name_of(&tenants, TWO).is_none());
    assert!(name_of(&tenants, "a-third-token-of-some-length").is_some());
}

#[test]
fn a_broken_file_keeps_the_tenants_and_is_told_once() {
    let place = Place::new();
    place.token("one", ONE);
    let good = r#"tenants.a = { token-files = ["one"], rights = ["read"] }"#;
    let tenants = Tenants::load(&place.tenants(good)).unwrap();
    place.tenants("tenants = 3");
    assert!(tenants.reload_if_changed().is_err());
    assert!(!tenants.reload_if_changed().unwrap(), "told already");
    assert!(
        tenants.reload().is_err(),
        "asked for by name it is told again"
    );
    assert!(name_of(&tenants, ONE).is_some());
    fs::remove_file(place.0.path().join("one")).unwrap();
    place.tenants(good);
    assert!(tenants.reload_if_changed().is_err());
    assert!(name_of(&tenants, ONE).is_some());
    place.token("one", TWO);
    assert!(tenants.reload_if_changed().unwrap());
    assert!(name_of(&tenants, TWO).is_some());
}

#[test]
fn what_is_wrong_with_the_files_is_said_with_what_to_do() {
    let place = Place::new();
    place.token("one", ONE);
    place.token("short", "0123456789abcde\n");
    place.token("spaces", "0123456789 abcdefg\n");
    place.token("long", &"x".repeat(5000));
    place.token("open", TWO);
    let open = place.0.path().join("open");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o640)).unwrap();
    let entry = |name: &str, file: &str| {
        format!("[tenants.{name}]\ntoken-files = [\"{file}\"]\nrights = [\"read\"]\n")
    };
    for (text, word) in [
        (entry("a", "short"), "16 or more"),
        (entry("a", "spaces"), "without spaces"),
        (entry("a", "long"), "store token --out"),
        (entry("a", "open"), "chmod 600"),
        (entry("a", "nowhere"), "nowhere"),
        (entry("\"A/b\"", "one"), "a-z"),
        (entry("a", "one") + &entry("b", "one"), "each needs its own"),
        (entry("a", "one") + "quota = \"lots\"", "100GiB"),
        (entry("a", "one") + "quotas = 1", "quotas"),
        (String::new(), "[tenants.NAME]"),
        (
            "tenants.a = { token-files = [], rights = [\"read\"] }".into(),
            "token-files",
        ),
        (
            "tenants.a = { token-files = [\"one\"], rights = [] }".into(),
            "rights",
        ),
        (
            "tenants.a = { token-files = [\"one\"], rights = [\"all\"] }".into(),
            "administer",
        ),
    ] {
        let error = place.error(&text);
        assert!(error.contains(word), "{word} is not in: {error}");
        for secret in [ONE, TWO, "0123456789"] {
            assert!(!error.contains(secret), "{error}");
        }
    }
    let missing = Tenants::load(Path::new("/nowhere/tenants.toml")).unwrap_err();
    assert!(missing.to_string().contains("/nowhere/tenants.toml"));
}
