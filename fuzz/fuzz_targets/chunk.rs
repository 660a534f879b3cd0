//! Payloads and chunks: any payload decodes to the expected length or fails; a chunk opens unchanged or not at all.
#![no_main]

use lazyimg_convergent::salt::DomainSecret;
use lazyimg_convergent::{MAX_CHUNK_LEN, Salt, chunk, payload};
use lazyimg_fuzz::halves;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((len, rest)) = data.split_first_chunk::<4>() else {
        return;
    };
    let expected = u32::from_le_bytes(*len) as usize % (MAX_CHUNK_LEN + 2);
    let decoded = payload::decode(rest, expected);
    if let Ok(plain) = &decoded {
        assert_eq!(plain.len(), expected);
    }

    let salt = Salt::derive(&DomainSecret::from_bytes([3; 32]), "fuzz", 1);
    let (body, change) = halves(rest);
    let sealed = chunk::seal(&salt, body.to_vec());
    assert_eq!(
        chunk::open_payload(&sealed.key, sealed.ciphertext.clone()).expect("just sealed"),
        body
    );
    let mut bad = sealed.ciphertext.clone();
    bad.iter_mut()
        .zip(change)
        .for_each(|(byte, change)| *byte ^= change);
    assert_eq!(
        chunk::open_payload(&sealed.key, bad.clone()).is_ok(),
        bad == sealed.ciphertext
    );

    // The way of an honest chunk.
    let plain = &body[..body.len().min(MAX_CHUNK_LEN)];
    if !plain.is_empty() {
        let sealed = chunk::seal(&salt, payload::encode(plain, 1));
        assert_eq!(
            chunk::open(&sealed.key, &sealed.ciphertext, plain.len()).expect("just sealed"),
            plain
        );
    }
});
