//! Docker's `config.json` and podman's `auth.json`: reading and matching, no secrets printed.

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::Deserialize;
use zeroize::{Zeroize as _, Zeroizing};

use super::{Credentials, CredentialsError, MAX_CONFIG_FILE};

/// How Docker Hub is called once its aliases are taken away.
pub(super) const DOCKER_HUB: &str = "docker.io";

/// One credentials file.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ConfigFile {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
    #[serde(default)]
    creds_store: Option<String>,
}

/// One registry's entry. No `Debug`: it holds secrets.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    auth: Option<Zeroizing<String>>,
    username: Option<String>,
    password: Option<Zeroizing<String>>,
    identitytoken: Option<Zeroizing<String>>,
    registrytoken: Option<Zeroizing<String>>,
}

/// Reads a file; `None` when there is none.
pub(super) fn read(path: &Path) -> Result<Option<ConfigFile>, CredentialsError> {
    let failed = |cause| CredentialsError::Read {
        path: path.to_owned(),
        cause,
    };
    let size = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(e)
            if matches!(
                e.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
        Err(e) => return Err(failed(e)),
    };
    if size > MAX_CONFIG_FILE {
        return Err(malformed(
            path,
            format_args!("it is larger than {MAX_CONFIG_FILE} bytes"),
        ));
    }
    let bytes = Zeroizing::new(std::fs::read(path).map_err(failed)?);
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    // serde_json's own message could quote a value; the position is enough.
    serde_json::from_slice(&bytes).map(Some).map_err(|e| {
        malformed(
            path,
            format_args!(
                "not the JSON it should be, at line {} column {}",
                e.line(),
                e.column()
            ),
        )
    })
}

fn malformed(path: &Path, reason: impl ToString) -> CredentialsError {
    CredentialsError::Malformed {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

impl ConfigFile {
    /// The helper for one registry alone, without the `docker-credential-` prefix.
    pub(super) fn helper_for(&self, registry: &str) -> Option<&str> {
        let wanted = canonical_registry(registry);
        let found = self
            .cred_helpers
            .iter()
            .find(|(key, _)| canonical_registry(key) == wanted);
        found
            .map(|(_, helper)| helper.as_str())
            .filter(|h| !h.is_empty())
    }

    /// The helper for all registries.
    pub(super) fn store(&self) -> Option<&str> {
        self.creds_store.as_deref().filter(|s| !s.is_empty())
    }

    /// The entry that matches best: podman allows keys that name a namespace or a repository.
    pub(super) fn auth_for(
        &self,
        registry: &str,
        repository: &str,
        path: &Path,
    ) -> Result<Option<Credentials>, CredentialsError> {
        let registry = canonical_registry(registry);
        let whole = format!("{registry}/{repository}");
        let mut key = whole.as_str();
        loop {
            for (name, entry) in &self.auths {
                if canonical_key(name) == key
                    && let Some(found) = entry.credentials().map_err(|reason| {
                        malformed(path, format_args!("the entry for {name} {reason}"))
                    })?
                {
                    return Ok(Some(found));
                }
            }
            match key.rsplit_once('/') {
                Some((shorter, _)) => key = shorter,
                None => return Ok(None),
            }
        }
    }
}

impl ConfigFile {
    /// Hosts with credentials of their own in the file. A user's name that somebody wrote into an
    /// address is left out.
    pub(super) fn registries(&self) -> Vec<String> {
        let held = self.auths.iter().filter(|(_, entry)| entry.is_filled());
        held.map(|(name, _)| {
            let key = canonical_key(name);
            key.rsplit('@').next().unwrap_or_default().to_owned()
        })
        .collect()
    }

    /// Helpers and the registry that each is for; the one for all registries last.
    pub(super) fn helpers(&self) -> Vec<(Option<String>, String)> {
        let named = self.cred_helpers.iter().filter(|(_, h)| !h.is_empty());
        let named = named.map(|(registry, helper)| {
            let registry = canonical_registry(registry).to_owned();
            (Some(registry), helper.clone())
        });
        let store = self.store().map(|helper| (None, helper.to_owned()));
        named.chain(store).collect()
    }
}

impl Entry {
    fn is_filled(&self) -> bool {
        let secrets = [
            &self.auth,
            &self.password,
            &self.identitytoken,
            &self.registrytoken,
        ];
        secrets.into_iter().flatten().any(|s| !s.is_empty())
    }

    fn credentials(&self) -> Result<Option<Credentials>, &'static str> {
        let filled = |s: &&Zeroizing<String>| !s.is_empty();
        if let Some(token) = self.identitytoken.as_ref().filter(filled) {
            return Ok(Some(Credentials::IdentityToken(token.clone())));
        }
        if let Some(token) = self.registrytoken.as_ref().filter(filled) {
            return Ok(Some(Credentials::RegistryToken(token.clone())));
        }
        if let Some(auth) = self.auth.as_ref().filter(filled) {
            return decode_auth(auth).map(Some);
        }
        match (&self.username, &self.password) {
            (Some(username), Some(password)) if !username.is_empty() => {
                Ok(Some(Credentials::Password {
                    username: username.clone(),
                    password: password.clone(),
                }))
            }
            _ => Ok(None),
        }
    }
}

/// `auth` is base64 of `user:password`, sometimes padded with NULs.
fn decode_auth(auth: &str) -> Result<Credentials, &'static str> {
    let auth = auth.trim();
    let decoded = STANDARD
        .decode(auth)
        .or_else(|_| STANDARD_NO_PAD.decode(auth))
        .map_err(|_| "is not base64")?;
    let mut decoded = String::from_utf8(decoded).map_err(|e| {
        e.into_bytes().zeroize();
        "is not UTF-8"
    })?;
    let split = decoded.split_once(':').map(|(user, password)| {
        (
            user.to_owned(),
            Zeroizing::new(password.trim_end_matches('\0').to_owned()),
        )
    });
    decoded.zeroize();
    let (username, password) = split.ok_or("has no colon between user and password")?;
    Ok(Credentials::Password { username, password })
}

/// A registry's host without scheme, path and aliases of Docker Hub.
pub(super) fn canonical_registry(name: &str) -> &str {
    let host = without_scheme(name).split('/').next().unwrap_or_default();
    match host {
        "index.docker.io" | "registry-1.docker.io" | "docker.io" => DOCKER_HUB,
        other => other,
    }
}

/// The key of an `auths` entry: as [`canonical_registry`], but a namespace is kept, and the API
/// version that docker once wrote is not.
fn canonical_key(name: &str) -> String {
    let rest = without_scheme(name).trim_end_matches('/');
    match rest.split_once('/') {
        None | Some((_, "v1" | "v2")) => canonical_registry(rest).to_owned(),
        Some((host, path)) => format!("{}/{path}", canonical_registry(host)),
    }
}

fn without_scheme(name: &str) -> &str {
    name.strip_prefix("https://")
        .or_else(|| name.strip_prefix("http://"))
        .unwrap_or(name)
}
