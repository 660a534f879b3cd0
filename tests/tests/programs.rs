//! Programs run out of a mount as they do from a disk.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use lazyimg_tests::process::{run, sh};
use lazyimg_tests::tree::{Field, assert_same_dirs};
use lazyimg_tests::{Layout, Lazyimg, Registry, Sample, WorkDir};

/// A mounted image and all that it stands on.
struct World {
    lazyimg: Lazyimg,
    registry: Registry,
    work: WorkDir,
}

impl World {
    fn new(name: &str) -> Self {
        let work = WorkDir::new(name);
        let registry = Registry::start(work.join("registry"));
        let lazyimg = Lazyimg::new(work.join("home"));
        Self {
            lazyimg,
            registry,
            work,
        }
    }

    fn convert(&self, layout: &Layout, tag: &str) -> String {
        let reference = self.registry.push(layout, tag, &format!("app:{tag}"));
        self.lazyimg.convert(&reference);
        reference
    }
}

#[track_caller]
fn chroot(root: &Path, words: &[&str]) -> String {
    let mut chroot = Command::new("chroot");
    chroot
        .arg(root)
        .args(words)
        .env_clear()
        .env("PATH", "/opt/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    run(&mut chroot).ok()
}

#[test]
fn python_answers_a_django_request_and_most_of_the_image_stays_where_it_is() {
    let world = World::new("django");
    let reference = world.convert(&Layout::prepared("django"), "v1");
    let mount = world.lazyimg.mount(&reference, world.work.join("mnt"));
    assert_eq!(
        chroot(mount.dir(), &["sh", "-c", "echo from dash"]),
        "from dash\n"
    );
    assert!(
        chroot(
            mount.dir(),
            &["python3", "-c", "import sys; print(sys.version)"]
        )
        .starts_with("3.")
    );
    let said = chroot(mount.dir(), &["/opt/venv/bin/python3", "/srv/app/app.py"]);
    assert!(said.starts_with("hello from Django 5."), "{said}");
    let (fetched, stored) = (mount.count("/fetched_bytes"), mount.count("/stored_bytes"));
    assert!(
        fetched > 0 && fetched < stored / 2,
        "{fetched} of {stored} bytes were fetched: {:#}",
        mount.status()
    );
    assert_eq!(mount.count("/errors"), 0, "{:#}", mount.status());
    mount.umount();

    // A second start on this host asks the registry for no chunk.
    let mount = world.lazyimg.mount(&reference, world.work.join("mnt"));
    let said = chroot(mount.dir(), &["/opt/venv/bin/python3", "/srv/app/app.py"]);
    assert!(said.starts_with("hello from Django 5."), "{said}");
    let again = mount.count("/fetched_bytes");
    assert!(
        again < fetched / 20,
        "{again} bytes were fetched again: {:#}",
        mount.status()
    );
}

#[test]
fn node_requires_its_modules() {
    let world = World::new("node");
    let reference = world.convert(&Layout::prepared("node"), "v1");
    let mount = world.lazyimg.mount(&reference, world.work.join("mnt"));
    let script = "process.chdir('/srv/app'); const l = require('/srv/app/node_modules/lodash'); \
                  require('/srv/app/node_modules/express'); require('/srv/app/node_modules/typescript'); \
                  console.log(l.chunk([1, 2, 3], 2).length)";
    assert_eq!(chroot(mount.dir(), &["node", "-e", script]), "2\n");
    assert_eq!(mount.count("/errors"), 0, "{:#}", mount.status());
}

const MMAP: &str = "
import mmap, os, random, sys
root, source = sys.argv[1:3]
for name in sorted(os.listdir(source)):
    size = os.path.getsize(f'{source}/{name}')
    want = open(f'{source}/{name}', 'rb').read()
    fd = os.open(f'{root}/{name}', os.O_RDONLY)
    for flags in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
        with mmap.mmap(fd, size, flags=flags, prot=mmap.PROT_READ) as m:
            pages = list(range(0, size, 4096))
            random.Random(1).shuffle(pages)
            for at in pages:
                assert m[at:at + 4096] == want[at:at + 4096], (name, at)
    out = os.memfd_create('out')
    at = 0
    while at < size:
        at += os.sendfile(out, fd, at, 1000003)
    os.lseek(out, 0, 0)
    got = b''
    while len(got) < size:
        got += os.read(out, size)
    assert got == want, name
    os.close(out)
    os.close(fd)
print('good')
";

#[test]
fn mmap_and_sendfile_give_the_bytes_in_any_order() {
    let world = World::new("mmap");
    let sample = Sample::new(&world.work.dir("sample"), 51, 12);
    let reference = world.convert(&sample.layout, "v1");
    let mount = world.lazyimg.mount(&reference, world.work.join("mnt"));
    for dir in ["large", "small"] {
        let (root, source) = (mount.join(dir), sample.source.join(dir));
        let args = [
            "-c",
            MMAP,
            &root.to_string_lossy(),
            &source.to_string_lossy(),
        ];
        assert_eq!(sh("python3", &args), "good\n");
    }
}

#[test]
fn many_readers_at_once_get_the_right_bytes() {
    let world = World::new("parallel");
    let sample = Sample::new(&world.work.dir("sample"), 52, 16);
    let reference = world.convert(&sample.layout, "v1");
    let mount = world.lazyimg.mount(&reference, world.work.join("mnt"));
    std::thread::scope(|scope| {
        for seed in 0..16 {
            let (sample, root) = (&sample, mount.dir());
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                (0..100).for_each(|_| sample.check_piece(root, &mut random).unwrap());
            });
        }
    });
    // One fetch for one chunk, however many wait.
    let status = mount.status();
    assert!(
        mount.count("/fetched_bytes") <= mount.count("/stored_bytes"),
        "{status:#}"
    );
}

#[test]
fn overlayfs_on_top_takes_writes_and_shows_the_rest() {
    let world = World::new("overlay");
    let layout = Layout::prepared("base");
    let reference = world.convert(&layout, "v1");
    let mount = world.lazyimg.mount(&reference, world.work.join("mnt"));
    let (upper, scratch, merged) = (
        world.work.dir("upper"),
        world.work.dir("scratch"),
        world.work.dir("merged"),
    );
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        mount.dir().display(),
        upper.display(),
        scratch.display()
    );
    sh(
        "mount",
        &[
            "-t",
            "overlay",
            "overlay",
            "-o",
            &options,
            &merged.to_string_lossy(),
        ],
    );
    // Nothing written yet: the same tree, but for the root, which is the upper directory's, and for link counts of
    // merged directories, which overlayfs says are 1.
    let root = |path: &[u8], _: Field| path.is_empty();
    assert_same_dirs("overlayfs changes the tree", mount.dir(), &merged, &root);
    let script = "set -e; echo new > /etc/new; echo more >> /etc/debian_version; rm /etc/issue; \
                  mkdir /srv/d; mv /etc/new /srv/d/; chmod 700 /usr/bin/perl; ln /usr/bin/dpkg /srv/dpkg; \
                  cp -a /usr/share/doc/apt /srv/; rm -r /usr/share/doc/apt; dpkg -l | wc -l";
    let packages: u32 = chroot(&merged, &["sh", "-c", script])
        .trim()
        .parse()
        .unwrap();
    assert!(packages > 60, "{packages} packages");
    let version = fs::read_to_string(merged.join("etc/debian_version")).unwrap();
    let original = fs::read_to_string(mount.join("etc/debian_version")).unwrap();
    assert_eq!(version, format!("{original}more\n"));
    assert!(!merged.join("etc/issue").exists() && mount.join("etc/issue").exists());
    assert_eq!(
        fs::read(merged.join("usr/bin/perl")).unwrap(),
        fs::read(mount.join("usr/bin/perl")).unwrap()
    );
    assert_eq!(
        fs::read_to_string(merged.join("srv/d/new")).unwrap(),
        "new\n"
    );
    sh("umount", &[&merged.to_string_lossy()]);
    assert_eq!(mount.count("/errors"), 0, "{:#}", mount.status());
}

#[test]
fn every_way_of_writing_is_refused_as_on_a_read_only_disk() {
    let world = World::new("writes");
    let sample = Sample::new(&world.work.dir("sample"), 53, 1);
    let reference = world.convert(&sample.layout, "v1");
    let mount = world.lazyimg.mount(&reference, world.work.join("mnt"));
    let file = mount.join(&sample.files[0]);
    let number = |result: std::io::Result<()>| result.err().and_then(|e| e.raw_os_error());
    const EROFS: Option<i32> = Some(30);
    let opened = |options: &mut fs::OpenOptions, path: &Path| number(options.open(path).map(drop));
    assert_eq!(
        opened(fs::OpenOptions::new().write(true), &file),
        EROFS,
        "open for writing"
    );
    assert_eq!(
        opened(fs::OpenOptions::new().append(true), &file),
        EROFS,
        "open for appending"
    );
    assert_eq!(
        opened(fs::OpenOptions::new().write(true).truncate(true), &file),
        EROFS,
        "truncate"
    );
    assert_eq!(
        opened(
            fs::OpenOptions::new().write(true).create(true),
            &mount.join("new")
        ),
        EROFS,
        "create"
    );
    assert_eq!(number(fs::create_dir(mount.join("new"))), EROFS, "mkdir");
    assert_eq!(number(fs::remove_file(&file)), EROFS, "unlink");
    assert_eq!(number(fs::remove_dir(mount.join("small"))), EROFS, "rmdir");
    assert_eq!(
        number(fs::rename(&file, mount.join("new"))),
        EROFS,
        "rename"
    );
    assert_eq!(
        number(fs::hard_link(&file, mount.join("new"))),
        EROFS,
        "link"
    );
    assert_eq!(number(symlink("x", mount.join("new"))), EROFS, "symlink");
    assert_eq!(
        number(fs::set_permissions(
            &file,
            fs::Permissions::from_mode(0o777)
        )),
        EROFS,
        "chmod"
    );
    assert_eq!(
        number(std::os::unix::fs::chown(&file, Some(1), Some(1))),
        EROFS,
        "chown"
    );
    let xattr = rustix::fs::setxattr(&file, "user.x", b"1", rustix::fs::XattrFlags::empty());
    assert_eq!(xattr, Err(rustix::io::Errno::ROFS), "setxattr");
    let removed = rustix::fs::removexattr(&file, "user.x");
    assert_eq!(removed, Err(rustix::io::Errno::ROFS), "removexattr");
    let touched = run(Command::new("touch").arg(&file)).fails(1);
    assert!(touched.contains("Read-only file system"), "{touched}");
    sample.assert_right(mount.dir());
}

#[test]
fn statfs_says_how_large_the_image_is_and_that_nothing_is_free() {
    let world = World::new("statfs");
    let sample = Sample::new(&world.work.dir("sample"), 54, 8);
    let reference = world.convert(&sample.layout, "v1");
    let mount = world.lazyimg.mount(&reference, world.work.join("mnt"));
    let stat = rustix::fs::statvfs(mount.dir()).unwrap();
    let total = stat.f_blocks * stat.f_frsize;
    assert!((8 << 20..12 << 20).contains(&total), "{total} bytes");
    assert_eq!((stat.f_bfree, stat.f_bavail, stat.f_ffree), (0, 0, 0));
    assert!(
        stat.f_files >= sample.files.len() as u64,
        "{} inodes",
        stat.f_files
    );
    assert_eq!(stat.f_namemax, 255);
    assert!(stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY));
}

/// Root may have set-user-id bits and devices if asked; nobody gets them unasked.
#[test]
fn setuid_and_devices_are_dead_unless_asked_for() {
    let world = World::new("suid-dev");
    let reference = world.convert(&Layout::prepared("odd"), "gzip");
    let options_of = |dir: &Path| {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = table
            .lines()
            .find(|l| l.split(' ').nth(4) == Some(&dir.to_string_lossy()))
            .unwrap()
            .to_owned();
        line.split(' ')
            .nth(5)
            .unwrap()
            .split(',')
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let plain = world.lazyimg.mount(&reference, world.work.join("plain"));
    let options = options_of(plain.dir());
    for wanted in ["ro", "nosuid", "nodev"] {
        assert!(options.iter().any(|o| o == wanted), "{options:?}");
    }
    // /dev/null under another name.
    assert_eq!(
        fs::File::open(plain.join("meta/null"))
            .err()
            .and_then(|e| e.raw_os_error()),
        Some(13)
    );
    let asked =
        world
            .lazyimg
            .mount_with(&reference, world.work.join("asked"), &["--suid", "--dev"]);
    let options = options_of(asked.dir());
    assert!(
        !options.iter().any(|o| o == "nosuid" || o == "nodev"),
        "{options:?}"
    );
    assert!(fs::read(asked.join("meta/null")).unwrap().is_empty());
    assert_eq!(
        fs::metadata(asked.join("meta/setuid")).unwrap().mode() & 0o7777,
        0o4755
    );
}

#[test]
fn without_root_an_image_mounts_through_fusermount3_for_its_user_alone() {
    /// Debian's `nobody`: fusermount3 wants the user to have a name.
    const UID: u32 = 65_534;
    let world = World::new("rootless");
    let reference = world.convert(&Layout::prepared("base"), "v1");
    let user = Lazyimg::new_unprivileged(world.work.join("user"), UID);
    user.copy_secrets_from(&world.lazyimg);
    let mount = user.mount(&reference, world.work.join("user/mnt"));
    let as_user = |words: &[&str]| {
        let mut command = Command::new("setpriv");
        command
            .arg(format!("--reuid={UID}"))
            .arg(format!("--regid={UID}"))
            .args(["--clear-groups", "--"]);
        run(command.args(words))
    };
    let path = |name: &str| -> PathBuf { mount.join(name) };
    let os = as_user(&["cat", &path("etc/debian_version").to_string_lossy()]).ok();
    assert!(os.starts_with("12."), "{os}");
    let said = as_user(&[
        &path("usr/bin/dash").to_string_lossy(),
        "-c",
        "echo from the mount",
    ])
    .ok();
    assert_eq!(said, "from the mount\n");
    // Modes of the image count for the user as for everybody.
    let shadow = as_user(&["cat", &path("etc/shadow").to_string_lossy()]);
    assert!(shadow.code != 0, "{shadow}");
    // And nobody else looks in, not even root.
    assert_eq!(
        fs::read_dir(mount.dir())
            .err()
            .and_then(|e| e.raw_os_error()),
        Some(13)
    );
    let status = user.status();
    assert_eq!(status["mounts"].as_array().unwrap().len(), 1, "{status:#}");
    mount.umount();
    assert_eq!(
        lazyimg_tests::workdir::mounts_below(world.work.path()),
        Vec::<PathBuf>::new()
    );
}
