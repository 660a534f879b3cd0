//! Locks by name, of this process only: they keep what is counted right, not what is kept.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

type Lock = Arc<tokio::sync::Mutex<()>>;

/// A lock for each key that somebody holds or waits for.
#[derive(Debug)]
pub(super) struct Locks<K> {
    locks: Mutex<HashMap<K, Lock>>,
}

impl<K> Default for Locks<K> {
    fn default() -> Self {
        Self {
            locks: Mutex::default(),
        }
    }
}

impl<K: Clone + Eq + Hash> Locks<K> {
    /// Waits until nobody else holds the lock of `key`.
    pub async fn lock(&self, key: K) -> Locked<'_, K> {
        let lock = self.locks.lock().entry(key.clone()).or_default().clone();
        // Before it is waited for: who stops waiting leaves nothing behind.
        let mut locked = Locked {
            of: self,
            key,
            guard: None,
        };
        locked.guard = Some(lock.lock_owned().await);
        locked
    }
}

/// A lock that is held until this is dropped.
#[derive(Debug)]
pub(super) struct Locked<'a, K: Clone + Eq + Hash> {
    of: &'a Locks<K>,
    key: K,
    guard: Option<OwnedMutexGuard<()>>,
}

impl<K: Clone + Eq + Hash> Drop for Locked<'_, K> {
    fn drop(&mut self) {
        self.guard = None;
        let mut locks = self.of.locks.lock();
        // It is cloned under this lock only: with one reference nobody else has it.
        if locks
            .get(&self.key)
            .is_some_and(|lock| Arc::strong_count(lock) == 1)
        {
            locks.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn one_key_is_held_by_one_another_by_another_and_none_is_left_over() {
        let locks = Locks::default();
        let first = locks.lock("a").await;
        let _other = locks.lock("b").await;
        let second = || tokio::time::timeout(Duration::from_secs(1), locks.lock("a"));
        assert!(second().await.is_err(), "it is held");
        drop(first);
        drop(second().await.unwrap());
        assert_eq!(locks.locks.lock().len(), 1);
    }
}
