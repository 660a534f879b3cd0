//! A registry in memory that does what the test wants.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_chunkstore::{BlobRanges, FetchError};
use lazyimg_convergent::Digest;
use tokio::sync::watch;

/// How the origin answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    Good,
    /// With an error, at once.
    Down,
    /// Not at all, until its health changes.
    Silent,
    /// With bytes that are not the right ones.
    Wrong,
}

pub struct Origin {
    packs: BTreeMap<Digest, Bytes>,
    health: watch::Sender<Health>,
    pub requests: AtomicU64,
    pub bytes: AtomicU64,
}

impl Origin {
    pub fn new(packs: BTreeMap<Digest, Vec<u8>>) -> Self {
        Self {
            packs: packs.into_iter().map(|(d, b)| (d, b.into())).collect(),
            health: watch::Sender::new(Health::Good),
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }
    }

    pub fn set(&self, health: Health) {
        self.health.send_replace(health);
    }

    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl BlobRanges for Origin {
    async fn read_range(&self, blob: &Digest, offset: u64, len: u64) -> Result<Bytes, FetchError> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let mut health = self.health.subscribe();
        let health = *health.wait_for(|h| *h != Health::Silent).await.unwrap();
        let pack = self
            .packs
            .get(blob)
            .ok_or_else(|| FetchError::NotFound(blob.to_string()))?;
        let bytes = pack.slice(offset as usize..(offset + len) as usize);
        match health {
            Health::Down => return Err(FetchError::unavailable("the test took it down")),
            Health::Wrong => return Ok(bytes.iter().map(|b| b ^ 1).collect::<Vec<_>>().into()),
            Health::Good | Health::Silent => {}
        }
        self.bytes.fetch_add(len, Ordering::SeqCst);
        Ok(bytes)
    }
}
