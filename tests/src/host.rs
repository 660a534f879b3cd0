//! What the tests need from the machine, checked once, with advice instead of a riddle.

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::sync::OnceLock;

/// Programs that the tests start, and the Debian package of each.
const PROGRAMS: &[(&str, &str)] = &[
    ("docker-registry", "docker-registry"),
    ("skopeo", "skopeo"),
    ("umoci", "umoci"),
    ("fsck.erofs", "erofs-utils"),
    ("fusermount3", "fuse3"),
    ("setpriv", "util-linux"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mount", "mount"),
    ("tar", "tar"),
    ("zstd", "zstd"),
    ("gzip", "gzip"),
    ("python3", "python3"),
    ("chroot", "coreutils"),
];

/// Panics, with what to do, unless the tests can run here.
pub fn require() {
    static CHECKED: OnceLock<Result<(), String>> = OnceLock::new();
    if let Err(advice) = CHECKED.get_or_init(check) {
        panic!("the end-to-end tests can't run here: {advice}");
    }
}

fn check() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("they need root (mounts, devices, owners): run them as root".into());
    }
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        return Err(format!(
            "/dev/fuse can't be opened ({error}): `modprobe fuse`, or start the container with it"
        ));
    }
    for (program, package) in PROGRAMS {
        if find_program(program).is_none() {
            return Err(format!(
                "no `{program}`: scripts/install-deps test (Debian package {package})"
            ));
        }
    }
    Ok(())
}

/// The path of a program in `PATH`, or where Debian keeps administrators' programs.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(more)
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
}
