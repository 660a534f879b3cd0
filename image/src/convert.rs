//! From layers to the form of an image: flattened tree, data space, chunks, packs, manifest.
//!
//! Layers stream through once, base first. Memory is bounded by the tree and a few chunks per
//! encoder; everything else waits in two working files (ciphertexts, and small files of layers whose
//! entries are in no order), which have no name and vanish with the process.

mod encode_pool;
pub mod packs;

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use lazyimg_convergent::{ChunkKey, MAX_CHUNK_LEN, Salt, TenantKey};

use crate::erofs;
use crate::flatten::{self, Counters, FlattenError};
use crate::layer::{LayerError, LayerReader};
use crate::layout::{
    ChunkEncoder, Contents, LayerSink, Plan, PlanError, Region, SinkError, Ticket,
};
use crate::limits::Limits;
use crate::manifest::{BLOCK, Entry, Header, Manifest, ManifestError};
use crate::source::{LayerDescriptor, ResolvedImage, SourceError};
use crate::tree::{Kind, Tree};

pub use encode_pool::{EncodePool, Encoded};

/// Length of the first chunk of the metadata space, in bytes (64 KiB): holds the superblock and the
/// top two levels of a usual tree with their names, which is what the first `ls` asks for. With 32 KiB
/// it waited for the second chunk, on a link of 20 ms another 70 ms.
pub const FIRST_META_CHUNK: usize = 64 << 10;

/// Length of the other chunks of the metadata space, in bytes.
pub const META_CHUNK: usize = 512 << 10;

/// How to convert.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// Salt that chunk keys are derived under.
    pub salt: Salt,
    /// Name of the salt's domain.
    pub domain: String,
    /// Epoch of the salt.
    pub epoch: u32,
    /// zstd level, 1 to 19.
    pub level: i32,
    /// Encoder threads.
    pub threads: usize,
    /// What layers may ask for.
    pub limits: Limits,
    /// Where the two working files are made; about the size of the image is needed.
    pub work_dir: PathBuf,
}

/// Why an image could not be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// A layer can't be fetched.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A layer's stream is bad.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// A layer's entries are bad.
    #[error(transparent)]
    Flatten(#[from] FlattenError),
    /// A layer can't be laid out.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A body can't be taken.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// The tree does not fit into EROFS.
    #[error(transparent)]
    Erofs(#[from] erofs::WriteError),
    /// The image is larger than anything that can be mounted.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A working file can't be made or read.
    #[error("working file in {dir}: {cause}; free some space there or set --work-dir")]
    Work {
        /// The directory.
        dir: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// More layers than allowed.
    #[error("image has {actual} layers, the limit is {limit}: raise it with --max-layers")]
    TooManyLayers {
        /// How many it has.
        actual: usize,
        /// How many are allowed.
        limit: u32,
    },
}

/// What happens during a conversion, for progress bars.
#[derive(Debug, Clone, Copy)]
pub enum ConvertEvent<'a> {
    /// A layer begins: number from 0, of how many, its descriptor.
    Layer(usize, usize, &'a LayerDescriptor),
    /// So many more bytes of compressed layers were read.
    Read(u64),
    /// Everything was read; chunks are being finished.
    Finishing,
}

/// A converted image, before it is pushed. Its ciphertexts lie in [`Form::spool`].
#[derive(Debug)]
pub struct Form {
    /// The manifest, keys sealed.
    pub manifest: Manifest,
    /// The metadata space in plaintext.
    pub metadata: Vec<u8>,
    /// The keys of all stored chunks, metadata first.
    pub keys: Vec<ChunkKey>,
    /// Ciphertexts.
    pub spool: File,
    /// Which pieces of the spool make which pack.
    pub pieces: Vec<packs::PackPieces>,
    /// Bytes of plaintext that were encoded.
    pub plain_bytes: u64,
    /// Names of all kinds in the tree.
    pub inodes: u64,
}

/// A chunk in [`Form::spool`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpooledChunk {
    /// SHA-256 of the ciphertext.
    pub id: lazyimg_convergent::ChunkId,
    /// Where the ciphertext begins in the spool, in bytes.
    pub at: u64,
    /// Its length in bytes.
    pub len: u32,
}

impl Form {
    /// Every chunk once, in the order of the packs: for stores that go by id.
    pub fn chunks(&self) -> Vec<SpooledChunk> {
        // Pieces are in the order of their pack and begin where the one before ends.
        let mut at: std::collections::HashMap<(u32, u64), u64> = std::collections::HashMap::new();
        for (pack, pieces) in (0_u32..).zip(&self.pieces) {
            let mut offset = 0;
            for (spooled, len) in &pieces.pieces {
                at.insert((pack, offset), *spooled);
                offset += u64::from(*len);
            }
        }
        let mut seen = std::collections::HashSet::new();
        let stored = self.manifest.stored().filter(|s| seen.insert(s.id));
        let mut chunks: Vec<_> = stored
            .filter_map(|s| {
                let at = *at.get(&(s.pack, s.offset))?;
                let (id, len) = (s.id, s.len);
                Some(((s.pack, s.offset), SpooledChunk { id, at, len }))
            })
            .collect();
        chunks.sort_unstable_by_key(|(place, _)| *place);
        chunks.into_iter().map(|(_, chunk)| chunk).collect()
    }
}

/// Converts an image. Blocking; call it from a thread of its own.
///
/// `open_layer` gives the compressed bytes of a layer.
///
/// # Errors
/// See [`ConvertError`]; nothing is left behind.
pub fn convert<R: Read + Send>(
    image: &ResolvedImage,
    mut open_layer: impl FnMut(&LayerDescriptor) -> Result<R, SourceError>,
    tenant: &TenantKey,
    options: &ConvertOptions,
    event: &(dyn Fn(ConvertEvent<'_>) + Sync),
) -> Result<Form, ConvertError> {
    let limit = options.limits.layers;
    if image.layers.len() > limit as usize {
        return Err(ConvertError::TooManyLayers {
            actual: image.layers.len(),
            limit,
        });
    }
    let work = |cause| ConvertError::Work {
        dir: options.work_dir.clone(),
        cause,
    };
    let spool = tempfile::tempfile_in(&options.work_dir).map_err(work)?;
    let mut pool =
        EncodePool::new(spool, &options.salt, options.level, options.threads).map_err(work)?;
    let (mut tree, mut contents, mut plan) = (Tree::new(), Contents::default(), Plan::default());
    let mut counters = Counters::default();
    for (n, layer) in image.layers.iter().enumerate() {
        event(ConvertEvent::Layer(n, image.layers.len(), layer));
        let raw = Counting {
            inner: open_layer(layer)?,
            event,
        };
        let small_files = tempfile::tempfile_in(&options.work_dir).map_err(work)?;
        let mut sink = LayerSink::new(&mut pool, &mut contents, &plan, n as u32, small_files);
        LayerReader::read(n as u32, layer, raw, &options.limits, |tar| {
            let name = layer.digest.to_string();
            flatten::apply_layer(
                &mut tree,
                n as u32,
                &name,
                tar,
                &mut sink,
                &options.limits,
                &mut counters,
            )
        })?;
        let small = sink.into_spool()?;
        plan.add_layer(n as u32, &tree, &contents, &small, &mut pool)?;
    }
    event(ConvertEvent::Finishing);
    let region = plan.finish(&tree, &contents)?;
    // Before the metadata is made; `assemble` adds only its few chunks.
    let stored = region.cuts.iter().filter(|c| c.ticket.is_some()).count();
    Manifest::check_counts(region.cuts.len() as u64, stored as u64, 0)?;
    let place = |id| plan.start_block(&region, &contents, id);
    let metadata = erofs::write(&tree, &place, region.blocks)?;
    let meta_tickets = encode_metadata(&metadata, &mut pool).map_err(work)?;
    pool.wait().map_err(work)?;
    let form = assemble(
        image,
        tenant,
        options,
        &tree,
        &plan,
        &region,
        metadata,
        &meta_tickets,
        &pool,
    )
    .map_err(work)?;
    form.manifest.check_len()?;
    Ok(form)
}

/// Cuts the metadata space and hands it to the encoders.
fn encode_metadata(metadata: &[u8], pool: &mut EncodePool) -> io::Result<Vec<(u32, Ticket)>> {
    const _: () = assert!(META_CHUNK <= MAX_CHUNK_LEN);
    let (first, rest) = metadata.split_at(FIRST_META_CHUNK.min(metadata.len()));
    std::iter::once(first)
        .chain(rest.chunks(META_CHUNK))
        .map(|plain| {
            Ok((
                (plain.len() as u64 / BLOCK) as u32,
                pool.encode(plain.to_vec())?,
            ))
        })
        .collect()
}

#[allow(clippy::too_many_arguments)]
fn assemble(
    image: &ResolvedImage,
    tenant: &TenantKey,
    options: &ConvertOptions,
    tree: &Tree,
    plan: &Plan,
    region: &Region,
    metadata: Vec<u8>,
    meta_tickets: &[(u32, Ticket)],
    pool: &EncodePool,
) -> io::Result<Form> {
    let mut packs = packs::Packs::default();
    let mut layer = 0;
    for group in plan.groups() {
        if group.layer != layer {
            packs.close();
            layer = group.layer;
        }
        for ticket in group.cuts.iter().filter_map(|c| c.ticket) {
            packs.add(&pool.encoded(ticket));
        }
    }
    packs.close();
    for (_, ticket) in meta_tickets {
        packs.add(&pool.encoded(*ticket));
    }
    let mut keys = Vec::new();
    let mut entry = |blocks: u32, ticket: Option<Ticket>| {
        let stored = ticket.map(|ticket| {
            let encoded = pool.encoded(ticket);
            let stored = packs.stored(&encoded);
            keys.push(encoded.key);
            stored
        });
        Entry { blocks, stored }
    };
    let meta: Vec<_> = meta_tickets
        .iter()
        .map(|(blocks, t)| entry(*blocks, Some(*t)))
        .collect();
    let data: Vec<_> = region
        .cuts
        .iter()
        .map(|c| entry(c.blocks as u32, c.ticket))
        .collect();
    let spool = pool.spool()?;
    let digests = packs::digests(&spool, packs.pieces(), options.threads)?;
    let (files, file_bytes) = count_files(tree);
    let header = Header {
        meta_len: metadata.len() as u64,
        data_len: region.blocks * BLOCK,
        image: image.digest,
        has_xattrs: tree.has_xattrs(),
        files,
        file_bytes,
        salt_id: options.salt.public_id(),
        epoch: options.epoch,
        domain: options.domain.clone(),
    };
    let mut manifest = Manifest {
        header,
        meta,
        data,
        packs: digests,
        sealed_keys: Vec::new(),
    };
    manifest.seal_keys(tenant, keys.iter());
    Ok(Form {
        manifest,
        metadata,
        keys,
        spool,
        pieces: packs.pieces().to_vec(),
        plain_bytes: pool.plain_bytes(),
        inodes: tree.inode_count() as u64,
    })
}

fn count_files(tree: &Tree) -> (u64, u64) {
    tree.inodes()
        .fold((0, 0), |(files, bytes), (_, inode)| match inode.kind {
            Kind::File { size, .. } => (files + 1, bytes + size),
            _ => (files, bytes),
        })
}

/// Tells what was read.
struct Counting<'a, R> {
    inner: R,
    event: &'a (dyn Fn(ConvertEvent<'_>) + Sync),
}

impl<R: Read> Read for Counting<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(buf)?;
        (self.event)(ConvertEvent::Read(len as u64));
        Ok(len)
    }
}
