//! Nobody reads what is not theirs.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use lazyimg_tests::image::Compression;
use lazyimg_tests::process::sh;
use lazyimg_tests::runs::Runs;
use lazyimg_tests::sample::noise;
use lazyimg_tests::tree::{assert_same_dirs, nothing};
use lazyimg_tests::{Layout, Lazyimg, Registry, Sample, WorkDir};

/// Secrets in a tree: contents, names, link targets and attributes.
struct Planted {
    runs: Runs,
    layout: Layout,
    source: std::path::PathBuf,
}

/// Noise would stay as it is through any compressor, so an unencrypted copy could not hide; the printable
/// secret is what people have.
fn plant(work: &WorkDir) -> Planted {
    let mut random = fastrand::Rng::with_seed(0x5ec2e7);
    let source = work.dir("source");
    let mut runs = Runs::default();
    let mut secret = |bytes: Vec<u8>| {
        runs.plant(&bytes);
        bytes
    };
    let printable: Vec<u8> = (0..4096).map(|_| random.u8(b'!'..=b'~')).collect();
    fs::write(source.join("printable"), secret(printable)).unwrap();
    fs::write(source.join("small"), secret(noise(&mut random, 4096))).unwrap();
    fs::write(source.join("large"), secret(noise(&mut random, 3 << 20))).unwrap();
    let name = |random: &mut fastrand::Rng, len: usize| -> Vec<u8> {
        std::iter::repeat_with(|| random.u8(1..))
            .filter(|b| *b != b'/')
            .take(len)
            .collect()
    };
    for i in 0..400 {
        // With lone names the metadata would be mostly zeros, which compress; with these it hardly does.
        let path = source.join(OsStr::from_bytes(&secret(name(&mut random, 250))));
        if i % 2 == 0 {
            fs::write(path, secret(noise(&mut random, 100))).unwrap();
        } else {
            std::os::unix::fs::symlink(OsStr::from_bytes(&secret(name(&mut random, 300))), path)
                .unwrap();
        }
    }
    let value = secret(noise(&mut random, 1000));
    rustix::fs::setxattr(
        source.join("small"),
        "user.secret",
        &value,
        rustix::fs::XattrFlags::empty(),
    )
    .unwrap();
    let layout = Layout::create(work.join("layout"));
    let layer = layout.add_layer(&source, Compression::Gzip);
    layout.add_image("v1", &[layer]);
    Planted {
        runs,
        layout,
        source,
    }
}

#[test]
fn neither_registry_nor_cache_contains_a_run_of_a_secret_or_a_name() {
    let work = WorkDir::new("secrecy");
    let planted = plant(&work);
    let registry = Registry::start(work.join("registry"));
    let reference = registry.push(&planted.layout, "v1", "app:v1");
    let originals = registry.blobs();
    let lazyimg = Lazyimg::new(work.join("home"));
    lazyimg.convert(&reference);
    let mount = lazyimg.mount(&reference, work.join("mnt"));
    assert_same_dirs("the mount differs", &planted.source, mount.dir(), &nothing);
    lazyimg.ok(&["verify", &mount.dir().to_string_lossy()]);

    let pushed: Vec<String> = registry.blobs().difference(&originals).cloned().collect();
    assert!(
        pushed.len() >= 4,
        "two packs, a manifest, an artifact: {pushed:?}"
    );
    let in_blobs: Vec<_> = pushed
        .iter()
        .filter_map(|d| planted.runs.find_in(&registry.blob_path(d)))
        .collect();
    assert_eq!(
        in_blobs,
        Vec::<String>::new(),
        "in the registry, while the daemon runs"
    );
    assert_eq!(
        planted.runs.find_below(lazyimg.cache()),
        Vec::<String>::new(),
        "in the cache, while it is in use"
    );
    let cached: u64 = lazyimg_tests::flip::files_below(lazyimg.cache())
        .iter()
        .map(|f| fs::metadata(f).map_or(0, |m| m.len()))
        .sum();
    assert!(
        cached > 3 << 20,
        "the cache holds the image, {cached} bytes"
    );
    lazyimg.stop();
    assert_eq!(
        planted.runs.find_below(lazyimg.cache()),
        Vec::<String>::new(),
        "in the cache, at rest"
    );
    assert_eq!(
        planted.runs.find_below(&work.join("home/tmp")),
        Vec::<String>::new(),
        "in working files"
    );

    // The search finds what is there: the same metadata, compressed but not encrypted.
    let export = work.join("export");
    lazyimg.ok(&["export", &reference, &export.to_string_lossy()]);
    sh(
        "zstd",
        &[
            "-q3",
            &export.join("meta.erofs").to_string_lossy(),
            "-o",
            &work.join("meta.zst").to_string_lossy(),
        ],
    );
    for name in ["export/meta.erofs", "export/data.blob", "meta.zst"] {
        assert!(
            planted.runs.find_in(&work.join(name)).is_some(),
            "the search is blind: {name}"
        );
    }
}

/// A converted sample and who converted it.
fn converted(work: &WorkDir) -> (Registry, Lazyimg, String, Sample) {
    let sample = Sample::new(&work.dir("sample"), 1, 2);
    let registry = Registry::start(work.join("registry"));
    let reference = registry.push(&sample.layout, "v1", "app:v1");
    let lazyimg = Lazyimg::new(work.join("home"));
    lazyimg.convert(&reference);
    (registry, lazyimg, reference, sample)
}

#[test]
fn another_tenants_key_opens_nothing_and_the_error_says_so() {
    let work = WorkDir::new("wrong-key");
    let (_registry, lazyimg, reference, sample) = converted(&work);
    let stranger = Lazyimg::new(work.join("stranger"));
    let at = work.dir("mnt").to_string_lossy().into_owned();
    // Without any key first: mounting makes none.
    let error = stranger.fails(4, &["mount", &reference, &at]);
    assert!(error.contains("key"), "{error}");
    assert!(
        !stranger.key_file().exists(),
        "a key was made to open somebody else's image"
    );
    stranger.copy_secrets_from(&lazyimg);
    let digits = fs::read_to_string(stranger.key_file()).unwrap();
    let other = digits
        .trim_end()
        .split_at(digits.trim_end().len() - 1)
        .0
        .to_owned();
    let last = if digits.trim_end().ends_with('0') {
        '1'
    } else {
        '0'
    };
    fs::write(stranger.key_file(), format!("{other}{last}\n")).unwrap();
    for args in [
        &["mount", &reference, &at][..],
        &["export", &reference, &at],
        &["verify", &reference],
        &["mount", &reference, &at, "--foreground"],
    ] {
        // The daemon of the mount before may still linger, and the foreground has its own.
        stranger.stop();
        let error = stranger.fails(4, args);
        assert!(error.contains("key"), "{args:?}: {error}");
        assert!(
            error.lines().count() <= 4,
            "an error is a few lines: {error}"
        );
    }
    assert_eq!(
        fs::read_dir(&at).unwrap().count(),
        0,
        "nothing is mounted or written"
    );
    // One daemon, two tenants: the second one's wrong key opens nothing of the first one's mount.
    let mount = lazyimg.mount(&reference, work.join("mnt-1"));
    sample.assert_right(mount.dir());
    let key = stranger.key_file().to_string_lossy().into_owned();
    let error = lazyimg.fails(4, &["mount", &reference, &at, "--key-file", &key]);
    assert!(error.contains("key"), "{error}");
    assert_eq!(fs::read_dir(&at).unwrap().count(), 0);
    sample.assert_right(mount.dir());
}

#[test]
fn keys_are_private_files_and_appear_nowhere_else() {
    let work = WorkDir::new("keys");
    let (_registry, lazyimg, reference, sample) = converted(&work);
    let mut runs = Runs::default();
    for name in ["tenant.key", "domain-default.secret"] {
        let file = lazyimg.config().join(name);
        assert_eq!(
            fs::metadata(&file).unwrap().permissions().mode() & 0o7777,
            0o600,
            "{name}"
        );
        let text = fs::read_to_string(&file).unwrap();
        let digits = text.split_whitespace().last().unwrap().to_owned();
        assert_eq!(digits.len(), 64, "{text}");
        runs.plant(digits.as_bytes());
        let bytes: Vec<u8> = (0..32)
            .map(|i| u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).unwrap())
            .collect();
        runs.plant(&bytes);
    }
    let config_mode = fs::metadata(lazyimg.config()).unwrap().permissions().mode() & 0o077;
    assert_eq!(config_mode, 0, "the folder of the keys is private");

    let mount = lazyimg.mount_with(&reference, work.join("mnt"), &["-v", "-v"]);
    sample.assert_right(mount.dir());
    let daemon = lazyimg.daemon().as_raw_pid();
    for what in ["cmdline", "environ"] {
        let bytes = fs::read(format!("/proc/{daemon}/{what}")).unwrap();
        assert_eq!(
            runs.find(&bytes),
            None,
            "{what}: {}",
            String::from_utf8_lossy(&bytes)
        );
    }
    assert_eq!(runs.find_below(lazyimg.cache()), Vec::<String>::new());
    assert_eq!(
        runs.find_below(&work.join("registry")),
        Vec::<String>::new()
    );
    let said = lazyimg.run(&["convert", &reference, "-v", "-v"]);
    assert_eq!(
        (runs.find(said.stderr.as_bytes()), runs.find(&said.stdout)),
        (None, None),
        "{said}"
    );

    // The control socket and the cache are nobody else's.
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o077;
    assert_eq!(mode(lazyimg.cache()), 0);
    assert_eq!(mode(&lazyimg.cache().join("control.sock")), 0);
    assert_eq!(mode(&lazyimg.cache().join("daemon.log")), 0);
    drop(mount);

    fs::set_permissions(lazyimg.key_file(), fs::Permissions::from_mode(0o640)).unwrap();
    let at = work.join("mnt").to_string_lossy().into_owned();
    let error = lazyimg.fails(4, &["mount", &reference, &at]);
    assert!(
        error.contains("tenant.key") && error.contains("600"),
        "what to do is not said: {error}"
    );
}

#[test]
fn a_key_command_is_asked_and_its_failure_is_told() {
    let work = WorkDir::new("key-command");
    let (_registry, lazyimg, reference, sample) = converted(&work);
    let command = format!("cat {}", lazyimg.key_file().display());
    let other = Lazyimg::new(work.join("other"));
    let mount = other.mount_with(&reference, work.join("mnt"), &["--key-command", &command]);
    sample.assert_right(mount.dir());
    drop(mount);
    let at = work.join("mnt").to_string_lossy().into_owned();
    let error = other.fails(
        4,
        &[
            "mount",
            &reference,
            &at,
            "--key-command",
            "echo no such tenant >&2; exit 3",
        ],
    );
    assert!(
        error.contains("no such tenant"),
        "the command's own words are missing: {error}"
    );
    let error = other.fails(
        4,
        &[
            "mount",
            &reference,
            &at,
            "--key-command",
            "echo nonsense-0123456789",
        ],
    );
    assert!(
        !error.contains("nonsense-0123456789"),
        "what a key command prints is secret: {error}"
    );
}
