//! The image manifest: what parses is written back the same, and opens under keys that fit.
#![no_main]

use lazyimg_convergent::{ChunkKey, TenantKey};
use lazyimg_image::manifest::Manifest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(mut manifest) = Manifest::parse(data) else {
        return;
    };
    assert_eq!(manifest.to_bytes(), data, "one form for one manifest");
    let tenant = TenantKey::from_bytes([9; 32]);
    assert!(
        manifest.clone().open(&tenant).is_err(),
        "no seed is sealed under this key"
    );
    let keys = vec![ChunkKey::from_bytes([1; 32]); manifest.stored().count()];
    manifest.seal_keys(&tenant, keys.iter());
    let (meta_len, data_len) = (manifest.header.meta_len, manifest.header.data_len);
    let open = manifest.open(&tenant).expect("just sealed");
    for (chunks, len) in [
        (open.meta_chunks(), meta_len),
        (open.data_chunks(), data_len),
    ] {
        assert_eq!(
            chunks.iter().map(|chunk| chunk.len).sum::<u64>(),
            len,
            "chunks fill their space"
        );
    }
});
