//! The `lazyimg` binary that is tested: the one that cargo builds in the tests' own profile.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Builds the binary, once in a process, and gives its path. `LAZYIMG_BIN` names another one.
pub fn lazyimg() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| match std::env::var_os("LAZYIMG_BIN") {
        Some(path) => path.into(),
        None => build(),
    })
}

fn build() -> PathBuf {
    let exe = std::env::current_exe().expect("a test knows its own path");
    // <target>/<profile>/deps/<test>-<hash>
    let profile_dir = exe
        .ancestors()
        .nth(2)
        .expect("cargo puts tests two levels deep")
        .to_owned();
    let target = profile_dir
        .parent()
        .expect("a profile lies in the target directory");
    let profile = match profile_dir.file_name().and_then(|n| n.to_str()) {
        Some("debug") | None => "dev",
        Some(other) => other,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests lies in the workspace");
    let built = crate::process::run_within(
        Command::new(cargo)
            .args([
                "build",
                "--quiet",
                "--package",
                "lazyimg-cli",
                "--profile",
                profile,
            ])
            .arg("--target-dir")
            .arg(target)
            .current_dir(workspace),
        // Other builds may hold cargo's lock.
        std::time::Duration::from_secs(1800),
    );
    built.ok();
    profile_dir.join("lazyimg")
}
