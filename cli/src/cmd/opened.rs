//! An image opened without a mount and without the host cache: for commands that read all of it.

use std::sync::Arc;

use lazyimg_chunkstore::{ImageStore, MountStats, OriginOptions, PackOrigin, Store, StoreOptions};
use lazyimg_convergent::TenantKey;
use lazyimg_fuse::opener::{REGISTRY_TIER, RepositoryBlobs};
use lazyimg_fuse::view::ImageView;
use lazyimg_image::artifact;
use lazyimg_image::reference::ImageRef;

use crate::args::Source;
use crate::exit::Error;

/// An image whose chunks come straight from its registry or layout.
pub struct OpenedImage {
    /// Its chunk tables.
    pub view: ImageView,
    /// Its chunks.
    pub store: ImageStore,
}

/// Opens an image.
///
/// # Errors
/// Not converted, not under this key, not reachable.
pub async fn open(
    reference: &ImageRef,
    source: &Source,
    tenant: &TenantKey,
) -> Result<OpenedImage, Error> {
    let repo = super::repository(reference, source)?;
    let opened = artifact::open(&repo, &reference.target(), tenant).await?;
    let view =
        ImageView::of_manifest(&opened.manifest).map_err(|e| Error::Damaged(e.to_string()))?;
    let blobs = Arc::new(RepositoryBlobs(repo));
    let origin = PackOrigin::new(REGISTRY_TIER, blobs, OriginOptions::default());
    let runtime = tokio::runtime::Handle::current();
    let store = Store::new(None, StoreOptions::default(), runtime)
        .image(vec![Arc::new(origin)], Arc::new(MountStats::new()));
    Ok(OpenedImage { view, store })
}
