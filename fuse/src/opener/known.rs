//! Images that are mounted or about to be: what was fetched for one mount serves the next one.
//!
//! Two hundred mounts of one image that come at once open it once. One that comes later asks only
//! what its tag means now, while another mount still holds the image's tables.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Weak};

use lazyimg_chunkstore::Tier;
use lazyimg_convergent::{Digest, KeyId};
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::{OpenError, OpenedImage};
use crate::protocol::{MountRequest, SourceSettings};
use crate::view::ImageView;

/// What must be equal for two requests to be answered by one opening.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OpenKey {
    image: String,
    /// Whose credentials are used decides who may see it.
    source: SourceSettings,
    tenant: KeyId,
}

impl OpenKey {
    /// Of a request under this tenant key.
    pub fn of(request: &MountRequest, tenant: KeyId) -> Self {
        Self {
            image: request.image.clone(),
            source: request.source.clone(),
            tenant,
        }
    }
}

/// An image that a mount holds.
pub struct KnownImage {
    /// Digest of the image.
    pub image: Digest,
    /// Its chunk tables.
    pub view: Arc<ImageView>,
    /// Where its chunks come from.
    pub tiers: Vec<Arc<dyn Tier>>,
}

impl KnownImage {
    /// For one more mount of it.
    pub fn opened(&self) -> OpenedImage {
        OpenedImage {
            view: Arc::clone(&self.view),
            tiers: self.tiers.clone(),
            early: Vec::new(),
        }
    }
}

/// What is remembered of a [`KnownImage`]; the tables only while a mount holds them.
struct Remembered {
    view: Weak<ImageView>,
    tiers: Vec<Weak<dyn Tier>>,
}

type Outcome = Result<OpenedImage, OpenError>;

/// Openings under way, and images that are mounted.
#[derive(Default)]
pub struct Known {
    under_way: Mutex<HashMap<OpenKey, Weak<OnceCell<Outcome>>>>,
    mounted: Mutex<HashMap<OpenKey, Remembered>>,
}

impl Known {
    /// Runs `open`, or waits for the same one that somebody else runs. One that fails has failed for
    /// all who waited; whoever comes afterwards tries again.
    pub async fn share(&self, key: &OpenKey, open: impl Future<Output = Outcome>) -> Outcome {
        let cell = self.join(key);
        // A runner that is cancelled hands over to one of those who wait.
        let outcome = cell.get_or_init(|| open).await.clone();
        if let Ok(opened) = &outcome {
            self.remember(key, opened);
        }
        self.leave(key, cell);
        outcome
    }

    fn join(&self, key: &OpenKey) -> Arc<OnceCell<Outcome>> {
        let mut under_way = self.under_way.lock();
        // One that has its outcome belongs to those who asked before.
        let open = under_way.get(key).and_then(Weak::upgrade);
        if let Some(cell) = open.filter(|cell| !cell.initialized()) {
            return cell;
        }
        let cell = Arc::new(OnceCell::new());
        under_way.insert(key.clone(), Arc::downgrade(&cell));
        cell
    }

    fn leave(&self, key: &OpenKey, cell: Arc<OnceCell<Outcome>>) {
        let mut under_way = self.under_way.lock();
        let ours = Arc::downgrade(&cell);
        drop(cell);
        if ours.strong_count() == 0 && under_way.get(key).is_some_and(|c| c.ptr_eq(&ours)) {
            under_way.remove(key);
        }
    }

    fn remember(&self, key: &OpenKey, opened: &OpenedImage) {
        let mut mounted = self.mounted.lock();
        mounted.retain(|_, image| image.view.strong_count() > 0);
        let remembered = Remembered {
            view: Arc::downgrade(&opened.view),
            tiers: opened.tiers.iter().map(Arc::downgrade).collect(),
        };
        mounted.insert(key.clone(), remembered);
    }

    /// The image that a mount holds under this key. Its tag may mean another one by now.
    pub fn mounted(&self, key: &OpenKey) -> Option<KnownImage> {
        let mounted = self.mounted.lock();
        let remembered = mounted.get(key)?;
        let view = remembered.view.upgrade()?;
        let tiers = remembered.tiers.iter().map(Weak::upgrade);
        let tiers = tiers.collect::<Option<Vec<_>>>()?;
        Some(KnownImage {
            image: view.image,
            view,
            tiers,
        })
    }

    /// Whether a mount holds an image that was asked for by this name.
    pub fn is_mounted(&self, image: &str) -> bool {
        let mounted = self.mounted.lock();
        mounted
            .iter()
            .any(|(key, held)| key.image == image && held.view.strong_count() > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use lazyimg_chunkstore::ChunkSpec;

    use super::*;
    use crate::protocol::{ErrorCode, KeySource, WirePath};
    use crate::view::Extent;

    fn key(image: &str) -> OpenKey {
        let request = MountRequest {
            image: image.to_owned(),
            dir: WirePath("/m".into()),
            namespace: String::new(),
            key: KeySource::Command("true".to_owned()),
            source: SourceSettings::default(),
            cache: Default::default(),
            flags: Default::default(),
            tree: Default::default(),
        };
        OpenKey::of(&request, KeyId([1; 8]))
    }

    fn opened() -> OpenedImage {
        let spec = ChunkSpec {
            chunk: lazyimg_chunkstore::ChunkRef {
                id: Default::default(),
                stored_len: 4096,
                at: None,
            },
            key: lazyimg_convergent::ChunkKey::from_bytes([0; 32]),
            plain_len: 4096,
        };
        let meta = Extent {
            start: 0,
            len: 4096,
            spec: Some(spec),
        };
        let view = ImageView::new(vec![meta], vec![], Digest([7; 32]), false).unwrap();
        OpenedImage {
            view: Arc::new(view),
            tiers: Vec::new(),
            early: Vec::new(),
        }
    }

    fn failed() -> OpenError {
        OpenError {
            code: ErrorCode::Unreachable,
            message: "down".to_owned(),
        }
    }

    #[tokio::test]
    async fn mounts_that_come_at_once_open_an_image_once() {
        let (known, opens) = (Known::default(), AtomicUsize::new(0));
        let key = key("r/x:1");
        let open = || async {
            opens.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(20)).await;
            Ok(opened())
        };
        let all = (0..50).map(|_| known.share(&key, open()));
        let all = futures_util::future::join_all(all).await;
        let first = all[0].as_ref().unwrap();
        for one in &all {
            assert!(Arc::ptr_eq(&one.as_ref().unwrap().view, &first.view));
        }
        assert_eq!(opens.load(Ordering::SeqCst), 1);
        assert!(known.under_way.lock().is_empty());
    }

    #[tokio::test]
    async fn a_failure_is_not_remembered_and_a_runner_who_leaves_strands_nobody() {
        let known = Known::default();
        let key = key("r/x:1");
        assert!(known.share(&key, async { Err(failed()) }).await.is_err());
        let stuck = known.share(&key, std::future::pending());
        let waits = known.share(&key, async { Ok(opened()) });
        let (stuck, waits) = tokio::join!(
            tokio::time::timeout(Duration::from_millis(20), stuck),
            waits
        );
        assert!(stuck.is_err() && waits.is_ok());
    }

    #[tokio::test]
    async fn tables_are_remembered_as_long_as_a_mount_holds_them() {
        let known = Known::default();
        let (one, other) = (key("r/x:1"), key("r/y:1"));
        let held = known.share(&one, async { Ok(opened()) }).await.unwrap();
        assert!(Arc::ptr_eq(&known.mounted(&one).unwrap().view, &held.view));
        assert!(known.mounted(&other).is_none() && known.is_mounted("r/x:1"));
        drop(held);
        assert!(known.mounted(&one).is_none() && !known.is_mounted("r/x:1"));
    }
}
