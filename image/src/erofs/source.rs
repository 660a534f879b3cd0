//! Where a reader gets metadata from.

use std::error::Error;
use std::sync::Arc;

/// The bytes of a metadata image, perhaps still arriving.
///
/// An image is written so that what is needed first lies in front: a source that receives it in
/// order can answer `ls /` long before the end is there.
pub trait MetaSource: Send + Sync {
    /// Length of the whole metadata in bytes, known from the start.
    fn len(&self) -> u64;

    /// True for metadata of no bytes, which no image has.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Lends the `len` bytes at `offset`. May block until they have arrived.
    ///
    /// # Errors
    /// [`MetaError::OutOfRange`] beyond the end, [`MetaError::Unavailable`] when the bytes can't be
    /// had; a later call may succeed.
    fn read(&self, offset: u64, len: usize) -> Result<&[u8], MetaError>;
}

/// Why a [`MetaSource`] has no bytes.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// The metadata is shorter than what it says of itself: it is corrupt.
    #[error("metadata bytes {offset}+{len} lie outside of its {end} bytes; it is corrupt")]
    OutOfRange {
        /// First byte that was asked for.
        offset: u64,
        /// Bytes that were asked for.
        len: usize,
        /// Bytes that there are.
        end: u64,
    },
    /// The bytes did not arrive.
    #[error("metadata bytes {offset}+{len} could not be had; a later read tries again")]
    Unavailable {
        /// First byte that was asked for.
        offset: u64,
        /// Bytes that were asked for.
        len: usize,
        /// Why.
        #[source]
        cause: Box<dyn Error + Send + Sync>,
    },
}

fn lend(bytes: &[u8], offset: u64, len: usize) -> Result<&[u8], MetaError> {
    usize::try_from(offset)
        .ok()
        .and_then(|from| bytes.get(from..from.checked_add(len)?))
        .ok_or(MetaError::OutOfRange {
            offset,
            len,
            end: bytes.len() as u64,
        })
}

impl MetaSource for Vec<u8> {
    fn len(&self) -> u64 {
        self.as_slice().len() as u64
    }

    fn read(&self, offset: u64, len: usize) -> Result<&[u8], MetaError> {
        lend(self, offset, len)
    }
}

impl MetaSource for bytes::Bytes {
    fn len(&self) -> u64 {
        self.as_ref().len() as u64
    }

    fn read(&self, offset: u64, len: usize) -> Result<&[u8], MetaError> {
        lend(self, offset, len)
    }
}

impl<S: MetaSource + ?Sized> MetaSource for Arc<S> {
    fn len(&self) -> u64 {
        (**self).len()
    }

    fn read(&self, offset: u64, len: usize) -> Result<&[u8], MetaError> {
        (**self).read(offset, len)
    }
}

impl<S: MetaSource + ?Sized> MetaSource for Box<S> {
    fn len(&self) -> u64 {
        (**self).len()
    }

    fn read(&self, offset: u64, len: usize) -> Result<&[u8], MetaError> {
        (**self).read(offset, len)
    }
}
