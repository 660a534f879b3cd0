//! Where tenant keys and domain secrets come from: a file, or a command (a KMS client).
//!
//! File: one line, `<kind>-v1 <64 lower-case hex digits>`; `kind` is `lazyimg-tenant-key` or
//! `lazyimg-domain-secret`. Made at first use with mode 0600; a file that others can read is
//! refused.
//!
//! Command: run by `sh -c`, with `LAZYIMG_KEY_KIND` telling what is asked for; it prints the same
//! line, or the 64 digits alone, on standard output. It gets [`COMMAND_TIMEOUT`].

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use crate::ids::{hex, unhex};
use crate::{DomainSecret, TenantKey};

/// How long a key command may take: a KMS answers within a second, a person at a hardware token
/// may take a few.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// More than a key line can hold, in bytes: what exceeds it is not a key.
const MAX_TEXT: u64 = 4096;

/// Where a secret comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Provider {
    /// A file, made at first use.
    File(PathBuf),
    /// A shell command that prints the secret.
    Command(String),
}

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    /// The file can't be read or made.
    #[error("{what} file {path}: {cause}")]
    Io {
        /// What was asked for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Others may read the file.
    #[error(
        "{what} file {path} can be read by others (mode {mode:o}): chmod 600 it, and rotate the key if others may have read it"
    )]
    Exposed {
        /// What was asked for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Not a key.
    #[error(
        "{source_name} does not hold a {what}: expected `{kind}-v1` and 64 lower-case hex digits"
    )]
    Malformed {
        /// What was asked for.
        what: &'static str,
        /// The line's first word, without version.
        kind: &'static str,
        /// File or command.
        source_name: String,
    },
    /// The command failed.
    #[error("{what} command `{command}`: {cause}")]
    Command {
        /// What was asked for.
        what: &'static str,
        /// The command as configured.
        command: String,
        /// How it failed.
        cause: String,
    },
}

/// What is asked for: names in messages and in the file.
struct Kind {
    what: &'static str,
    word: &'static str,
}

const TENANT: Kind = Kind {
    what: "tenant key",
    word: "lazyimg-tenant-key",
};
const DOMAIN: Kind = Kind {
    what: "domain secret",
    word: "lazyimg-domain-secret",
};

impl Provider {
    /// The tenant key; a missing file is made.
    ///
    /// # Errors
    /// See [`ProviderError`].
    pub fn tenant_key(&self) -> Result<TenantKey, ProviderError> {
        self.secret(&TENANT, true)
            .map(|b| TenantKey::from_bytes(*b))
    }

    /// The tenant key; a missing file is an error. For readers: a key made now opens nothing.
    ///
    /// # Errors
    /// See [`ProviderError`].
    pub fn existing_tenant_key(&self) -> Result<TenantKey, ProviderError> {
        self.secret(&TENANT, false)
            .map(|b| TenantKey::from_bytes(*b))
    }

    /// The secret of a dedup domain; a missing file is made.
    ///
    /// # Errors
    /// See [`ProviderError`].
    pub fn domain_secret(&self) -> Result<DomainSecret, ProviderError> {
        self.secret(&DOMAIN, true)
            .map(|b| DomainSecret::from_bytes(*b))
    }

    fn secret(&self, kind: &Kind, create: bool) -> Result<Zeroizing<[u8; 32]>, ProviderError> {
        match self {
            Self::File(path) => from_file(path, kind, create),
            Self::Command(command) => from_command(command, kind),
        }
    }
}

fn io_error(kind: &Kind, path: &Path, cause: io::Error) -> ProviderError {
    ProviderError::Io {
        what: kind.what,
        path: path.to_owned(),
        cause,
    }
}

fn from_file(path: &Path, kind: &Kind, make: bool) -> Result<Zeroizing<[u8; 32]>, ProviderError> {
    let mut file = match File::open(path) {
        Err(e) if make && e.kind() == io::ErrorKind::NotFound => match create(path, kind) {
            Ok(secret) => return Ok(secret),
            // Another process was faster: its key is the key.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => File::open(path),
            Err(e) => Err(e),
        },
        other => other,
    }
    .map_err(|e| io_error(kind, path, e))?;
    let mode = file.metadata().map_err(|e| io_error(kind, path, e))?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(ProviderError::Exposed {
            what: kind.what,
            path: path.to_owned(),
            mode,
        });
    }
    let mut text = Zeroizing::new(String::new());
    Read::by_ref(&mut file)
        .take(MAX_TEXT)
        .read_to_string(&mut text)
        .map_err(|e| io_error(kind, path, e))?;
    parse(&text, kind, || path.display().to_string())
}

/// Makes the file whole or not at all: written aside, then linked to its name.
fn create(path: &Path, kind: &Kind) -> io::Result<Zeroizing<[u8; 32]>> {
    let dir = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)?;
    let mut random = File::open("/dev/urandom")?;
    let mut secret = Zeroizing::new([0; 32]);
    random.read_exact(&mut *secret)?;
    let mut unique = [0; 8];
    random.read_exact(&mut unique)?;
    let line = Zeroizing::new(format!(
        "{}-v1 {}\n",
        kind.word,
        *Zeroizing::new(hex(&*secret))
    ));
    let aside = path.with_extension(format!("new-{}", hex(&unique)));
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&aside)?;
        file.write_all(line.as_bytes())?;
        file.sync_all()?;
        fs::hard_link(&aside, path)?;
        File::open(dir)?.sync_all()
    })();
    let _ = fs::remove_file(&aside);
    written.map(|()| secret)
}

fn from_command(command: &str, kind: &Kind) -> Result<Zeroizing<[u8; 32]>, ProviderError> {
    let failed = |cause: String| ProviderError::Command {
        what: kind.what,
        command: command.to_owned(),
        cause,
    };
    let mut child = Command::new("/bin/sh")
        .args(["-c", command])
        .env("LAZYIMG_KEY_KIND", kind.word)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| failed(e.to_string()))?;
    let stdout = child
        .stdout
        .take()
        .ok_or_else(|| failed("no standard output".into()))?;
    let reader = std::thread::spawn(move || {
        let mut text = Zeroizing::new(String::new());
        let result = stdout.take(MAX_TEXT).read_to_string(&mut text);
        result.map(|_| text)
    });
    let deadline = Instant::now() + COMMAND_TIMEOUT;
    let status = loop {
        match child.try_wait().map_err(|e| failed(e.to_string()))? {
            Some(status) => break status,
            None if Instant::now() >= deadline => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(format!(
                    "no answer within {} s",
                    COMMAND_TIMEOUT.as_secs()
                )));
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    if !status.success() {
        return Err(failed(format!(
            "ended with {status}; its own message is on standard error"
        )));
    }
    let text = reader
        .join()
        .map_err(|_| failed("its output could not be read".into()))?
        .map_err(|e| failed(e.to_string()))?;
    parse(&text, kind, || "the output of the key command".to_owned())
}

fn parse(
    text: &str,
    kind: &Kind,
    source: impl Fn() -> String,
) -> Result<Zeroizing<[u8; 32]>, ProviderError> {
    let mut words = text.split_ascii_whitespace();
    let digits = match (words.next(), words.next(), words.next()) {
        (Some(word), Some(digits), None) if word.strip_suffix("-v1") == Some(kind.word) => digits,
        (Some(digits), None, None) => digits,
        _ => "",
    };
    unhex(digits)
        .map(Zeroizing::new)
        .ok_or_else(|| ProviderError::Malformed {
            what: kind.what,
            kind: kind.word,
            source_name: source(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_missing_key_file_is_made_once_and_only_its_owner_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/tenant.key");
        let file = Provider::File(path.clone());
        assert!(file.existing_tenant_key().is_err());
        let key = file.tenant_key().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(file.tenant_key().unwrap(), key);
        assert_eq!(file.existing_tenant_key().unwrap(), key);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn many_processes_that_make_the_key_at_once_agree_on_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = Provider::File(dir.path().join("k"));
        let keys: Vec<_> = std::thread::scope(|s| {
            let threads: Vec<_> = (0..4).map(|_| s.spawn(|| file.tenant_key())).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let key = file.existing_tenant_key().unwrap();
        assert!(keys.into_iter().all(|k| k.unwrap() == key));
    }

    #[test]
    fn a_key_file_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k");
        Provider::File(path.clone()).tenant_key().unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(
            Provider::File(path).tenant_key(),
            Err(ProviderError::Exposed { mode: 0o644, .. })
        ));
    }

    #[test]
    fn the_files_are_pinned_by_golden_vectors() {
        let dir = tempfile::tempdir().unwrap();
        let read = |line: &str| {
            let path = dir.path().join("k");
            let mut file = OpenOptions::new();
            let file = file.write(true).create(true).truncate(true).mode(0o600);
            let mut file = file.open(&path).unwrap();
            writeln!(file, "{line}").unwrap();
            Provider::File(path)
        };
        let tenant = read(&golden::words("files.tenant-key").join(" "));
        assert_eq!(
            *tenant.tenant_key().unwrap().as_bytes(),
            golden::array("files.secret")
        );
        let domain = read(&golden::words("files.domain-secret").join(" "));
        assert_eq!(
            *domain.domain_secret().unwrap().as_bytes(),
            golden::array("files.secret")
        );
        // What is written has the same form.
        let path = dir.path().join("new");
        let key = Provider::File(path.clone()).tenant_key().unwrap();
        let line = fs::read_to_string(path).unwrap();
        let word = golden::words("files.tenant-key")[0];
        assert_eq!(line, format!("{word} {}\n", hex(key.as_bytes())));
    }

    #[test]
    fn a_domain_secret_is_not_taken_for_a_tenant_key() {
        let dir = tempfile::tempdir().unwrap();
        let file = Provider::File(dir.path().join("k"));
        file.domain_secret().unwrap();
        assert!(matches!(
            file.tenant_key(),
            Err(ProviderError::Malformed { .. })
        ));
    }

    #[test]
    fn a_command_gives_the_key() {
        let command = Provider::Command(format!("echo {}", "ab".repeat(32)));
        assert_eq!(command.tenant_key().unwrap().as_bytes(), &[0xab; 32]);
        let command =
            Provider::Command("echo $LAZYIMG_KEY_KIND-v1 $(printf '0%.0s' $(seq 64))".into());
        assert_eq!(command.tenant_key().unwrap().as_bytes(), &[0; 32]);
    }

    #[test]
    fn a_command_that_fails_or_prints_something_else_is_an_error_without_its_output() {
        let failed = Provider::Command("echo secret; exit 3".into())
            .tenant_key()
            .unwrap_err();
        assert!(failed.to_string().contains("exit status: 3"), "{failed}");
        let odd = Provider::Command("printf %s oops-${LAZYIMG_KEY_KIND}".into()).tenant_key();
        assert!(!odd.unwrap_err().to_string().contains("oops-lazyimg"));
    }
}
