//! The fast path: chunks that are on this host, decoded in the calling thread.

use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use lazyimg_convergent::{ChunkId, MAX_CHUNK_LEN, MAX_STORED_LEN, chunk};
use parking_lot::MutexGuard;

use super::Image;
use crate::cache::Lookup;
use crate::{ChunkSpec, ReadError};

/// What a look around this host found.
pub enum Local {
    /// The plaintext.
    Plain(Bytes),
    /// Nothing that opens.
    Missing,
    /// The right bytes, but the spec does not open them: no tier can help.
    Broken(ReadError),
}

impl From<Result<Bytes, ReadError>> for Local {
    fn from(result: Result<Bytes, ReadError>) -> Self {
        result.map_or_else(Self::Broken, Self::Plain)
    }
}

/// Refuses lengths that the format forbids, before anything is allocated for them.
pub fn check_spec(spec: &ChunkSpec) -> Result<(), ReadError> {
    let bad = |reason: String| {
        Err(ReadError::BadSpec {
            id: *spec.id(),
            reason,
        })
    };
    if !(1..=MAX_CHUNK_LEN as u32).contains(&spec.plain_len) {
        return bad(format!("{} bytes of plaintext", spec.plain_len));
    }
    if !(1..=MAX_STORED_LEN as u32).contains(&spec.chunk.stored_len) {
        return bad(format!("{} stored bytes", spec.chunk.stored_len));
    }
    Ok(())
}

impl Image {
    /// From memory or from the host cache. At most one thread decodes a chunk at a time; the
    /// others find it in memory.
    pub fn local(&self, spec: &ChunkSpec) -> Local {
        if let Err(e) = check_spec(spec) {
            return Local::Broken(e);
        }
        if let Some(plain) = self.hot(spec) {
            return Local::Plain(plain);
        }
        let Some(cache) = &self.host.cache else {
            return Local::Missing;
        };
        let _alone = self.decode_lock(spec);
        // Another thread may have decoded it meanwhile.
        if let Some(plain) = self.hot(spec) {
            return Local::Plain(plain);
        }
        let plain_len = spec.plain_len as usize;
        match cache.lookup(spec.id()) {
            Lookup::Miss => Local::Missing,
            Lookup::Bad => self.bad_copy(spec),
            Lookup::Pending(bytes) => {
                self.stats.cache.add(bytes.len());
                self.opened(spec, chunk::open(&spec.key, &bytes, plain_len))
                    .into()
            }
            Lookup::Disk(bytes, _) => {
                let stored = bytes.len();
                let Ok(plain) = chunk::open_owned(&spec.key, bytes, plain_len) else {
                    return self.look_closer(spec);
                };
                self.stats.cache.add(stored);
                Local::Plain(self.keep_hot(spec, plain))
            }
        }
    }

    /// A copy did not open. Is the copy bad, or the spec? Only a bad copy may be dropped: else
    /// whoever forges a manifest could empty the cache of others' chunks.
    fn look_closer(&self, spec: &ChunkSpec) -> Local {
        let Some(cache) = &self.host.cache else {
            return Local::Missing;
        };
        match cache.peek(spec.id()) {
            Lookup::Disk(bytes, at) if ChunkId::of(&bytes) != *spec.id() => {
                cache.forget(spec.id(), at);
                self.bad_copy(spec)
            }
            Lookup::Disk(bytes, _) => {
                let stored = bytes.len();
                let plain = chunk::open_owned(&spec.key, bytes, spec.plain_len as usize);
                if plain.is_ok() {
                    self.stats.cache.add(stored);
                }
                self.opened(spec, plain).into()
            }
            Lookup::Bad => self.bad_copy(spec),
            Lookup::Pending(_) | Lookup::Miss => Local::Missing,
        }
    }

    fn bad_copy(&self, spec: &ChunkSpec) -> Local {
        self.stats.bad_local_copies.fetch_add(1, Relaxed);
        self.host.wound(spec.id());
        tracing::debug!(chunk = %spec.id(), "dropped a bad copy from the host cache");
        Local::Missing
    }

    /// Decodes a ciphertext whose id was verified: if it does not open, the spec is wrong.
    pub fn open_verified(&self, spec: &ChunkSpec, bytes: &[u8]) -> Result<Bytes, ReadError> {
        let _alone = self.decode_lock(spec);
        if let Some(plain) = self.host.hot.get(spec) {
            return Ok(plain);
        }
        self.opened(spec, chunk::open(&spec.key, bytes, spec.plain_len as usize))
    }

    fn opened(
        &self,
        spec: &ChunkSpec,
        plain: Result<Vec<u8>, chunk::OpenError>,
    ) -> Result<Bytes, ReadError> {
        match plain {
            Ok(plain) => Ok(self.keep_hot(spec, plain)),
            Err(source) => Err(ReadError::Undecryptable {
                id: *spec.id(),
                source,
            }),
        }
    }

    fn keep_hot(&self, spec: &ChunkSpec, plain: Vec<u8>) -> Bytes {
        let plain = Bytes::from(plain);
        self.host.hot.put(spec, plain.clone());
        plain
    }

    fn hot(&self, spec: &ChunkSpec) -> Option<Bytes> {
        let plain = self.host.hot.get(spec)?;
        self.stats.hot.add(plain.len());
        Some(plain)
    }

    /// `None` when nothing is kept hot: then waiting for another thread's plaintext is in vain.
    fn decode_lock(&self, spec: &ChunkSpec) -> Option<MutexGuard<'_, ()>> {
        let locks = &self.host.decoding;
        self.host
            .hot
            .is_enabled()
            .then(|| locks[spec.id().0[0] as usize % locks.len()].lock())
    }
}
