//! A store for other hosts: TLS under an authority of its own, tenants and their tokens.

use std::path::{Path, PathBuf};
use std::time::Duration;

use lazyimg_tests::process::wait_for;
use lazyimg_tests::registry::free_port;
use lazyimg_tests::{Lazyimg, Mounted, Registry, Sample, Store, WorkDir};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

/// What a busy machine may take.
const PATIENCE: Duration = Duration::from_secs(60);

const TENANTS: &str = r#"
[tenants.alpha]
token-files = ["alpha.token"]
rights = ["read", "write"]
[tenants.operator]
token-files = ["operator.token"]
rights = ["administer"]
"#;

/// An authority's certificate in `NAME.pem`, and one for 127.0.0.1 under it in `NAME-store.pem` with its
/// key in `NAME-store.key`.
fn authority(dir: &Path, name: &str) -> PathBuf {
    let write = |file: &str, text: String| {
        let path = dir.join(format!("{name}{file}"));
        std::fs::write(&path, text).expect("a test may write to its own directory");
        path
    };
    let key = || KeyPair::generate().expect("keys can be made");
    let named = |name: &str| CertificateParams::new([name.to_owned()]).expect("a name");
    let mut params = named(&format!("{name}.test"));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = key();
    let certificate = params.self_signed(&authority_key).expect("it is its own");
    let issuer = Issuer::new(params, authority_key);
    let store_key = key();
    let store = named("127.0.0.1").signed_by(&store_key, &issuer);
    write("-store.pem", store.expect("it may sign").pem());
    write("-store.key", store_key.serialize_pem());
    write(".pem", certificate.pem())
}

struct Setup {
    lazyimg: Lazyimg,
    registry: Registry,
    store: Store,
    sample: Sample,
    reference: String,
    ca: PathBuf,
    work: WorkDir,
}

impl Setup {
    fn new(name: &str) -> Self {
        let work = WorkDir::new(name);
        let sample = Sample::new(&work.dir("sample"), 31, 6);
        let registry = Registry::start(work.join("registry"));
        let reference = registry.push(&sample.layout, "v1", "app:v1");
        let ca = authority(work.path(), "ours");
        let lazyimg = Lazyimg::new(work.join("home"));
        for token in ["alpha.token", "alpha2.token", "operator.token"] {
            let out = work.join(token).to_string_lossy().into_owned();
            lazyimg.ok(&["store", "token", "--out", &out]);
        }
        let tenants = work.join("tenants.toml");
        std::fs::write(&tenants, TENANTS).expect("a test may write to its own directory");
        let at = |name: &str| work.join(name).to_string_lossy().into_owned();
        let flags = [
            "--data",
            &at("data"),
            "--tenants",
            &at("tenants.toml"),
            "--tls-cert",
            &at("ours-store.pem"),
            "--tls-key",
            &at("ours-store.key"),
        ];
        let listen = format!("127.0.0.1:{}", free_port());
        Self {
            store: Store::start_at(work.join("store"), &listen, &flags),
            lazyimg,
            registry,
            sample,
            reference,
            ca,
            work,
        }
    }

    /// A path in the test's directory, as text.
    fn at(&self, name: &str) -> String {
        self.work.join(name).to_string_lossy().into_owned()
    }

    /// How the store is reached with `token`.
    fn flags(&self, token: &str) -> Vec<String> {
        let ca = self.ca.to_string_lossy().into_owned();
        let (url, token) = (self.store.url(), self.at(token));
        let flags = [
            "--store",
            &url,
            "--store-ca",
            &ca,
            "--store-token-file",
            &token,
        ];
        flags.map(str::to_owned).to_vec()
    }

    /// Words of a command, and how the store is reached.
    fn words<'a>(words: &[&'a str], flags: &'a [String]) -> Vec<&'a str> {
        words
            .iter()
            .copied()
            .chain(flags.iter().map(String::as_str))
            .collect()
    }

    #[track_caller]
    fn convert(&self) -> serde_json::Value {
        let flags = self.flags("alpha.token");
        self.lazyimg
            .json(&Self::words(&["convert", &self.reference], &flags))
    }

    fn fresh_host(&self, name: &str) -> Lazyimg {
        let host = Lazyimg::new(self.work.join(name));
        host.copy_secrets_from(&self.lazyimg);
        host
    }

    #[track_caller]
    fn mount<'a>(&self, host: &'a Lazyimg, flags: &[String], more: &[&str]) -> Mounted<'a> {
        let flags = Self::words(more, flags);
        host.mount_with(&self.reference, host.home().join("mnt"), &flags)
    }

    /// Gives a file another content at once, as programs that rotate secrets do; only its owner reads it.
    fn replace(&self, name: &str, from: &str) {
        let new = self.work.join(format!("{name}.new"));
        // `copy` keeps the mode.
        std::fs::copy(self.work.join(from), &new).expect("a test may write there");
        std::fs::rename(new, self.work.join(name)).expect("a test may write there");
    }
}

#[test]
fn an_image_is_put_and_read_over_tls_under_an_own_authority_with_a_token() {
    let mut setup = Setup::new("tls");
    assert!(setup.store.url().starts_with("https://"));
    let report = setup.convert();
    assert_eq!(report["store"]["uploaded_chunks"], report["chunks"]);
    let flags = setup.flags("operator.token");
    let stats = setup
        .lazyimg
        .json(&Setup::words(&["store", "stats"], &flags));
    assert_eq!(stats["roots"][0]["images"], 1, "{stats:#}");
    setup.registry.stop();
    let host = setup.fresh_host("host");
    let mount = setup.mount(&host, &setup.flags("alpha.token"), &[]);
    setup.sample.assert_right(mount.dir());
    let status = mount.status();
    assert_eq!(mount.count("/errors"), 0, "{status:#}");
    assert!(mount.count("/tiers/store/chunks") > 0, "{status:#}");
}

#[test]
fn a_certificate_of_a_stranger_is_refused_with_words_that_say_what_to_do() {
    let mut setup = Setup::new("tls-stranger");
    setup.convert();
    let theirs = authority(setup.work.path(), "theirs");
    let ours = std::mem::replace(&mut setup.ca, theirs);
    let (wrong, at) = (setup.flags("alpha.token"), setup.at("mnt"));
    std::fs::create_dir_all(&at).expect("a test may write to its own directory");
    let without: Vec<_> = [&wrong[..2], &wrong[4..]].concat();
    for flags in [&wrong, &without] {
        let convert = Setup::words(&["convert", &setup.reference], flags);
        let only = ["mount", &setup.reference, &at, "--store-only"];
        for words in [convert, Setup::words(&only, flags)] {
            let said = setup.fresh_host("stranger").fails(5, &words);
            assert!(said.contains("certificate"), "{said}");
            assert!(said.contains("--store-ca"), "{said}");
        }
        let stats = Setup::words(&["store", "stats"], flags);
        let said = setup.lazyimg.fails(5, &stats);
        assert!(said.contains("--store-ca"), "{said}");
    }
    // With a registry a store in trouble costs no mount; the log has why.
    let host = setup.fresh_host("host");
    let mount = setup.mount(&host, &wrong, &[]);
    setup.sample.assert_right(mount.dir());
    assert_eq!(mount.count("/tiers/store/chunks"), 0);
    assert!(mount.count("/tiers/registry/chunks") > 0);
    assert!(host.log().contains("--store-ca"), "{}", host.log());
    // Files that hold no certificate are wrong settings, and named.
    std::fs::write(setup.at("none.pem"), "nothing").expect("a test may write there");
    for name in ["none.pem", "nowhere.pem"] {
        setup.ca = setup.work.join(name);
        let flags = setup.flags("alpha.token");
        let convert = Setup::words(&["convert", &setup.reference], &flags);
        let said = setup.lazyimg.fails(2, &convert);
        assert!(said.contains(name), "{said}");
    }
    setup.ca = ours;
    assert_eq!(setup.convert()["store"]["uploaded_chunks"], 0);
}

#[test]
fn an_unencrypted_address_of_a_tls_store_is_an_error_and_no_way_in() {
    let setup = Setup::new("tls-clear");
    let mut flags = setup.flags("alpha.token");
    flags[1] = flags[1].replace("https://", "http://");
    let stats = Setup::words(&["store", "stats"], &flags);
    let said = setup.lazyimg.fails(5, &stats);
    assert!(said.contains(&flags[1]), "{said}");
    let log = std::fs::read_to_string(setup.store.log()).unwrap_or_default();
    let token = std::fs::read_to_string(setup.work.join("alpha.token")).unwrap_or_default();
    assert!(!token.trim().is_empty() && !log.contains(token.trim()));
    // Nor the other way round.
    let plain = Store::start(setup.work.join("plain"));
    flags[1] = plain.url().replace("http://", "https://");
    let convert = Setup::words(&["convert", &setup.reference], &flags);
    let said = setup.lazyimg.fails(5, &convert);
    assert!(said.contains("does not speak TLS"), "{said}");
}

#[test]
fn a_mount_goes_on_when_its_token_is_rotated_and_without_a_good_one_the_error_says_so() {
    let mut setup = Setup::new("tls-token");
    setup.convert();
    setup.registry.stop();
    setup.replace("host.token", "alpha.token");
    let host = setup.fresh_host("host");
    let flags = setup.flags("host.token");
    let mount = setup.mount(&host, &flags, &["--store-only", "--hot-bytes", "0"]);
    let read_anew = || {
        host.ok(&["cache", "trim", "--to", "0"]);
        for file in &setup.sample.files {
            lazyimg_tests::sample::forget(&mount.join(file));
        }
        setup.sample.assert_right(mount.dir());
    };
    read_anew();
    // The new one beside the old one, then to the host, then the old one goes.
    let tenants = |files: &str| {
        let text = TENANTS.replace(r#""alpha.token""#, files);
        std::fs::write(setup.at("tenants.toml"), text).expect("a test may write there");
    };
    let other = setup.fresh_host("other");
    let works = |token: &str| {
        let flags = setup.flags(token);
        let convert = Setup::words(&["mount", &setup.reference, "mnt", "--store-only"], &flags);
        let _ = std::fs::create_dir_all(other.home().join("mnt"));
        let done = other.run(&convert);
        if done.code == 0 {
            other.ok(&["umount", "mnt"]);
        } else {
            assert_eq!(done.code, 4, "{done}");
            assert!(done.stderr.contains("token"), "{done}");
        }
        done.code == 0
    };
    assert!(works("alpha.token") && !works("alpha2.token"));
    tenants(r#""alpha.token", "alpha2.token""#);
    wait_for("both tokens are good", PATIENCE, || works("alpha2.token"));
    assert!(works("alpha.token"));
    setup.replace("host.token", "alpha2.token");
    tenants(r#""alpha2.token""#);
    wait_for("the old token is no good", PATIENCE, || {
        !works("alpha.token")
    });
    let before = mount.count("/tiers/store/chunks");
    read_anew();
    assert!(mount.count("/tiers/store/chunks") > before);
    assert_eq!(mount.count("/errors"), 0, "{:#}", mount.status());
}
