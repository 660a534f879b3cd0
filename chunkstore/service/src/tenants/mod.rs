//! Who may do what: tenants, their tokens, rights and quotas.
//!
//! [`Tenants`] holds what the tenants file said when it could last be read. A token is known by its
//! SHA-256 only; a presented one is compared with all known ones in constant time.

mod file;
mod quantity;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConditionallySelectable as _, ConstantTimeEq as _};

pub use file::{MIN_TOKEN_LEN, TenantsError, read_token};
pub use quantity::{ParseQuantityError, parse_bytes};

use crate::catalog::TenantName;
use crate::watched::Watched;
use file::Loaded;

/// The name of the one tenant of a store without tenants. A name like others: a store may get tenants
/// later, and keep what it had.
pub const LOCAL: &str = "local";

/// A tenant as a request meets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Its name.
    pub name: TenantName,
    /// What its tokens allow.
    pub rights: Rights,
    /// The most bytes of chunks that it may put; `None` for no bound.
    pub quota: Option<u64>,
}

/// What a token allows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rights {
    /// To ask for chunks, manifests, profiles and references.
    pub read: bool,
    /// To put and delete them.
    pub write: bool,
    /// To see and change what is not one tenant's: roots, garbage collection, statistics.
    pub administer: bool,
    /// To see what the store counts: figures of all tenants together.
    pub observe: bool,
}

impl Rights {
    /// All of them.
    pub const ALL: Self = Self {
        read: true,
        write: true,
        administer: true,
        observe: true,
    };

    /// Whether `right` is one of them.
    pub fn allow(self, right: Right) -> bool {
        match right {
            Right::Read => self.read,
            Right::Write => self.write,
            Right::Administer => self.administer,
            Right::Observe => self.observe || self.administer,
        }
    }
}

/// What a request needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// See [`Rights::read`].
    Read,
    /// See [`Rights::write`].
    Write,
    /// See [`Rights::administer`].
    Administer,
    /// See [`Rights::observe`].
    Observe,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Administer => "administer",
            Self::Observe => "observe",
        })
    }
}

/// SHA-256 of a token.
type TokenHash = [u8; 32];

/// The tenants of a store, as they are now.
#[derive(Debug)]
pub struct Tenants {
    /// `None`: everybody is [`LOCAL`] and may do everything.
    file: Option<PathBuf>,
    known: RwLock<Arc<Known>>,
    /// Of what was read last, whether or not it could be used.
    seen: Mutex<Watched>,
}

#[derive(Debug)]
struct Known {
    tenants: Vec<Arc<Tenant>>,
    /// Each with the index of its tenant.
    tokens: Vec<(TokenHash, u32)>,
}

impl Tenants {
    /// One tenant, [`LOCAL`], that may do everything and needs no token: for loopback only.
    pub fn local() -> Self {
        let local = LOCAL.parse().ok().map(|name| Tenant {
            name,
            rights: Rights::ALL,
            quota: None,
        });
        let known = Known {
            tenants: local.map(Arc::new).into_iter().collect(),
            tokens: Vec::new(),
        };
        Self {
            file: None,
            known: RwLock::new(Arc::new(known)),
            seen: Mutex::default(),
        }
    }

    /// What a tenants file and the token files it names say.
    ///
    /// # Errors
    /// [`TenantsError`] for the first thing that is wrong with any of them.
    pub fn load(path: &Path) -> Result<Self, TenantsError> {
        let Loaded { known, files } = file::load(path).map_err(|(error, _)| error)?;
        Ok(Self {
            file: Some(path.to_owned()),
            known: RwLock::new(Arc::new(known)),
            seen: Mutex::new(files),
        })
    }

    /// Whether requests need a token.
    pub fn need_tokens(&self) -> bool {
        self.file.is_some()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.known.read().tenants.len()
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Tenant>> {
        self.known.read().tenants.clone()
    }

    /// The tenant of a token; without tenants, [`LOCAL`] whatever is presented. Takes the same time
    /// for every token of one length.
    pub fn find(&self, token: Option<&[u8]>) -> Option<Arc<Tenant>> {
        let known = Arc::clone(&self.known.read());
        if self.file.is_none() {
            return known.tenants.first().cloned();
        }
        let presented: TokenHash = Sha256::digest(token?).into();
        let mut found = Choice::from(0);
        let mut whose = 0;
        for (hash, tenant) in &known.tokens {
            let same = hash.ct_eq(&presented);
            whose.conditional_assign(tenant, same);
            found |= same;
        }
        let tenant = known.tenants.get(whose as usize)?;
        bool::from(found).then(|| Arc::clone(tenant))
    }

    /// Reads the file again if it or a token file has changed since it was last read; true when the
    /// tenants are new. Does file I/O.
    ///
    /// # Errors
    /// [`TenantsError`]: then the tenants stay as they were. Told once for each change.
    pub fn reload_if_changed(&self) -> Result<bool, TenantsError> {
        if self.file.is_none() || !self.seen.lock().has_changed() {
            return Ok(false);
        }
        self.reload()
    }

    /// Reads the file again; true when there is one. Does file I/O.
    ///
    /// # Errors
    /// [`TenantsError`]: then the tenants stay as they were.
    pub fn reload(&self) -> Result<bool, TenantsError> {
        let Some(path) = &self.file else {
            return Ok(false);
        };
        match file::load(path) {
            Ok(Loaded { known, files }) => {
                *self.seen.lock() = files;
                *self.known.write() = Arc::new(known);
                Ok(true)
            }
            Err((error, files)) => {
                *self.seen.lock() = files;
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests;
