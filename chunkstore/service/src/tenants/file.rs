//! The tenants file, and the token files that it names.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::quantity::{ParseQuantityError, parse_bytes};
use super::{Known, Rights, Tenant, TokenHash};
use crate::catalog::ParseTenantError;
use crate::watched::Watched;

/// The shortest token, in characters.
pub const MIN_TOKEN_LEN: usize = 16;

/// The longest token file, in bytes.
const MAX_TOKEN_FILE: u64 = 4096;

/// The longest tenants file, in bytes.
const MAX_TENANTS_FILE: u64 = 4 << 20;

/// The most tenants, and the most tokens of all of them. Each request is compared with each token.
const MAX_TOKENS: usize = 10_000;

/// Why the tenants can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TenantsError {
    /// A file can't be read.
    #[error("{path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The tenants file is not what it must be.
    #[error("tenants file {path}: {cause}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        cause: Box<toml::de::Error>,
    },
    /// There is no tenant in it, or there are too many.
    #[error(
        "tenants file {path}: 1 to {MAX_TOKENS} tenants are needed, each as [tenants.NAME], and as many tokens at most"
    )]
    Count {
        /// The file.
        path: PathBuf,
    },
    /// A name that names no tenant.
    #[error("tenants file {path}: {cause}")]
    Name {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: ParseTenantError,
    },
    /// A tenant that could do nothing.
    #[error(
        "tenants file {path}: tenant {name} has no {what}: give at least one, or delete the tenant"
    )]
    Nothing {
        /// The file.
        path: PathBuf,
        /// The tenant.
        name: String,
        /// `token-files` or `rights`.
        what: &'static str,
    },
    /// A quota that is no quantity.
    #[error("tenants file {path}: quota of tenant {name}: {cause}")]
    Quota {
        /// The file.
        path: PathBuf,
        /// The tenant.
        name: String,
        /// Why.
        cause: ParseQuantityError,
    },
    /// A token file that others can read.
    #[error(
        "token file {path} can be read by others (mode {mode:03o}): chmod 600 it, and replace the token if others may have read it"
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A token file without a proper token. Says nothing of its content.
    #[error(
        "token file {path} holds no token: one line of {MIN_TOKEN_LEN} or more printable ASCII characters without spaces is needed; `lazyimg store token --out FILE` makes one"
    )]
    Token {
        /// The file.
        path: PathBuf,
    },
    /// One token for two tenants.
    #[error(
        "token file {path}: tenant {name} and tenant {other} have the same token: each needs its own"
    )]
    Shared {
        /// The file.
        path: PathBuf,
        /// Its tenant.
        name: String,
        /// The other tenant.
        other: String,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    tenants: BTreeMap<String, Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Entry {
    token_files: Vec<PathBuf>,
    rights: Vec<RightName>,
    quota: Option<Quota>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RightName {
    Read,
    Write,
    Administer,
    Observe,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Quota {
    Bytes(u64),
    Text(String),
}

/// What was read.
#[derive(Debug)]
pub(super) struct Loaded {
    pub known: Known,
    pub files: Watched,
}

/// Reads the tenants file and all token files. With an error comes what they looked like, so that the
/// same error is not met again before something changes.
pub(super) fn load(path: &Path) -> Result<Loaded, (TenantsError, Watched)> {
    let mut files = Watched::default();
    match read_all(path, &mut files) {
        Ok(known) => Ok(Loaded { known, files }),
        Err(error) => Err((error, files)),
    }
}

fn read_all(path: &Path, files: &mut Watched) -> Result<Known, TenantsError> {
    // Looked at before it is read: a change in between is then seen as one.
    files.add(path);
    let document = read_document(path)?;
    let tokens: usize = document.tenants.values().map(|e| e.token_files.len()).sum();
    if document.tenants.is_empty() || document.tenants.len() > MAX_TOKENS || tokens > MAX_TOKENS {
        return Err(TenantsError::Count {
            path: path.to_owned(),
        });
    }
    let dir = path.parent().unwrap_or(Path::new(""));
    let mut known = Known {
        tenants: Vec::with_capacity(document.tenants.len()),
        tokens: Vec::with_capacity(tokens),
    };
    let mut owners: BTreeMap<TokenHash, String> = BTreeMap::new();
    for (name, entry) in document.tenants {
        let tenant = tenant(path, &name, &entry)?;
        let index = known.tenants.len() as u32;
        for file in &entry.token_files {
            let file = dir.join(file);
            files.add(&file);
            let hash: TokenHash = Sha256::digest(read_token(&file)?.as_bytes()).into();
            match owners.get(&hash) {
                Some(other) if *other != name => {
                    return Err(TenantsError::Shared {
                        path: file,
                        name,
                        other: other.clone(),
                    });
                }
                // The same token twice for one tenant: a rotation that has only begun.
                Some(_) => {}
                None => {
                    owners.insert(hash, name.clone());
                    known.tokens.push((hash, index));
                }
            }
        }
        known.tenants.push(Arc::new(tenant));
    }
    Ok(known)
}

fn read_document(path: &Path) -> Result<Document, TenantsError> {
    let io = |cause| TenantsError::Io {
        path: path.to_owned(),
        cause,
    };
    let mut text = String::new();
    let file = File::open(path).map_err(io)?;
    file.take(MAX_TENANTS_FILE + 1)
        .read_to_string(&mut text)
        .map_err(io)?;
    if text.len() as u64 > MAX_TENANTS_FILE {
        return Err(io(io::Error::other("larger than 4 MiB")));
    }
    toml::from_str(&text).map_err(|cause| TenantsError::Syntax {
        path: path.to_owned(),
        cause: Box::new(cause),
    })
}

fn tenant(path: &Path, name: &str, entry: &Entry) -> Result<Tenant, TenantsError> {
    let parsed = name.parse().map_err(|cause| TenantsError::Name {
        path: path.to_owned(),
        cause,
    })?;
    let nothing = |what| TenantsError::Nothing {
        path: path.to_owned(),
        name: name.to_owned(),
        what,
    };
    if entry.token_files.is_empty() {
        return Err(nothing("token-files"));
    }
    if entry.rights.is_empty() {
        return Err(nothing("rights"));
    }
    let mut rights = Rights::default();
    for right in &entry.rights {
        match right {
            RightName::Read => rights.read = true,
            RightName::Write => rights.write = true,
            RightName::Administer => rights.administer = true,
            RightName::Observe => rights.observe = true,
        }
    }
    let quota = match &entry.quota {
        None => None,
        Some(Quota::Bytes(bytes)) => Some(*bytes),
        Some(Quota::Text(text)) => {
            let bytes = parse_bytes(text).map_err(|cause| TenantsError::Quota {
                path: path.to_owned(),
                name: name.to_owned(),
                cause,
            })?;
            Some(bytes)
        }
    };
    Ok(Tenant {
        name: parsed,
        rights,
        quota,
    })
}

/// The token in a file that only its owner may read.
///
/// # Errors
/// [`TenantsError`]; none says anything of the content.
pub fn read_token(path: &Path) -> Result<Zeroizing<String>, TenantsError> {
    let io = |cause| TenantsError::Io {
        path: path.to_owned(),
        cause,
    };
    let bad = || TenantsError::Token {
        path: path.to_owned(),
    };
    let file = File::open(path).map_err(io)?;
    // Of the file that is open: what has this name may be another one a moment later.
    let meta = file.metadata().map_err(io)?;
    if !meta.is_file() || meta.len() > MAX_TOKEN_FILE {
        return Err(bad());
    }
    if meta.mode() & 0o077 != 0 {
        return Err(TenantsError::Open {
            path: path.to_owned(),
            mode: meta.mode() & 0o777,
        });
    }
    // With room for everything: a buffer that grows leaves copies behind.
    let mut content = Zeroizing::new(Vec::with_capacity(MAX_TOKEN_FILE as usize + 1));
    file.take(MAX_TOKEN_FILE)
        .read_to_end(&mut content)
        .map_err(io)?;
    let token = content.trim_ascii();
    if token.len() < MIN_TOKEN_LEN || !token.iter().all(u8::is_ascii_graphic) {
        return Err(bad());
    }
    let token = std::str::from_utf8(token).map_err(|_| bad())?;
    Ok(Zeroizing::new(token.to_owned()))
}
