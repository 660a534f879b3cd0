//! `lazyimg export`: the image as files that the kernel and erofs-utils read.

use std::fs::File;
use std::os::unix::fs::FileExt;

use lazyimg_chunkstore::{ChunkSpec, ImageStore};
use lazyimg_fuse::view::Extent;

use crate::args::{Export, Global};
use crate::cmd::opened;
use crate::exit::Error;
use crate::{output, secrets};

/// Plaintext that is in memory at once, in bytes: one request's worth.
const BATCH_LEN: u64 = 16 << 20;

/// Runs the command.
pub fn run(global: &Global, args: &Export) -> Result<(), Error> {
    let tenant = secrets::tenant(&args.key)?.existing_tenant_key()?;
    std::fs::create_dir_all(&args.dir).map_err(Error::io(args.dir.display().to_string()))?;
    super::block_on(async {
        let image = opened::open(&args.image, &args.source, &tenant).await?;
        let view = &image.view;
        let total = view.meta_len()
            + if args.metadata_only {
                0
            } else {
                view.data_len()
            };
        let bar = output::byte_bar(global, total, "exporting");
        let space = |name: &str, len| {
            let path = args.dir.join(name);
            let file = File::create(&path).and_then(|f| f.set_len(len).map(|()| f));
            file.map_err(Error::io(path.display().to_string()))
        };
        let meta = space("meta.erofs", view.meta_len())?;
        write(&image.store, view.meta(), &meta, &bar).await?;
        if !args.metadata_only {
            let data = space("data.blob", view.data_len())?;
            write(&image.store, view.data(), &data, &bar).await?;
        }
        bar.finish_and_clear();
        Ok(())
    })
}

/// Writes the stored chunks of a space; holes stay holes.
async fn write(
    store: &ImageStore,
    extents: &[Extent],
    file: &File,
    bar: &indicatif::ProgressBar,
) -> Result<(), Error> {
    let mut batch: Vec<(u64, ChunkSpec)> = Vec::new();
    let mut len = 0;
    for extent in extents {
        match &extent.spec {
            Some(spec) => {
                batch.push((extent.start, spec.clone()));
                len += extent.len;
            }
            None => bar.inc(extent.len),
        }
        if len >= BATCH_LEN {
            write_batch(store, std::mem::take(&mut batch), file, bar).await?;
            len = 0;
        }
    }
    write_batch(store, batch, file, bar).await
}

async fn write_batch(
    store: &ImageStore,
    batch: Vec<(u64, ChunkSpec)>,
    file: &File,
    bar: &indicatif::ProgressBar,
) -> Result<(), Error> {
    let (starts, specs): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
    for (start, plain) in starts.into_iter().zip(store.read_many(&specs).await) {
        let plain = plain.map_err(|e| Error::Other(e.to_string()))?;
        file.write_all_at(&plain, start)
            .map_err(Error::io("writing the exported image"))?;
        bar.inc(plain.len() as u64);
    }
    Ok(())
}
