//! What a bench needs before it can measure: content, images, a registry, a slow link, the program.

pub mod corpus;
pub mod lazyimg;
pub mod link;
pub mod oci;
pub mod registry;
pub mod tarball;
pub mod workload;
