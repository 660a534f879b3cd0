//! Measures a mount beside a plain directory with the same files: `cargo run --release --example
//! measure_mount [MIB_OF_THE_LARGE_FILE [SMALL_FILES]]`, as root, on an otherwise idle machine. The host
//! cache is full; "cold" means that the kernel was told to forget all it had.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use lazyimg_fuse::tree::TreeOptions;
use support::{ImageBuilder, Mounted, Options, drop_caches, text};

/// Runs of each figure; the median is printed.
const RUNS: usize = 5;

fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            walk(&path, files);
        } else {
            files.push(path);
        }
    }
}

fn read_small(dir: &Path) {
    let mut files = Vec::new();
    walk(&dir.join("small"), &mut files);
    for file in files {
        std::hint::black_box(fs::read(file).unwrap());
    }
}

fn sequential(dir: &Path) {
    let file = File::open(dir.join("large")).unwrap();
    let mut buffer = vec![0; 128 << 10];
    let mut at = 0;
    loop {
        match file.read_at(&mut buffer, at).unwrap() {
            0 => return,
            n => at += n as u64,
        }
    }
}

fn random(dir: &Path, len: usize, count: u64) {
    let file = File::open(dir.join("large")).unwrap();
    let size = file.metadata().unwrap().len();
    let mut buffer = vec![0; len];
    let mut at = 99_u64;
    for _ in 0..count {
        at = at
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let offset = (at >> 20) % (size / len as u64) * len as u64;
        file.read_exact_at(&mut buffer, offset).unwrap();
    }
}

type Work = Box<dyn Fn(&Path)>;

/// From the start of the mounting process to the end of the first listing of the root, with no
/// daemon and an empty cache; `mini` (build it first) does the mounting.
fn latency(files: usize) {
    let mut b = ImageBuilder::default();
    for i in 0..files {
        b.file(
            format!("usr/lib/d{:04}/a-file-of-some-name-{i}", i / 40),
            "",
        );
    }
    let image = b.build();
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    image.write_to(&at("image"));
    fs::create_dir(at("mnt")).unwrap();
    let mini = std::env::current_exe()
        .unwrap()
        .parent()
        .unwrap()
        .with_file_name("mini");
    let run = |args: &[&std::ffi::OsStr]| {
        let status = std::process::Command::new(&mini)
            .args(args)
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
    };
    let mut times: Vec<f64> = (0..11)
        .map(|i| {
            let cache = at(&format!("cache{i}"));
            let began = Instant::now();
            run(&[
                "mount".as_ref(),
                cache.as_ref(),
                at("image").as_ref(),
                at("mnt").as_ref(),
            ]);
            assert_eq!(fs::read_dir(at("mnt")).unwrap().count(), 1);
            let took = began.elapsed().as_secs_f64();
            run(&[
                "umount".as_ref(),
                cache.as_ref(),
                at("mnt").as_ref(),
                "clean".as_ref(),
            ]);
            took
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!(
        "mount to first ls, {files} files: median {:.1} ms, fastest {:.1} ms",
        times[5] * 1e3,
        times[0] * 1e3
    );
}

fn main() {
    if std::env::args().nth(1).as_deref() == Some("latency") {
        return latency(40_000);
    }
    let mut args = std::env::args()
        .skip(1)
        .map(|a| a.parse::<usize>().unwrap());
    let large = args.next().unwrap_or(512) << 20;
    let small = args.next().unwrap_or(4000);
    let mut b = ImageBuilder::default();
    for i in 0..small {
        b.file(
            format!("small/d{:03}/file-{i}", i / 40),
            text(i as u64, 500 + i * 7919 % 20_000),
        );
    }
    b.file("large", text(1, large));
    let image = b.build();
    let plain = tempfile::tempdir_in("/var/tmp").unwrap();
    for (path, expected) in &image.expected {
        let at = plain.path().join(std::str::from_utf8(path).unwrap());
        match expected.inode.kind {
            lazyimg_image::tree::Kind::Dir(_) => fs::create_dir_all(at).unwrap(),
            _ => fs::write(at, &expected.bytes).unwrap(),
        }
    }
    let works: Vec<(&str, bool, Work)> = vec![
        ("find + stat", false, Box::new(|d| walk(d, &mut Vec::new()))),
        ("find + stat", true, Box::new(|d| walk(d, &mut Vec::new()))),
        ("read small files", false, Box::new(read_small)),
        ("read small files", true, Box::new(read_small)),
        ("sequential", false, Box::new(sequential)),
        ("sequential", true, Box::new(sequential)),
        (
            "random 4K x 8000",
            false,
            Box::new(|d| random(d, 4096, 8000)),
        ),
        (
            "random 128K x 1500",
            false,
            Box::new(|d| random(d, 128 << 10, 1500)),
        ),
    ];
    println!("| | | plain (s) | mount (s) | ratio | no fill (s) |\n|---|---|---|---|---|---|");
    let mount = |fill: bool| {
        let tree = TreeOptions {
            fill,
            ..TreeOptions::default()
        };
        let mounted = Mounted::with(
            &image,
            &Options {
                tree,
                ..Options::default()
            },
        );
        read_small(mounted.dir());
        sequential(mounted.dir());
        mounted.host.flush();
        mounted
    };
    rustix::fs::sync();
    let (filling, plain_mount) = (mount(true), mount(false));
    for (name, warm, work) in &works {
        let time = |dir: &Path| {
            let mut times: Vec<f64> = (0..RUNS)
                .map(|_| {
                    if *warm {
                        work(dir);
                    } else {
                        drop_caches();
                    }
                    let began = Instant::now();
                    work(dir);
                    began.elapsed().as_secs_f64()
                })
                .collect();
            times.sort_by(f64::total_cmp);
            times[RUNS / 2]
        };
        let (p, m, n) = (
            time(plain.path()),
            time(filling.dir()),
            time(plain_mount.dir()),
        );
        println!(
            "| {name} | {} | {p:.3} | {m:.3} | {:.2} | {n:.3} |",
            if *warm { "warm" } else { "cold" },
            m / p
        );
    }
    println!("filled {} MiB", filling.mount.filled_bytes() >> 20);
}
