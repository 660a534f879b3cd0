//! The tree of a mount: names, attributes, listings, and what the kernel does with them.

// A test that can't go on should say where.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{CString, OsStr};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use lazyimg_image::tree::{Kind, Meta};
use support::image::{Expected, meta};
use support::{Health, ImageBuilder, Mounted, Options};

/// Every path below `dir`, relative, the root as the empty path.
fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::new()];
    let mut next = 0;
    while next < found.len() {
        let at = dir.join(&found[next]);
        if fs::symlink_metadata(&at).unwrap().is_dir() {
            for entry in fs::read_dir(&at).unwrap() {
                let path = found[next].join(entry.unwrap().file_name());
                found.push(path);
            }
        }
        next += 1;
    }
    found
}

fn assert_same(path: &Path, relative: &str, expected: &Expected) {
    let found = fs::symlink_metadata(path).unwrap();
    let kind = found.file_type();
    let mut size = None;
    match &expected.inode.kind {
        Kind::Dir(_) => assert!(kind.is_dir(), "{relative}"),
        Kind::File { size: s, .. } => {
            assert!(kind.is_file(), "{relative}");
            size = Some(*s);
            assert!(
                fs::read(path).unwrap() == expected.bytes,
                "bytes of {relative}"
            );
        }
        Kind::Symlink(target) => {
            assert_eq!(
                fs::read_link(path).unwrap().as_os_str().as_bytes(),
                target,
                "{relative}"
            );
            size = Some(target.len() as u64);
        }
        Kind::Char(dev) | Kind::Block(dev) => {
            assert_eq!(
                kind.is_char_device(),
                matches!(expected.inode.kind, Kind::Char(_)),
                "{relative}"
            );
            assert_eq!(
                kind.is_block_device(),
                matches!(expected.inode.kind, Kind::Block(_)),
                "{relative}"
            );
            assert_eq!(
                found.rdev(),
                rustix::fs::makedev(dev.major, dev.minor),
                "{relative}"
            );
        }
        Kind::Fifo => assert!(kind.is_fifo(), "{relative}"),
        Kind::Socket => assert!(kind.is_socket(), "{relative}"),
    }
    let meta = &expected.inode.meta;
    assert_eq!(
        found.mode() & 0o7777,
        u32::from(meta.mode),
        "mode of {relative}"
    );
    assert_eq!(
        (found.uid(), found.gid()),
        (meta.uid, meta.gid),
        "owner of {relative}"
    );
    assert_eq!(
        (found.mtime(), found.mtime_nsec()),
        (meta.mtime.sec, i64::from(meta.mtime.nsec)),
        "{relative}"
    );
    assert_eq!(
        found.nlink(),
        u64::from(expected.nlink),
        "links of {relative}"
    );
    if let Some(size) = size {
        assert_eq!(found.size(), size, "size of {relative}");
        assert_eq!(
            found.blocks(),
            size.div_ceil(4096) * 8,
            "blocks of {relative}"
        );
    }
}

#[test]
fn the_mount_shows_the_tree_and_nothing_else() {
    let image = ImageBuilder::oddities().build();
    let mounted = Mounted::new(&image);
    let found: HashSet<Vec<u8>> = walk(mounted.dir())
        .into_iter()
        .map(|p| p.into_os_string().into_vec())
        .collect();
    assert_eq!(
        found,
        image.expected.keys().cloned().collect::<HashSet<_>>()
    );
    let mut inos: HashMap<u64, u32> = HashMap::new();
    for (path, expected) in &image.expected {
        let at = mounted.dir().join(OsStr::from_bytes(path));
        assert_same(&at, &String::from_utf8_lossy(path), expected);
        let ino = fs::symlink_metadata(&at).unwrap().ino();
        assert_eq!(
            *inos.entry(ino).or_insert(expected.id),
            expected.id,
            "inode number of {path:?}"
        );
    }
    let inodes: HashSet<u32> = image.expected.values().map(|e| e.id).collect();
    assert_eq!(inos.len(), inodes.len(), "one number for each inode");
    assert_eq!(fs::metadata(mounted.dir()).unwrap().ino(), 1);
}

#[test]
fn dots_are_listed_and_lead_where_they_should() {
    let mut b = ImageBuilder::default();
    b.dir("a/b");
    let mounted = Mounted::new(&b.build());
    let list = |path: &Path| -> BTreeMap<Vec<u8>, u64> {
        let dir = rustix::fs::openat(
            rustix::fs::CWD,
            path,
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
        let mut dir = rustix::fs::Dir::new(dir).unwrap();
        let mut all = BTreeMap::new();
        while let Some(entry) = dir.read() {
            let entry = entry.unwrap();
            all.insert(entry.file_name().to_bytes().to_vec(), entry.ino());
        }
        all
    };
    let ino = |path: &str| fs::metadata(mounted.path(path)).unwrap().ino();
    let root = list(mounted.dir());
    assert_eq!((root[&b"."[..]], root[&b"a"[..]]), (1, ino("a")));
    assert!(root.contains_key(&b".."[..]));
    let b = list(&mounted.path("a/b"));
    assert_eq!((b[&b"."[..]], b[&b".."[..]]), (ino("a/b"), ino("a")));
    let a = list(&mounted.path("a"));
    assert_eq!(a[&b".."[..]], 1);
    assert_eq!(fs::metadata(mounted.path("a/b/../..")).unwrap().ino(), 1);
}

#[test]
fn statfs_tells_sizes_and_that_nothing_is_free() {
    let image = ImageBuilder::oddities().build();
    let mounted = Mounted::new(&image);
    let stat = rustix::fs::statvfs(mounted.dir()).unwrap();
    let inodes = image
        .expected
        .values()
        .map(|e| e.id)
        .collect::<HashSet<_>>()
        .len();
    assert_eq!(stat.f_files, inodes as u64);
    assert_eq!(
        stat.f_blocks,
        (image.view.data_len() + image.view.meta_len()) / 4096
    );
    assert_eq!((stat.f_bfree, stat.f_bavail, stat.f_ffree), (0, 0, 0));
    assert_eq!((stat.f_bsize, stat.f_namemax), (4096, 255));
    assert!(
        stat.f_flag.contains(
            rustix::fs::StatVfsMountFlags::RDONLY | rustix::fs::StatVfsMountFlags::NOSUID
        )
    );
}

#[test]
fn what_is_absent_stays_absent_and_names_that_are_too_long_are_an_error() {
    let mounted = Mounted::new(&ImageBuilder::oddities().build());
    for _ in 0..2 {
        assert_eq!(
            fs::metadata(mounted.path("no")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        assert_eq!(
            fs::metadata(mounted.path("etc/no")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        assert_eq!(
            fs::metadata(mounted.path("empty/x")).unwrap_err().kind(),
            io::ErrorKind::NotADirectory
        );
    }
    let long = fs::metadata(mounted.path(&"x".repeat(256))).unwrap_err();
    assert_eq!(long.raw_os_error(), Some(libc::ENAMETOOLONG));
}

/// The errno of a system call that should fail.
fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn every_way_to_write_is_refused_with_erofs() {
    let mounted = Mounted::new(&ImageBuilder::oddities().build());
    let at = |name: &str| mounted.path(name);
    // Also after somebody has made the mount writable: then the kernel asks us.
    for remount in [false, true] {
        if remount {
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount_remount(mounted.dir(), flags, "").unwrap();
        }
        let open = |mode: &str| match mode {
            "w" => fs::OpenOptions::new()
                .write(true)
                .open(at("etc/hello"))
                .and_then(|f| {
                    use std::os::unix::fs::FileExt;
                    f.write_at(b"x", 0)
                }),
            "trunc" => fs::OpenOptions::new()
                .write(true)
                .truncate(true)
                .open(at("etc/hello"))
                .map(|_| 0),
            _ => fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(at("new"))
                .map(|_| 0),
        };
        for mode in ["w", "trunc", "create"] {
            assert_eq!(errno(open(mode)), libc::EROFS, "{mode} {remount}");
        }
        assert_eq!(errno(fs::create_dir(at("newdir"))), libc::EROFS);
        assert_eq!(errno(fs::remove_file(at("empty"))), libc::EROFS);
        assert_eq!(errno(fs::remove_dir(at("sticky"))), libc::EROFS);
        assert_eq!(errno(fs::rename(at("empty"), at("moved"))), libc::EROFS);
        assert_eq!(errno(fs::hard_link(at("empty"), at("linked"))), libc::EROFS);
        assert_eq!(
            errno(std::os::unix::fs::symlink("x", at("sym"))),
            libc::EROFS
        );
        assert_eq!(
            errno(fs::set_permissions(
                at("empty"),
                fs::Permissions::from_mode(0o777)
            )),
            libc::EROFS
        );
        assert_eq!(
            errno(std::os::unix::fs::chown(at("empty"), Some(1), None)),
            libc::EROFS
        );
        let set =
            rustix::fs::setxattr(at("empty"), "user.x", b"y", rustix::fs::XattrFlags::empty());
        let refused = [libc::EROFS, libc::EOPNOTSUPP];
        assert!(
            refused.contains(&set.unwrap_err().raw_os_error()),
            "{remount}"
        );
    }
}

#[test]
fn an_image_without_attributes_has_none_and_the_kernel_stops_asking() {
    let mounted = Mounted::new(&ImageBuilder::oddities().build());
    for _ in 0..2 {
        let mut buffer = [0; 100];
        let get = rustix::fs::getxattr(mounted.path("empty"), "user.x", &mut buffer);
        assert_eq!(get.unwrap_err(), rustix::io::Errno::OPNOTSUPP);
        let list = rustix::fs::listxattr(mounted.path("empty"), &mut buffer[..0]);
        assert!(
            matches!(list, Err(rustix::io::Errno::OPNOTSUPP) | Ok(0)),
            "{list:?}"
        );
    }
}

#[test]
fn attributes_are_listed_and_read_and_absent_ones_are_enodata() {
    let mut b = ImageBuilder::default();
    let xattrs = vec![
        (
            b"security.capability".to_vec(),
            vec![1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        (b"trusted.x".to_vec(), b"t".to_vec()),
        (b"user.bin".to_vec(), vec![0, 255, 10]),
        (b"user.empty".to_vec(), vec![]),
        (b"user.large".to_vec(), vec![7; 3000]),
    ];
    b.file_with(
        "f",
        Meta {
            xattrs: xattrs.iter().map(|(n, v)| (n.clone(), v.clone())).collect(),
            ..meta(0o755)
        },
        "x",
    );
    b.file("plain", "x");
    let mounted = Mounted::new(&b.build());
    let mut buffer = vec![0; 8192];
    let len = rustix::fs::listxattr(mounted.path("f"), &mut buffer).unwrap();
    let names: HashSet<Vec<u8>> = buffer[..len]
        .split(|&b| b == 0)
        .filter(|n| !n.is_empty())
        .map(<[u8]>::to_vec)
        .collect();
    assert_eq!(names, xattrs.iter().map(|(n, _)| n.clone()).collect());
    for (name, value) in &xattrs {
        let name = CString::new(name.clone()).unwrap();
        let len = rustix::fs::getxattr(mounted.path("f"), &name, &mut buffer).unwrap();
        assert_eq!(&buffer[..len], &value[..], "{name:?}");
        assert_eq!(
            rustix::fs::getxattr_query(mounted.path("f"), &name).unwrap(),
            value.len()
        );
    }
    let small = rustix::fs::getxattr(mounted.path("f"), "user.large", &mut [0u8; 10][..]);
    assert_eq!(small.unwrap_err(), rustix::io::Errno::RANGE);
    for path in ["f", "plain"] {
        let none = rustix::fs::getxattr(mounted.path(path), "user.none", &mut buffer[..]);
        assert_eq!(none.unwrap_err(), rustix::io::Errno::NODATA);
    }
}

#[test]
fn a_directory_of_ten_thousand_is_listed_with_small_buffers_and_can_be_sought_in() {
    const COUNT: usize = 10_000;
    let mut b = ImageBuilder::default();
    for i in 0..COUNT {
        b.file(format!("many/{i:05}-{}", "x".repeat(i % 50)), "");
    }
    let image = b.build();
    let mounted = Mounted::new(&image);
    let expected: Vec<Vec<u8>> = image
        .expected
        .keys()
        .filter_map(|path| path.strip_prefix(b"many/").map(<[u8]>::to_vec))
        .collect();
    assert_eq!(expected.len(), COUNT);
    let dir = fs::File::open(mounted.path("many")).unwrap();
    let mut buffer = Vec::with_capacity(600);
    let mut read = rustix::fs::RawDir::new(&dir, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    let mut cookies = Vec::new();
    while let Some(entry) = read.next() {
        let entry = entry.unwrap();
        names.push(entry.file_name().to_bytes().to_vec());
        cookies.push(entry.next_entry_cookie());
    }
    assert_eq!(names[..2], [b".".to_vec(), b"..".to_vec()]);
    names.retain(|n| !matches!(&n[..], b"." | b".."));
    assert_eq!(names, expected);
    assert_eq!(
        cookies.iter().collect::<HashSet<_>>().len(),
        cookies.len(),
        "every cookie is its own"
    );
    // Each a place to go on from, in any order, also in a new open file.
    for at in [9_000, 17, 5_000, 0, COUNT - 1] {
        let dir = fs::File::open(mounted.path("many")).unwrap();
        rustix::fs::seek(&dir, rustix::fs::SeekFrom::Start(cookies[at + 1])).unwrap();
        let mut buffer = Vec::with_capacity(600);
        let mut read = rustix::fs::RawDir::new(&dir, buffer.spare_capacity_mut());
        let next = read
            .next()
            .unwrap()
            .unwrap()
            .file_name()
            .to_bytes()
            .to_vec();
        assert_eq!(next, expected[at], "behind entry {at}");
    }
}

#[test]
fn overlayfs_works_on_top() {
    let mut b = ImageBuilder::oddities();
    b.file("dir/below", "below");
    let mounted = Mounted::new(&b.build());
    let scratch = tempfile::tempdir().unwrap();
    // Not on overlayfs itself, which can't be an upper layer.
    let tmpfs = scratch.path();
    rustix::mount::mount(
        "tmpfs",
        tmpfs,
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        None::<&std::ffi::CStr>,
    )
    .unwrap();
    for name in ["upper", "work", "merged"] {
        fs::create_dir(tmpfs.join(name)).unwrap();
    }
    let merged = tmpfs.join("merged");
    let data = CString::new(format!(
        "lowerdir={},upperdir={},workdir={}",
        mounted.dir().display(),
        tmpfs.join("upper").display(),
        tmpfs.join("work").display()
    ))
    .unwrap();
    rustix::mount::mount(
        "overlay",
        &merged,
        "overlay",
        rustix::mount::MountFlags::empty(),
        data.as_c_str(),
    )
    .unwrap();
    fs::write(merged.join("dir/new"), "new").unwrap();
    fs::write(merged.join("etc/hello"), "changed").unwrap();
    fs::remove_file(merged.join("dir/below")).unwrap();
    assert_eq!(
        fs::read_to_string(merged.join("etc/hello")).unwrap(),
        "changed"
    );
    assert_eq!(
        fs::read_to_string(mounted.path("etc/hello")).unwrap(),
        "hello\n"
    );
    assert!(!merged.join("dir/below").exists() && mounted.path("dir/below").exists());
    assert_eq!(
        fs::read(merged.join("sparse")).unwrap().len(),
        4 * support::image::CHUNK
    );
    rustix::mount::unmount(&merged, rustix::mount::UnmountFlags::empty()).unwrap();
    rustix::mount::unmount(tmpfs, rustix::mount::UnmountFlags::empty()).unwrap();
}

#[test]
fn permissions_are_the_kernels_and_root_lets_others_in() {
    let mounted = Mounted::new(&ImageBuilder::oddities().build());
    // `setpriv` into the way to the mount point, which tempfile keeps to its owner.
    fs::set_permissions(mounted.scratch.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let read = |name: &str| {
        std::process::Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "cat"])
            .arg(mounted.path(name))
            .output()
            .unwrap()
    };
    assert_eq!(read("etc/hello").stdout, b"hello\n");
    let secret = read("secret");
    assert!(!secret.status.success());
    assert!(String::from_utf8_lossy(&secret.stderr).contains("Permission denied"));
}

#[test]
fn the_root_is_there_before_the_rest_of_the_metadata() {
    let mut b = ImageBuilder::default();
    b.file("a-first", "x");
    for i in 0..12_000 {
        b.file(format!("d{:03}/file-with-a-name-{i}", i / 40), "");
    }
    let image = b.build();
    assert!(
        image.view.meta().len() >= 2,
        "more than one chunk of metadata"
    );
    let options = Options {
        health: Health::Silent,
        load: false,
        tree: lazyimg_fuse::tree::TreeOptions {
            read_timeout: std::time::Duration::from_millis(300),
            ..Default::default()
        },
        ..Options::default()
    };
    let mounted = Mounted::with(&image, &options);
    assert!(
        fs::metadata(mounted.path("a-first")).is_ok(),
        "the first chunk is here"
    );
    let last = mounted.path("d299/file-with-a-name-11999");
    let began = std::time::Instant::now();
    assert_eq!(errno(fs::metadata(&last)), libc::EIO, "the last is not");
    assert!(began.elapsed() < std::time::Duration::from_secs(30));
    assert!(fs::metadata(mounted.path("a-first")).is_ok());
    mounted.origin.set(Health::Good);
    assert!(fs::metadata(&last).is_ok(), "and it can be had again");
    assert_eq!(walk(mounted.dir()).len(), image.expected.len());
}
