//! `lazyimg convert`.

mod region;

use std::time::Instant;

use indicatif::ProgressBar;
use lazyimg_image::artifact::{self, PushEvent};
use lazyimg_image::convert::{self, ConvertEvent, ConvertOptions, Form};
use lazyimg_image::limits::Limits;
use lazyimg_image::platform::Platform;
use lazyimg_image::reference::ImageRef;
use lazyimg_image::source::{Descriptor, Repository, ResolvedImage};
use serde::Serialize;

use crate::args::{Convert, Global, LimitFlags};
use crate::exit::Error;
use crate::output::{self, bytes};
use crate::secrets;
use region::Stored;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// Digest of the image manifest.
    image: String,
    /// Digest of the artifact in the registry; absent with `--store-only`.
    artifact: Option<String>,
    /// Digest of header and chunk table.
    root: String,
    layers: usize,
    /// Names of all kinds.
    inodes: u64,
    files: u64,
    /// Bytes in files, holes included.
    file_bytes: u64,
    /// Length of the EROFS metadata.
    metadata_bytes: u64,
    /// Chunks of the image, each once.
    chunks: u64,
    /// Ciphertext of those chunks.
    stored_bytes: u64,
    packs: usize,
    uploaded_packs: usize,
    uploaded_chunks: u64,
    uploaded_bytes: u64,
    manifest_bytes: u64,
    /// What the regional store got; absent without one.
    store: Option<Stored>,
    seconds: f64,
}

/// Runs the command.
pub fn run(global: &Global, args: &Convert) -> Result<(), Error> {
    let started = Instant::now();
    let salt = secrets::salt(&args.salt)?;
    let tenant = secrets::tenant(&args.key)?.tenant_key()?;
    let options = ConvertOptions {
        salt,
        domain: args.salt.domain.clone(),
        epoch: args.salt.epoch,
        level: args.level,
        threads: args.threads.map_or_else(cores, usize::from),
        limits: limits(&args.limits),
        work_dir: args.work_dir.clone().unwrap_or_else(work_dir),
    };
    let store = region::client(&args.region)?;
    let repo = super::repository(&args.image, &args.source)?;
    let (image, form, pushed, stored) = super::block_on(async {
        let looking = output::spinner(global, "looking the image up");
        let image = repo.resolve(args.image.target()).await?;
        looking.finish_and_clear();
        let form = build(global, &repo, &image, tenant, options).await?;
        // The store first: what the registry tells hosts of, they find in both.
        let stored = match &store {
            Some(client) => {
                let platform = args.source.platform.clone().unwrap_or_else(Platform::host);
                let names = region::names(&args.image, &platform.to_string(), &image);
                Some(region::push(global, client, &form, &image, &names).await?)
            }
            None => None,
        };
        if args.region.store_only {
            return Ok::<_, Error>((image, form, None, stored));
        }
        let subject = Descriptor::new(&image.media_type, image.digest, image.manifest_size);
        let tag = tag(&args.image).filter(|_| !args.no_tag);
        let bar = output::byte_bar(global, 0, "pushing");
        let event = |e| match e {
            PushEvent::Total(n) => bar.set_length(n),
            PushEvent::Done(n) => bar.inc(n),
        };
        let pushed = artifact::push(&repo, &form, subject, tag.as_deref(), &event).await?;
        bar.finish_and_clear();
        Ok((image, form, Some(pushed), stored))
    })?;
    let seconds = started.elapsed().as_secs_f64();
    let report = report(&image, &form, pushed.as_ref(), stored, seconds);
    if args.json {
        return output::json(&report);
    }
    output::say(global, &summary(&args.image, &report));
    output::data(report.artifact.as_ref().unwrap_or(&report.image))
}

async fn build(
    global: &Global,
    repo: &Repository,
    image: &ResolvedImage,
    tenant: lazyimg_convergent::TenantKey,
    options: ConvertOptions,
) -> Result<Form, Error> {
    let total = image.layers.iter().map(|l| l.size).sum();
    let bar = output::byte_bar(global, total, "converting");
    let progress = Progress(bar.clone());
    let runtime = tokio::runtime::Handle::current();
    let (repo, image) = (repo.clone(), image.clone());
    let converted = tokio::task::spawn_blocking(move || {
        let open = |layer: &lazyimg_image::source::LayerDescriptor| {
            let stream = runtime.block_on(repo.blob_stream(&layer.digest, layer.size))?;
            Ok(stream.into_read(runtime.clone()))
        };
        convert::convert(&image, open, &tenant, &options, &|e| progress.event(e))
    })
    .await
    .map_err(|e| Error::Other(format!("the conversion ended abnormally: {e}")))?;
    bar.finish_and_clear();
    Ok(converted?)
}

/// What a conversion tells, on a bar.
struct Progress(ProgressBar);

impl Progress {
    fn event(&self, event: ConvertEvent<'_>) {
        match event {
            ConvertEvent::Layer(n, of, _) => {
                self.0.set_message(format!("layer {} of {of}", n + 1));
            }
            ConvertEvent::Read(n) => self.0.inc(n),
            // Metadata is encoded and packs are hashed: that takes a while with large images.
            ConvertEvent::Finishing => {
                output::to_spinner(self.0.clone(), "encoding metadata, hashing packs");
            }
        }
    }
}

fn report(
    image: &ResolvedImage,
    form: &Form,
    pushed: Option<&artifact::Pushed>,
    store: Option<Stored>,
    seconds: f64,
) -> Report {
    let manifest = &form.manifest;
    let mut seen = std::collections::HashSet::new();
    let stored_bytes = manifest
        .stored()
        .filter(|s| seen.insert(s.id))
        .map(|s| u64::from(s.len))
        .sum();
    Report {
        image: image.digest.to_string(),
        artifact: pushed.map(|p| p.artifact.to_string()),
        root: manifest.root().to_string(),
        layers: image.layers.len(),
        inodes: form.inodes,
        files: manifest.header.files,
        file_bytes: manifest.header.file_bytes,
        metadata_bytes: manifest.header.meta_len,
        chunks: seen.len() as u64,
        stored_bytes,
        packs: manifest.packs.len(),
        uploaded_packs: pushed.map_or(0, |p| p.uploaded_packs),
        uploaded_chunks: pushed.map_or(0, |p| p.uploaded_chunks),
        uploaded_bytes: pushed.map_or(0, |p| p.uploaded_bytes),
        manifest_bytes: manifest.to_bytes().len() as u64,
        store,
        seconds,
    }
}

fn summary(image: &ImageRef, r: &Report) -> String {
    let upload = match r.uploaded_chunks {
        0 => "no chunk was new".to_owned(),
        n => format!("{n} new chunks, {}", bytes(r.uploaded_bytes)),
    };
    let upload = match &r.artifact {
        Some(_) => format!("; uploaded: {upload}"),
        None => String::new(),
    };
    let stored = r
        .store
        .map_or_else(String::new, |s| match s.uploaded_chunks {
            0 => "; the store had every chunk".to_owned(),
            n => format!("; stored: {n} chunks, {}", bytes(s.uploaded_bytes)),
        });
    format!(
        "converted {image}: {} layers, {} files, {} in {} chunks of {}{upload}{stored}; {:.1} s",
        r.layers,
        r.files,
        bytes(r.file_bytes),
        r.chunks,
        bytes(r.stored_bytes),
        r.seconds
    )
}

/// The tag that the image was named by; an OCI layout's too.
fn tag(image: &ImageRef) -> Option<String> {
    match image.target() {
        lazyimg_image::reference::ManifestRef::Tag(tag) => Some(tag),
        _ => None,
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Working files are as large as images: `/tmp` is often memory, `/var/tmp` is not.
fn work_dir() -> std::path::PathBuf {
    std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), Into::into)
}

fn limits(flags: &LimitFlags) -> Limits {
    let d = Limits::default();
    Limits {
        layer_bytes: flags.max_layer_bytes.unwrap_or(d.layer_bytes),
        image_bytes: flags.max_image_bytes.unwrap_or(d.image_bytes),
        file_bytes: flags.max_file_bytes.unwrap_or(d.file_bytes),
        entries_per_image: flags.max_entries.unwrap_or(d.entries_per_image),
        metadata_bytes: flags.max_metadata_bytes.unwrap_or(d.metadata_bytes),
        layers: flags.max_layers.unwrap_or(d.layers),
        path_depth: flags.max_path_depth.unwrap_or(d.path_depth),
        resolve_steps: flags.max_resolve_steps.unwrap_or(d.resolve_steps),
        xattr_bytes_per_entry: flags.max_xattr_bytes.unwrap_or(d.xattr_bytes_per_entry),
        xattr_count_per_entry: flags.max_xattr_count.unwrap_or(d.xattr_count_per_entry),
        pax_bytes: flags.max_pax_bytes.unwrap_or(d.pax_bytes),
        sparse_extents: flags.max_sparse_extents.unwrap_or(d.sparse_extents),
        compression_ratio: flags.max_compression_ratio.unwrap_or(d.compression_ratio),
        compression_slack_bytes: flags
            .max_compression_slack_bytes
            .unwrap_or(d.compression_slack_bytes),
        zstd_window_log: flags.max_zstd_window_log.unwrap_or(d.zstd_window_log),
        ..d
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_stays_while_metadata_is_encoded_and_packs_are_hashed() {
        let bar = ProgressBar::hidden();
        let progress = Progress(bar.clone());
        progress.event(ConvertEvent::Read(1));
        progress.event(ConvertEvent::Finishing);
        assert!(!bar.is_finished());
        assert!(bar.message().contains("packs"), "{}", bar.message());
    }
}
