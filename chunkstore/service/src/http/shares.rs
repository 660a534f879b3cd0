//! What one tenant may take of what all share: so much that it feels no bound when it is alone, and so
//! little that the others go on whatever it does.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;
use crate::catalog::TenantName;

/// A tenant's part of requests and memory. There may be more tenants than parts: these are bounds, not
/// reservations.
const PART: (u64, u64) = (3, 4);

/// The parts of all tenants that have asked.
#[derive(Debug)]
pub(super) struct Shares {
    requests: usize,
    memory: u32,
    tenants: Mutex<HashMap<TenantName, Arc<Share>>>,
}

/// One tenant's.
#[derive(Debug)]
pub(super) struct Share {
    requests: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    most_memory: u32,
}

impl Shares {
    /// Of so many requests and bytes of memory; all of them, if there is but one tenant.
    pub fn new(requests: usize, memory: u32, only_one: bool) -> Self {
        let part = |all: u64| match only_one {
            true => all,
            false => (all * PART.0 / PART.1).max(1),
        };
        Self {
            requests: part(requests as u64) as usize,
            memory: part(memory.into()) as u32,
            tenants: Mutex::default(),
        }
    }

    /// A tenant's. The names are those of the tenants file: they do not grow without bound.
    pub fn of(&self, tenant: &TenantName) -> Arc<Share> {
        let mut tenants = self.tenants.lock();
        if let Some(share) = tenants.get(tenant) {
            return Arc::clone(share);
        }
        let share = Arc::new(Share {
            requests: Arc::new(Semaphore::new(self.requests)),
            memory: Arc::new(Semaphore::new(self.memory as usize)),
            most_memory: self.memory,
        });
        tenants.insert(tenant.clone(), Arc::clone(&share));
        share
    }
}

impl Share {
    /// One more request; not if the tenant has its part.
    pub fn request(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        let permit = Arc::clone(&self.requests).try_acquire_owned();
        permit.map_err(|_| ApiError::Busy)
    }

    /// Waits for so many bytes, or for the whole part, if that is less. It ends only with the store.
    pub async fn memory(&self, bytes: u32) -> Option<OwnedSemaphorePermit> {
        let bytes = bytes.min(self.most_memory);
        let permits = Arc::clone(&self.memory).acquire_many_owned(bytes);
        permits.await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_tenant_that_takes_all_it_can_leaves_something_for_the_others() {
        let shares = Shares::new(8, 100, false);
        let name = |name: &str| name.parse::<TenantName>().unwrap();
        let greedy: Vec<_> = (0..8)
            .map_while(|_| shares.of(&name("a")).request().ok())
            .collect();
        assert_eq!(greedy.len(), 6);
        assert!(shares.of(&name("b")).request().is_ok());
        let all = shares.of(&name("a")).memory(1000).await.unwrap();
        assert_eq!(all.num_permits(), 75);
        drop(greedy);
        assert!(shares.of(&name("a")).request().is_ok());
    }

    #[tokio::test]
    async fn one_who_is_alone_has_everything() {
        let shares = Shares::new(1, 100, true);
        let share = shares.of(&"a".parse().unwrap());
        assert!(share.request().is_ok());
        assert_eq!(share.memory(1000).await.unwrap().num_permits(), 100);
    }
}
