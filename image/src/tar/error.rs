//! What can be wrong with a tar stream.

use std::error::Error;
use std::fmt;
use std::io;

use crate::limits::Exceeded;

/// Why a tar stream could not be read on.
#[derive(Debug)]
pub struct TarError {
    /// Where: byte offset in the uncompressed stream.
    pub offset: u64,
    /// The entry, as far as its name was known.
    pub entry: Option<Vec<u8>>,
    /// What.
    pub problem: TarProblem,
}

impl fmt::Display for TarError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(entry) = &self.entry {
            write!(f, "entry \"{}\", ", entry.escape_ascii())?;
        }
        write!(
            f,
            "byte {} of the tar stream: {}",
            self.offset, self.problem
        )
    }
}

impl Error for TarError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.problem.source()
    }
}

/// The kinds of trouble a tar stream can make.
#[derive(Debug, thiserror::Error)]
pub enum TarProblem {
    /// The stream below failed.
    #[error("{0}")]
    Read(#[source] io::Error),
    /// The stream ended inside an entry.
    #[error("the stream ends here, inside an entry: the layer is truncated")]
    Truncated,
    /// Not a header: the checksum is wrong.
    #[error(
        "no tar header here (its checksum is wrong): the layer is not a tar archive or is damaged"
    )]
    Checksum,
    /// One block of zeros, then more entries.
    #[error("a single block of zeros between entries: the layer is damaged")]
    LoneZeroBlock,
    /// A number that isn't one, or that the field can't mean.
    #[error("field {field} holds no valid number: \"{value}\"")]
    Number {
        /// Name of the header field or PAX keyword.
        field: &'static str,
        /// What it holds, escaped and shortened.
        value: String,
    },
    /// A PAX extended header that does not follow POSIX.
    #[error("malformed PAX header: {0}")]
    Pax(&'static str),
    /// A PAX global header that says what can only be true of one entry.
    #[error("the PAX global header sets \"{0}\", which can only be true of one entry")]
    PaxGlobal(String),
    /// A sparse map that contradicts itself.
    #[error("invalid map of a sparse file: {0}")]
    Sparse(&'static str),
    /// An extended header or long name, and then no entry.
    #[error("the archive ends after an extended header, before the entry that it describes")]
    DanglingHeader,
    /// A type flag that stands for nothing an image can hold.
    #[error("unknown entry type '{}'{}", .0.escape_ascii(), type_hint(*.0))]
    UnknownType(u8),
    /// More than a limit allows.
    #[error(transparent)]
    Limit(#[from] Exceeded),
}

fn type_hint(flag: u8) -> &'static str {
    match flag {
        b'M' => " (continued from another volume: multi-volume archives can't be layers)",
        b'N' => " (GNU long names of before 1989)",
        _ => "",
    }
}

/// A field's content, fit for a message.
pub(super) fn show(value: &[u8]) -> String {
    const SHOWN: usize = 64;
    value[..value.len().min(SHOWN)].escape_ascii().to_string()
}
