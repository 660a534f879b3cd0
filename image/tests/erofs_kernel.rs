//! The kernel and erofs-utils read the metadata as we meant it: two independent implementations.
//! Needs root (it mounts) and `fsck.erofs`; panics where either is missing.
#![allow(clippy::unwrap_used)] // Helpers outside of test functions.

mod erofs_support;

use std::ffi::CString;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use erofs_support::{Content, Sample, describe_fs, mode, samples};
use lazyimg_image::erofs;
use lazyimg_image::tree::{ContentId, Kind, Meta, Mtime, Rdev};
use proptest::prelude::*;
use rustix::mount::{MountFlags, UnmountFlags};

/// Metadata and data as files, where the tools and the kernel want them.
struct Form {
    dir: tempfile::TempDir,
}

impl Form {
    fn of(sample: &Sample) -> Self {
        let data = sample.data();
        let form = Self::with_meta(&sample.write(&data));
        std::fs::write(form.data(), &data.bytes).unwrap();
        form
    }

    fn with_meta(meta: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("meta"), meta).unwrap();
        std::fs::write(dir.path().join("data"), b"").unwrap();
        Self { dir }
    }

    fn meta(&self) -> PathBuf {
        self.dir.path().join("meta")
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Runs `fsck.erofs`, which must find nothing wrong.
    fn check(&self, more: &[&str]) {
        // It recurses with about 10 KiB for each level.
        let output = Command::new("sh")
            .args([
                "-c",
                "ulimit -s unlimited && exec fsck.erofs \"$@\"",
                "fsck.erofs",
            ])
            .arg("-d3")
            .arg(format!("--device={}", self.data().display()))
            .args(more)
            .arg(self.meta())
            .output()
            .expect("a shell");
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert_ne!(
            output.status.code(),
            Some(127),
            "erofs-utils must be installed for this test: {text}"
        );
        assert!(output.status.success(), "fsck.erofs: {text}");
        let verdict = ["No errors found", "Extracted filesystem successfully"];
        assert!(
            verdict.iter().any(|verdict| text.contains(verdict)),
            "fsck.erofs: {text}"
        );
        assert!(!text.contains("<E>"), "fsck.erofs: {text}");
    }

    /// Mounts the two files with mount(2), without a loop device.
    fn mount(&self) -> Mounted {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test mounts file systems: run it as root"
        );
        let at = self.dir.path().join("mnt");
        std::fs::create_dir_all(&at).unwrap();
        let options = [b"device=", self.data().as_os_str().as_bytes()].concat();
        rustix::mount::mount(
            self.meta(),
            &at,
            "erofs",
            MountFlags::RDONLY,
            CString::new(options).unwrap().as_c_str(),
        )
        .expect("Linux 6.12 or later with EROFS_FS_BACKED_BY_FILE is needed for this test");
        Mounted { at }
    }
}

struct Mounted {
    at: PathBuf,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.at, UnmountFlags::empty());
    }
}

fn assert_same(seen: &[String], wanted: &[String]) {
    for (seen, wanted) in seen.iter().zip(wanted) {
        assert_eq!(seen, wanted);
    }
    assert_eq!(seen.len(), wanted.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_kernel_mounts_any_tree_as_it_is(sample in samples(80)) {
        let form = Form::of(&sample);
        let mounted = form.mount();
        assert_same(&describe_fs(&mounted.at, true), &sample.describe());
    }

    #[test]
    fn fsck_finds_no_fault_in_any_tree(sample in samples(80)) {
        Form::of(&sample).check(&[]);
    }
}

/// Version 1.5 extracts no extended attributes, and forgets holes: those are left out here.
#[test]
fn fsck_extracts_the_right_bytes() {
    let mut sample = Sample::default();
    let root = sample.tree.root();
    let dir = sample.dir(root, b"dir");
    let deep = sample.dir(dir, b"deep \xff\xfe name");
    for (i, len) in [1usize, 4095, 4096, 4097, 100_000, 3 << 20]
        .into_iter()
        .enumerate()
    {
        let bytes: Vec<u8> = (0..len).map(|b| (b * 31 + i) as u8 | 1).collect();
        let id = sample.file(deep, format!("f{len}").as_bytes(), &bytes);
        sample.tree.meta_mut(id).mtime = Mtime {
            sec: 1_000_000 + i as i64,
            nsec: 77,
        };
        sample
            .tree
            .link(root, format!("also{len}").into_bytes(), id);
        sample.file(dir, format!("same{len}").as_bytes(), &bytes);
    }
    sample.file(root, b"empty", b"");
    sample.add(
        root,
        b"short",
        mode(0o777),
        Kind::Symlink(b"dir/deep".to_vec()),
    );
    sample.add(dir, b"long", mode(0o777), Kind::Symlink(vec![b'l'; 4095]));
    sample.add(dir, b"fifo", mode(0o644), Kind::Fifo);
    sample.add(
        dir,
        b"null",
        mode(0o644),
        Kind::Char(Rdev { major: 1, minor: 3 }),
    );

    let form = Form::of(&sample);
    let out = form.dir.path().join("out");
    form.check(&[&format!("--extract={}", out.display())]);
    // 1.5 makes copies of hard links: compare type, mode and content.
    let brief = |lines: Vec<String>| -> Vec<String> {
        lines
            .into_iter()
            .map(|line| {
                let words: Vec<_> = line.split(' ').collect();
                let what = words.iter().position(|w| w.starts_with("nlink=")).unwrap();
                let what: Vec<_> = words[what + 1..]
                    .iter()
                    .filter(|w| !w.starts_with("same-as="))
                    .copied()
                    .collect();
                format!("{} {} {}", words[0], words[1], what.join(" "))
            })
            .collect()
    };
    assert_same(&brief(describe_fs(&out, false)), &brief(sample.describe()));
}

/// Everything at its limit, in one tree.
#[test]
fn the_kernel_and_fsck_take_every_oddity() {
    let mut sample = Sample::default();
    let root = sample.tree.root();
    let with = |xattrs: Vec<(&str, Vec<u8>)>| Meta {
        mode: 0o640,
        xattrs: xattrs
            .into_iter()
            .map(|(name, value)| (name.as_bytes().to_vec(), value))
            .collect(),
        ..Meta::default()
    };
    let dir = |sample: &mut Sample, name: &[u8]| sample.dir(root, name);

    let names = dir(&mut sample, b"names");
    for first in (1..=255u8).filter(|&b| b != b'/') {
        sample.add(names, &[first; 255], mode(0o600), Kind::Fifo);
        sample.add(names, &[b'.', first, first], mode(0o600), Kind::Fifo);
    }

    let links = dir(&mut sample, b"links");
    for len in [1, 59, 60, 3900, 4031, 4032, 4033, 4095] {
        let target = vec![b't'; len];
        sample.add(
            links,
            format!("{len}").as_bytes(),
            mode(0o777),
            Kind::Symlink(target.clone()),
        );
        let meta = with(vec![("trusted.t", vec![9; len])]);
        sample.add(
            links,
            format!("{len}x").as_bytes(),
            meta,
            Kind::Symlink(target),
        );
    }

    let xattrs = dir(&mut sample, b"xattrs");
    let capability = |rev: u8, more: &[u8]| [&[1, 0, 0, rev][..], &[0x22; 16], more].concat();
    let longest = format!("user.{}", "n".repeat(250));
    let several = vec![
        ("security.capability", capability(3, &1000u32.to_le_bytes())),
        ("trusted.overlay.opaque", b"y".to_vec()),
        ("user.empty", Vec::new()),
        (longest.as_str(), b"v".to_vec()),
    ];
    let kind = sample.content(Content::Bytes(b"data".to_vec()));
    sample.add(xattrs, b"several", with(several), kind);
    // 65,535 bytes each, and together just what fits: 12 + 4 * 65,534.
    let most = vec![
        ("trusted.1", vec![1; 65_535]),
        ("trusted.2", vec![2; 65_535]),
        ("trusted.3", vec![3; 65_535]),
        ("trusted.4", vec![4; 262_136 - 3 * 65_540 - 5]),
    ];
    let kind = sample.content(Content::Bytes(b"data".to_vec()));
    sample.add(xattrs, b"most", with(most.clone()), kind);
    let kind = Kind::Dir(Default::default());
    let inner = sample.add(xattrs, b"most-dir", with(most.clone()), kind);
    sample.add(inner, b"child", mode(0o600), Kind::Fifo);
    sample.add(
        xattrs,
        b"most-link",
        with(most),
        Kind::Symlink(b"x".to_vec()),
    );
    for len in (0..200).chain(3900..4100) {
        let meta = with(vec![("trusted.x", vec![b'x'; len])]);
        let name = format!("d{len}");
        sample.add(xattrs, name.as_bytes(), meta, Kind::Dir(Default::default()));
    }
    let acl = |entries: &[(u16, u16, u32)]| {
        let mut acl = 2u32.to_le_bytes().to_vec();
        for (tag, perm, id) in entries {
            acl.extend(tag.to_le_bytes());
            acl.extend(perm.to_le_bytes());
            acl.extend(id.to_le_bytes());
        }
        acl
    };
    const NONE: u32 = u32::MAX;
    let list = acl(&[
        (1, 7, NONE),
        (2, 5, 1000),
        (4, 5, NONE),
        (16, 5, NONE),
        (32, 4, NONE),
    ]);
    let meta = with(vec![
        ("system.posix_acl_access", list.clone()),
        ("system.posix_acl_default", list),
    ]);
    sample.add(xattrs, b"acl", meta, Kind::Dir(Default::default()));

    let times = dir(&mut sample, b"times");
    let sizes = dir(&mut sample, b"sizes");
    for (i, sec) in [-1, -62_135_596_800, 1 << 33, 253_402_300_799]
        .into_iter()
        .enumerate()
    {
        let meta = Meta {
            mode: 0o7777,
            uid: u32::MAX - 1,
            gid: 1 << 31,
            mtime: Mtime {
                sec,
                nsec: 999_999_999,
            },
            xattrs: Vec::new(),
        };
        sample.add(times, format!("{i}").as_bytes(), meta, Kind::Fifo);
    }
    for size in [
        1,
        4095,
        4096,
        4097,
        8 << 30,
        (8 << 30) + 1,
        1 << 40,
        (1 << 50) + 1,
    ] {
        let kind = sample.content(Content::Zeros(size));
        sample.add(sizes, format!("hole{size}").as_bytes(), mode(0o600), kind);
    }
    let mut partly = vec![0u8; 1 << 20];
    partly[700_000] = 1;
    sample.file(sizes, b"partly", &partly);

    let nodes = dir(&mut sample, b"nodes");
    for (major, minor) in [
        (0, 0),
        (1, 3),
        (8, 255),
        (8, 256),
        (259, 1_048_575),
        (4095, 70_000),
    ] {
        let rdev = Rdev { major, minor };
        let name = format!("{major}-{minor}");
        sample.add(
            nodes,
            format!("c{name}").as_bytes(),
            mode(0o600),
            Kind::Char(rdev),
        );
        sample.add(
            nodes,
            format!("b{name}").as_bytes(),
            mode(0o600),
            Kind::Block(rdev),
        );
    }
    sample.add(nodes, b"socket", mode(0o600), Kind::Socket);

    let form = Form::of(&sample);
    form.check(&[]);
    let mounted = form.mount();
    assert_same(&describe_fs(&mounted.at, true), &sample.describe());
}

#[test]
fn a_hundred_thousand_names_and_more_links_than_sixteen_bits_count() {
    let mut sample = Sample::default();
    let root = sample.tree.root();
    let big = sample.dir(root, b"big");
    let file = sample.file(root, b"file", b"content");
    for i in 0..70_000 {
        sample.tree.link(big, format!("link{i}").into_bytes(), file);
    }
    for i in 0..30_000 {
        sample.add(big, format!("{i}.own").as_bytes(), mode(0o600), Kind::Fifo);
    }
    assert_eq!(sample.tree.nlink(file), 70_001);
    let form = Form::of(&sample);
    form.check(&[]);
    let mounted = form.mount();
    assert_same(&describe_fs(&mounted.at, false), &sample.describe());
}

#[test]
fn a_thousand_directories_deep() {
    let mut sample = Sample::default();
    let mut dir = sample.tree.root();
    for _ in 0..1000 {
        dir = sample.dir(dir, b"d");
    }
    sample.file(dir, b"bottom", b"reached");
    let form = Form::of(&sample);
    form.check(&[]);
    let mounted = form.mount();
    assert_same(&describe_fs(&mounted.at, false), &sample.describe());
}

/// Data in several chunks of 1 GiB, read through the kernel at their borders.
#[test]
fn a_file_beyond_eight_gib_is_read_right_at_every_chunk_border() {
    const GIB: u64 = 1 << 30;
    const START: u32 = 3;
    let size = 9 * GIB + 9001;
    let mut sample = Sample::default();
    let kind = Kind::File {
        size,
        content: Some(ContentId(0)),
    };
    sample.add(sample.tree.root(), b"huge", mode(0o600), kind);
    let blocks = u64::from(START) + size.div_ceil(4096);
    let meta = erofs::write(&sample.tree, &|_| Some(START), blocks).unwrap();
    let form = Form::with_meta(&meta);
    let mut data = std::fs::File::create(form.data()).unwrap();
    data.set_len(blocks * 4096).unwrap();
    let marks: Vec<u64> = (0..=9)
        .flat_map(|gib| [gib * GIB, gib * GIB + 4096])
        .chain((1..=9).map(|gib| gib * GIB - 5))
        .chain([size - 5])
        .filter(|at| at + 5 <= size)
        .collect();
    for &at in &marks {
        data.seek(SeekFrom::Start(u64::from(START) * 4096 + at))
            .unwrap();
        data.write_all(&(at as u32).to_le_bytes()).unwrap();
        data.write_all(b"!").unwrap();
    }
    form.check(&[]);
    let mounted = form.mount();
    let file = std::fs::File::open(mounted.at.join("huge")).unwrap();
    assert_eq!(file.metadata().unwrap().len(), size);
    for &at in &marks {
        let mut read = [0; 5];
        file.read_exact_at(&mut read, at).unwrap();
        assert_eq!(read[..4], (at as u32).to_le_bytes(), "at {at}");
        assert_eq!(read[4], b'!');
    }
    drop(file);
}

#[test]
fn an_image_without_files_needs_only_an_empty_data_space() {
    let form = Form::of(&Sample::default());
    form.check(&[]);
    let mounted = form.mount();
    assert_eq!(names(&mounted.at), 0);
    let stat = rustix::fs::statvfs(&mounted.at).unwrap();
    assert_eq!(stat.f_bsize, 4096);
}

fn names(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}
