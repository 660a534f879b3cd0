//! What commands leave behind and say when something is in the way, or takes long.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lazyimg_tests::process::{self, Finished};
use lazyimg_tests::proxy::{Fault, Proxy, Target};
use lazyimg_tests::{Lazyimg, Registry, Sample, WorkDir, flip};
use serde_json::Value;

struct World {
    lazyimg: Lazyimg,
    registry: Registry,
    reference: String,
    work: WorkDir,
}

/// A small converted image.
fn converted(name: &str) -> World {
    let work = WorkDir::new(name);
    let sample = Sample::new(&work.dir("sample"), 63, 2);
    let registry = Registry::start(work.join("registry"));
    let reference = registry.push(&sample.layout, "v1", "app:v1");
    let lazyimg = Lazyimg::new(work.join("home"));
    lazyimg.convert(&reference);
    World {
        lazyimg,
        registry,
        reference,
        work,
    }
}

/// The digest of the pack that holds the files' bytes.
fn data_pack(w: &World) -> String {
    let inspect = w.lazyimg.json(&["inspect", &w.reference]);
    inspect["packs"][0]["digest"].as_str().unwrap().to_owned()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn an_export_that_fails_says_why_by_its_code_and_leaves_nothing_half_done() {
    let w = converted("export-fails");
    let proxy = Proxy::start(w.registry.port());
    let reference = proxy.reference("app:v1");
    let out = w.work.dir("out");
    let export = ["export", &reference, &*out.to_string_lossy()];
    let pack = data_pack(&w);
    let reads = Target::Naming(Box::leak(pack.clone().into_boxed_str()));
    for (fault, code) in [(Fault::Status(403), 4), (Fault::Close, 5)] {
        proxy.set(fault, reads);
        w.lazyimg.fails(code, &export);
        assert_eq!(names(&out), [""; 0], "{fault:?}");
    }
    proxy.heal();
    w.lazyimg.ok(&export);
    assert_eq!(names(&out), ["data.blob", "meta.erofs"]);
    let before = fs::read(out.join("data.blob")).unwrap();

    let flipped = flip::bit(&w.registry.blob_path(&pack), 100, 0);
    let error = w.lazyimg.fails(6, &export);
    assert!(error.contains("wrong bytes"), "{error}");
    assert_eq!(names(&out), ["data.blob", "meta.erofs"]);
    assert!(
        fs::read(out.join("data.blob")).unwrap() == before,
        "the export that was there stays"
    );
    flipped.restore();
    // What a killed export left is in nobody's way.
    fs::write(out.join("data.blob.partial"), "rest").unwrap();
    w.lazyimg.ok(&export);
    assert_eq!(names(&out), ["data.blob", "meta.erofs"]);
    assert!(fs::read(out.join("data.blob")).unwrap() == before);
}

#[test]
fn umount_all_takes_off_what_it_can_and_tells_of_each_that_it_can_not() {
    let w = converted("umount-all");
    let dirs = ["a", "b", "c"].map(|name| w.work.dir(name));
    let mut mounts: Vec<_> = dirs
        .iter()
        .map(|dir| w.lazyimg.mount(&w.reference, dir))
        .collect();
    let first = Sample::new(&w.work.dir("names"), 63, 2).files[0].clone();
    // Whatever the order is: one that is busy comes before the one that is not.
    let held = [0, 2].map(|n| fs::File::open(dirs[n].join(&first)).unwrap());
    let error = w.lazyimg.fails(1, &["umount", "--all"]);
    for busy in [&dirs[0], &dirs[2]] {
        assert!(error.contains(&*busy.to_string_lossy()), "{error}");
    }
    assert_eq!(error.matches("lazyimg: ").count(), 2, "{error}");
    let status = w.lazyimg.status();
    let left: Vec<_> = status["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["mountpoint"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(left.len(), 2, "{status:#}");
    assert!(!left.contains(&dirs[1].to_string_lossy().into_owned()));
    drop(held);
    w.lazyimg.ok(&["umount", "--all"]);
    assert_eq!(w.lazyimg.status()["mounts"], Value::Array(vec![]));
    mounts.clear();
}

/// Runs the program with a terminal as its standard error; what it drew is in `stdout`.
fn on_a_terminal(lazyimg: &Lazyimg, args: &[&str]) -> Finished {
    const SCRIPT: &str = "
import os, pty, subprocess, sys
ours, theirs = pty.openpty()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=theirs)
os.close(theirs)
while True:
    try:
        piece = os.read(ours, 65536)
    except OSError:
        break
    if not piece:
        break
    sys.stdout.buffer.write(piece)
sys.exit(child.wait())
";
    let inner = lazyimg.command(args);
    let mut outer = Command::new("python3");
    outer
        .args(["-c", SCRIPT])
        .arg(inner.get_program())
        .args(inner.get_args())
        .env_clear()
        .envs(inner.get_envs().filter_map(|(k, v)| Some((k, v?))))
        .env("TERM", "xterm")
        .current_dir(lazyimg.home());
    process::run(&mut outer)
}

#[test]
fn what_takes_more_than_a_second_shows_a_sign_of_life_on_a_terminal_and_nothing_before() {
    let w = converted("progress");
    let at = w.work.dir("mnt").to_string_lossy().into_owned();
    for (args, words) in [
        (&["mount", &w.reference, &at][..], "mounting"),
        (&["convert", &w.reference], "looking the image up"),
    ] {
        w.registry.freeze();
        let done = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(2500));
                w.registry.thaw();
            });
            on_a_terminal(&w.lazyimg, args)
        });
        assert_eq!(done.code, 0, "{done}");
        assert!(done.text().contains(words), "{words} in {:?}", done.text());
    }
    w.lazyimg.ok(&["umount", "--all"]);
    // On a machine that is busy enough this takes a second: then a bar is right.
    let done = on_a_terminal(&w.lazyimg, &["verify", &w.reference]);
    assert_eq!(done.code, 0, "{done}");
    if done.took < Duration::from_millis(900) {
        assert_eq!(done.text(), "", "{done}");
    }
}
