//! The document of an artifact: what is understood means the same after being written again.
#![no_main]

use lazyimg_image::fuzzing::artifact_document;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Some(again) = artifact_document(data) {
        assert_eq!(artifact_document(&again).as_ref(), Some(&again));
    }
});
