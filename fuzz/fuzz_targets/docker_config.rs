//! Credentials files, which other programs write: whatever they hold, the answer is one or an error.
#![no_main]

use std::fs;
use std::path::Path;
use std::time::Duration;

use lazyimg_image::credentials::{self, CredentialPlaces, CredentialStore};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let base = if Path::new("/dev/shm").is_dir() {
        "/dev/shm"
    } else {
        "/tmp"
    };
    let dir = tempfile::Builder::new()
        .prefix("lazyimg-fuzz-")
        .tempdir_in(base)
        .expect("a directory");
    let path = dir.path().join("config.json");
    fs::write(&path, data).expect("a file in memory");
    let _ = credentials::found(Some(&path));
    for (registry, repository) in [("registry.example", "a/b"), ("docker.io", "library/debian")] {
        // No helper is run: `stored` asks none.
        let places = CredentialPlaces::here(Some(&path));
        let store = CredentialStore::new(registry, repository, places, Duration::ZERO);
        let _ = store.stored();
    }
});
