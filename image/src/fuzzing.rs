//! Readers that are private to this crate, for the fuzz targets in `fuzz/`. Behind the feature `fuzzing`,
//! which nothing else enables.

use lazyimg_convergent::Digest;

use crate::artifact::Document;

pub use crate::registry::fuzzing::{error_message, next_page, token, token_service};

/// The document of an artifact, read and written again; `None` when it is refused.
pub fn artifact_document(bytes: &[u8]) -> Option<Vec<u8>> {
    let document = Document::parse(Digest::of(bytes), bytes).ok()?;
    serde_json::to_vec(&document).ok()
}
