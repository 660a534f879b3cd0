//! The regional store: ciphertexts and manifests of many tenants, and no key.

mod activity;
pub mod audit;
pub mod catalog;
mod direct;
pub mod engine;
pub mod http;
mod leases;
mod metrics;
pub mod server;
pub mod tenants;
pub mod tls;
mod watched;
