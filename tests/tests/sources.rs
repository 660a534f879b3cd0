//! Where images come from: registries with credentials, OCI layouts, several platforms, digests.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use lazyimg_tests::registry::{CHANGED_PASSWORD, CREDENTIALS};
use lazyimg_tests::runs::Runs;
use lazyimg_tests::{Layout, Lazyimg, Registry, Sample, WorkDir};

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[test]
fn an_oci_layout_is_converted_mounted_and_verified_like_a_registry() {
    let work = WorkDir::new("layout");
    let sample = Sample::new(&work.dir("sample"), 81, 4);
    let lazyimg = Lazyimg::new(work.join("home"));
    let reference = sample.layout.reference("v1");
    let report = lazyimg.convert(&reference);
    assert!(
        report["uploaded_chunks"].as_u64().unwrap() > 0,
        "{report:#}"
    );
    let again = lazyimg.convert(&reference);
    assert_eq!(
        (&again["uploaded_chunks"], &again["artifact"]),
        (&0.into(), &report["artifact"]),
        "{again:#}"
    );
    let mount = lazyimg.mount(&reference, work.join("mnt"));
    sample.assert_right(mount.dir());
    lazyimg.ok(&["verify", &reference]);
    lazyimg.ok(&["export", &reference, &text(&work.join("export"))]);
    assert_eq!(
        lazyimg.json(&["inspect", &reference])["artifact"],
        report["artifact"]
    );
    // Other programs still read the layout.
    let copy = format!("oci:{}:copy", text(&work.join("copy")));
    lazyimg_tests::process::sh(
        "skopeo",
        &["--insecure-policy", "copy", "--quiet", &reference, &copy],
    );

    // The same image in a registry gives the same form.
    let registry = Registry::start(work.join("registry"));
    let pushed = lazyimg.convert(&registry.push(&sample.layout, "v1", "app:v1"));
    assert_eq!(pushed["artifact"], report["artifact"]);
}

#[test]
fn a_relative_layout_is_found_from_where_the_command_runs() {
    let work = WorkDir::new("relative");
    let sample = Sample::new(&work.dir("home/sample"), 82, 1);
    let lazyimg = Lazyimg::new(work.join("home"));
    fs::create_dir(work.join("home/mnt")).unwrap();
    lazyimg.ok(&["convert", "oci:sample/layout:v1"]);
    lazyimg.ok(&["mount", "oci:sample/layout:v1", "mnt"]);
    sample.assert_right(&work.join("home/mnt"));
    lazyimg.ok(&["umount", "mnt"]);
}

/// A registry that asks for a password, with a converted image.
fn protected(work: &WorkDir) -> (Registry, String, Sample) {
    let sample = Sample::new(&work.dir("sample"), 83, 12);
    let registry = Registry::start_with_password(work.join("registry"));
    let reference = registry.push(&sample.layout, "v1", "private/app:v1");
    (registry, reference, sample)
}

/// base64, which docker's configuration has credentials in.
fn base64(text: &str) -> String {
    let script = "import base64,sys; print(base64.b64encode(sys.argv[1].encode()).decode())";
    lazyimg_tests::process::sh("python3", &["-c", script, text])
        .trim()
        .to_owned()
}

fn auths(registry: &Registry, user: &str, password: &str) -> String {
    let auth = base64(&format!("{user}:{password}"));
    format!(
        r#"{{"auths": {{"{}": {{"auth": "{auth}"}}}}}}"#,
        registry.host()
    )
}

#[test]
fn credentials_come_from_dockers_configuration_each_time_and_stay_there() {
    let work = WorkDir::new("credentials");
    let (mut registry, reference, sample) = protected(&work);
    let lazyimg = Lazyimg::new(work.join("home"));
    let error = lazyimg.fails(4, &["convert", &reference]);
    assert!(error.contains(&registry.host()), "which registry? {error}");
    assert!(
        error.contains("docker login") || error.contains("config.json"),
        "what to do? {error}"
    );

    let config = work.dir("home/.docker").join("config.json");
    fs::write(&config, auths(&registry, CREDENTIALS.0, "wrong password")).unwrap();
    let error = lazyimg.fails(4, &["convert", &reference]);
    assert!(
        !error.contains("wrong password"),
        "credentials are not for logs: {error}"
    );
    fs::write(&config, auths(&registry, CREDENTIALS.0, CREDENTIALS.1)).unwrap();
    lazyimg.convert(&reference);
    let mount = lazyimg.mount_with(
        &reference,
        work.join("mnt"),
        &["--read-timeout", "5", "--hot-bytes", "0", "-vv"],
    );
    let first = &sample.files[0];
    let last = sample
        .files
        .iter()
        .rfind(|f| f.starts_with("large"))
        .unwrap();
    sample.check(mount.dir(), first).unwrap();

    // The password changes while a container runs: what is cached can be read, what is not is an error until the
    // configuration has the new one. Nothing needs to be restarted.
    registry.change_password();
    lazyimg_tests::sample::forget(&mount.join(first));
    sample.check(mount.dir(), first).unwrap();
    assert_eq!(sample.check(mount.dir(), last), Err(5), "{}", lazyimg.log());
    assert!(
        lazyimg.log().contains("docker login"),
        "what to do? {}",
        lazyimg.log()
    );
    fs::write(&config, auths(&registry, CREDENTIALS.0, CHANGED_PASSWORD)).unwrap();
    sample.assert_right(mount.dir());

    let mut runs = Runs::default();
    runs.plant(base64(&format!("{}:{}", CREDENTIALS.0, CREDENTIALS.1)).as_bytes());
    // 15 bytes are one too few for a run.
    runs.plant(format!("{}\0", CREDENTIALS.1).repeat(2).as_bytes());
    assert_eq!(runs.find_below(lazyimg.cache()), Vec::<String>::new());
    assert!(!lazyimg.log().contains(CREDENTIALS.1));
}

#[test]
fn a_credential_helper_is_asked_each_time() {
    let work = WorkDir::new("helper");
    let (registry, reference, sample) = protected(&work);
    let bin = work.dir("bin");
    let helper = bin.join("docker-credential-test");
    let answers = format!(
        "#!/bin/sh\nread server\necho \"$1 $server\" >> {}\n\
         printf '{{\"ServerURL\":\"%s\",\"Username\":\"{}\",\"Secret\":\"{}\"}}\\n' \"$server\"\n",
        work.join("asked").display(),
        CREDENTIALS.0,
        CREDENTIALS.1
    );
    fs::write(&helper, answers).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let lazyimg = Lazyimg::new(work.join("home")).env("PATH", &path);
    let config = work.join("docker.json");
    for setting in [
        format!(r#"{{"credHelpers": {{"{}": "test"}}}}"#, registry.host()),
        r#"{"credsStore": "test"}"#.to_owned(),
    ] {
        fs::write(&config, &setting).unwrap();
        let _ = fs::remove_file(work.join("asked"));
        lazyimg.ok(&["convert", &reference, "--docker-config", &text(&config)]);
        let asked = fs::read_to_string(work.join("asked")).unwrap();
        assert!(
            asked.contains(&format!("get {}", registry.host())),
            "{setting}: {asked}"
        );
        let mount = lazyimg.mount_with(
            &reference,
            work.join("mnt"),
            &["--docker-config", &text(&config)],
        );
        sample.assert_right(mount.dir());
        mount.umount();
        lazyimg.stop();
        fs::remove_dir_all(lazyimg.cache()).unwrap();
    }
    fs::write(&helper, "#!/bin/sh\necho the vault is sealed >&2\nexit 1\n").unwrap();
    let error = lazyimg.fails(
        4,
        &["convert", &reference, "--docker-config", &text(&config)],
    );
    assert!(
        error.contains("docker-credential-test") && error.contains("the vault is sealed"),
        "{error}"
    );
}

#[test]
fn what_convert_can_read_a_mount_can_read_whoever_started_the_daemon() {
    let work = WorkDir::new("credentials-elsewhere");
    let (registry, reference, sample) = protected(&work);
    let other = Sample::new(&work.dir("other"), 85, 1);
    let cache = work.join("cache");
    // Another shell starts the daemon: no credentials, no helpers.
    let starter = Lazyimg::new(work.join("starter")).with_cache(&cache);
    starter.convert(&other.layout.reference("v1"));
    let _first = starter.mount(&other.layout.reference("v1"), work.join("first"));

    let bin = work.dir("bin");
    let helper = bin.join("docker-credential-test");
    let script = format!(
        "#!/bin/sh\n[ -e \"$HOME/vault\" ] || exit 1\n\
         printf '{{\"Username\":\"{}\",\"Secret\":\"{}\"}}\\n'\n",
        CREDENTIALS.0, CREDENTIALS.1
    );
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let good = auths(&registry, CREDENTIALS.0, CREDENTIALS.1);
    let nothing = text(&work.dir("nothing"));
    let helped = r#"{"credsStore": "test"}"#;
    let cases = [
        ("home/.docker/config.json", &*good, vec![]),
        // podman's, while DOCKER_CONFIG names a place that knows nothing.
        (
            "home/config/containers/auth.json",
            &good,
            vec![("DOCKER_CONFIG", nothing.clone())],
        ),
        (
            "auth.json",
            &good,
            vec![
                ("REGISTRY_AUTH_FILE", text(&work.join("auth.json"))),
                ("DOCKER_CONFIG", nothing),
            ],
        ),
        (
            "run/containers/auth.json",
            &good,
            vec![("XDG_RUNTIME_DIR", text(&work.join("run")))],
        ),
        ("home/.docker/config.json", helped, vec![("PATH", path)]),
    ];
    fs::create_dir_all(work.join("home")).unwrap();
    fs::write(work.join("home/vault"), "").unwrap();
    for (place, content, env) in cases {
        let mut lazyimg = Lazyimg::new(work.join("home")).with_cache(&cache);
        for (name, value) in &env {
            lazyimg = lazyimg.env(name, value);
        }
        let file = work.join(place);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, content).unwrap();
        lazyimg.convert(&reference);
        let at = text(&work.dir("mnt"));
        lazyimg.ok(&["mount", &reference, &at]);
        sample.assert_right(Path::new(&at));
        lazyimg.ok(&["umount", &at]);
        fs::remove_file(&file).unwrap();
        lazyimg.fails(4, &["mount", &reference, &at]);
        // Dropped, it would end the daemon.
        std::mem::forget(lazyimg);
    }
}

#[test]
fn a_platform_is_chosen_and_a_missing_one_is_told() {
    let work = WorkDir::new("platform");
    let (one, two) = (
        Sample::new(&work.dir("one"), 84, 1),
        Sample::new(&work.dir("two"), 85, 1),
    );
    let layout = Layout::create(work.join("layout"));
    let (of_one, of_two) = (one.layout.layers("v1"), two.layout.layers("v1"));
    layout.borrow(&one.layout, &of_one);
    layout.borrow(&two.layout, &of_two);
    layout.add_index("v1", &[("amd64", &of_one), ("arm64", &of_two)]);
    let registry = Registry::start(work.join("registry"));
    let reference = registry.push(&layout, "v1", "multi:v1");
    let lazyimg = Lazyimg::new(work.join("home"));
    for (platform, sample, at) in [
        ("linux/amd64", &one, "mnt-1"),
        ("linux/arm64", &two, "mnt-2"),
    ] {
        let report = lazyimg.json(&["convert", &reference, "--platform", platform]);
        assert_eq!(report["files"], sample.files.len(), "{platform}");
        let mount = lazyimg.mount_with(&reference, work.join(at), &["--platform", platform]);
        sample.assert_right(mount.dir());
        mount.umount();
    }
    // Both are there now, side by side; the host's own is the default.
    let (host, sample) = match std::env::consts::ARCH {
        "x86_64" => ("linux/amd64", &one),
        "aarch64" => ("linux/arm64", &two),
        other => panic!("the test knows no image for {other}"),
    };
    assert_eq!(lazyimg.json(&["inspect", &reference])["platform"], host);
    sample.assert_right(lazyimg.mount(&reference, work.join("mnt-3")).dir());
    two.assert_right(
        lazyimg
            .mount_with(
                &reference,
                work.join("mnt-4"),
                &["--platform", "linux/arm64"],
            )
            .dir(),
    );
    let error = lazyimg.fails(3, &["convert", &reference, "--platform", "linux/riscv64"]);
    assert!(
        error.contains("linux/amd64") && error.contains("linux/arm64"),
        "which are there? {error}"
    );
    lazyimg.fails(2, &["convert", &reference, "--platform", "nonsense"]);
}

#[test]
fn an_image_can_be_named_by_digest_and_a_moved_tag_shows_the_new_image() {
    let work = WorkDir::new("digest");
    let (old, new) = (
        Sample::new(&work.dir("old"), 86, 1),
        Sample::new(&work.dir("new"), 87, 1),
    );
    let registry = Registry::start(work.join("registry"));
    let lazyimg = Lazyimg::new(work.join("home"));
    let tag = registry.push(&old.layout, "v1", "app:v1");
    let by_digest = registry.reference(&format!("app@{}", old.layout.digest("v1")));
    let report = lazyimg.convert(&by_digest);
    assert_eq!(report["image"], old.layout.digest("v1"));
    old.assert_right(lazyimg.mount(&by_digest, work.join("mnt-1")).dir());
    // The tag names the converted image though it was converted by digest.
    old.assert_right(lazyimg.mount(&tag, work.join("mnt-2")).dir());
    lazyimg.convert(&tag);

    registry.push(&new.layout, "v1", "app:v1");
    let at = text(&work.dir("mnt-3"));
    let error = lazyimg.fails(3, &["mount", &tag, &at]);
    assert!(
        error.contains("lazyimg convert"),
        "the old artifact is not the new image's: {error}"
    );
    lazyimg.convert(&tag);
    new.assert_right(lazyimg.mount(&tag, &at).dir());
    old.assert_right(lazyimg.mount(&by_digest, work.join("mnt-4")).dir());
    let both = registry.reference(&format!("app:v1@{}", new.layout.digest("v1")));
    new.assert_right(lazyimg.mount(&both, work.join("mnt-5")).dir());
}

#[test]
fn without_the_tag_the_artifact_is_found_among_the_referrers() {
    let work = WorkDir::new("no-tag");
    let sample = Sample::new(&work.dir("sample"), 88, 1);
    let registry = Registry::start(work.join("registry"));
    let reference = registry.push(&sample.layout, "v1", "app:v1");
    let lazyimg = Lazyimg::new(work.join("home"));
    lazyimg.json(&["convert", &reference, "--no-tag"]);
    let tags = work.join("registry/storage/docker/registry/v2/repositories/app/_manifests/tags");
    assert!(!tags.join("v1-lazyimg").exists());
    sample.assert_right(lazyimg.mount(&reference, work.join("mnt")).dir());
    lazyimg.convert(&reference);
    assert!(tags.join("v1-lazyimg").exists());
}

#[test]
fn rotating_the_key_uploads_no_pack_and_opens_under_the_new_key() {
    let work = WorkDir::new("rotate");
    let sample = Sample::new(&work.dir("sample"), 89, 2);
    let registry = Registry::start(work.join("registry"));
    let reference = registry.push(&sample.layout, "v1", "app:v1");
    let lazyimg = Lazyimg::new(work.join("home"));
    lazyimg.convert(&reference);
    let before = registry.blobs();
    let packs = lazyimg.json(&["inspect", &reference])["packs"].clone();
    let new_key = text(&work.join("home/new.key"));
    let said = lazyimg.run(&["rotate-key", &reference, "--new-key-file", &new_key]);
    assert_eq!(said.code, 0, "{said}");
    assert_eq!(
        fs::metadata(&new_key).unwrap().permissions().mode() & 0o7777,
        0o600
    );
    let added: Vec<usize> = registry
        .blobs()
        .difference(&before)
        .map(|d| registry.blob(d).len())
        .collect();
    assert!(
        added.iter().sum::<usize>() < 64 << 10,
        "only documents are new: {added:?}"
    );
    assert_eq!(lazyimg.json(&["inspect", &reference])["packs"], packs);

    let at = text(&work.dir("mnt"));
    // Until it is deleted in the registry, the artifact under the old key is there too.
    assert!(said.stderr.contains("delete"), "{said}");
    let mount = lazyimg.mount_with(&reference, &at, &["--key-file", &new_key]);
    sample.assert_right(mount.dir());
    let ok = lazyimg.run(&["verify", &reference, "--key-file", &new_key]);
    assert_eq!(ok.code, 0, "{ok}");
}
