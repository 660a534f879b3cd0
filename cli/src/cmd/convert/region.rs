//! A converted image into a regional store.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use lazyimg_chunkstore::Guards;
use lazyimg_chunkstore::remote::{
    RefCondition, StoreClient, StoreError, StoreErrorCode, StoreSettings,
};
use lazyimg_chunkstore::wire::{MAX_PROFILE, index_profile};
use lazyimg_convergent::{ChunkId, KeyId};
use lazyimg_image::convert::{Form, SpooledChunk};
use lazyimg_image::reference::{ImageRef, ManifestRef, RegistryRef};
use lazyimg_image::source::ResolvedImage;
use serde::Serialize;

use crate::args::{Global, Region};
use crate::exit::Error;
use crate::output;

/// Chunks on their way at once: the store syncs many together.
const UPLOADS: usize = 16;

/// Chunks that the store is asked about in one request.
const ASKED: usize = 4096;

/// How often a manifest is tried that the store says lacks chunks: another host may collect garbage
/// meanwhile.
const ROUNDS: usize = 5;

/// How long each request is tried while the store is away: it may be starting anew.
const PATIENCE: Duration = Duration::from_secs(60);

/// What was done.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Stored {
    /// Chunks that this tenant had not put before.
    pub uploaded_chunks: u64,
    /// Their ciphertext, in bytes.
    pub uploaded_bytes: u64,
}

/// The client of the store that is to have the image; `None` when none was named.
///
/// # Errors
/// Wrong settings.
pub fn client(region: &Region) -> Result<Option<StoreClient>, Error> {
    if region.store.is_empty() {
        return match region.store_only {
            true => Err(Error::Usage(
                "--store-only needs --store URL: the image would go nowhere".into(),
            )),
            false => Ok(None),
        };
    }
    let settings = StoreSettings {
        token_file: region.store_token_file.clone(),
        ca_file: region.store_ca.clone(),
        patience: PATIENCE,
        ..StoreSettings::new(region.store.clone())
    };
    Ok(Some(StoreClient::new(settings, &Guards::default())?))
}

/// Puts what the store lacks: chunks first, then the manifest, which makes the image live, then what
/// the image is called. Safe to repeat after a failure; what was put stays.
///
/// # Errors
/// What the store says.
pub async fn push(
    global: &Global,
    client: &StoreClient,
    form: &Form,
    image: &ResolvedImage,
    names: &[String],
) -> Result<Stored, Error> {
    let key = lazyimg_convergent::seal::sealed_for(&form.manifest.sealed_keys)
        .map_err(|e| Error::Other(e.to_string()))?;
    let chunks = form.chunks();
    let mut done = Stored::default();
    let mut wanted = missing(client, &chunks).await?;
    for round in 1.. {
        upload(global, client, form, &wanted, &mut done).await?;
        match publish(client, form, image, &key).await {
            Ok(()) => break,
            Err(StoreError::Refused {
                code: StoreErrorCode::Missing,
                chunks: lacking,
                ..
            }) if round < ROUNDS => {
                let lacking: std::collections::HashSet<ChunkId> = lacking.into_iter().collect();
                wanted = chunks
                    .iter()
                    .filter(|c| lacking.contains(&c.id))
                    .copied()
                    .collect();
            }
            Err(error) => return Err(error.into()),
        }
    }
    // What proves to others that the index's digest means this image. Larger ones are for the registry.
    if let Some(index) = &image.index
        && index.bytes.len() <= MAX_PROFILE
    {
        let name = index_profile(&index.digest);
        let put = client.put_profile(&image.digest, &name, index.bytes.clone());
        match put.await {
            // One image may be named by more indexes than are kept: the registry knows the others.
            Err(error) if error.code() == Some(StoreErrorCode::Conflict) => {
                tracing::warn!(index = %index.digest, %error, "the store does not keep this index");
            }
            done => done?,
        }
    }
    for name in names {
        let put = client.put_ref(name, &image.digest, &RefCondition::Always);
        put.await?;
    }
    Ok(done)
}

/// What a store is to know the image by: its reference, and the exact ones behind it.
pub fn names(reference: &ImageRef, platform: &str, image: &ResolvedImage) -> Vec<String> {
    let ImageRef::Registry(registry) = reference else {
        return Vec::new();
    };
    let exact = image.index_digest.iter().chain([&image.digest]);
    let exact = exact.map(|digest| RegistryRef {
        tag: None,
        digest: Some(*digest),
        ..registry.clone()
    });
    let mut names: Vec<_> = std::iter::once(registry.clone())
        .chain(exact)
        .map(|r| r.store_name(platform))
        .collect();
    names.dedup();
    if matches!(registry.target(), ManifestRef::Digest(_)) {
        names.sort();
        names.dedup();
    }
    names
}

async fn missing(
    client: &StoreClient,
    chunks: &[SpooledChunk],
) -> Result<Vec<SpooledChunk>, Error> {
    let mut missing = Vec::new();
    for batch in chunks.chunks(ASKED) {
        let ids: Vec<ChunkId> = batch.iter().map(|c| c.id).collect();
        let has = client.has(&ids).await?;
        let lacking = batch.iter().zip(has).filter(|(_, has)| !has);
        missing.extend(lacking.map(|(chunk, _)| *chunk));
    }
    Ok(missing)
}

async fn upload(
    global: &Global,
    client: &StoreClient,
    form: &Form,
    chunks: &[SpooledChunk],
    done: &mut Stored,
) -> Result<(), Error> {
    let total = chunks.iter().map(|c| u64::from(c.len)).sum();
    let bar = output::byte_bar(global, total, "storing");
    let spool = Arc::new(form.spool.try_clone().map_err(Error::io("working file"))?);
    let puts = chunks.iter().map(|chunk| {
        let (spool, bar, chunk) = (Arc::clone(&spool), bar.clone(), *chunk);
        async move {
            let bytes = tokio::task::spawn_blocking(move || {
                let mut bytes = vec![0; chunk.len as usize];
                spool.read_exact_at(&mut bytes, chunk.at).map(|()| bytes)
            });
            let bytes = bytes.await.map_err(|e| Error::Other(e.to_string()))?;
            let bytes = bytes.map_err(Error::io("working file"))?;
            client.put(&chunk.id, Bytes::from(bytes), false).await?;
            bar.inc(u64::from(chunk.len));
            Ok::<_, Error>(chunk.len)
        }
    });
    let mut puts = stream::iter(puts).buffer_unordered(UPLOADS);
    while let Some(len) = puts.try_next().await? {
        done.uploaded_chunks += 1;
        done.uploaded_bytes += u64::from(len);
    }
    bar.finish_and_clear();
    Ok(())
}

async fn publish(
    client: &StoreClient,
    form: &Form,
    image: &ResolvedImage,
    key: &KeyId,
) -> Result<(), StoreError> {
    let manifest = Bytes::from(form.manifest.to_bytes());
    let put = client.put_manifest(&image.digest, key, manifest);
    put.await.map(|_| ())
}
