//! The store's protocol, over real connections to a store in this process: `docs/store.md`.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod administration;
mod chunks;
mod connections;
mod direct;
mod failures;
mod images;
mod many;
mod tenants;
mod world;
