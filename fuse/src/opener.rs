//! From a mount request to an image that can be read.

mod known;
mod region;
mod registry;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_chunkstore::Tier;
use lazyimg_convergent::ChunkId;
use lazyimg_image::artifact::ArtifactError;
use lazyimg_image::failure::FailureClass;

use crate::errno::chain;
use crate::protocol::{ErrorCode, MountRequest};
use crate::view::ImageView;

pub use registry::{REGISTRY_TIER, RegistryOpener, RepositoryBlobs};

/// An image that is ready to be mounted.
#[derive(Clone)]
pub struct OpenedImage {
    /// Its chunk tables; those of another mount where that has the same image.
    pub view: Arc<ImageView>,
    /// Where its chunks come from, nearest first.
    pub tiers: Vec<Arc<dyn Tier>>,
    /// Ciphertexts that came along while it was opened.
    pub early: Vec<(ChunkId, Bytes)>,
}

/// Why an image could not be opened, in words for the user: the causes are many, and nobody but a
/// person acts on them.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct OpenError {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
}

impl OpenError {
    /// With all the causes of `error`.
    pub fn of(error: &(dyn std::error::Error + 'static)) -> Self {
        Self {
            code: ErrorCode::Image,
            message: chain(error),
        }
    }

    fn artifact(error: &ArtifactError) -> Self {
        let code = match error.class() {
            FailureClass::NotFound => ErrorCode::NotFound,
            FailureClass::Key => ErrorCode::Key,
            FailureClass::Unreachable => ErrorCode::Unreachable,
            FailureClass::Damaged => ErrorCode::Damaged,
            FailureClass::Other => ErrorCode::Image,
        };
        Self {
            code,
            message: chain(error),
        }
    }
}

/// Finds and opens images. The daemon has one; tests bring their own.
#[async_trait]
pub trait ImageOpener: Send + Sync {
    /// Opens the image of a request. Ends by itself: every step has a deadline.
    async fn open(&self, request: &MountRequest) -> Result<OpenedImage, OpenError>;
}
