//! Which tenant key and which salt a command uses.

use std::path::PathBuf;

use lazyimg_convergent::Salt;
use lazyimg_convergent::provider::Provider;
use lazyimg_convergent::salt::MAX_DOMAIN_LEN;

use crate::args;
use crate::config::config_dir;
use crate::exit::Error;

/// Where the tenant key comes from.
///
/// # Errors
/// When neither a flag nor a home directory says where.
pub fn tenant(key: &args::Key) -> Result<Provider, Error> {
    if let Some(command) = &key.key_command {
        return Ok(Provider::Command(command.clone()));
    }
    file_or_default(key.key_file.clone(), "tenant.key", "--key-file")
}

/// Where the domain's secret comes from.
///
/// # Errors
/// A domain name that can't be a file name, or no home directory.
pub fn domain(salt: &args::Salt) -> Result<Provider, Error> {
    let name = &salt.domain;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > MAX_DOMAIN_LEN || !name.chars().all(plain) {
        return Err(Error::Usage(format!(
            "`{name}` can't be a domain: use 1 to {MAX_DOMAIN_LEN} of the characters a-z, A-Z, 0-9, `.`, `_` and `-`"
        )));
    }
    if let Some(command) = &salt.salt_command {
        return Ok(Provider::Command(command.clone()));
    }
    file_or_default(
        salt.salt_file.clone(),
        &format!("domain-{name}.secret"),
        "--salt-file",
    )
}

/// The salt for converting; a missing secret is made.
///
/// # Errors
/// See [`domain`] and [`lazyimg_convergent::provider::ProviderError`].
pub fn salt(salt: &args::Salt) -> Result<Salt, Error> {
    Ok(Salt::derive(
        &domain(salt)?.domain_secret()?,
        &salt.domain,
        salt.epoch,
    ))
}

fn file_or_default(file: Option<PathBuf>, name: &str, flag: &str) -> Result<Provider, Error> {
    file.or_else(|| config_dir().map(|d| d.join(name)))
        .map(Provider::File)
        .ok_or_else(|| {
            Error::Usage(format!(
                "neither HOME nor XDG_CONFIG_HOME is set: say where with {flag}"
            ))
        })
}
