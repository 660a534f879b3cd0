//! Which tenant key and which salt a command uses. [`crate::precedence`] has left one of file and
//! command.

use std::path::PathBuf;

use lazyimg_convergent::Salt;
use lazyimg_convergent::provider::Provider;

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
/// When neither a flag nor a home directory says where.
pub fn domain(salt: &args::Salt) -> Result<Provider, Error> {
    if let Some(command) = &salt.salt_command {
        return Ok(Provider::Command(command.clone()));
    }
    file_or_default(
        salt.salt_file.clone(),
        &format!("domain-{}.secret", salt.domain),
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
