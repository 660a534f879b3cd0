//! The client of the regional store: `docs/store.md` has the protocol.
//!
//! [`StoreClient`] speaks it with any number of instances, each of which can answer everything.
//! Which one is asked for a chunk is chosen by rendezvous hashing, so that all hosts ask the same
//! one and its cache and leases help; when that one is down, the next in rank is asked.
//! [`StoreTier`] makes it a [`crate::Tier`].

mod answer;
mod client;
mod documents;
mod error;
mod exchange;
mod fetch;
mod frames;
mod http;
mod instances;
mod settings;
#[cfg(test)]
mod tests;
mod tier;
mod token;
mod write_back;

pub use client::{Got, PutOutcome, StoreClient};
pub use documents::{ManifestAnswer, RefAnswer, RefCondition, RefRecord, StoredManifest};
pub use error::{StoreError, StoreErrorCode};
pub use fetch::Effort;
pub use frames::{Frame, FrameError, FrameParser};
pub use settings::{Http2, SettingsError, StoreSettings};
pub use tier::{STORE_TIER, StoreTier, StoreTierOptions};
