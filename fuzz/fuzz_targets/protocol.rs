//! The control protocol: a line that is understood means the same after being written again.
#![no_main]

use lazyimg_fuse::protocol::{Envelope, Reply, Request};
use libfuzzer_sys::fuzz_target;

fn survives<T>(line: &[u8])
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let Ok(message) = serde_json::from_slice::<Envelope<T>>(line) else {
        return;
    };
    let again = serde_json::to_string(&message).expect("it came from JSON");
    assert!(!again.contains('\n'), "one message, one line");
    assert_eq!(
        serde_json::from_str::<Envelope<T>>(&again).expect("our own"),
        message
    );
}

fuzz_target!(|line: &[u8]| {
    survives::<Request>(line);
    survives::<Reply>(line);
});
