//! The names of documents: written and read here only.

use std::fmt;
use std::str::FromStr;

use lazyimg_convergent::{ChunkId, Digest, KeyId};

use crate::engine::RootId;

use super::types::TenantName;

/// Where the format of the store is said.
pub const FORMAT: &str = "meta/format";

/// Where the roots' states are.
pub const ROOTS: &str = "roots/";

/// A mark that a root carries. Marks are put where there is none and, but for alarms, taken away with
/// the root only: no two instances can undo each other's steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// The root exists.
    Active,
    /// There is a newer root.
    Retired,
    /// No live image was left.
    Expired,
    /// An alarm was acknowledged.
    Acknowledged,
    /// Somebody read from it after it had expired.
    Alarm,
    /// Alarms do not stop its deletion.
    Ignored,
    /// It is being deleted.
    Deleting,
}

impl Mark {
    /// All of them, in the order in which they go when a root is gone: the last one says till the end
    /// that the root must not be used.
    pub const ALL: [Self; 7] = [
        Self::Active,
        Self::Retired,
        Self::Expired,
        Self::Acknowledged,
        Self::Alarm,
        Self::Ignored,
        Self::Deleting,
    ];

    fn text(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Retired => "retired",
            Self::Expired => "expired",
            Self::Acknowledged => "acknowledged",
            Self::Alarm => "alarm",
            Self::Ignored => "ignored",
            Self::Deleting => "deleting",
        }
    }
}

/// A mark of a root.
pub fn mark(root: RootId, mark: Mark) -> String {
    format!("{ROOTS}{root}/{}", mark.text())
}

/// Which mark of which root a name below [`ROOTS`] is.
pub fn parse_mark(name: &str) -> Option<(RootId, Mark)> {
    let (root, text) = name.strip_prefix(ROOTS)?.split_once('/')?;
    let mark = Mark::ALL.into_iter().find(|m| m.text() == text)?;
    Some((root.parse().ok()?, mark))
}

/// All that goes with a root.
pub fn held(root: RootId) -> String {
    format!("held/{root}/")
}

/// A grant.
pub fn grant(root: RootId, tenant: &TenantName, id: &ChunkId) -> String {
    format!("held/{root}/grants/{tenant}/{}", id.hex())
}

/// All grants of a tenant.
pub fn grants_of_tenant(root: RootId, tenant: &TenantName) -> String {
    format!("held/{root}/grants/{tenant}/")
}

/// Below each of these lie documents of a root by tenant.
pub fn by_tenant(root: RootId) -> [String; 5] {
    ["cached", "grants", "manifests", "profiles", "usage"]
        .map(|kind| format!("held/{root}/{kind}/"))
}

/// All manifests of a root.
pub fn manifests(root: RootId) -> String {
    format!("held/{root}/manifests/")
}

/// All manifests of a tenant.
pub fn manifests_of_tenant(root: RootId, tenant: &TenantName) -> String {
    format!("held/{root}/manifests/{tenant}/")
}

/// All manifests of an image.
pub fn manifests_of_image(root: RootId, tenant: &TenantName, image: &Digest) -> String {
    format!("held/{root}/manifests/{tenant}/{}/", image.hex())
}

/// All copies of a manifest.
pub fn manifests_of_key(root: RootId, tenant: &TenantName, image: &Digest, key: KeyId) -> String {
    format!("held/{root}/manifests/{tenant}/{}/{key}/", image.hex())
}

/// All copies of a manifest that is not live.
pub fn cached_of_key(root: RootId, tenant: &TenantName, image: &Digest, key: KeyId) -> String {
    format!("held/{root}/cached/{tenant}/{}/{key}/", image.hex())
}

/// All manifests of a tenant that are not live.
pub fn cached_of_tenant(root: RootId, tenant: &TenantName) -> String {
    format!("held/{root}/cached/{tenant}/")
}

/// Which copy of a manifest a name is, of a live one or another.
pub fn version_of(name: &str) -> Option<Version> {
    name.rsplit('/').next()?.parse().ok()
}

/// All profiles of a tenant.
pub fn profiles_of_tenant(root: RootId, tenant: &TenantName) -> String {
    format!("held/{root}/profiles/{tenant}/")
}

/// All profiles of an image.
pub fn profiles(root: RootId, tenant: &TenantName, image: &Digest) -> String {
    format!("held/{root}/profiles/{tenant}/{}/", image.hex())
}

/// What a tenant was found to have in a root when it was last counted.
pub fn counted(root: RootId, tenant: &TenantName) -> String {
    format!("held/{root}/counted/{tenant}")
}

/// What a tenant has been granted.
pub fn usages_of(root: RootId, tenant: &TenantName) -> String {
    format!("held/{root}/usage/{tenant}/")
}

/// What an instance has granted a tenant.
pub fn usage(root: RootId, tenant: &TenantName, instance: &str) -> String {
    format!("held/{root}/usage/{tenant}/{instance}")
}

/// All references of a tenant.
pub fn references(tenant: &TenantName) -> String {
    format!("refs/{tenant}/")
}

/// A reference.
pub fn reference(tenant: &TenantName, reference: &str) -> String {
    let digest = Digest::of(reference.as_bytes());
    format!("refs/{tenant}/{}", digest.hex())
}

/// On which day an image was last asked for.
pub fn used(tenant: &TenantName, image: &Digest) -> String {
    format!("used/{tenant}/{}", image.hex())
}

/// A copy of a manifest: the last part of its document's name.
///
/// Every put and every move writes a name that nobody else writes, so that whoever takes a copy back
/// takes back their own. The order says which manifest is in force: the one that was put last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// When it was put, in milliseconds since 1970; a move keeps it.
    pub stamp: u64,
    /// First bytes of its SHA-256.
    pub hash: u64,
    /// Its length.
    pub len: u32,
    /// Differs between copies.
    pub nonce: u64,
}

impl Version {
    /// First bytes of the SHA-256 of a manifest.
    pub fn hash_of(bytes: &[u8]) -> u64 {
        let mut first = [0; 8];
        first.copy_from_slice(&Digest::of(bytes).0[..8]);
        u64::from_be_bytes(first)
    }

    /// Whether these are the bytes that were put under it.
    pub fn is_of(&self, bytes: &[u8]) -> bool {
        bytes.len() == self.len as usize && Self::hash_of(bytes) == self.hash
    }

    /// What is the same in all copies of one put, and decides between two puts.
    pub fn in_force(&self) -> (u64, u64, u32) {
        (self.stamp, self.hash, self.len)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            stamp,
            hash,
            len,
            nonce,
        } = self;
        write!(f, "{stamp:016x}-{hash:016x}-{len:08x}-{nonce:016x}")
    }
}

impl FromStr for Version {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split('-');
        let mut number = || u64::from_str_radix(parts.next().ok_or(())?, 16).map_err(|_| ());
        let version = Self {
            stamp: number()?,
            hash: number()?,
            len: number()?.try_into().map_err(|_| ())?,
            nonce: number()?,
        };
        match version.to_string() == text {
            true => Ok(version),
            false => Err(()),
        }
    }
}

/// A manifest in a root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestName {
    /// In which root.
    pub root: RootId,
    /// Whose.
    pub tenant: TenantName,
    /// Of which image.
    pub image: Digest,
    /// For which tenant key.
    pub key: KeyId,
    /// Which copy.
    pub version: Version,
}

impl fmt::Display for ManifestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = manifests_of_key(self.root, &self.tenant, &self.image, self.key);
        write!(f, "{prefix}{}", self.version)
    }
}

impl FromStr for ManifestName {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split('/');
        let mut part = || parts.next().ok_or(());
        let (held, root, manifests) = (part()?, part()?, part()?);
        let name = Self {
            root: root.parse().map_err(|_| ())?,
            tenant: part()?.parse().map_err(|_| ())?,
            image: format!("sha256:{}", part()?).parse().map_err(|_| ())?,
            key: {
                let key = u64::from_str_radix(part()?, 16).map_err(|_| ())?;
                KeyId(key.to_be_bytes())
            },
            version: part()?.parse()?,
        };
        match held == "held" && manifests == "manifests" && name.to_string() == text {
            true => Ok(name),
            false => Err(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::MAX_DOC_NAME;

    #[test]
    fn names_come_back_as_they_were_written() {
        let name = ManifestName {
            root: RootId::FIRST,
            tenant: "t".repeat(64).parse().unwrap(),
            image: Digest([0xab; 32]),
            key: KeyId([0, 1, 2, 3, 4, 5, 6, 0xff]),
            version: Version {
                stamp: 1_700_000_000_000,
                hash: u64::MAX,
                len: u32::MAX,
                nonce: 7,
            },
        };
        let text = name.to_string();
        assert_eq!(text.parse(), Ok(name.clone()));
        assert!(text.len() <= MAX_DOC_NAME);
        assert!(text.starts_with(&manifests_of_image(name.root, &name.tenant, &name.image)));
        for bad in [
            text.to_uppercase(),
            format!("{text}0"),
            format!("{text}/"),
            text[1..].to_owned(),
        ] {
            assert_eq!(bad.parse::<ManifestName>(), Err(()), "{bad}");
        }
        for m in Mark::ALL {
            assert_eq!(
                parse_mark(&mark(RootId::FIRST, m)),
                Some((RootId::FIRST, m))
            );
        }
        assert_eq!(parse_mark("roots/r1/active"), None);
        assert_eq!(parse_mark("roots/r00000001/other"), None);
    }

    #[test]
    fn the_manifest_that_was_put_last_is_the_greatest() {
        let old = Version {
            stamp: 5,
            hash: 9,
            len: 9,
            nonce: 9,
        };
        let new = Version {
            stamp: 6,
            hash: 1,
            len: 1,
            nonce: 1,
        };
        assert!(new > old);
    }
}
