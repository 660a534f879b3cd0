//! One directory for each test, gone when the test is over, mounts included.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, unmount};

/// A test's own directory, on a real disk and open to every user.
#[derive(Debug)]
pub struct WorkDir {
    dir: tempfile::TempDir,
}

impl WorkDir {
    /// A new one, after [`crate::host::require`]. `name` helps to find it while the test runs.
    pub fn new(name: &str) -> Self {
        crate::host::require();
        let base =
            std::env::var_os("LAZYIMG_TEST_DIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
        fs::create_dir_all(&base).unwrap_or_else(|e| panic!("{}: {e}", base.display()));
        let dir = tempfile::Builder::new()
            .prefix(&format!("lazyimg-test-{name}-"))
            .tempdir_in(&base)
            .unwrap_or_else(|e| panic!("a directory in {}: {e}", base.display()));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
        Self { dir }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The path of `name` in it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path().join(name)
    }

    /// Makes the directory `name` in it.
    pub fn dir(&self, name: impl AsRef<Path>) -> PathBuf {
        let path = self.join(name);
        fs::create_dir_all(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        path
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        // Removing what a forgotten mount shows would be wrong in every way.
        for mount in mounts_below(self.path()).iter().rev() {
            let _ = unmount(mount, UnmountFlags::DETACH);
        }
    }
}

/// The mount points at or below `dir`, in the order they were mounted.
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    points
        .map(|p| PathBuf::from(unescape(p)))
        .filter(|p| p.starts_with(dir))
        .collect()
}

/// Mount points have spaces and such as octal escapes.
fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let code = after
            .get(..3)
            .and_then(|octal| u8::from_str_radix(octal, 8).ok());
        out.push(code.map_or('\\', char::from));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_with_spaces_are_understood() {
        assert_eq!(unescape(r"/a\040b\134c\x"), r"/a b\c\x");
    }
}
