//! The harness itself: a comparison that can't fail proves nothing.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, SystemTime};

use lazyimg_tests::WorkDir;
use lazyimg_tests::process::sh;
use lazyimg_tests::tree::{Field, diff, nothing, snapshot};

fn make_tree(dir: &Path) {
    fs::create_dir_all(dir.join("d/sub")).unwrap();
    fs::write(dir.join("d/file"), b"content").unwrap();
    fs::hard_link(dir.join("d/file"), dir.join("d/other")).unwrap();
    fs::write(dir.join("d/twin"), b"content").unwrap();
    symlink("file", dir.join("d/link")).unwrap();
    sh(
        "mknod",
        &[dir.join("d/dev").to_str().unwrap(), "c", "1", "3"],
    );
    rustix::fs::setxattr(
        dir.join("d/file"),
        "user.a",
        b"1",
        rustix::fs::XattrFlags::empty(),
    )
    .unwrap();
    let sparse = fs::File::create(dir.join("d/sparse")).unwrap();
    sparse.set_len(10 << 30).unwrap();
    std::os::unix::fs::FileExt::write_at(&sparse, b"x", 5 << 30).unwrap();
    for entry in ["d/sub", "d/file", "d/twin", "d/sparse", "d"] {
        let time = SystemTime::UNIX_EPOCH + Duration::new(1_600_000_000, 123_456_789);
        fs::File::open(dir.join(entry))
            .unwrap()
            .set_modified(time)
            .unwrap();
    }
    sh(
        "touch",
        &[
            "-h",
            "-d",
            "@1.5",
            dir.join("d/link").to_str().unwrap(),
            dir.join("d/dev").to_str().unwrap(),
        ],
    );
    sh("touch", &["-d", "@7", dir.to_str().unwrap()]);
}

/// Changes one thing in the second of two equal trees and gives the fields that then differ.
fn differences(work: &WorkDir, change: impl FnOnce(&Path)) -> Vec<String> {
    let (a, b) = (work.dir("a"), work.dir("b"));
    make_tree(&a);
    make_tree(&b);
    assert_eq!(
        diff(("a", &snapshot(&a)), ("b", &snapshot(&b)), &nothing),
        Vec::<String>::new()
    );
    change(&b);
    let found = diff(("a", &snapshot(&a)), ("b", &snapshot(&b)), &nothing);
    fs::remove_dir_all(&a).unwrap();
    fs::remove_dir_all(&b).unwrap();
    found
}

/// Keeps a directory's mtime over a change in it.
fn keeping_mtime(dir: &Path, change: impl FnOnce()) {
    let before = fs::metadata(dir).unwrap().modified().unwrap();
    change();
    fs::File::open(dir).unwrap().set_modified(before).unwrap();
}

#[test]
fn the_comparison_sees_every_kind_of_difference() {
    let work = WorkDir::new("harness");
    let expect = |path: &str, field: Field, change: &dyn Fn(&Path)| {
        let found = differences(&work, change);
        let wanted = format!("{path}: {field:?}: ");
        assert!(
            found.iter().any(|line| line.starts_with(&wanted)),
            "{wanted} is not in {found:#?}"
        );
    };
    let mode = |m: u32| {
        move |p: &Path| fs::set_permissions(p.join("d/sub"), fs::Permissions::from_mode(m)).unwrap()
    };
    expect("d/sub", Field::Mode, &mode(0o4755));
    expect("d/twin", Field::Uid, &|p| {
        std::os::unix::fs::chown(p.join("d/twin"), Some(5), None).unwrap()
    });
    expect("d/twin", Field::Gid, &|p| {
        std::os::unix::fs::chown(p.join("d/twin"), None, Some(5)).unwrap()
    });
    expect("d/link", Field::Mtime, &|p| {
        sh(
            "touch",
            &[
                "-h",
                "-d",
                "@1.500000001",
                p.join("d/link").to_str().unwrap(),
            ],
        );
    });
    expect("d/twin", Field::Nlink, &|p| {
        fs::hard_link(p.join("d/twin"), p.join("d/new")).unwrap()
    });
    // Same counts, other groups.
    expect("d/other", Field::Links, &|p| {
        fs::remove_file(p.join("d/other")).unwrap();
        fs::hard_link(p.join("d/twin"), p.join("d/other")).unwrap();
    });
    expect("d/file", Field::Size, &|p| {
        fs::File::options()
            .write(true)
            .open(p.join("d/file"))
            .unwrap()
            .set_len(8)
            .unwrap();
    });
    expect("d/dev", Field::Rdev, &|p| {
        fs::remove_file(p.join("d/dev")).unwrap();
        sh("mknod", &[p.join("d/dev").to_str().unwrap(), "c", "1", "5"]);
    });
    expect("d/dev", Field::Kind, &|p| {
        fs::remove_file(p.join("d/dev")).unwrap();
        sh("mknod", &[p.join("d/dev").to_str().unwrap(), "b", "1", "3"]);
    });
    expect("d/link", Field::Target, &|p| {
        fs::remove_file(p.join("d/link")).unwrap();
        symlink("fine", p.join("d/link")).unwrap();
    });
    expect("d/other", Field::Xattrs, &|p| {
        rustix::fs::setxattr(
            p.join("d/file"),
            "user.a",
            b"2",
            rustix::fs::XattrFlags::empty(),
        )
        .unwrap();
    });
    expect("d/other", Field::Content, &|p| {
        fs::write(p.join("d/file"), b"Content").unwrap()
    });
    expect("d/sparse", Field::Content, &|p| {
        let file = fs::File::options()
            .write(true)
            .open(p.join("d/sparse"))
            .unwrap();
        std::os::unix::fs::FileExt::write_at(&file, b"x", (5 << 30) + 4096).unwrap();
    });
    let removed = differences(&work, |p| {
        keeping_mtime(&p.join("d"), || fs::remove_dir(p.join("d/sub")).unwrap())
    });
    assert!(
        removed.contains(&"d/sub: only in a".to_owned()),
        "{removed:?}"
    );
}

#[test]
fn zeros_and_holes_are_the_same_content() {
    let work = WorkDir::new("harness-sparse");
    let found = differences(&work, |p| {
        let file = fs::File::options()
            .write(true)
            .open(p.join("d/sparse"))
            .unwrap();
        std::os::unix::fs::FileExt::write_at(&file, &[0; 200_000], 1 << 30).unwrap();
        let time = SystemTime::UNIX_EPOCH + Duration::new(1_600_000_000, 123_456_789);
        file.set_modified(time).unwrap();
        assert!(file.metadata().unwrap().blocks() > 300);
    });
    assert_eq!(found, Vec::<String>::new());
}
