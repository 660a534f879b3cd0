//! What the store holds, counted on demand.

use crate::engine::RootId;

use super::images::parse_name;
use super::names;
use super::types::{RootStats, Stats, TenantStats};
use super::{Catalog, CatalogError, MAX_COUNTED};

/// Chunks or documents that are listed at once.
const PAGE: usize = 1000;

impl Catalog {
    /// What the store holds. It lists every chunk, up to a bound: for people who ask, not for a
    /// scrape.
    ///
    /// # Errors
    /// [`CatalogError::Engine`], [`CatalogError::Damaged`].
    pub async fn stats(&self) -> Result<Stats, CatalogError> {
        let view = self.fresh_view().await?;
        let mut roots = Vec::new();
        for root in view.all() {
            let mut stats = RootStats {
                info: self.root_info(root).await?,
                chunks: 0,
                chunk_bytes: 0,
                counted_all: true,
                images: 0,
            };
            self.count_chunks(root.id, &mut stats).await?;
            self.count_images(root.id, &mut stats).await?;
            roots.push(stats);
        }
        let mut used = Vec::new();
        for tenant in self.all_tenants(&view).await? {
            let bytes = self.used_bytes(&view, &tenant).await?;
            used.push(TenantStats { tenant, bytes });
        }
        Ok(Stats {
            engine: self.engine.name().to_owned(),
            engine_bytes: self.engine.used_bytes().await?,
            roots,
            tenants: used,
        })
    }

    async fn count_chunks(&self, root: RootId, stats: &mut RootStats) -> Result<(), CatalogError> {
        let mut after = None;
        loop {
            let page = self.engine.list_chunks(root, after.as_ref(), PAGE).await?;
            stats.chunks += page.len() as u64;
            stats.chunk_bytes += page.iter().map(|(_, len)| u64::from(*len)).sum::<u64>();
            if page.len() < PAGE {
                return Ok(());
            }
            if stats.chunks >= MAX_COUNTED {
                stats.counted_all = false;
                return Ok(());
            }
            after = page.last().map(|(id, _)| *id);
        }
    }

    async fn count_images(&self, root: RootId, stats: &mut RootStats) -> Result<(), CatalogError> {
        let prefix = names::manifests(root);
        let mut after: Option<String> = None;
        let mut last = None;
        loop {
            let page = self
                .engine
                .list_docs(&prefix, after.as_deref(), PAGE)
                .await?;
            for name in &page {
                let name = parse_name(name.clone())?;
                let image = Some((name.tenant, name.image));
                if image != last {
                    stats.images += 1;
                    last = image;
                }
            }
            if page.len() < PAGE {
                return Ok(());
            }
            if stats.images >= MAX_COUNTED {
                stats.counted_all = false;
                return Ok(());
            }
            after = page.last().cloned();
        }
    }
}
