//! What kind of failure an error is, for programs: exit codes and codes of protocols come from here.

use lazyimg_convergent::seal::UnsealError;

use crate::artifact::ArtifactError;
use crate::convert::ConvertError;
use crate::flatten::{EntryProblem, FlattenError};
use crate::layer::{LayerError, LayerProblem};
use crate::manifest::ManifestError;
use crate::source::SourceError;

/// What a program would do differently after one error than after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureClass {
    /// The image is not there, or nobody converted it.
    NotFound,
    /// The tenant key or the registry's credentials are not the right ones.
    Key,
    /// The registry can't be reached or is in trouble; later may work.
    Unreachable,
    /// Bytes that are not what they should be.
    Damaged,
    /// Anything else.
    Other,
}

impl SourceError {
    /// The kind of failure.
    pub fn class(&self) -> FailureClass {
        match self {
            e if e.is_not_found() => FailureClass::NotFound,
            Self::NoPlatform { .. } => FailureClass::NotFound,
            Self::Unauthorized { .. } | Self::Credentials(_) => FailureClass::Key,
            Self::DigestMismatch { .. } | Self::SizeMismatch { .. } => FailureClass::Damaged,
            e if e.is_retryable() => FailureClass::Unreachable,
            _ => FailureClass::Other,
        }
    }
}

impl ArtifactError {
    /// The kind of failure.
    pub fn class(&self) -> FailureClass {
        match self {
            Self::Source(e) => e.class(),
            Self::NotConverted { .. } => FailureClass::NotFound,
            Self::OtherKey { .. } => FailureClass::Key,
            Self::Manifest {
                cause: ManifestError::Unseal(UnsealError::WrongKey { .. }),
                ..
            } => FailureClass::Key,
            Self::Manifest { .. } | Self::Malformed { .. } | Self::WrongImage { .. } => {
                FailureClass::Damaged
            }
            Self::Spool(_) => FailureClass::Other,
        }
    }
}

impl ConvertError {
    /// The kind of failure.
    pub fn class(&self) -> FailureClass {
        match self {
            Self::Source(e) => e.class(),
            Self::Layer(e) => e.class(),
            Self::Flatten(e) => e.class(),
            _ => FailureClass::Other,
        }
    }
}

impl FlattenError {
    /// The kind of failure.
    pub fn class(&self) -> FailureClass {
        match &self.problem {
            EntryProblem::Blob(e) => e.class(),
            _ => FailureClass::Other,
        }
    }
}

impl LayerError {
    /// The kind of failure.
    pub fn class(&self) -> FailureClass {
        match &self.problem {
            LayerProblem::Truncated { .. }
            | LayerProblem::TooLong { .. }
            | LayerProblem::Decompress { .. }
            | LayerProblem::Digest { .. }
            | LayerProblem::DiffId { .. } => FailureClass::Damaged,
            LayerProblem::Read(e) => e
                .get_ref()
                .and_then(|e| e.downcast_ref::<SourceError>())
                .map_or(FailureClass::Unreachable, SourceError::class),
            _ => FailureClass::Other,
        }
    }
}
