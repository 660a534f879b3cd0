//! Salts: under which secret the keys of chunks are derived.

use crate::secret::{derive, secret32};

secret32! {
    /// The secret of a dedup domain. Whoever converts images of the domain holds it; who mounts
    /// them does not need it.
    DomainSecret
}

secret32! {
    /// The salt of one epoch of one domain: the extraction salt of every chunk key.
    Salt
}

/// The longest name of a domain, in bytes: it is written into every manifest.
pub const MAX_DOMAIN_LEN: usize = 64;

impl Salt {
    /// The salt of `epoch` in `domain`.
    ///
    /// Same domain secret, name and epoch: equal plaintext gives equal chunks. Another epoch: no
    /// chunk is shared, so that one lost or corrupt popular chunk hurts one epoch only.
    pub fn derive(secret: &DomainSecret, domain: &str, epoch: u32) -> Self {
        let len = (domain.len() as u64).to_le_bytes();
        Self::from_bytes(derive(
            b"lazyimg salt v1",
            secret.as_bytes(),
            &[&len, domain.as_bytes(), &epoch.to_le_bytes()],
        ))
    }

    /// A public name of this salt (16 bytes): equal for equal salts, and nothing more.
    pub fn public_id(&self) -> [u8; 16] {
        let mut id = [0; 16];
        id.copy_from_slice(&derive(b"lazyimg salt id v1", self.as_bytes(), &[])[..16]);
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    #[test]
    fn domain_epoch_and_secret_each_give_another_salt() {
        let secret = DomainSecret::from_bytes([1; 32]);
        let salt = Salt::derive(&secret, "a", 1);
        assert_eq!(salt, Salt::derive(&secret, "a", 1));
        assert_ne!(salt, Salt::derive(&secret, "a", 2));
        assert_ne!(salt, Salt::derive(&secret, "b", 1));
        assert_ne!(
            salt,
            Salt::derive(&DomainSecret::from_bytes([2; 32]), "a", 1)
        );
        assert_ne!(&salt.public_id()[..], &salt.as_bytes()[..16]);
    }

    #[test]
    fn the_derivation_is_pinned_by_a_golden_vector() {
        // docs/format.md has the numbers; computed with Python's hmac, not with this crate.
        let secret = DomainSecret::from_bytes(golden::array("salt.secret"));
        let salt = Salt::derive(&secret, "default", 1);
        assert_eq!(*salt.as_bytes(), golden::array("salt.salt"));
        assert_eq!(salt.public_id().to_vec(), golden::bytes("salt.public-id"));
    }

    #[test]
    fn secrets_do_not_print() {
        assert_eq!(
            format!("{:?}", DomainSecret::from_bytes([7; 32])),
            "DomainSecret(..)"
        );
    }
}
