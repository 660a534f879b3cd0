//! What can be wrong with a layer's blob.

use std::error::Error;
use std::fmt;
use std::io;

use lazyimg_convergent::Digest;

use super::Compression;
use crate::limits::Exceeded;
use crate::source::LayerDescriptor;

/// Why a layer could not be read.
#[derive(Debug)]
pub struct LayerError {
    /// Which layer, counted from 0 at the base.
    pub number: u32,
    /// The digest that its descriptor names.
    pub digest: Digest,
    /// What.
    pub problem: LayerProblem,
}

impl LayerError {
    pub(super) fn new(number: u32, layer: &LayerDescriptor, problem: LayerProblem) -> Self {
        Self {
            number,
            digest: layer.digest,
            problem,
        }
    }
}

impl fmt::Display for LayerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "layer {} ({}): {}",
            self.number, self.digest, self.problem
        )
    }
}

impl Error for LayerError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.problem.source()
    }
}

/// The kinds of trouble a blob can make.
#[derive(Debug, thiserror::Error)]
pub enum LayerProblem {
    /// The media type is none that can be unpacked.
    #[error("media type \"{}\" is not a layer that can be unpacked", .0.escape_debug())]
    MediaType(String),
    /// The media type says one thing, the first bytes another.
    #[error(
        "its media type promises {declared}, its first bytes are {found}: \
         the image was pushed with a wrong media type, or the blob is damaged"
    )]
    Magic {
        /// By the media type.
        declared: Compression,
        /// By the first bytes.
        found: Compression,
    },
    /// The source failed.
    #[error("reading the blob failed: {0}")]
    Read(#[source] io::Error),
    /// The blob ended early.
    #[error("the blob is truncated: {actual} bytes of {expected} came")]
    Truncated {
        /// By the descriptor.
        expected: u64,
        /// What came.
        actual: u64,
    },
    /// The blob goes on behind its end.
    #[error("the blob is longer than the {expected} bytes that its descriptor states")]
    TooLong {
        /// By the descriptor.
        expected: u64,
    },
    /// The decompressor gave up.
    #[error("the blob can't be decompressed as {compression}, it is damaged: {cause}")]
    Decompress {
        /// By the media type.
        compression: Compression,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The compressed bytes have another digest.
    #[error("the blob has the digest {actual}: it was changed on its way or in the registry")]
    Digest {
        /// Of what came.
        actual: Digest,
    },
    /// The uncompressed bytes have another digest.
    #[error(
        "uncompressed, it has the digest {actual}, but the image's configuration names the \
         diff id {expected}: the image is inconsistent"
    )]
    DiffId {
        /// By the configuration.
        expected: Digest,
        /// Of what came.
        actual: Digest,
    },
    /// An earlier read failed.
    #[error("reading went on after an error")]
    Stopped,
    /// More than a limit allows.
    #[error(transparent)]
    Limit(#[from] Exceeded),
}
