//! `lazyimg export`: the image as files that the kernel and erofs-utils read.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use lazyimg_chunkstore::{ChunkSpec, ImageStore};
use lazyimg_fuse::view::Extent;
use rustix::fs::{FlockOperation, flock};

use crate::args::{Export, Global};
use crate::cmd::opened;
use crate::exit::Error;
use crate::{output, secrets};

/// Plaintext that is in memory at once, in bytes: one request's worth.
const BATCH_LEN: u64 = 16 << 20;

/// What follows a file's name while it is not complete.
const PARTIAL: &str = ".partial";

/// Runs the command.
pub fn run(global: &Global, args: &Export) -> Result<(), Error> {
    let tenant = secrets::tenant(&args.key)?.existing_tenant_key()?;
    super::block_on(async {
        let opening = output::spinner(global, "opening the image");
        let image = opened::open(&args.image, &args.source, &tenant).await?;
        opening.finish_and_clear();
        let view = &image.view;
        let mut spaces = vec![("meta.erofs", view.meta(), view.meta_len())];
        if !args.metadata_only {
            spaces.push(("data.blob", view.data(), view.data_len()));
        }
        std::fs::create_dir_all(&args.dir).map_err(Error::io(args.dir.display().to_string()))?;
        let total = spaces.iter().map(|(_, _, len)| len).sum();
        let bar = output::byte_bar(global, total, "exporting");
        let mut written = Vec::new();
        for (name, extents, len) in spaces {
            let aside = Aside::create(&args.dir, name, len)?;
            write(&image.store, extents, &aside.file, &bar).await?;
            written.push(aside);
        }
        // Both are complete: only now they take their names, so that they belong together.
        written.into_iter().try_for_each(Aside::keep)?;
        bar.finish_and_clear();
        Ok(())
    })
}

/// A file under another name until it is complete; gone when it is not kept.
struct Aside {
    file: File,
    path: PathBuf,
    partial: PathBuf,
}

impl Aside {
    fn create(dir: &Path, name: &str, len: u64) -> Result<Self, Error> {
        let partial = dir.join(format!("{name}{PARTIAL}"));
        let failed = || Error::io(partial.display().to_string());
        let mut options = OpenOptions::new();
        // What a killed export left is written anew, what another one writes is let be.
        let file = options.write(true).create(true).truncate(false);
        let file = file.open(&partial).map_err(failed())?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Error::Other(format!(
                "{}: another export is writing it; wait for that, or choose another directory",
                partial.display()
            ))
        })?;
        let aside = Self {
            file,
            path: dir.join(name),
            partial: partial.clone(),
        };
        let sized = aside.file.set_len(0).and_then(|()| aside.file.set_len(len));
        sized.map_err(failed())?;
        Ok(aside)
    }

    fn keep(self) -> Result<(), Error> {
        std::fs::rename(&self.partial, &self.path)
            .map_err(Error::io(self.path.display().to_string()))
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // After `keep` there is nothing of this name.
        let _ = std::fs::remove_file(&self.partial);
    }
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
        let plain = plain?;
        file.write_all_at(&plain, start)
            .map_err(Error::io("writing the exported image"))?;
        bar.inc(plain.len() as u64);
    }
    Ok(())
}
