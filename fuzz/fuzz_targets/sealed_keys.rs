//! The sealed key table: only what was sealed opens, and opens to what was sealed.
#![no_main]

use lazyimg_convergent::{Digest, TenantKey, seal};
use lazyimg_fuzz::halves;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let tenant = TenantKey::from_bytes([7; 32]);
    let binding = Digest::of(b"chunk table");
    if let Ok(keys) = seal::open(&tenant, &binding, data) {
        // Sealing is deterministic, so a second form would be a forgery.
        assert_eq!(seal::seal(&tenant, &binding, &keys), data);
    }
    // A change to a good one: the second half is laid over it.
    let (keys, change) = halves(data);
    let good = seal::seal(&tenant, &binding, keys);
    let mut bad = good.clone();
    bad.iter_mut()
        .zip(change)
        .for_each(|(byte, change)| *byte ^= change);
    assert_eq!(seal::open(&tenant, &binding, &bad).is_ok(), bad == good);
    let other = TenantKey::from_bytes([8; 32]);
    assert!(seal::open(&other, &binding, &good).is_err());
    let resealed = seal::reseal(&tenant, &other, &binding, &good).expect("a good one");
    assert_eq!(
        seal::open(&other, &binding, &resealed)
            .expect("just sealed")
            .as_slice(),
        keys
    );
});
