//! Tenants, chunks, and images made of them; and what `lazyimg convert` does with them.

use std::collections::BTreeSet;

use bytes::Bytes;
use lazyimg_convergent::{ChunkId, ChunkKey, Digest, KeyId, TenantKey};
use lazyimg_image::manifest::{BLOCK, Entry, Header, Manifest, Pack, Stored};
use lazyimg_store::catalog::{Catalog, CatalogError, ManifestPut, TenantName};

pub const TENANTS: usize = 2;
pub const IMAGES: usize = 3;
pub const CHUNKS: usize = 7;

pub fn chunk(n: usize) -> Bytes {
    Bytes::from(vec![n as u8 + 1; 100 + n])
}

pub fn chunk_id(n: usize) -> ChunkId {
    ChunkId::of(&chunk(n))
}

pub fn tenant(n: usize) -> TenantName {
    format!("tenant-{n}").parse().unwrap()
}

pub fn image(n: usize) -> Digest {
    Digest([n as u8 + 1; 32])
}

pub fn tenant_key() -> TenantKey {
    TenantKey::from_bytes([5; 32])
}

pub fn key() -> KeyId {
    tenant_key().id()
}

/// The manifest of an image that consists of these chunks.
pub fn manifest(of: usize, chunks: &BTreeSet<usize>) -> Bytes {
    let entry = |n: &usize| Entry {
        blocks: 1,
        stored: Some(Stored {
            id: chunk_id(*n),
            len: chunk(*n).len() as u32,
            pack: 0,
            offset: 0,
        }),
    };
    let entries: Vec<Entry> = chunks.iter().map(entry).collect();
    let mut manifest = Manifest {
        header: Header {
            meta_len: BLOCK,
            data_len: BLOCK * (entries.len() as u64 - 1),
            image: image(of),
            has_xattrs: false,
            files: 1,
            file_bytes: 1,
            salt_id: [0; 16],
            epoch: 1,
            domain: "default".to_owned(),
        },
        meta: entries[..1].to_vec(),
        data: entries[1..].to_vec(),
        packs: vec![Pack {
            digest: Digest([7; 32]),
            len: 10_000,
        }],
        sealed_keys: Vec::new(),
    };
    let keys = vec![ChunkKey::from_bytes([1; 32]); chunks.len()];
    manifest.seal_keys(&tenant_key(), keys.iter());
    manifest.to_bytes().into()
}

/// What `lazyimg convert` does: brings what the store has not, then the manifest. False: refused.
pub async fn convert(
    catalog: &Catalog,
    t: usize,
    i: usize,
    chunks: &BTreeSet<usize>,
    partial: bool,
) -> Result<bool, CatalogError> {
    let tenant = tenant(t);
    let mut wanted: Vec<usize> = chunks.iter().copied().collect();
    if partial {
        wanted.pop();
    }
    let ids: Vec<ChunkId> = wanted.iter().map(|c| chunk_id(*c)).collect();
    let has = catalog.has_chunks(&tenant, &ids).await?;
    for (c, _) in wanted.iter().zip(has).filter(|(_, has)| !has) {
        catalog
            .put_chunk(&tenant, None, &chunk_id(*c), chunk(*c), false)
            .await?;
    }
    for _ in 0..3 {
        let put = catalog
            .put_manifest(&tenant, None, &image(i), key(), manifest(i, chunks))
            .await?;
        match put {
            ManifestPut::Created | ManifestPut::Known => return Ok(true),
            ManifestPut::Missing(missing) => {
                assert!(!missing.is_empty());
                if partial {
                    return Ok(false);
                }
                for c in chunks.iter().filter(|c| missing.contains(&chunk_id(**c))) {
                    catalog
                        .put_chunk(&tenant, None, &chunk_id(*c), chunk(*c), false)
                        .await?;
                }
            }
        }
    }
    Ok(false)
}
