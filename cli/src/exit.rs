//! Which error ends with which exit code, and how errors are told.

use std::io::Write;
use std::process::ExitCode;

use lazyimg_chunkstore::remote::{StoreError, StoreErrorCode};
use lazyimg_chunkstore::{FetchError, ReadError};
use lazyimg_convergent::provider::ProviderError;
use lazyimg_fuse::client::ClientError;
use lazyimg_fuse::daemon::DaemonError;
use lazyimg_fuse::protocol::ErrorCode;
use lazyimg_image::artifact::ArtifactError;
use lazyimg_image::convert::ConvertError;
use lazyimg_image::failure::FailureClass;
use lazyimg_image::source::SourceError;

/// Anything that ends a command.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration file.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// A key or a salt.
    #[error(transparent)]
    Provider(#[from] ProviderError),
    /// A registry or a layout.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// An artifact.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// A conversion.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// A chunk that can't be read.
    #[error(transparent)]
    Chunk(#[from] ReadError),
    /// A regional store.
    #[error(transparent)]
    Region(#[from] StoreError),
    /// A mount, or its daemon.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The daemon itself.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// Input or output.
    #[error("{what}: {cause}")]
    Io {
        /// What was being done, on what.
        what: String,
        /// Why it failed.
        cause: std::io::Error,
    },
    /// Wrong usage that clap can't see.
    #[error("{0}")]
    Usage(String),
    /// `verify` found damage.
    #[error("{0}")]
    Damaged(String),
    /// `verify` could not check everything.
    #[error("{0}")]
    Unreachable(String),
    /// A store knows no such thing.
    #[error("{0}")]
    Missing(String),
    /// A store does not take these credentials, or there are none.
    #[error("{0}")]
    Credentials(String),
    /// Several, each told; the first one's exit code counts.
    #[error("{}", all(.0))]
    Several(Vec<Error>),
    /// Anything else, with what to do next.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// An I/O error with what was being done.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |cause| Self::Io { what, cause }
    }
}

/// Exit codes, as `lazyimg --help` lists them.
fn code(error: &Error) -> u8 {
    match error {
        Error::Config(_) | Error::Usage(_) => 2,
        Error::Provider(_) => 4,
        Error::Source(e) => class_code(e.class()),
        Error::Convert(e) => class_code(e.class()),
        Error::Artifact(e) => class_code(e.class()),
        Error::Chunk(e) => chunk_code(e),
        Error::Region(e) => region_code(e),
        Error::Client(e) => client_code(e),
        Error::Several(all) => all.first().map_or(1, code),
        Error::Damaged(_) => 6,
        Error::Unreachable(_) => 5,
        Error::Missing(_) => 3,
        Error::Credentials(_) => 4,
        Error::Daemon(DaemonError::Mount { code, .. }) => refusal_code(*code),
        Error::Daemon(_) | Error::Io { .. } | Error::Other(_) => 1,
    }
}

fn chunk_code(error: &ReadError) -> u8 {
    if error.is_damage() {
        return class_code(FailureClass::Damaged);
    }
    let class = match error {
        ReadError::TimedOut { .. } => FailureClass::Unreachable,
        // The last tier is the origin: nobody else can have it.
        ReadError::Tiers { failures, .. } => match failures.last().map(|f| f.error.root()) {
            Some(FetchError::Unauthorized(_)) => FailureClass::Key,
            Some(FetchError::Unavailable { .. } | FetchError::TimedOut(_)) => {
                FailureClass::Unreachable
            }
            _ => FailureClass::Other,
        },
        _ => FailureClass::Other,
    };
    class_code(class)
}

fn region_code(error: &StoreError) -> u8 {
    use StoreErrorCode::{Forbidden, NotFound, Quota, Unauthorized};
    let class = match (error, error.code()) {
        (StoreError::Setup(_), _) => return 2,
        (StoreError::Token { .. }, _) | (_, Some(Unauthorized | Forbidden | Quota)) => {
            FailureClass::Key
        }
        (_, Some(NotFound)) => FailureClass::NotFound,
        _ if error.is_passing() => FailureClass::Unreachable,
        _ => FailureClass::Other,
    };
    class_code(class)
}

fn client_code(error: &ClientError) -> u8 {
    match error {
        ClientError::Request(_) => 2,
        ClientError::Refused { code, .. } => refusal_code(*code),
        _ => 1,
    }
}

fn refusal_code(code: ErrorCode) -> u8 {
    match code {
        ErrorCode::BadRequest => 2,
        ErrorCode::NotFound => 3,
        ErrorCode::Key => 4,
        ErrorCode::Unreachable | ErrorCode::Overloaded => 5,
        ErrorCode::Damaged => 6,
        _ => 1,
    }
}

fn class_code(class: FailureClass) -> u8 {
    match class {
        FailureClass::Other => 1,
        FailureClass::NotFound => 3,
        FailureClass::Key => 4,
        FailureClass::Unreachable => 5,
        FailureClass::Damaged => 6,
    }
}

/// Tells the error and gives the exit code. A reader that closed the pipe is no error.
pub fn report(error: &Error) -> ExitCode {
    if let Error::Io { cause, .. } = error
        && cause.kind() == std::io::ErrorKind::BrokenPipe
    {
        return ExitCode::SUCCESS;
    }
    let told = match error {
        Error::Several(all) => all.as_slice(),
        one => std::slice::from_ref(one),
    };
    for error in told {
        let _ = writeln!(std::io::stderr(), "lazyimg: {}", chain(error));
    }
    ExitCode::from(code(error))
}

fn all(errors: &[Error]) -> String {
    let texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

/// The error with all its causes, each once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        if !text.contains(&next_text) {
            text.push_str(": ");
            text.push_str(&next_text);
        }
        cause = next.source();
    }
    text
}
