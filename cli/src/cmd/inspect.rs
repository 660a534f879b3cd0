//! `lazyimg inspect`: needs no key, since chunk and pack tables are in clear.

use std::collections::{HashMap, HashSet};

use lazyimg_convergent::ChunkId;
use lazyimg_image::artifact;
use lazyimg_image::manifest::{BLOCK, Entry, Manifest};
use lazyimg_image::reference::ImageRef;
use lazyimg_image::source::ResolvedImage;
use serde::Serialize;

use crate::args::{Global, Inspect, Source};
use crate::exit::Error;
use crate::output::{self, bytes, percent};

#[derive(Debug, Serialize)]
struct Report {
    reference: String,
    image: String,
    platform: String,
    artifact: String,
    key_id: String,
    root: String,
    domain: String,
    epoch: u32,
    layers: Vec<Layer>,
    files: u64,
    file_bytes: u64,
    metadata: Space,
    data: Space,
    /// Ciphertext of all chunks, each once.
    stored_bytes: u64,
    /// Ciphertext of chunks, counted as often as they occur.
    total_stored_bytes: u64,
    packs: Vec<Pack>,
    manifest_bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    shared: Option<Shared>,
}

#[derive(Debug, Serialize)]
struct Layer {
    digest: String,
    media_type: String,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Pack {
    digest: String,
    bytes: u64,
}

/// A space of the image: metadata or data.
#[derive(Debug, Serialize)]
struct Space {
    bytes: u64,
    hole_bytes: u64,
    chunks: u64,
    unique_chunks: u64,
    unique_stored_bytes: u64,
}

/// What two images have in common.
#[derive(Debug, Serialize)]
struct Shared {
    with: String,
    /// Data chunks of this image that the other has too, each once.
    data_chunks: u64,
    /// Their ciphertext.
    data_stored_bytes: u64,
    /// Data chunks of the other image that this one lacks.
    missing_from_this: u64,
    /// Data chunks of this image that the other lacks.
    only_in_this: u64,
    /// Ciphertext of those.
    only_in_this_stored_bytes: u64,
    metadata_chunks: u64,
}

/// Runs the command.
pub fn run(global: &Global, args: &Inspect) -> Result<(), Error> {
    let reading = output::spinner(global, "reading the manifest");
    let (mut report, manifest) = super::block_on(load(&args.image, &args.source))?;
    if let Some(with) = &args.with {
        let (_, other) = super::block_on(load(with, &args.source))?;
        report.shared = Some(shared(with.to_string(), &manifest, &other));
    }
    reading.finish_and_clear();
    if args.json {
        output::json(&report)
    } else {
        output::data(&text(&report))
    }
}

async fn load(reference: &ImageRef, source: &Source) -> Result<(Report, Manifest), Error> {
    let repo = super::repository(reference, source)?;
    let image = repo.resolve(reference.target()).await?;
    let found = artifact::find(&repo, &image.digest, None).await?;
    let (manifest, manifest_bytes) = artifact::read_manifest(&repo, found.digest).await?;
    let key_id = lazyimg_convergent::seal::sealed_for(&manifest.sealed_keys)
        .map_or_else(|e| e.to_string(), |id| id.to_string());
    Ok((
        report(
            reference,
            &image,
            found.digest.to_string(),
            key_id,
            &manifest,
            manifest_bytes,
        ),
        manifest,
    ))
}

fn report(
    reference: &ImageRef,
    image: &ResolvedImage,
    artifact: String,
    key_id: String,
    m: &Manifest,
    manifest_bytes: usize,
) -> Report {
    let (metadata, data) = (space(&m.meta), space(&m.data));
    Report {
        reference: reference.to_string(),
        image: image.digest.to_string(),
        platform: image.platform.to_string(),
        artifact,
        key_id,
        root: m.root().to_string(),
        domain: m.header.domain.clone(),
        epoch: m.header.epoch,
        layers: image
            .layers
            .iter()
            .map(|l| Layer {
                digest: l.digest.to_string(),
                media_type: l.media_type.clone(),
                bytes: l.size,
            })
            .collect(),
        files: m.header.files,
        file_bytes: m.header.file_bytes,
        stored_bytes: stored(m.meta.iter().chain(&m.data)).values().sum(),
        total_stored_bytes: m.stored().map(|s| u64::from(s.len)).sum(),
        metadata,
        data,
        packs: m
            .packs
            .iter()
            .map(|p| Pack {
                digest: p.digest.to_string(),
                bytes: p.len,
            })
            .collect(),
        manifest_bytes,
        shared: None,
    }
}

/// The stored chunks, each once, with the length of their ciphertext.
fn stored<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> HashMap<ChunkId, u64> {
    entries
        .into_iter()
        .filter_map(|e| e.stored)
        .map(|s| (s.id, u64::from(s.len)))
        .collect()
}

fn space(entries: &[Entry]) -> Space {
    let unique = stored(entries);
    let len = |e: &Entry| u64::from(e.blocks) * BLOCK;
    Space {
        bytes: entries.iter().map(len).sum(),
        hole_bytes: entries.iter().filter(|e| e.stored.is_none()).map(len).sum(),
        chunks: entries.iter().filter(|e| e.stored.is_some()).count() as u64,
        unique_chunks: unique.len() as u64,
        unique_stored_bytes: unique.values().sum(),
    }
}

fn shared(with: String, this: &Manifest, other: &Manifest) -> Shared {
    let (mine, theirs) = (stored(&this.data), stored(&other.data));
    let common: Vec<_> = mine
        .iter()
        .filter(|(id, _)| theirs.contains_key(id))
        .collect();
    let meta: HashSet<_> = stored(&other.meta).into_keys().collect();
    Shared {
        with,
        data_chunks: common.len() as u64,
        data_stored_bytes: common.iter().map(|(_, len)| **len).sum(),
        missing_from_this: (theirs.len() - common.len()) as u64,
        only_in_this: (mine.len() - common.len()) as u64,
        only_in_this_stored_bytes: mine
            .iter()
            .filter(|(id, _)| !theirs.contains_key(id))
            .map(|(_, len)| len)
            .sum(),
        metadata_chunks: stored(&this.meta)
            .keys()
            .filter(|id| meta.contains(id))
            .count() as u64,
    }
}

fn text(r: &Report) -> String {
    let mut out = format!(
        "image      {}\n           {} ({})\nartifact   {}\nroot       {}\nkey        {}, domain {}, epoch {}\n",
        r.reference, r.image, r.platform, r.artifact, r.root, r.key_id, r.domain, r.epoch
    );
    for (n, layer) in r.layers.iter().enumerate() {
        out += &format!("layer {n:<4} {} {:>10}\n", layer.digest, bytes(layer.bytes));
    }
    out += &format!("files      {} with {}\n", r.files, bytes(r.file_bytes));
    for (name, s) in [("metadata", &r.metadata), ("data", &r.data)] {
        out += &format!(
            "{name:10} {} in {} chunks, {} of them unique, stored in {}; holes {}\n",
            bytes(s.bytes),
            s.chunks,
            s.unique_chunks,
            bytes(s.unique_stored_bytes),
            bytes(s.hole_bytes)
        );
    }
    out += &format!(
        "stored     {} ({} of the files' bytes) in {} packs; manifest {}\n           {} if no chunk were shared within the image\n",
        bytes(r.stored_bytes),
        percent(r.stored_bytes, r.file_bytes),
        r.packs.len(),
        bytes(r.manifest_bytes as u64),
        bytes(r.total_stored_bytes)
    );
    if let Some(s) = &r.shared {
        out += &format!(
            "shares     {} of {} data chunks ({}) with {}\n           {} data chunks ({}) are only in this image, {} only in the other\n",
            s.data_chunks,
            r.data.unique_chunks,
            bytes(s.data_stored_bytes),
            s.with,
            s.only_in_this,
            bytes(s.only_in_this_stored_bytes),
            s.missing_from_this
        );
    }
    out
}
