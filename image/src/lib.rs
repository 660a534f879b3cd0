//! The image side of lazyimg: layers in, one flattened tree, its layout in the data space, its
//! EROFS metadata and its manifest; and the registries and OCI layouts that images lie in.

pub mod artifact;
pub mod convert;
pub mod credentials;
pub mod erofs;
pub mod failure;
pub mod flatten;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
#[cfg(test)]
#[path = "../../convergent/src/golden.rs"]
#[allow(dead_code, reason = "not every vector kind is used here")]
mod golden;
pub mod layer;
pub mod layout;
pub mod limits;
pub mod manifest;
pub mod oci_layout;
pub mod platform;
pub mod reference;
pub mod registry;
pub mod source;
pub mod tar;
pub mod tree;
