//! Archives that GNU tar writes in all its formats, read here and extracted by GNU tar, must give
//! the same tree; and random stacks of layers extracted by GNU tar one over the other.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests.

mod layers_support;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::BufReader;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use layers_support::host::{describe, require_root, run, set_mtime, set_xattr, without_time};
use layers_support::stack::{layer, plain_stack};
use layers_support::{Image, assert_same};
use proptest::prelude::*;

/// What a format can say.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Can {
    /// Short names, small numbers, no devices (v7).
    Little,
    /// Devices, longer names (ustar).
    More,
    /// Names of any length, large and negative numbers (GNU).
    Much,
    /// Attributes and nanoseconds too (PAX).
    All,
}

fn at(dir: &Path, name: &[u8]) -> PathBuf {
    dir.join(OsStr::from_bytes(name))
}

fn write_sparse(path: &Path, size: u64, data: &[(u64, &[u8])]) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for (offset, bytes) in data {
        file.write_all_at(bytes, *offset).unwrap();
    }
}

/// A tree with as many oddities as the format can hold.
fn make_tree(dir: &Path, can: Can) {
    fs::create_dir_all(dir.join("d/sub")).unwrap();
    fs::write(dir.join("empty"), b"").unwrap();
    fs::write(dir.join("d/block"), vec![b'x'; 512]).unwrap();
    fs::write(dir.join("d/blocks"), vec![b'y'; 70_001]).unwrap();
    fs::write(
        dir.join("d/large"),
        (0..3_000_000).map(|n| (n / 3) as u8).collect::<Vec<_>>(),
    )
    .unwrap();
    fs::write(at(dir, b"not utf8 \xff\xfe"), b"1").unwrap();
    fs::write(at(dir, b"new\nline"), b"1").unwrap();
    fs::write(dir.join("setuid"), b"1").unwrap();
    fs::set_permissions(dir.join("setuid"), fs::Permissions::from_mode(0o6711)).unwrap();
    fs::set_permissions(dir.join("d"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::hard_link(dir.join("d/block"), dir.join("d/sub/linked")).unwrap();
    symlink("d/block", dir.join("link")).unwrap();
    symlink("../../nowhere", dir.join("d/dangling")).unwrap();
    lchown(dir.join("empty"), Some(1), Some(2_097_151)).unwrap();
    lchown(dir.join("link"), Some(77), Some(78)).unwrap();
    let ns = if can == Can::All { 123_456_789 } else { 0 };
    if can >= Can::More {
        for (name, kind, rdev) in [
            ("null", rustix::fs::FileType::CharacterDevice, (1, 3)),
            ("disk", rustix::fs::FileType::BlockDevice, (8, 17)),
            ("pipe", rustix::fs::FileType::Fifo, (0, 0)),
        ] {
            let dev = rustix::fs::makedev(rdev.0, rdev.1);
            let mode = rustix::fs::Mode::from_raw_mode(0o640);
            rustix::fs::mknodat(rustix::fs::CWD, dir.join(name), kind, mode, dev).unwrap();
        }
        let parents = format!("prefix/{}", "p".repeat(90));
        fs::create_dir_all(dir.join(&parents)).unwrap();
        fs::write(dir.join(&parents).join("n".repeat(80)), b"ustar prefix").unwrap();
    }
    if can >= Can::Much {
        let mut deep = dir.to_owned();
        for c in ["a", "b", "c"] {
            deep = deep.join(c.repeat(255));
        }
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("f"), b"deep").unwrap();
        symlink("t".repeat(3000), deep.join("long target")).unwrap();
        fs::hard_link(deep.join("f"), dir.join("link to deep")).unwrap();
        lchown(deep.join("f"), Some(2_097_152), Some(4_294_967_294)).unwrap();
        fs::write(dir.join("before 1970"), b"1").unwrap();
    }
    if can >= Can::All {
        set_xattr(&dir.join("d"), "user.key", b"value\0\n=\xff");
        set_xattr(&dir.join("setuid"), "trusted.t", b"x");
        set_xattr(&dir.join("link"), "trusted.on-link", b"x");
        set_xattr(&dir.join("d/large"), "user.empty", b"");
        set_xattr(
            &dir.join("d/large"),
            "security.capability",
            &[
                1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            ],
        );
        run(Command::new("setfacl")
            .arg("-m")
            .arg("u:12345:rwx,g:54321:r")
            .arg(dir.join("empty")));
        run(Command::new("setfacl")
            .arg("-d")
            .arg("-m")
            .arg("u:12345:rx")
            .arg(dir.join("d/sub")));
    }
    let mut time = 1_500_000_000;
    for entry in all_below(dir) {
        time += 1;
        set_mtime(&entry, time, ns);
    }
    if can >= Can::Much {
        set_mtime(&dir.join("before 1970"), -86_401, ns);
    }
}

/// Children before their parents, so that setting times does not disturb them.
fn all_below(dir: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            out.extend(all_below(&path));
        } else {
            out.push(path);
        }
    }
    out.sort();
    out.push(dir.to_owned());
    out
}

fn pack(dir: &Path, archive: &Path, args: &[&str]) {
    run(Command::new("tar")
        .args(args)
        .args(["--numeric-owner", "--sort=name", "-C"])
        .arg(dir)
        .arg("-cf")
        .arg(archive)
        .arg("."));
}

fn extract(archive: &Path, dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    run(Command::new("tar")
        .args([
            "--xattrs",
            "--xattrs-include=*",
            "--acls",
            "--numeric-owner",
            "-P",
            "-p",
            "-C",
        ])
        .arg(dir)
        .arg("-xf")
        .arg(archive));
}

fn read(archive: &Path) -> Vec<String> {
    let mut image = Image::default();
    image
        .apply(BufReader::new(File::open(archive).unwrap()))
        .unwrap();
    image.describe()
}

/// Packs a tree, and compares what is read with what GNU tar extracts, and with the tree itself.
fn round_trip(can: Can, args: &[&str], make: impl Fn(&Path)) {
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let (tree, archive, out) = (
        dir.path().join("tree"),
        dir.path().join("a.tar"),
        dir.path().join("out"),
    );
    fs::create_dir(&tree).unwrap();
    make(&tree);
    pack(&tree, &archive, args);
    extract(&archive, &out);
    let ours = read(&archive);
    assert!(ours.len() > 1);
    assert_same(&ours, &describe(&out), "what GNU tar extracts");
    if can == Can::All {
        assert_same(&ours, &describe(&tree), "what GNU tar packed");
    }
}

#[test]
fn every_format_of_gnu_tar_is_read_as_gnu_tar_reads_it() {
    for (format, can) in [
        ("v7", Can::Little),
        ("ustar", Can::More),
        ("oldgnu", Can::Much),
        ("gnu", Can::Much),
        ("pax", Can::All),
    ] {
        let format = format!("--format={format}");
        let mut args = vec![&format[..]];
        if can == Can::All {
            args.extend(["--xattrs", "--xattrs-include=*", "--acls"]);
        }
        round_trip(can, &args, |dir| make_tree(dir, can));
    }
}

#[test]
fn every_kind_of_sparse_file_is_read_as_gnu_tar_reads_it() {
    let make = |dir: &Path| {
        write_sparse(&dir.join("hole at end"), 1 << 20, &[(0, b"start")]);
        write_sparse(
            &dir.join("hole at start"),
            1 << 20,
            &[((1 << 20) - 3, b"end")],
        );
        write_sparse(&dir.join("only a hole"), 5 << 20, &[]);
        write_sparse(
            &dir.join("9 GiB"),
            9 << 30,
            &[(4096, b"x"), ((9 << 30) - 4096, &[1; 4096])],
        );
        // More extents than the header (4), and than several extension blocks (21) hold.
        let many: Vec<(u64, &[u8])> = (0..100)
            .map(|n| (n * 65_536 + 4096, &b"data"[..]))
            .collect();
        write_sparse(&dir.join("many"), 100 * 65_536, &many);
        write_sparse(
            &dir.join(format!("{:0>150}", "long name")),
            1 << 20,
            &[(8192, b"x")],
        );
        fs::write(dir.join("dense"), vec![7; 100_000]).unwrap();
        for (n, path) in all_below(dir).into_iter().enumerate() {
            set_mtime(&path, 1_600_000_000 + n as i64, 0);
        }
    };
    for args in [
        &["--format=oldgnu"][..],
        &["--format=gnu"],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let args = [&["--sparse"], args].concat();
        round_trip(Can::All, &args, make);
    }
}

#[test]
fn a_volume_label_and_incremental_archives_are_read() {
    let make = |dir: &Path| make_tree(dir, Can::More);
    round_trip(Can::Much, &["--format=gnu", "--label=volume"], make);
    round_trip(
        Can::Much,
        &["--format=pax", "--label=volume", "--pax-option=comment=x"],
        make,
    );
    let snapshot = tempfile::tempdir().unwrap();
    let arg = format!(
        "--listed-incremental={}",
        snapshot.path().join("snar").display()
    );
    round_trip(Can::Much, &["--format=gnu", &arg], make);
}

#[test]
fn a_name_given_twice_is_a_link_to_itself_and_changes_nothing() {
    require_root();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), b"text").unwrap();
    let archive = dir.path().join("a.tar");
    run(Command::new("tar")
        .arg("-C")
        .arg(dir.path())
        .arg("-cf")
        .arg(&archive)
        .args(["a", "a"]));
    let lines = read(&archive);
    assert_eq!(lines.len(), 2);
    assert!(lines[1].contains("nlink=1 file 4 "), "{}", lines[1]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Entries that GNU tar stumbles over as well (hard links to what is not there) are left out by
    /// asking the flattening itself: the comparison is of what both take.
    #[test]
    fn random_stacks_equal_what_gnu_tar_extracts(stack in plain_stack()) {
        require_root();
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        let mut taken: Vec<Vec<u8>> = Vec::new();
        for ops in stack {
            let mut kept = Vec::new();
            for op in ops {
                kept.push(op);
                let mut image = Image::default();
                let tars = taken.iter().cloned().chain([layer(&kept)]);
                if tars.map(|tar| image.apply(&tar[..])).any(|result| result.is_err()) {
                    kept.pop();
                }
            }
            taken.push(layer(&kept));
        }
        let mut image = Image::default();
        for tar in &taken {
            image.apply(&tar[..]).unwrap();
            let archive = dir.path().join("layer.tar");
            fs::write(&archive, tar).unwrap();
            extract(&archive, &out);
        }
        // GNU tar dates a directory "now" when a later layer puts something into it.
        let undated = |lines: &[String]| without_time(lines, |_, line| line.ends_with(" dir") || line.contains(" dir "));
        let (mut ours, mut theirs) = (undated(&image.describe()), undated(&describe(&out)));
        // The directory that is extracted into has the host's own mode unless a layer says so.
        ours.remove(0);
        theirs.remove(0);
        assert_same(&ours, &theirs, "GNU tar");
    }
}
