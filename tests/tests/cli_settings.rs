//! Where settings come from: command line, environment, configuration file, the service manager.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;

use lazyimg_tests::{Lazyimg, Registry, Sample, WorkDir};
use serde_json::Value;

/// A key command that needs no KMS.
const KMS: &str = "printf %064d 7";

struct World {
    lazyimg: Lazyimg,
    reference: String,
    work: WorkDir,
    _registry: Registry,
}

impl World {
    /// A small image, pushed but not converted.
    fn new(name: &str) -> Self {
        let work = WorkDir::new(name);
        let sample = Sample::new(&work.dir("sample"), 62, 1);
        let registry = Registry::start(work.join("registry"));
        Self {
            reference: registry.push(&sample.layout, "v1", "app:v1"),
            lazyimg: Lazyimg::new(work.join("home")),
            work,
            _registry: registry,
        }
    }

    fn path(&self, name: &str) -> String {
        self.work.join(name).to_string_lossy().into_owned()
    }

    fn configure(&self, text: &str) {
        fs::create_dir_all(self.lazyimg.config()).unwrap();
        fs::write(self.lazyimg.config().join("config.toml"), text).unwrap();
    }

    /// The same home with another variable in the environment.
    fn with_env(&self, name: &str, value: &str) -> Lazyimg {
        Lazyimg::new(self.work.join("home")).env(name, value)
    }

    fn opens_with(&self, key: &[&str]) {
        self.configure("");
        let verify = [&["verify", &self.reference], key].concat();
        self.lazyimg.ok(&verify);
    }
}

#[test]
fn the_command_line_beats_the_environment_beats_the_file() {
    let w = World::new("config");
    w.lazyimg.convert(&w.reference);
    let dir_of = |status: &Value| status["cache_dir"].as_str().unwrap().to_owned();
    assert!(
        dir_of(&w.lazyimg.status()).starts_with(&*w.lazyimg.home().to_string_lossy()),
        "XDG is the default"
    );
    let path = |name: &str| w.work.join(name).to_string_lossy().into_owned();
    fs::write(
        w.lazyimg.config().join("config.toml"),
        format!("cache-dir = \"{}\"\n", path("from-file")),
    )
    .unwrap();
    assert_eq!(dir_of(&w.lazyimg.status()), path("from-file"));
    let other = w.work.join("other.toml");
    fs::write(
        &other,
        format!(
            "cache-dir = \"{}\"\nread-timeout = 7\njson = true\n",
            path("from-other")
        ),
    )
    .unwrap();
    let text = w
        .lazyimg
        .ok(&["status", "--config", &other.to_string_lossy()]);
    assert_eq!(
        dir_of(&serde_json::from_str(&text).unwrap()),
        path("from-other")
    );

    let lazyimg = Lazyimg::new(w.work.join("home")).env("LAZYIMG_CACHE_DIR", &path("from-env"));
    assert_eq!(dir_of(&lazyimg.status()), path("from-env"));
    assert_eq!(
        dir_of(&lazyimg.json(&["status", "--cache-dir", &path("from-flag")])),
        path("from-flag")
    );
    let lazyimg = Lazyimg::new(w.work.join("home"))
        .env("LAZYIMG_JSON", "1")
        .env("LAZYIMG_CONFIG", &other.to_string_lossy());
    assert!(serde_json::from_str::<Value>(&lazyimg.ok(&["status"])).is_ok());

    // The settings of a mount reach its daemon.
    fs::write(
        w.lazyimg.config().join("config.toml"),
        format!(
            "cache-dir = \"{}\"\ncache-bytes = 33554432\n",
            path("from-file")
        ),
    )
    .unwrap();
    let mount = w.lazyimg.mount(&w.reference, w.work.join("mnt"));
    assert_eq!(
        w.lazyimg.status().pointer("/cache/max_bytes"),
        Some(&33_554_432.into()),
        "{:#}",
        w.lazyimg.status()
    );
    assert!(w.work.join("from-file/daemon.log").exists());
    mount.umount();

    for (text, word) in [
        ("cachedir = 1", "cachedir"),
        ("= 1", "config.toml"),
        ("cache-dir = [1]", "cache-dir"),
        ("read-timeout = \"x\"", "`read-timeout`"),
        ("read-timeout = 0", "`read-timeout`"),
    ] {
        fs::write(w.lazyimg.config().join("config.toml"), text).unwrap();
        let error = w.lazyimg.fails(2, &["status"]);
        assert!(
            error.contains(word) && error.contains("config.toml"),
            "{text}: {error}"
        );
    }
    let gone = path("gone.toml");
    assert!(
        w.lazyimg
            .fails(2, &["status", "--config", &gone])
            .contains(&gone)
    );
}

#[test]
fn the_key_that_the_command_line_names_beats_one_of_another_kind_below_it() {
    let w = World::new("key-precedence");
    let (flag, env) = (w.path("flag.key"), w.path("env.key"));
    w.configure(&format!("key-command = \"{KMS}\"\n"));
    w.lazyimg
        .ok(&["convert", &w.reference, "--key-file", &flag]);
    w.opens_with(&["--key-file", &flag]);

    w.configure(&format!("key-command = \"{KMS}\"\n"));
    let lazyimg = w.with_env("LAZYIMG_KEY_FILE", &env);
    lazyimg.ok(&["convert", &w.reference]);
    w.opens_with(&["--key-file", &env]);

    let lazyimg = w.with_env("LAZYIMG_KEY_COMMAND", "false");
    lazyimg.ok(&["convert", &w.reference, "--key-file", &flag]);
    let lazyimg = w.with_env("LAZYIMG_KEY_FILE", "/nowhere/key");
    lazyimg.ok(&["convert", &w.reference, "--key-command", KMS]);
    w.opens_with(&["--key-command", KMS]);

    // A mount's daemon gets the key of whoever mounts.
    w.configure("key-command = \"false\"\n");
    let mount = w
        .lazyimg
        .mount_with(&w.reference, w.work.join("mnt"), &["--key-file", &flag]);
    mount.umount();
}

#[test]
fn salts_and_new_keys_follow_the_same_order() {
    let w = World::new("salt-precedence");
    let (salt, new) = (w.path("domain.secret"), w.path("new.key"));
    w.configure("salt-command = \"false\"\nnew-key-command = \"false\"\n");
    w.lazyimg
        .ok(&["convert", &w.reference, "--salt-file", &salt]);
    assert!(fs::metadata(&salt).is_ok(), "it was made at first use");
    w.lazyimg
        .ok(&["rotate-key", &w.reference, "--new-key-file", &new]);
    w.opens_with(&["--key-file", &new]);
    // What the file says is used where nothing above says anything.
    w.configure(&format!("new-key-command = \"{KMS}\"\n"));
    w.lazyimg.ok(&["rotate-key", &w.reference]);
    w.opens_with(&["--key-command", KMS]);
}

#[test]
fn two_settings_of_one_place_that_exclude_each_other_are_both_named() {
    let w = World::new("both");
    let convert = |lazyimg: &Lazyimg, flags: &[&str]| {
        lazyimg.fails(2, &[&["convert", &w.reference], flags].concat())
    };
    let has = |error: &str, words: &[&str]| {
        for word in words {
            assert!(error.contains(word), "{word} is not in: {error}");
        }
    };
    let flags = ["--salt-file", "s", "--salt-command", "c"];
    has(
        &convert(&w.lazyimg, &flags),
        &["--salt-file", "--salt-command"],
    );
    let both = w
        .with_env("LAZYIMG_KEY_FILE", "k")
        .env("LAZYIMG_KEY_COMMAND", "c");
    has(
        &convert(&both, &[]),
        &["LAZYIMG_KEY_FILE", "LAZYIMG_KEY_COMMAND"],
    );
    w.configure("key-file = \"k\"\nkey-command = \"c\"\n");
    has(
        &convert(&w.lazyimg, &[]),
        &["config.toml", "`key-file`", "`key-command`"],
    );
    w.configure("");
    let neither = w.lazyimg.fails(2, &["rotate-key", &w.reference]);
    has(&neither, &["--new-key-file", "--new-key-command"]);
    assert!(!w.lazyimg.key_file().exists(), "wrong usage makes no keys");
}

#[test]
fn a_service_has_its_cache_where_systemd_made_it() {
    let w = World::new("service");
    let dir_of = |lazyimg: &Lazyimg, flags: &[&str]| {
        let status = lazyimg.json(&[&["status"], flags].concat());
        status["cache_dir"].as_str().unwrap().to_owned()
    };
    let (first, second, other) = (w.path("var"), w.path("var2"), w.path("other"));
    let service = w.with_env("CACHE_DIRECTORY", &format!("{first}:{second}"));
    assert_eq!(dir_of(&service, &[]), first);
    assert_eq!(dir_of(&service, &["--cache-dir", &other]), other);
    let service = service.env("LAZYIMG_CACHE_DIR", &second);
    assert_eq!(dir_of(&service, &[]), second);
    assert!(
        w.lazyimg
            .ok(&["status", "--help"])
            .contains("CACHE_DIRECTORY")
    );
}
