//! The daemon and its client, as processes of their own: `tests/support/mini.rs`.

// A test that can't go on should say where.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lazyimg_fuse::client::{Client, ClientError};
use lazyimg_fuse::mountpoint::{mounted_at, namespace};
use lazyimg_fuse::protocol::{CacheSettings, ErrorCode, KeySource, MountRequest, WirePath};
use support::image::CHUNK;
use support::place::{Place, is_running};
use support::{BuiltImage, ImageBuilder, noise};

fn image() -> BuiltImage {
    let mut b = ImageBuilder::oddities();
    for i in 0..12 {
        b.file(format!("data/{i}"), noise(100 + i, CHUNK));
    }
    b.build()
}

fn assert_data(dir: &Path) {
    for i in 0..12 {
        assert!(
            fs::read(dir.join(format!("data/{i}"))).unwrap() == noise(100 + i, CHUNK),
            "data/{i}"
        );
    }
}

#[test]
fn a_mount_starts_a_daemon_that_ends_after_the_last_unmount() {
    let place = Place::new(&image());
    assert_eq!(place.status(), None);
    place.ok(&["mount", "cache", "image", "mnt"]);
    assert_data(&place.path("mnt"));
    place.ok(&["mount", "cache", "image", "other"]);
    assert_data(&place.path("other"));
    let status = place.status().unwrap();
    assert_eq!(status.mounts.len(), 2);
    let first = &status.mounts[0];
    assert_eq!(first.dir.0, place.path("mnt"));
    assert!(
        first.metadata_complete
            && first.resident_bytes > 0
            && first.resident_bytes <= first.stored_bytes
    );
    assert!(first.image_bytes > first.resident_bytes && first.file_bytes >= 12 * CHUNK as u64);
    assert!(
        first.stats.tiers[0].delivered.bytes > 6 << 20,
        "the first mount fetched: {:?}",
        first.stats
    );
    assert_eq!(
        status.mounts[1].stats.tiers[0].delivered.chunks, 0,
        "the second found all in the cache"
    );
    assert_eq!(
        fs::metadata(place.path("cache/control.sock"))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o600
    );
    assert_eq!(
        fs::metadata(place.path("cache/daemon.log"))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o600
    );
    assert_eq!(
        fs::metadata(place.path("cache"))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o700
    );
    place.ok(&["umount", "cache", "mnt", "clean"]);
    assert!(!place.is_mounted("mnt") && place.is_mounted("other"));
    assert_eq!(place.status().unwrap().mounts.len(), 1);
    place.ok(&["umount", "cache", "other", "clean"]);
    place.wait_until("the daemon has ended", || !is_running(status.pid));
    assert!(!place.path("cache/control.sock").exists());
}

#[test]
fn an_unmount_by_others_is_noticed() {
    let place = Place::new(&image());
    place.ok(&["mount", "cache", "image", "mnt"]);
    let pid = place.status().unwrap().pid;
    assert!(
        Command::new("umount")
            .arg(place.path("mnt"))
            .status()
            .unwrap()
            .success()
    );
    place.wait_until("the daemon has ended", || !is_running(pid));
}

#[test]
fn sigterm_takes_every_mount_off_even_when_files_are_open() {
    let place = Place::new(&image());
    place.ok(&["mount", "cache", "image", "mnt"]);
    place.ok(&["mount", "cache", "image", "other"]);
    let _open = fs::File::open(place.path("mnt/data/1")).unwrap();
    let began = Instant::now();
    place.kill(rustix::process::Signal::TERM);
    assert!(began.elapsed() < Duration::from_secs(30));
    assert!(!place.is_mounted("mnt") && !place.is_mounted("other"));
}

#[test]
fn clients_that_come_at_once_share_one_daemon() {
    let place = Place::new(&image());
    let names: Vec<String> = (0..8).map(|i| format!("m{i}")).collect();
    let mut children: Vec<_> = names
        .iter()
        .map(|name| {
            fs::create_dir(place.path(name)).unwrap();
            let dir = place.path(name);
            place
                .command(&["mount", "cache", "image", dir.to_str().unwrap()])
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for child in children.drain(..) {
        let output = child.wait_with_output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    assert_eq!(place.status().unwrap().mounts.len(), 8);
    for name in &names {
        assert!(fs::read(place.path(name).join("etc/hello")).is_ok());
        place.ok(&[
            "umount",
            "cache",
            place.path(name).to_str().unwrap(),
            "clean",
        ]);
    }
}

#[test]
fn a_client_that_comes_while_the_daemon_ends_is_served() {
    let place = Place::new(&image());
    for round in 0..10_u64 {
        place.ok(&["mount", "cache", "image", "mnt"]);
        place.ok(&["umount", "cache", "mnt", "clean"]);
        // Around the linger of 300 ms.
        std::thread::sleep(Duration::from_millis(270 + 7 * round));
    }
}

#[test]
fn the_foreground_ends_with_its_mount() {
    let place = Place::new(&image());
    for by_signal in [false, true] {
        let mut child = place
            .command(&["foreground", "cache", "image", "mnt"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        assert_data(&place.path("mnt"));
        let taken = place.fails(&["foreground", "cache", "image", "other"]);
        assert!(taken.contains("serves the cache"), "{taken}");
        if by_signal {
            let pid = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        } else {
            place.ok(&["umount", "cache", "mnt", "clean"]);
        }
        assert!(child.wait().unwrap().success());
        assert!(!place.is_mounted("mnt"));
    }
    let missing = place.fails(&["foreground", "cache", "image", "nowhere"]);
    assert!(missing.contains("No such file"), "{missing}");
}

#[test]
fn what_cannot_be_mounted_is_refused_with_the_reason() {
    let place = Place::new(&image());
    fs::write(place.path("file"), "").unwrap();
    let file = place.path("file");
    let not_dir = place.fails(&["mount", "cache", "image", file.to_str().unwrap()]);
    assert!(
        not_dir.to_lowercase().contains("not a directory"),
        "{not_dir}"
    );
    let no_image = place.fails(&["mount", "cache", "/nowhere", "mnt"]);
    assert!(no_image.contains("No such file"), "{no_image}");
    place.ok(&["mount", "cache", "image", "mnt"]);
    let twice = place.fails(&["mount", "cache", "image", "mnt"]);
    assert!(twice.contains("already"), "{twice}");
    let not_ours = place.fails(&["umount", "cache", "other", "clean"]);
    assert!(not_ours.contains("not a lazyimg mount"), "{not_ours}");
    let proc = place.fails(&["umount", "cache", "/proc", "lazy"]);
    assert!(
        proc.contains("not a lazyimg mount") && proc.contains("proc"),
        "{proc}"
    );
    let open = fs::File::open(place.path("mnt/etc/hello")).unwrap();
    let busy = place.fails(&["umount", "cache", "mnt", "clean"]);
    assert!(busy.contains("in use"), "{busy}");
    assert!(
        place
            .ok(&["umount", "cache", "mnt", "lazy"])
            .contains("in use: true")
    );
    assert_eq!(std::io::read_to_string(&open).unwrap(), "hello\n");
    assert!(place.status().unwrap().mounts[0].detached);
    place.ok(&["mount", "cache", "image", "mnt"]);
    drop(open);
    place.wait_until("the detached mount is gone", || {
        place.status().unwrap().mounts.len() == 1
    });
}

#[test]
fn a_mount_of_another_caches_daemon_can_be_taken_off() {
    let place = Place::new(&image());
    place.ok(&["mount", "cache", "image", "mnt"]);
    place.ok(&["mount", "cache2", "image", "other"]);
    let alive = place.fails(&["mount", "cache2", "image", "mnt"]);
    assert!(alive.contains("already"), "{alive}");
    place.ok(&["umount", "cache2", "mnt", "clean"]);
    assert!(!place.is_mounted("mnt"));
    place.ok(&["umount", "cache", "other", "clean"]);
    assert!(!place.is_mounted("other"));
}

#[test]
fn a_mount_whose_origin_is_down_fails_or_waits_as_long_as_its_timeout() {
    let place = Place::new(&image());
    for word in ["down", "silent"] {
        place.health(word);
        let began = Instant::now();
        let error = place.fails(&["mount", "cache", "image", "mnt", "700"]);
        assert!(error.contains("metadata"), "{error}");
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "{word} took {:?}",
            began.elapsed()
        );
        assert!(!place.is_mounted("mnt"));
    }
    place.health("good");
    place.ok(&["mount", "cache", "image", "mnt", "700"]);
    assert_data(&place.path("mnt"));
}

#[test]
fn a_daemon_in_another_mount_namespace_says_so() {
    let place = Place::new(&image());
    place.ok(&["mount", "cache", "image", "mnt"]);
    let output = Command::new("unshare")
        .arg("--mount")
        .arg(&place.mini)
        .args([
            "mount".as_ref(),
            place.path("cache").as_path(),
            &place.path("image"),
            &place.path("other"),
        ])
        .output()
        .unwrap();
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("another mount namespace"),
        "{output:?}"
    );
    let client = Client::new(&place.path("cache"), None).unwrap();
    let request = MountRequest {
        image: "oci:/x".into(),
        dir: WirePath(place.path("other")),
        namespace: "mnt:[1]".into(),
        key: KeySource::Command("true".into()),
        source: Default::default(),
        cache: Default::default(),
        flags: Default::default(),
        tree: Default::default(),
    };
    let refused = client.mount(request).unwrap_err();
    assert!(
        matches!(
            refused,
            ClientError::Refused {
                code: ErrorCode::Namespace,
                ..
            }
        ),
        "{refused}"
    );
}

#[test]
fn verify_counts_good_chunks_and_heals_the_cache() {
    let place = Place::new(&image());
    place.ok(&["mount", "cache", "image", "mnt"]);
    assert_data(&place.path("mnt"));
    let client = Client::new(&place.path("cache"), None).unwrap();
    assert_eq!(namespace().unwrap().get(..4), Some("mnt:"));
    for tiers in [false, true] {
        let mut steps = Vec::new();
        let report = client
            .verify(&place.path("mnt"), tiers, &mut |done, total| {
                steps.push((done, total))
            })
            .unwrap();
        assert_eq!(
            (report.bad, report.good),
            (0, place.status().unwrap().mounts[0].chunks),
            "{report:?}"
        );
        assert_eq!(report.cached == 0, tiers);
    }
}

#[test]
fn verify_tells_what_it_could_not_reach_from_what_is_damaged() {
    let place = Place::new(&image());
    place.ok(&["mount", "cache", "image", "mnt"]);
    assert!(fs::read(place.path("mnt/data/1")).unwrap() == noise(101, CHUNK));
    let client = Client::new(&place.path("cache"), None).unwrap();
    let verify = || {
        client
            .verify(&place.path("mnt"), false, &mut |_, _| {})
            .unwrap()
    };
    place.health("down");
    let offline = verify();
    assert_eq!(offline.bad, 0, "{offline:?}");
    assert!(offline.cached > 0 && offline.unreachable > 0, "{offline:?}");
    let told = &offline.unreachable_causes;
    assert!(
        told.len() == 1 && told[0].contains("taken down"),
        "{told:?}"
    );
    place.health("good");
    // Gone for good is damage.
    let pack = fs::read_dir(place.path("image"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .max_by_key(|path| path.metadata().unwrap().len())
        .unwrap();
    fs::rename(&pack, place.path("aside")).unwrap();
    let gone = verify();
    assert!(gone.bad > 0 && gone.unreachable == 0, "{gone:?}");
    fs::rename(place.path("aside"), &pack).unwrap();
    let back = verify();
    assert_eq!((back.bad, back.unreachable), (0, 0), "{back:?}");
}

#[test]
fn a_client_that_asks_for_another_cache_than_there_is_is_told() {
    let place = Place::new(&image());
    place.ok(&["mount", "cache", "image", "mnt"]);
    let client = Client::new(&place.path("cache"), None).unwrap();
    let note = |cache_bytes, hot_bytes| {
        let request = MountRequest {
            image: format!("oci:{}", place.path("image").display()),
            dir: WirePath(place.path("other")),
            namespace: namespace().unwrap(),
            key: KeySource::Command("true".into()),
            source: Default::default(),
            cache: CacheSettings {
                cache_bytes,
                hot_bytes,
            },
            flags: Default::default(),
            tree: Default::default(),
        };
        let mounted = client.mount(request).unwrap();
        place.ok(&["umount", "cache", "other", "clean"]);
        mounted.note
    };
    // What `mini` runs with.
    assert_eq!(note(None, None), None);
    assert_eq!(note(Some(1 << 30), Some(16 << 20)), None);
    for (cache_bytes, hot_bytes) in [(Some(2 << 30), None), (None, Some(1))] {
        let note = note(cache_bytes, hot_bytes).unwrap();
        assert!(
            note.contains("--cache-bytes 1073741824 --hot-bytes 16777216")
                && note.contains("unmount everything"),
            "{note}"
        );
    }
}

/// /dev/fuse with udev's default mode, which some machines lack, for the time of a test.
struct OpenDevice(fs::Permissions);

impl OpenDevice {
    fn new() -> Self {
        let before = fs::metadata("/dev/fuse").unwrap().permissions();
        fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
        Self(before)
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        let _ = fs::set_permissions("/dev/fuse", self.0.clone());
    }
}

#[test]
fn without_root_fusermount_mounts_and_unmounts() {
    let mut place = Place::new(&image());
    let _open = OpenDevice::new();
    place.user = Some(65534);
    for name in ["image/tenant", "image/manifest"] {
        fs::set_permissions(place.path(name), fs::Permissions::from_mode(0o644)).unwrap();
    }
    for name in ["mnt", "other"] {
        std::os::unix::fs::chown(place.path(name), Some(65534), Some(65534)).unwrap();
    }
    place.ok(&["mount", "cache", "image", "mnt"]);
    let entry = mounted_at(&place.path("mnt")).unwrap().unwrap();
    assert!(entry.is_ours(), "{entry:?}");
    let mine = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "cat"])
        .arg(place.path("mnt/etc/hello"))
        .output()
        .unwrap();
    assert_eq!(mine.stdout, b"hello\n");
    assert!(
        fs::read(place.path("mnt/etc/hello")).is_err(),
        "even root is another user"
    );
    let refused = Client::new(&place.path("cache"), None).unwrap().status();
    assert!(refused.is_ok(), "root may ask: {refused:?}");
    place.ok(&["umount", "cache", "mnt", "clean"]);
    assert!(!place.is_mounted("mnt"));
    place.ok(&["mount", "cache", "image", "mnt"]);
    place.kill(rustix::process::Signal::KILL);
    assert!(
        place
            .ok(&["mount", "cache", "image", "mnt"])
            .contains("stale")
    );
    place.ok(&["umount", "cache", "mnt", "lazy"]);
    // Another user's daemon is not for everybody.
    place.user = None;
    place.ok(&["mount", "cache2", "image", "other"]);
    place.user = Some(65534);
    let forbidden = place.fails(&["mount", "cache2", "image", "mnt"]);
    assert!(forbidden.contains("Permission denied"), "{forbidden}");
}
