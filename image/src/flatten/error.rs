//! What can be wrong with a layer's entries.

use std::error::Error;
use std::fmt;

use crate::layer::LayerError;
use crate::limits::Exceeded;
use crate::tar::{TarError, TarProblem};

/// Why a layer could not be applied: which layer, which entry, what.
#[derive(Debug)]
pub struct FlattenError {
    /// Which layer, counted from 0 at the base.
    pub layer: u32,
    /// What the layer is called: its digest.
    pub name: String,
    /// The entry's name as it stands in the layer, as far as known.
    pub entry: Option<Vec<u8>>,
    /// What.
    pub problem: EntryProblem,
}

/// The kinds of trouble an entry can make.
#[derive(Debug, thiserror::Error)]
pub enum EntryProblem {
    /// The archive itself.
    #[error(transparent)]
    Tar(Box<TarError>),
    /// The blob around the archive.
    #[error(transparent)]
    Blob(Box<LayerError>),
    /// The content sink.
    #[error("the file's content can't be kept: {0}")]
    Sink(#[source] Box<dyn Error + Send + Sync>),
    /// A name that leads upwards.
    #[error("\"{}\" contains \"..\": it could lead out of the image", .0.escape_ascii())]
    DotDot(Vec<u8>),
    /// A NUL byte in a name.
    #[error("\"{}\" contains a NUL byte", .0.escape_ascii())]
    Nul(Vec<u8>),
    /// The root as anything but a directory.
    #[error("the root of an image must be a directory")]
    RootNotDirectory,
    /// A whiteout that hides nothing that could exist.
    #[error("a whiteout must name what it hides: after \".wh.\" stands nothing, \".\" or \"..\"")]
    Whiteout,
    /// Symbolic links that lead in circles, or nearly.
    #[error("more than {0} symbolic links on the way to the entry: they lead in a circle")]
    SymlinkLoop(usize),
    /// A hard link to a directory.
    #[error("hard link to \"{}\", which is a directory", .0.escape_ascii())]
    LinkToDirectory(Vec<u8>),
    /// A hard link to nothing.
    #[error(
        "hard link to \"{}\", which is in neither this layer up to here nor a lower one",
        .0.escape_ascii()
    )]
    LinkToNothing(Vec<u8>),
    /// A symbolic link without a target.
    #[error("symbolic link without a target, or with a NUL byte in it")]
    EmptyTarget,
    /// More than a limit allows.
    #[error(transparent)]
    Limit(#[from] Exceeded),
}

impl FlattenError {
    pub(super) fn new(layer: u32, name: &str, entry: Option<&[u8]>, problem: EntryProblem) -> Self {
        Self {
            layer,
            name: name.to_owned(),
            entry: entry.map(<[u8]>::to_vec),
            problem,
        }
    }

    /// Unwraps what came through the tar reader from the blob below.
    pub(super) fn tar(layer: u32, name: &str, mut e: TarError) -> Self {
        let entry = e.entry.take();
        let problem = match e.problem {
            TarProblem::Read(cause) => match cause.downcast::<LayerError>() {
                Ok(blob) => EntryProblem::Blob(Box::new(blob)),
                Err(cause) => EntryProblem::Tar(Box::new(TarError {
                    problem: TarProblem::Read(cause),
                    ..e
                })),
            },
            problem => EntryProblem::Tar(Box::new(TarError { problem, ..e })),
        };
        Self {
            layer,
            name: name.to_owned(),
            entry,
            problem,
        }
    }
}

impl From<LayerError> for FlattenError {
    fn from(e: LayerError) -> Self {
        Self {
            layer: e.number,
            name: e.digest.to_string(),
            entry: None,
            problem: EntryProblem::Blob(Box::new(e)),
        }
    }
}

impl fmt::Display for FlattenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let EntryProblem::Blob(e) = &self.problem {
            return e.fmt(f);
        }
        write!(f, "layer {} ({})", self.layer, self.name)?;
        if let Some(entry) = &self.entry {
            // A name may be as long as a limit allows; the message need not be.
            const SHOWN: usize = 300;
            let shown = &entry[..entry.len().min(SHOWN)];
            let dots = if entry.len() > SHOWN { "…" } else { "" };
            write!(f, ", entry \"{}{dots}\"", shown.escape_ascii())?;
        }
        write!(f, ": {}", self.problem)
    }
}

impl Error for FlattenError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.problem.source()
    }
}
