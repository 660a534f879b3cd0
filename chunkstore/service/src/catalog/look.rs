//! Looking for something in one root after the other, while roots change and things move.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::images::TRIES;
use super::names::{self, Mark};
use super::roots::View;
use super::{Catalog, CatalogError};

/// A look that takes less was not held up, whatever the options say.
const SHORTEST_SETTLE: Duration = Duration::from_secs(1);

/// Somebody who looks for something in the roots of a view.
#[derive(Debug)]
pub(super) struct Look {
    /// Where to look now.
    pub view: Arc<View>,
    began: Instant,
    looks: usize,
}

impl Catalog {
    /// Begins to look.
    pub(super) async fn look(&self) -> Result<Look, CatalogError> {
        Ok(Look {
            view: self.view().await?,
            began: Instant::now(),
            looks: 1,
        })
    }

    /// Whether to look once more, for who did not find it: true with the roots to look in. There are
    /// such when another instance has made, and may have filled, a newer root meanwhile; or when the
    /// look took so long that what was looked for may have been moved behind its back and its old root
    /// deleted: then that root's state is another one than it was.
    ///
    /// # Errors
    /// [`CatalogError::RootsMove`] when that goes on and on; [`CatalogError::Engine`].
    pub(super) async fn look_again(&self, look: &mut Look) -> Result<bool, CatalogError> {
        let Some(newer) = self.newer_view(look).await? else {
            return Ok(false);
        };
        if look.looks >= TRIES {
            return Err(CatalogError::RootsMove);
        }
        *look = Look {
            view: newer,
            began: Instant::now(),
            looks: look.looks + 1,
        };
        Ok(true)
    }

    async fn newer_view(&self, look: &Look) -> Result<Option<Arc<View>>, CatalogError> {
        let view = &look.view;
        // With no time at all every look would be a late one.
        if look.began.elapsed() >= self.options.settle.max(SHORTEST_SETTLE) {
            let fresh = self.fresh_view().await?;
            return Ok(Some(fresh).filter(|fresh| !fresh.has_same_roots(view)));
        }
        let active = view.active()?;
        let known = self.last_view();
        if known.active()? > active {
            return Ok(Some(known));
        }
        let Some(next) = active.next().filter(|_| !self.exclusive()) else {
            return Ok(None);
        };
        match self.has_doc(names::mark(next, Mark::Active)).await? {
            true => Ok(Some(self.fresh_view().await?)),
            false => Ok(None),
        }
    }
}
