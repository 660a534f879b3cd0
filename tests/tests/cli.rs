//! The command line as a person or a script meets it.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::process::Command;

use lazyimg_tests::{Lazyimg, Registry, Sample, WorkDir};
use serde_json::Value;

struct World {
    lazyimg: Lazyimg,
    registry: Registry,
    reference: String,
    sample: Sample,
    work: WorkDir,
}

/// A small image, pushed but not converted.
fn pushed(name: &str) -> World {
    let work = WorkDir::new(name);
    let sample = Sample::new(&work.dir("sample"), 61, 2);
    let registry = Registry::start(work.join("registry"));
    let reference = registry.push(&sample.layout, "v1", "app:v1");
    let lazyimg = Lazyimg::new(work.join("home"));
    World {
        lazyimg,
        registry,
        reference,
        sample,
        work,
    }
}

fn converted(name: &str) -> World {
    let world = pushed(name);
    world.lazyimg.convert(&world.reference);
    world
}

#[test]
fn help_teaches_with_examples_and_wrong_usage_is_2() {
    let work = WorkDir::new("help");
    let lazyimg = Lazyimg::new(work.join("home"));
    let help = lazyimg.ok(&["--help"]);
    for word in [
        "Example",
        "lazyimg convert",
        "lazyimg mount",
        "Exit codes",
        "LAZYIMG_",
    ] {
        assert!(help.contains(word), "{word} is not in: {help}");
    }
    let listed = help.split("Commands:\n").nth(1).unwrap();
    let commands: Vec<&str> = listed
        .lines()
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next())
        .filter(|word| !word.is_empty() && *word != "help")
        .collect();
    assert!(commands.len() >= 9, "{commands:?} in: {help}");
    for command in commands {
        let own = lazyimg.ok(&[command, "--help"]);
        for word in ["Usage:", "Example", &format!("  lazyimg {command} ")] {
            assert!(own.contains(word), "{word} is not in: {own}");
        }
    }
    for command in ["status", "umount", "verify"] {
        let own = lazyimg.ok(&[command, "--help"]);
        assert!(own.contains("--cache-dir"), "{own}");
        assert!(
            !own.contains("--cache-bytes") && !own.contains("--hot-bytes"),
            "these have no effect there: {own}"
        );
    }
    assert!(lazyimg.ok(&["--version"]).starts_with("lazyimg "));
    for args in [
        &["frobnicate"][..],
        &["mount"],
        &["mount", "not a reference", "/tmp"],
        &["convert", "127.0.0.1:1/x:v1", "--level", "99"],
        &["mount", "127.0.0.1:1/x:v1", "/tmp", "--read-timeout", "0"],
        &["convert", "127.0.0.1:1/x:v1", "--domain", "a/b"],
    ] {
        let done = lazyimg.run(args);
        assert_eq!(
            (done.code, done.text()),
            (2, String::new()),
            "{args:?}: {done}"
        );
        assert!(!done.stderr.is_empty(), "{args:?}");
    }
    assert!(!lazyimg.config().exists(), "wrong usage makes no keys");
}

#[test]
fn an_image_that_is_missing_or_not_converted_is_3_and_the_error_says_which() {
    let w = pushed("missing");
    let at = w.work.dir("mnt").to_string_lossy().into_owned();
    let missing = w.registry.reference("nobody/has:this");
    let tag = w.registry.reference("app:v9");
    w.lazyimg
        .convert(&w.registry.push(&w.sample.layout, "v1", "other:v1"));
    for reference in [&missing, &tag] {
        for args in [
            &["convert", reference][..],
            &["inspect", reference],
            &["mount", reference, &at],
        ] {
            let error = w.lazyimg.fails(3, args);
            assert!(
                error.contains("nobody/has") || error.contains("v9"),
                "which image? {error}"
            );
        }
    }
    for args in [
        &["mount", &w.reference, &at][..],
        &["inspect", &w.reference],
        &["verify", &w.reference],
    ] {
        let error = w.lazyimg.fails(3, args);
        assert!(error.contains("lazyimg convert"), "what to do? {error}");
    }
    w.lazyimg.fails(
        3,
        &[
            "convert",
            &format!("oci:{}:v9", w.sample.layout.dir().display()),
        ],
    );
}

#[test]
fn data_goes_to_stdout_and_words_go_to_stderr() {
    let w = pushed("streams");
    let done = w.lazyimg.run(&["convert", &w.reference]);
    assert_eq!(done.code, 0, "{done}");
    let lines: Vec<String> = done.text().lines().map(str::to_owned).collect();
    assert!(
        lines.len() == 1 && lines[0].starts_with("sha256:") && lines[0].len() == 71,
        "{done}"
    );
    assert!(done.stderr.contains("converted"), "{done}");
    assert!(
        !done.stderr.contains('\r'),
        "bars are for terminals: {done}"
    );
    let quiet = w.lazyimg.run(&["convert", &w.reference, "--quiet"]);
    assert_eq!(
        (quiet.code, quiet.text().trim(), quiet.stderr.as_str()),
        (0, lines[0].as_str(), ""),
        "{quiet}"
    );
    let json = w.lazyimg.run(&["convert", &w.reference, "--json"]);
    let report: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(report["artifact"], lines[0].as_str());
    assert_eq!(report["files"], w.sample.files.len());

    let at = w.work.dir("mnt").to_string_lossy().into_owned();
    let mounted = w.lazyimg.run(&["mount", &w.reference, &at]);
    assert_eq!(
        (mounted.code, mounted.text().as_str()),
        (0, ""),
        "{mounted}"
    );
    assert!(mounted.stderr.contains(&at), "{mounted}");
    let failed = w
        .lazyimg
        .run(&["mount", &w.registry.reference("no:v1"), &at]);
    assert_eq!(failed.text(), "", "{failed}");
    assert!(failed.stderr.starts_with("lazyimg: "), "{failed}");
    assert!(
        !failed.stderr.contains("Error {") && !failed.stderr.contains("backtrace"),
        "{failed}"
    );
    // A reader that goes away is no failure.
    let mut head = std::process::Command::new("sh");
    let script = format!(
        "{} inspect {} | head -c 1 >/dev/null",
        lazyimg_tests::binary::lazyimg().display(),
        w.reference
    );
    assert_eq!(
        lazyimg_tests::process::run(head.args(["-c", &script])).ok(),
        ""
    );
}

#[test]
fn status_tells_what_was_fetched_what_hit_and_what_failed() {
    let w = converted("status");
    let none = w.lazyimg.status();
    assert_eq!(
        (&none["pid"], &none["mounts"]),
        (&Value::Null, &Value::Array(vec![])),
        "{none:#}"
    );
    assert!(w.lazyimg.ok(&["status"]).contains("nothing is mounted"));

    let inspect = w.lazyimg.json(&["inspect", &w.reference]);
    let mount = w
        .lazyimg
        .mount_with(&w.reference, w.work.join("mnt"), &["--hot-bytes", "0"]);
    let before = mount.status();
    assert_eq!(before["image"], w.reference.as_str());
    assert_eq!(before["digest"], inspect["image"]);
    assert_eq!(before["frontend"], "tree");
    assert_eq!(before["file_bytes"], inspect["file_bytes"]);
    assert_eq!(before["stored_bytes"], inspect["stored_bytes"]);
    w.sample.assert_right(mount.dir());
    let after = mount.status();
    let number = |status: &Value, pointer: &str| {
        status
            .pointer(pointer)
            .and_then(Value::as_u64)
            .unwrap_or_else(|| panic!("no {pointer} in {status:#}"))
    };
    assert_eq!(
        number(&after, "/resident_chunks"),
        number(&after, "/chunks"),
        "all was read: {after:#}"
    );
    assert_eq!(
        number(&after, "/resident_bytes"),
        number(&after, "/stored_bytes"),
        "{after:#}"
    );
    assert_eq!(
        number(&after, "/fetched_bytes"),
        number(&after, "/stored_bytes"),
        "each byte once: {after:#}"
    );
    assert_eq!(
        number(&after, "/tiers/registry/bytes"),
        number(&after, "/stored_bytes"),
        "{after:#}"
    );
    assert_eq!(number(&after, "/errors"), 0);
    w.sample
        .files
        .iter()
        .for_each(|f| lazyimg_tests::sample::forget(&mount.join(f)));
    w.sample.assert_right(mount.dir());
    let again = mount.status();
    assert!(
        number(&again, "/hits/cache/chunks") > number(&after, "/hits/cache/chunks"),
        "{again:#}"
    );
    assert_eq!(
        number(&again, "/fetched_bytes"),
        number(&after, "/fetched_bytes")
    );
    let text = w.lazyimg.ok(&["status"]);
    for word in [
        "resident", "fetched", "hits", "errors", "registry", "100.0 %",
    ] {
        assert!(text.contains(word), "{word} is not in: {text}");
    }
}

#[test]
fn doctor_says_what_this_host_can_do() {
    let w = pushed("doctor");
    let report = w.lazyimg.json(&["doctor"]);
    assert_eq!(report["ready"], true, "{report:#}");
    assert_eq!(report["mount_path"], "direct");
    let state_of = |report: &Value, what: &str| {
        let checks = report["checks"].as_array().unwrap();
        let check = checks
            .iter()
            .find(|c| c["what"] == what)
            .unwrap_or_else(|| panic!("no {what} in {report:#}"));
        check["state"].as_str().unwrap().to_owned()
    };
    for what in [
        "kernel",
        "/dev/fuse",
        "fusermount3",
        "other users",
        "random reads",
        "cache",
    ] {
        assert_eq!(state_of(&report, what), "ok", "{report:#}");
    }
    assert_eq!(state_of(&report, "tenant key"), "note", "there is none yet");
    w.lazyimg.convert(&w.reference);
    assert_eq!(state_of(&w.lazyimg.json(&["doctor"]), "tenant key"), "ok");
    assert!(w.lazyimg.ok(&["doctor"]).contains("mounts: "));
    fs::write(w.lazyimg.key_file(), "nonsense\n").unwrap();
    let broken = w.lazyimg.run(&["doctor", "--json"]);
    assert_eq!(broken.code, 1, "{broken}");
    let report: Value = serde_json::from_slice(&broken.stdout).unwrap();
    assert_eq!(
        (report["ready"].clone(), state_of(&report, "tenant key")),
        (false.into(), "fail".into())
    );
}

#[test]
fn without_root_doctor_names_fusermount3() {
    let w = pushed("doctor-user");
    let user = Lazyimg::new_unprivileged(w.work.join("user"), 65_533);
    let report: Value = serde_json::from_slice(&user.run(&["doctor", "--json"]).stdout).unwrap();
    assert_eq!(report["mount_path"], "fusermount3", "{report:#}");
    assert_eq!(report["ready"], true, "{report:#}");
}

#[test]
fn doctor_tests_capabilities_and_not_the_user_id() {
    let work = WorkDir::new("doctor-rights");
    let lazyimg = Lazyimg::new(work.join("home"));
    let doctor = lazyimg.command(&["doctor", "--json"]);
    let mut contained = Command::new("setpriv");
    contained
        .args(["--bounding-set=-sys_admin,-dac_read_search", "--"])
        .arg(doctor.get_program())
        .args(doctor.get_args())
        .env_clear()
        .envs(doctor.get_envs().filter_map(|(k, v)| Some((k, v?))))
        .current_dir(lazyimg.home());
    let done = lazyimg_tests::process::run(&mut contained);
    assert_eq!(done.code, 1, "{done}");
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(report["mount_path"], "none", "{report:#}");
    assert_eq!(report["ready"], false, "{report:#}");
    for (what, state) in [("fusermount3", "fail"), ("random reads", "note")] {
        let checks = report["checks"].as_array().unwrap();
        let check = checks.iter().find(|c| c["what"] == what).unwrap();
        assert_eq!(check["state"], state, "{report:#}");
    }
}

#[test]
fn doctor_names_credential_files_and_helpers_and_no_secret() {
    let work = WorkDir::new("doctor-credentials");
    let lazyimg = Lazyimg::new(work.join("home"));
    let file = lazyimg.home().join(".docker/config.json");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(
        &file,
        r#"{"auths": {"registry.example": {"auth": "YWxpY2U6aHVudGVyMg=="}}, "credHelpers": {"gcr.io": "no-such-helper"}}"#,
    )
    .unwrap();
    let text = lazyimg.ok(&["doctor"]);
    for word in [
        &*file.to_string_lossy(),
        "registry.example",
        "docker-credential-no-such-helper",
        "gcr.io",
        "not in PATH",
    ] {
        assert!(text.contains(word), "{word} is not in: {text}");
    }
    for secret in ["YWxp", "alice", "hunter2"] {
        assert!(!text.contains(secret), "{secret} is in: {text}");
    }
}

#[test]
fn inspect_and_verify_describe_a_good_image() {
    let w = converted("inspect");
    // Chunk tables are in clear: no key is needed to look.
    let stranger = Lazyimg::new(w.work.join("stranger"));
    let inspect = stranger.json(&["inspect", &w.reference]);
    assert!(!stranger.key_file().exists());
    assert_eq!(inspect["files"], w.sample.files.len());
    let bytes: u64 = w
        .sample
        .files
        .iter()
        .map(|f| fs::metadata(w.sample.source.join(f)).unwrap().len())
        .sum();
    assert_eq!(inspect["file_bytes"], bytes);
    assert_eq!(inspect["layers"].as_array().unwrap().len(), 1);
    let packs = inspect["packs"].as_array().unwrap();
    for pack in packs {
        let blob = w.registry.blob(pack["digest"].as_str().unwrap());
        assert_eq!(pack["bytes"], blob.len());
    }
    let text = stranger.ok(&["inspect", &w.reference]);
    for word in [
        "layer 0",
        "files",
        "data",
        "metadata",
        "stored",
        "if no chunk were shared",
        inspect["artifact"].as_str().unwrap(),
    ] {
        assert!(text.contains(word), "{word} is not in: {text}");
    }
    let verified = w.lazyimg.json(&["verify", &w.reference]);
    assert_eq!(
        (&verified["damaged"], &verified["chunks"]),
        (
            &0.into(),
            &inspect["data"]["unique_chunks"]
                .as_u64()
                .zip(inspect["metadata"]["unique_chunks"].as_u64())
                .map(|(a, b)| a + b)
                .unwrap()
                .into()
        ),
        "{verified:#}"
    );
    let mount = w.lazyimg.mount(&w.reference, w.work.join("mnt"));
    let verified = w.lazyimg.json(&["verify", &mount.dir().to_string_lossy()]);
    assert_eq!(verified["damaged"], 0, "{verified:#}");
}
