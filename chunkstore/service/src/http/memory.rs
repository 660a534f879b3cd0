//! A bound on the bytes of bodies that are in memory. What does not fit waits.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;
use super::shares::Share;

/// How long a request waits for memory before it is told to come again.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// The bytes that bodies may take.
#[derive(Debug, Clone)]
pub(super) struct Memory {
    free: Arc<Semaphore>,
    total: u32,
}

/// A part of them, until it is dropped: of all, and of the tenant's.
#[derive(Debug)]
pub(super) struct Held {
    all: OwnedSemaphorePermit,
    tenant: OwnedSemaphorePermit,
}

impl Memory {
    pub fn new(bytes: u64) -> Self {
        let total = u32::try_from(bytes).unwrap_or(u32::MAX);
        // A 32-bit machine has fewer permits than that.
        let total = total.min(u32::try_from(Semaphore::MAX_PERMITS).unwrap_or(u32::MAX));
        Self {
            free: Arc::new(Semaphore::new(total as usize)),
            total,
        }
    }

    /// Waits for room; one body may have all of it, even if it is longer.
    ///
    /// Nobody waits who holds some already, except at the end of its own patience: so those who hold
    /// can always go on. The tenant's part comes first: who waits for that keeps nobody else waiting.
    pub async fn take(&self, share: &Share, bytes: usize) -> Result<Held, ApiError> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let room = async {
            let tenant = share.memory(bytes).await?;
            let all = Arc::clone(&self.free).acquire_many_owned(bytes.min(self.total));
            let all = all.await.ok()?;
            Some(Held { all, tenant })
        };
        match tokio::time::timeout(PATIENCE, room).await {
            Ok(Some(held)) => Ok(held),
            _ => Err(ApiError::Busy),
        }
    }

    /// How many there are.
    pub fn total(&self) -> u32 {
        self.total
    }

    /// Bytes that are taken.
    pub fn taken(&self) -> u64 {
        (self.total as usize).saturating_sub(self.free.available_permits()) as u64
    }
}

impl Held {
    /// Gives back what is more than `bytes`.
    pub fn shrink_to(&mut self, bytes: usize) {
        for part in [&mut self.all, &mut self.tenant] {
            let more = part.num_permits().saturating_sub(bytes);
            drop(part.split(more));
        }
    }

    /// Bytes that give this part back when the last reference to them is dropped: for an answer, when
    /// the socket has taken them.
    pub fn with(mut self, bytes: Bytes) -> Bytes {
        struct Owner {
            bytes: Bytes,
            _held: Held,
        }
        impl AsRef<[u8]> for Owner {
            fn as_ref(&self) -> &[u8] {
                &self.bytes
            }
        }
        self.shrink_to(bytes.len());
        Bytes::from_owner(Owner { bytes, _held: self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::shares::Shares;

    #[tokio::test(start_paused = true)]
    async fn what_does_not_fit_waits_until_bytes_are_dropped() {
        let memory = Memory::new(100);
        let share = Shares::new(1, 100, true).of(&"t".parse().unwrap());
        let share = &*share;
        let bytes = memory
            .take(share, 90)
            .await
            .unwrap()
            .with(Bytes::from(vec![7; 60]));
        assert_eq!(memory.taken(), 60);
        let second = memory.take(share, 40).await.unwrap();
        assert!(memory.take(share, 1).await.is_err(), "after its patience");
        let copy = bytes.clone();
        drop(bytes);
        assert_eq!(memory.taken(), 100, "a copy is still there");
        drop(copy);
        assert_eq!(memory.taken(), 40);
        drop(second);
        let all = memory.take(share, 1000).await.unwrap();
        assert_eq!(
            memory.taken(),
            100,
            "one longer than all of it has it alone"
        );
        drop(all);
        assert_eq!(memory.taken(), 0);
    }
}
