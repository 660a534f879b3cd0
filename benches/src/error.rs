//! What can break in a bench. A slow result is not an error.

use std::io;
use std::path::Path;

/// Why a bench could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The operating system refused something.
    #[error("{what}: {cause}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        cause: io::Error,
    },
    /// A program ended with an error.
    #[error("`{command}` ended with {status}:\n{stderr}")]
    Command {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// The end of its standard error.
        stderr: String,
    },
    /// A program printed something else than agreed.
    #[error("{what} printed JSON that the bench does not understand: {cause}")]
    Json {
        /// The program.
        what: String,
        /// Why.
        cause: String,
    },
    /// The machine lacks something, or two trees that must be equal are not.
    #[error("{0}")]
    Setup(String),
}

/// For `map_err`: names what was tried.
pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> BenchError {
    let what = what.into();
    move |cause| BenchError::Io { what, cause }
}

/// For `map_err`: names the path.
pub fn at(path: &Path) -> impl FnOnce(io::Error) -> BenchError {
    io(path.display().to_string())
}
