//! A mount shows the tree that an independent program unpacks, and the one that the kernel shows of the
//! same form.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lazyimg_tests::process::{run, sh};
use lazyimg_tests::tree::{self, Except, Field, Tree, assert_same, snapshot};
use lazyimg_tests::{Layout, Lazyimg, Mounted, Registry, WorkDir};
use rustix::mount::MountFlags;

/// Where lazyimg's tree comes from, and with what it is compared.
struct Case {
    work: WorkDir,
    lazyimg: Lazyimg,
    reference: String,
    registry: Registry,
}

impl Case {
    fn new(name: &str, tag: &str) -> (Self, Layout) {
        let work = WorkDir::new(name);
        let layout = Layout::prepared(name);
        let registry = Registry::start(work.join("registry"));
        let reference = registry.push(&layout, tag, &format!("{name}:{tag}"));
        let lazyimg = Lazyimg::new(work.join("home"));
        lazyimg.convert(&reference);
        (
            Self {
                work,
                lazyimg,
                reference,
                registry,
            },
            layout,
        )
    }

    fn mount(&self) -> Mounted<'_> {
        self.lazyimg.mount(&self.reference, self.work.join("mnt"))
    }

    /// Mounts the image and compares the mount with `oracle` and with the kernel.
    fn check(&self, oracle_name: &str, oracle: &Tree, except: Except<'_>) {
        let mount = self.mount();
        tree::assert_inodes(mount.dir());
        let shown = snapshot(mount.dir());
        assert_same(
            "the mount differs",
            (oracle_name, oracle),
            ("lazyimg", &shown),
            except,
        );
        assert_eq!(mount.count("/errors"), 0, "{:#}", mount.status());
        assert_eq!(mount.count("/stats/errors"), 0, "{:#}", mount.status());
        mount.umount();
        self.check_kernel(&shown);
    }

    /// Exports the image and compares what fsck.erofs and the kernel make of it.
    fn check_kernel(&self, shown: &Tree) {
        let dir = self.work.join("export");
        self.lazyimg
            .ok(&["export", &self.reference, &dir.to_string_lossy()]);
        let (meta, data) = (dir.join("meta.erofs"), dir.join("data.blob"));
        let device = format!("--device={}", data.display());
        sh("fsck.erofs", &[&device, &meta.to_string_lossy()]);
        let kernel = mount_erofs(&meta, &data, self.work.dir("kernel"));
        let by_kernel = snapshot(&kernel);
        assert_same(
            "the kernel sees another tree",
            ("lazyimg", shown),
            ("kernel", &by_kernel),
            &tree::nothing,
        );
    }
}

/// Mounts with mount(2): mount(8) of Debian 12 makes a loop device first.
fn mount_erofs(meta: &Path, data: &Path, at: PathBuf) -> PathBuf {
    let options = std::ffi::CString::new(format!("device={}", data.display())).unwrap();
    rustix::mount::mount(meta, &at, "erofs", MountFlags::RDONLY, options.as_c_str())
        .unwrap_or_else(|e| {
            panic!(
                "the kernel does not mount {}: {e}; see dmesg",
                meta.display()
            )
        });
    at
}

/// Compares a prepared image with what umoci unpacks.
fn same_as_umoci(name: &str) {
    let (case, layout) = Case::new(name, "v1");
    let unpacked = layout.umoci_unpack("v1", &case.work.join("umoci"));
    case.check("umoci", &snapshot(&unpacked), &tree::nothing);
}

#[test]
fn debian_base_mounts_as_umoci_unpacks_it() {
    same_as_umoci("base");
}

#[test]
fn a_django_application_mounts_as_umoci_unpacks_it() {
    same_as_umoci("django");
}

#[test]
fn a_node_application_of_42_000_files_mounts_as_umoci_unpacks_it() {
    same_as_umoci("node");
}

#[test]
fn hundreds_of_megabytes_of_libraries_mount_as_umoci_unpacks_them() {
    same_as_umoci("libs");
}

/// umoci 0.4.7 reads no zstd, so it unpacks the tag whose layers are all gzip; lazyimg reads the same
/// layers in gzip, zstd and plain tar.
#[test]
fn everything_that_a_layer_can_say_is_kept() {
    let (case, layout) = Case::new("odd", "v1");
    let unpacked = layout.umoci_unpack("gzip", &case.work.join("umoci"));
    let except = |path: &[u8], field: Field| {
        // Parents that no layer mentions: umoci leaves the time of the unpacking, lazyimg says 0.
        let last = path.rsplit(|b| *b == b'/').next().unwrap_or(path);
        let unsaid = field == Field::Mtime && last.starts_with(b"implied-");
        // Go takes an empty PAX value for a deletion of it, which POSIX means for its own keywords. GNU tar
        // keeps the attribute: see the test below.
        let empty = field == Field::Xattrs && path == b"meta/xattr-user";
        unsaid || empty
    };
    case.check("umoci", &snapshot(&unpacked), &except);
    let gzip = case.registry.push(&layout, "gzip", "odd:gzip");
    let again = case.lazyimg.convert(&gzip);
    assert_eq!(
        again["uploaded_chunks"], 0,
        "compression of layers is no content: {again:#}"
    );
}

/// What umoci does not keep of the odd image's first layer.
#[test]
fn attributes_with_empty_values_mount_as_gnu_tar_unpacks_them() {
    let (case, layout) = Case::new("odd", "gzip");
    let unpacked = case.work.dir("tar");
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpzf"]);
    run(tar
        .arg(layout.blob_path(layout.layers("gzip")[0].digest()))
        .arg("-C")
        .arg(&unpacked))
    .ok();
    let (oracle, shown) = (snapshot(&unpacked), snapshot(case.mount().dir()));
    let attributes = |tree: &Tree| tree[&b"meta/xattr-user"[..]].xattrs.clone();
    assert_eq!(attributes(&oracle)[&b"user.empty"[..]], b"");
    assert_eq!(attributes(&oracle), attributes(&shown));
    // GNU tar agrees on all of the folder, of which the upper layers change nothing. ACLs are its own matter.
    for (path, entry) in oracle.iter().filter(|(path, _)| path.starts_with(b"meta/")) {
        let mut entry = entry.clone();
        entry.xattrs.retain(|name, _| !name.starts_with(b"system."));
        let mut ours = shown[path].clone();
        ours.xattrs.retain(|name, _| !name.starts_with(b"system."));
        (entry.first_name, ours.first_name) = (Vec::new(), Vec::new());
        assert_eq!(entry, ours, "{}", tree::show(path));
    }
}

/// Go's archive/tar, and so umoci, refuses old GNU sparse files; GNU tar unpacks its own format.
#[test]
fn old_gnu_sparse_files_and_files_above_8_gib_mount_as_gnu_tar_unpacks_them() {
    let (case, layout) = Case::new("sparse", "v1");
    let unpacked = case.work.dir("tar");
    for layer in layout.layers("v1") {
        let mut tar = Command::new("tar");
        tar.args([
            "--zstd",
            "--xattrs",
            "--xattrs-include=*",
            "--numeric-owner",
            "-xpf",
        ]);
        run(tar
            .arg(layout.blob_path(layer.digest()))
            .arg("-C")
            .arg(&unpacked))
        .ok();
    }
    let oracle = snapshot(&unpacked);
    assert!(oracle[&b"above-8-gib"[..]].size > 8 << 30);
    case.check("GNU tar", &oracle, &tree::nothing);
    // Zeros between segments are neither stored nor fetched.
    let stored: u64 = fs::metadata(case.work.join("export/data.blob"))
        .map(|m| m.len())
        .unwrap();
    let inspect = case.lazyimg.json(&["inspect", &case.reference]);
    assert!(
        inspect["stored_bytes"].as_u64().unwrap() < 8 << 20,
        "{inspect:#}"
    );
    assert!(stored > 8 << 30, "the data space has holes: {stored}");
}
