//! Names of images and platforms as users type them: what is understood prints as the same thing.
#![no_main]

use lazyimg_convergent::Digest;
use lazyimg_image::platform::Platform;
use lazyimg_image::reference::ImageRef;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(image) = text.parse::<ImageRef>() {
        assert_eq!(
            image.to_string().parse::<ImageRef>().expect("our own"),
            image
        );
    }
    if let Ok(platform) = text.parse::<Platform>() {
        // The canonical form may be a letter longer (`arm64/8` is `arm64/v8`), and then too long.
        if let Ok(again) = platform.to_string().parse::<Platform>() {
            assert_eq!(again, platform);
        }
    }
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
});
