//! Credentials for registries, from where docker and podman keep them.
//!
//! Asked, in this order, until one knows the registry: the file the caller names; else
//! `$REGISTRY_AUTH_FILE`, `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`,
//! `$XDG_RUNTIME_DIR/containers/auth.json`, `~/.config/containers/auth.json`. In each file:
//! `credHelpers` for the registry, `auths`, `credsStore`.
//!
//! Nothing is cached: every need reads the files again, so that a rotated password works at once.
//! Secrets live in zeroized memory, have no `Debug` and are never logged.

mod file;
mod helper;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use zeroize::Zeroizing;

/// The most a credential helper may print, in bytes: tokens of some clouds exceed 10 KB.
pub const MAX_HELPER_OUTPUT: usize = 256 * 1024;

/// The largest credentials file that is read, in bytes.
pub const MAX_CONFIG_FILE: u64 = 4 << 20;

/// The variables by which credential helpers find themselves and what they keep. None of them is a
/// secret.
pub const HELPER_VARIABLES: [&str; 9] = [
    "PATH",
    "HOME",
    "DOCKER_CONFIG",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_RUNTIME_DIR",
    "DBUS_SESSION_BUS_ADDRESS",
    "GNUPGHOME",
    "PASSWORD_STORE_DIR",
];

/// Where credentials are looked up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CredentialPlaces {
    /// The files, in the order in which they are asked.
    pub files: Vec<PathBuf>,
    /// [`HELPER_VARIABLES`] for credential helpers; one that is not in it is taken from them. `None`:
    /// helpers get this process's environment.
    pub helper_env: Option<Vec<(String, OsString)>>,
}

impl CredentialPlaces {
    /// The places of this process: the caller's file or directory, else the usual ones.
    pub fn here(docker_config: Option<&Path>) -> Self {
        Self {
            files: places(docker_config),
            helper_env: None,
        }
    }

    /// The same places in words that mean the same to a process with another environment and another
    /// working directory.
    ///
    /// # Errors
    /// The working directory is gone.
    pub fn for_another_process(docker_config: Option<&Path>) -> std::io::Result<Self> {
        let here = Self::here(docker_config);
        let set = |name: &&str| Some(((*name).to_owned(), std::env::var_os(name)?));
        let mut env: Vec<_> = HELPER_VARIABLES.iter().filter_map(set).collect();
        let current = std::env::current_dir()?;
        for (_, path) in env.iter_mut().filter(|(name, _)| name == "PATH") {
            let dirs = std::env::split_paths(path).map(|dir| current.join(dir));
            // A directory with a colon in its name can't be in a PATH.
            *path = std::env::join_paths(dirs).unwrap_or_else(|_| path.clone());
        }
        Ok(Self {
            files: here.files.iter().map(|file| current.join(file)).collect(),
            helper_env: Some(env),
        })
    }
}

/// What a registry accepts from us.
pub enum Credentials {
    /// A user name and a password (or an access token in its place).
    Password {
        /// User name.
        username: String,
        /// Password.
        password: Zeroizing<String>,
    },
    /// An OAuth2 refresh token, changed for access tokens at the registry's token service.
    IdentityToken(Zeroizing<String>),
    /// A bearer token, sent as it is.
    RegistryToken(Zeroizing<String>),
}

/// Why credentials could not be looked up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialsError {
    /// The file is there and can't be read.
    #[error("could not read the credentials file {}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// The system's word.
        #[source]
        cause: std::io::Error,
    },
    /// The file is no credentials file. The cause names the position and never the content.
    #[error("the credentials file {} is malformed: {reason}", .path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The helper could not be run, or failed.
    #[error(
        "the credential helper `{helper}` failed for {registry}: {reason}. Run `docker login {registry}` again, or correct the helper in the configuration"
    )]
    Helper {
        /// Its program name.
        helper: String,
        /// For which registry.
        registry: String,
        /// What happened; never what it printed to standard output.
        reason: String,
    },
}

/// Looks credentials up for one repository.
#[derive(Debug, Clone)]
pub struct CredentialStore {
    places: CredentialPlaces,
    registry: String,
    repository: String,
    helper_timeout: Duration,
}

/// What a credentials file names; none of its secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The file.
    pub path: PathBuf,
    /// Registries with credentials in the file itself.
    pub registries: Vec<String>,
    /// Programs that are asked, and for which registry; `None` for all.
    pub helpers: Vec<(Option<String>, String)>,
}

/// The credentials files that are there, in the order in which they are asked.
///
/// # Errors
/// A file that is there can't be read or understood: no registry would be asked.
pub fn found(docker_config: Option<&Path>) -> Result<Vec<Found>, CredentialsError> {
    let mut all = Vec::new();
    for path in places(docker_config) {
        if let Some(config) = file::read(&path)? {
            let helpers = config.helpers().into_iter();
            all.push(Found {
                registries: config.registries(),
                helpers: helpers
                    .map(|(registry, name)| (registry, format!("docker-credential-{name}")))
                    .collect(),
                path,
            });
        }
    }
    Ok(all)
}

fn places(docker_config: Option<&Path>) -> Vec<PathBuf> {
    match docker_config {
        Some(path) if path.is_dir() => vec![path.join("config.json")],
        Some(path) => vec![path.to_owned()],
        None => usual_places(|name| std::env::var_os(name)),
    }
}

impl CredentialStore {
    /// For `registry/repository`. A helper that takes longer than `helper_timeout` is ended.
    pub fn new(
        registry: &str,
        repository: &str,
        places: CredentialPlaces,
        helper_timeout: Duration,
    ) -> Self {
        Self {
            places,
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            helper_timeout,
        }
    }

    /// What the files say without asking a helper: cheap enough before the first request.
    ///
    /// # Errors
    /// A file that is there can't be read or understood.
    pub fn stored(&self) -> Result<Option<Credentials>, CredentialsError> {
        for path in &self.places.files {
            let Some(config) = file::read(path)? else {
                continue;
            };
            if config.helper_for(&self.registry).is_some() {
                return Ok(None);
            }
            if let Some(found) = config.auth_for(&self.registry, &self.repository, path)? {
                return Ok(Some(found));
            }
            if config.store().is_some() {
                return Ok(None);
            }
        }
        Ok(None)
    }

    /// What the files or the helpers they name say.
    ///
    /// # Errors
    /// As [`CredentialStore::stored`], or a helper fails. A helper that knows nothing is no error.
    pub async fn look_up(&self) -> Result<Option<Credentials>, CredentialsError> {
        for path in &self.places.files {
            let Some(config) = file::read(path)? else {
                continue;
            };
            if let Some(helper) = config.helper_for(&self.registry) {
                if let Some(found) = self.ask(helper).await? {
                    return Ok(Some(found));
                }
                continue;
            }
            if let Some(found) = config.auth_for(&self.registry, &self.repository, path)? {
                return Ok(Some(found));
            }
            if let Some(helper) = config.store()
                && let Some(found) = self.ask(helper).await?
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The places that were searched, for messages.
    pub fn places(&self) -> String {
        let files = self.places.files.iter();
        let places: Vec<String> = files.map(|p| p.display().to_string()).collect();
        if places.is_empty() {
            "no credentials file (HOME is not set)".into()
        } else {
            places.join(", ")
        }
    }

    async fn ask(&self, helper: &str) -> Result<Option<Credentials>, CredentialsError> {
        let names: &[&str] = match file::canonical_registry(&self.registry) {
            // Docker Hub's credentials are kept under an address of 2013.
            file::DOCKER_HUB => &["https://index.docker.io/v1/"],
            _ => &[&self.registry],
        };
        let env = self.places.helper_env.as_deref();
        for name in names {
            if let Some(found) = helper::get(helper, name, env, self.helper_timeout).await? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

/// Where docker, podman and skopeo keep credentials, for an environment.
fn usual_places(env: impl Fn(&str) -> Option<std::ffi::OsString>) -> Vec<PathBuf> {
    let dir = |name: &str| env(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = dir("HOME");
    let docker = dir("DOCKER_CONFIG").or_else(|| Some(home.as_ref()?.join(".docker")));
    let config = dir("XDG_CONFIG_HOME").or_else(|| Some(home.as_ref()?.join(".config")));
    [
        dir("REGISTRY_AUTH_FILE"),
        docker.map(|d| d.join("config.json")),
        dir("XDG_RUNTIME_DIR").map(|d| d.join("containers/auth.json")),
        config.map(|d| d.join("containers/auth.json")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests;
