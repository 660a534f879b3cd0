//! What this process may do: mount, let others in, open by handle.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::thread::CapabilitiesSecureBits;
use serde::Serialize;

use super::{Check, State, check};

/// The program that mounts for those who may not.
pub const HELPER: &str = "fusermount3";

/// Its configuration.
const FUSE_CONF: &str = "/etc/fuse.conf";

/// CAP_DAC_READ_SEARCH, a bit of the sets in `/proc/self/status` (linux/capability.h).
const DAC_READ_SEARCH: u64 = 1 << 2;

/// CAP_SYS_ADMIN.
const SYS_ADMIN: u64 = 1 << 21;

/// How a mount will be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum MountPath {
    /// By the system call.
    #[serde(rename = "direct")]
    Direct,
    /// By `fusermount3`.
    #[serde(rename = "fusermount3")]
    Helper,
    /// Not at all.
    #[serde(rename = "none")]
    None,
}

/// Who this process is and which capabilities it has. The user id alone says little: root in a
/// container mostly lacks CAP_SYS_ADMIN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rights {
    root: bool,
    effective: u64,
    /// What a program that it starts can get at most.
    bounding: u64,
    /// Set-user-id bits have no effect.
    no_new_privs: bool,
    /// Being root gives no capabilities.
    no_root: bool,
}

impl Rights {
    /// As `/proc` tells them.
    pub fn of_this_process() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let bits = rustix::thread::capabilities_secure_bits();
        Self::parse(
            &status,
            rustix::process::geteuid().is_root(),
            bits.is_ok_and(|b| b.contains(CapabilitiesSecureBits::NO_ROOT)),
        )
    }

    fn parse(status: &str, root: bool, no_root: bool) -> Self {
        let field = |name: &str| {
            let mut lines = status.lines();
            let value = lines.find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
            value.unwrap_or_default().trim()
        };
        let set = |name: &str| u64::from_str_radix(field(name), 16).unwrap_or(0);
        Self {
            root,
            effective: set("CapEff"),
            bounding: set("CapBnd"),
            no_new_privs: field("NoNewPrivs") == "1",
            no_root,
        }
    }

    fn may_mount(&self) -> bool {
        self.effective & SYS_ADMIN != 0
    }

    /// Whether the helper gets the right to mount when this process starts it.
    fn helper_may_mount(&self, set_uid: bool) -> bool {
        let becomes_root = self.root || set_uid;
        becomes_root && !self.no_new_privs && !self.no_root && self.bounding & SYS_ADMIN != 0
    }

    /// How a mount will be made: as `lazyimg mount` does, the system call first.
    pub fn mount_path(&self, helper: Option<&Path>) -> MountPath {
        match helper {
            _ if self.may_mount() => MountPath::Direct,
            Some(path) if self.helper_may_mount(is_set_uid(path)) => MountPath::Helper,
            _ => MountPath::None,
        }
    }

    /// Whether the helper is there and of use, where it is needed.
    pub fn check_mounting(&self, helper: Option<&Path>) -> Check {
        let Some(path) = helper else {
            return if self.may_mount() {
                let finding = "not installed, and not needed: this process may mount";
                check(HELPER, State::Ok, finding, "")
            } else {
                check(
                    HELPER,
                    State::Fail,
                    "not installed, and this process lacks CAP_SYS_ADMIN",
                    "apt-get install fuse3",
                )
            };
        };
        let set_uid = is_set_uid(path);
        let path = path.display();
        if self.may_mount() {
            return check(
                HELPER,
                State::Ok,
                format!("{path}; not needed: this process may mount"),
                "",
            );
        }
        if self.helper_may_mount(set_uid) {
            return check(HELPER, State::Ok, path.to_string(), "");
        }
        let (why, advice) = if !set_uid && !self.root {
            (
                "not set-user-id",
                "reinstall the package fuse3: without set-user-id it mounts for root only",
            )
        } else if self.no_new_privs || self.no_root {
            (
                "set-user-id has no effect in this process (no_new_privs or securebits)",
                "start lazyimg outside of this sandbox, or give the sandbox CAP_SYS_ADMIN",
            )
        } else {
            (
                "CAP_SYS_ADMIN is not in this container's bounding set",
                "start the container with CAP_SYS_ADMIN and /dev/fuse, or mount outside of it",
            )
        };
        check(
            HELPER,
            State::Fail,
            format!("{path} can't mount: {why}"),
            advice,
        )
    }

    /// Whether other users may be let into a mount.
    pub fn check_others(&self, mount_path: MountPath) -> Check {
        let what = "other users";
        match mount_path {
            MountPath::None => check(what, State::Note, "nothing can be mounted", ""),
            MountPath::Direct => check(what, State::Ok, "can be let in (--allow-other)", ""),
            MountPath::Helper if self.root => {
                check(what, State::Ok, "can be let in (--allow-other)", "")
            }
            MountPath::Helper => {
                let conf = fs::read_to_string(FUSE_CONF).unwrap_or_default();
                if allows_other(&conf) {
                    let finding = format!("can be let in: {FUSE_CONF} has user_allow_other");
                    check(what, State::Ok, finding, "")
                } else {
                    check(
                        what,
                        State::Note,
                        format!("{FUSE_CONF} has no user_allow_other: --allow-other is refused"),
                        "to let other users into a mount, root adds the line `user_allow_other` there",
                    )
                }
            }
        }
    }

    /// Whether the page cache can be filled behind random reads.
    pub fn check_random_reads(&self) -> Check {
        let what = "random reads";
        if self.effective & DAC_READ_SEARCH != 0 {
            let finding = "the rest of a chunk goes to the page cache (CAP_DAC_READ_SEARCH)";
            check(what, State::Ok, finding, "")
        } else {
            check(
                what,
                State::Note,
                "without CAP_DAC_READ_SEARCH the page cache is not filled behind them",
                "random reads of large files are several times slower than as root",
            )
        }
    }
}

fn is_set_uid(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.mode() & 0o4000 != 0)
}

/// Whether fuse.conf lets users let others in, read as libfuse does (`util/fusermount.c`).
fn allows_other(conf: &str) -> bool {
    conf.lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .any(|line| line == "user_allow_other")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str =
        "Name:\tx\nCapEff:\t000001ffffffffff\nCapBnd:\t000001ffffffffff\nNoNewPrivs:\t0\n";
    const CONTAINER: &str =
        "CapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\nNoNewPrivs:\t0\n";
    const USER: &str = "CapEff:\t0000000000000000\nCapBnd:\t000001ffffffffff\nNoNewPrivs:\t0\n";

    /// A file that is there, and whether it has the set-user-id bit.
    fn helper(set_uid: bool) -> tempfile::NamedTempFile {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        let mode = if set_uid { 0o4755 } else { 0o755 };
        fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    #[test]
    fn capabilities_decide_and_not_the_user_id() {
        let file = helper(true);
        let path = Some(file.path());
        let of = |status: &str, root| Rights::parse(status, root, false);
        assert_eq!(of(ROOT, true).mount_path(path), MountPath::Direct);
        assert_eq!(of(ROOT, false).mount_path(None), MountPath::Direct);
        assert_eq!(of(USER, false).mount_path(path), MountPath::Helper);
        assert_eq!(of(USER, true).mount_path(path), MountPath::Helper);
        assert_eq!(of(USER, false).mount_path(None), MountPath::None);
        let contained = of(CONTAINER, true);
        assert_eq!(contained.mount_path(path), MountPath::None);
        let told = contained.check_mounting(path);
        assert_eq!(told.state, State::Fail);
        assert!(told.finding.contains("bounding"), "{}", told.finding);
        assert_eq!(contained.check_random_reads().state, State::Note);
        assert_eq!(of(ROOT, true).check_random_reads().state, State::Ok);
    }

    #[test]
    fn a_helper_that_gets_no_rights_is_no_way() {
        let file = helper(true);
        let path = Some(file.path());
        let sandboxed = USER.replace("NoNewPrivs:\t0", "NoNewPrivs:\t1");
        assert_eq!(
            Rights::parse(&sandboxed, false, false).mount_path(path),
            MountPath::None
        );
        assert_eq!(
            Rights::parse(USER, true, true).mount_path(path),
            MountPath::None
        );
        let plain = helper(false);
        let user = Rights::parse(USER, false, false);
        assert_eq!(user.mount_path(Some(plain.path())), MountPath::None);
        assert_eq!(user.check_mounting(Some(plain.path())).state, State::Fail);
    }

    #[test]
    fn fuse_conf_is_read_as_libfuse_reads_it() {
        assert!(allows_other("mount_max = 9\n  user_allow_other # yes\n"));
        assert!(!allows_other("# user_allow_other\nuser_allow_others\n"));
    }
}
