//! Layer blobs: decompression within its limits, whatever the stream says.
#![no_main]

use std::io::Read;

use lazyimg_convergent::Digest;
use lazyimg_fuzz::limits;
use lazyimg_image::layer::{LayerError, LayerReader};
use lazyimg_image::source::LayerDescriptor;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((kind, blob)) = data.split_first() else {
        return;
    };
    let suffix = ["", "+gzip", "+zstd"][usize::from(kind % 3)];
    let layer = LayerDescriptor {
        digest: Digest::of(blob),
        size: blob.len() as u64,
        media_type: format!("application/vnd.oci.image.layer.v1.tar{suffix}"),
        diff_id: Digest::of(b""),
    };
    let limits = limits();
    let mut produced = 0;
    let _ = LayerReader::read(0, &layer, blob, &limits, |reader| {
        let mut buffer = [0; 8192];
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            produced += count as u64;
        }
        Ok::<(), LayerError>(())
    });
    assert!(
        produced <= limits.layer_bytes + 8192,
        "{produced} bytes out of {}",
        blob.len()
    );
});
