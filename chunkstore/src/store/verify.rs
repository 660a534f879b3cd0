//! Checking copies of chunks, for `lazyimg verify`.

use bytes::Bytes;
use lazyimg_convergent::{ChunkId, chunk};

use super::Image;
use super::local::check_spec;
use super::read::Patience;
use super::walk::{Progress, walk};
use crate::cache::Lookup;
use crate::{ChunkRef, ChunkSpec, Offer, ReadError, TierFailure};

/// Which copies [`crate::ImageStore::verify`] looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VerifyScope {
    /// The host cache's copy where there is one (a bad one is dropped and replaced), else the
    /// tiers'.
    CacheFirst,
    /// Only the tiers' copies.
    Tiers,
}

/// Where a verified copy lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopyPlace {
    /// In the host cache.
    Cache,
    /// In the tier of this name.
    Tier(String),
}

/// A chunk whose id and plaintext were found right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The copy that was checked.
    pub copy: CopyPlace,
    /// Whether the host cache had a bad copy, which was dropped and is replaced by this one.
    pub healed: bool,
}

type Outcome = Result<Verified, ReadError>;

/// See [`crate::ImageStore::verify`].
pub async fn verify(image: &Image, specs: &[ChunkSpec], scope: VerifyScope) -> Vec<Outcome> {
    let mut check = Check {
        image,
        specs,
        asked: Vec::new(),
        wounded: vec![false; specs.len()],
        outcomes: vec![None; specs.len()],
        failures: vec![Vec::new(); specs.len()],
    };
    let mut chunks: Vec<ChunkRef> = Vec::new();
    for (index, spec) in specs.iter().enumerate() {
        let outcome = match check_spec(spec) {
            Err(e) => Some(Err(e)),
            Ok(()) if scope == VerifyScope::CacheFirst => check.cached(index),
            Ok(()) => None,
        };
        if outcome.is_none() {
            check.asked.push(index);
            chunks.push(spec.chunk);
        }
        check.outcomes[index] = outcome;
    }
    let patience = Patience::of_store(&image.host.options);
    walk(image, &chunks, patience, &mut check).await;
    let Check {
        outcomes, failures, ..
    } = check;
    outcomes
        .into_iter()
        .zip(failures)
        .zip(specs)
        .map(|((outcome, failures), spec)| {
            outcome.unwrap_or(Err(ReadError::Tiers {
                id: *spec.id(),
                failures,
            }))
        })
        .collect()
}

struct Check<'a> {
    image: &'a Image,
    specs: &'a [ChunkSpec],
    /// What the tiers are asked for, as indices into `specs`.
    asked: Vec<usize>,
    wounded: Vec<bool>,
    outcomes: Vec<Option<Outcome>>,
    failures: Vec<Vec<TierFailure>>,
}

impl Check<'_> {
    /// The cache's copy; `None` when there is no good one.
    fn cached(&mut self, index: usize) -> Option<Outcome> {
        let spec = &self.specs[index];
        let cache = self.image.host.cache.as_ref()?;
        match cache.peek(spec.id()) {
            Lookup::Disk(bytes, _) if ChunkId::of(&bytes) == *spec.id() => {
                Some(opens(spec, &bytes, CopyPlace::Cache, false))
            }
            Lookup::Disk(_, at) => {
                cache.forget(spec.id(), at);
                self.wound(index);
                None
            }
            Lookup::Pending(bytes) => Some(opens(spec, &bytes, CopyPlace::Cache, false)),
            Lookup::Bad => {
                self.wound(index);
                None
            }
            Lookup::Miss => None,
        }
    }

    fn wound(&mut self, index: usize) {
        self.wounded[index] = true;
        let stats = &self.image.stats.bad_local_copies;
        stats.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.image.host.wound(self.specs[index].id());
    }
}

impl Progress for Check<'_> {
    fn asking(&mut self, _index: usize, _tier: &str) {}

    fn arrived(&mut self, index: usize, bytes: Bytes, tier: &str) {
        let index = self.asked[index];
        let healed = self.wounded[index];
        let spec = &self.specs[index];
        let copy = CopyPlace::Tier(tier.to_owned());
        self.outcomes[index] = Some(opens(spec, &bytes, copy, healed));
        if healed {
            self.image.keep(spec.id(), bytes);
        }
    }

    fn failed(&mut self, index: usize, failure: TierFailure) {
        self.failures[self.asked[index]].push(failure);
    }

    fn offers(&self, why: Offer) -> bool {
        why == Offer::WasWrong
    }
}

/// Whether the key opens a ciphertext whose id was found right.
fn opens(spec: &ChunkSpec, bytes: &[u8], copy: CopyPlace, healed: bool) -> Outcome {
    match chunk::open(&spec.key, bytes, spec.plain_len as usize) {
        Ok(_) => Ok(Verified { copy, healed }),
        Err(source) => Err(ReadError::Undecryptable {
            id: *spec.id(),
            source,
        }),
    }
}
