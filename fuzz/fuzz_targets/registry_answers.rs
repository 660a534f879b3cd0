//! What a registry and its token service answer beside documents and blobs: challenges, tokens, links to
//! the next page, errors. The first byte says which of them the input is.
#![no_main]

use lazyimg_image::fuzzing::{error_message, next_page, token, token_service};
use libfuzzer_sys::fuzz_target;
use reqwest::Url;

fuzz_target!(|data: &[u8]| {
    let Some((kind, input)) = data.split_first() else {
        return;
    };
    let from = Url::parse("https://registry.example/v2/app/tags/list").expect("an address");
    match kind % 4 {
        0 => {
            let values: Vec<_> = input.split(|byte| *byte == b'\n').collect();
            if let Some(service) = token_service(&from, &values) {
                assert_eq!(service.scheme(), "https", "a password in the clear");
                assert_eq!((service.username(), service.password()), ("", None));
            }
        }
        1 => {
            if let Some((token, lifetime)) = token(&from, input) {
                assert!(!token.is_empty());
                assert!((0..=1 << 20).contains(&lifetime.as_secs()));
            }
        }
        2 => {
            let header = String::from_utf8_lossy(input);
            if let Some(next) = next_page(&from, &header) {
                assert_eq!(next.origin(), from.origin(), "a token for somebody else");
            }
        }
        _ => {
            let message = error_message(input, 503).expect("a status");
            assert!(!message.trim().is_empty() && message.chars().count() <= 300);
            assert!(!message.chars().any(char::is_control), "{message:?}");
        }
    }
});
