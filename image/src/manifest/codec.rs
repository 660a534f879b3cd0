//! The bytes of a manifest: little-endian, fixed widths, no padding that may vary.

use lazyimg_convergent::chunk::TAG_LEN;
use lazyimg_convergent::salt::MAX_DOMAIN_LEN;
use lazyimg_convergent::{ChunkId, Digest, MAX_CHUNK_LEN, MAX_STORED_LEN, seal};

use super::{BLOCK, Entry, Header, MAX_MANIFEST_LEN, Manifest, ManifestError, Pack, Stored};

/// First bytes of a manifest.
pub const MAGIC: &[u8; 8] = b"LZIMAGE\0";
/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// Length of the header in bytes.
pub const HEADER_LEN: usize = 192;

const ENTRY_LEN: usize = 40;
const PACK_LEN: usize = 40;
const LOCATION_LEN: usize = 12;
const KEY_LEN: usize = 32;
const FLAG_XATTRS: u32 = 1;

/// Length in bytes of a manifest with so many entries, stored ones among them, and packs.
pub fn len_of(entries: u64, stored: u64, packs: u64) -> u64 {
    let tables = entries * ENTRY_LEN as u64 + packs * PACK_LEN as u64;
    let each = (LOCATION_LEN + KEY_LEN) as u64;
    (HEADER_LEN + 4 + 4 + seal::OVERHEAD) as u64 + tables + stored * each
}

/// Header and chunk table: what the root digest covers.
pub fn write_table(m: &Manifest) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_LEN + (m.meta.len() + m.data.len()) * ENTRY_LEN);
    let h = &m.header;
    out.extend_from_slice(MAGIC);
    put32(&mut out, VERSION);
    put32(&mut out, if h.has_xattrs { FLAG_XATTRS } else { 0 });
    put64(&mut out, h.meta_len);
    put64(&mut out, h.data_len);
    put32(&mut out, m.meta.len() as u32);
    put32(&mut out, m.data.len() as u32);
    out.extend_from_slice(&h.image.0);
    put64(&mut out, h.files);
    put64(&mut out, h.file_bytes);
    out.extend_from_slice(&h.salt_id);
    put32(&mut out, h.epoch);
    put32(&mut out, h.domain.len() as u32);
    out.extend_from_slice(h.domain.as_bytes());
    out.resize(HEADER_LEN, 0);
    for entry in m.meta.iter().chain(&m.data) {
        put32(&mut out, entry.blocks);
        put32(&mut out, entry.stored.map_or(0, |s| s.len));
        out.extend_from_slice(&entry.stored.map_or([0; 32], |s| s.id.0));
    }
    out
}

/// The whole manifest.
pub fn write(m: &Manifest) -> Vec<u8> {
    let mut out = write_table(m);
    put32(&mut out, m.packs.len() as u32);
    for pack in &m.packs {
        out.extend_from_slice(&pack.digest.0);
        put64(&mut out, pack.len);
    }
    for stored in m.stored() {
        put32(&mut out, stored.pack);
        put64(&mut out, stored.offset);
    }
    put32(&mut out, m.sealed_keys.len() as u32);
    out.extend_from_slice(&m.sealed_keys);
    out
}

/// Reads and checks a manifest.
pub fn read(bytes: &[u8]) -> Result<Manifest, ManifestError> {
    if bytes.len() as u64 > MAX_MANIFEST_LEN {
        return Err(ManifestError::TooLarge(bytes.len() as u64));
    }
    let mut r = Cursor { bytes, at: 0 };
    let (header, meta_count, data_count) = read_header(&mut r)?;
    r.expect(
        (meta_count as u64 + data_count as u64) * ENTRY_LEN as u64,
        "chunk table cut short",
    )?;
    let mut meta = read_entries(&mut r, meta_count, header.meta_len)?;
    let mut data = read_entries(&mut r, data_count, header.data_len)?;
    if meta.is_empty() || meta.iter().any(|e| e.stored.is_none()) {
        return Err(r.malformed("metadata has a hole"));
    }
    let packs = read_packs(&mut r)?;
    for stored in meta
        .iter_mut()
        .chain(&mut data)
        .filter_map(|e| e.stored.as_mut())
    {
        stored.pack = r.u32()?;
        stored.offset = r.u64()?;
        let end = stored.offset.checked_add(u64::from(stored.len));
        match packs.get(stored.pack as usize) {
            Some(pack) if end.is_some_and(|end| end <= pack.len) => {}
            _ => return Err(r.malformed("chunk lies outside its pack")),
        }
    }
    let keys_len = r.u32()? as usize;
    let sealed_keys = r.take(keys_len)?.to_vec();
    if r.at != bytes.len() {
        return Err(r.malformed("bytes after the end"));
    }
    Ok(Manifest {
        header,
        meta,
        data,
        packs,
        sealed_keys,
    })
}

fn read_header(r: &mut Cursor<'_>) -> Result<(Header, u32, u32), ManifestError> {
    r.expect(HEADER_LEN as u64, "header cut short")?;
    if r.take(8)? != MAGIC {
        return Err(ManifestError::Malformed {
            at: 0,
            what: "not a lazyimg manifest",
        });
    }
    let version = r.u32()?;
    if version != VERSION {
        return Err(ManifestError::Version(version));
    }
    let flags = r.u32()?;
    if flags & !FLAG_XATTRS != 0 {
        return Err(ManifestError::Features(flags & !FLAG_XATTRS));
    }
    let meta_len = r.u64()?;
    let data_len = r.u64()?;
    let meta_count = r.u32()?;
    let data_count = r.u32()?;
    let image = Digest(r.array()?);
    let files = r.u64()?;
    let file_bytes = r.u64()?;
    let salt_id = r.array()?;
    let epoch = r.u32()?;
    let domain_len = r.u32()? as usize;
    if domain_len > MAX_DOMAIN_LEN {
        return Err(r.malformed("domain name too long"));
    }
    let domain = String::from_utf8(r.take(domain_len)?.to_vec())
        .map_err(|_| r.malformed("domain name is not UTF-8"))?;
    let rest = HEADER_LEN - r.at;
    if r.take(rest)?.iter().any(|&b| b != 0) {
        return Err(r.malformed("reserved bytes are not zero"));
    }
    let header = Header {
        meta_len,
        data_len,
        image,
        has_xattrs: flags & FLAG_XATTRS != 0,
        files,
        file_bytes,
        salt_id,
        epoch,
        domain,
    };
    Ok((header, meta_count, data_count))
}

fn read_entries(r: &mut Cursor<'_>, count: u32, len: u64) -> Result<Vec<Entry>, ManifestError> {
    let mut total = 0u64;
    let mut entries = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let blocks = r.u32()?;
        let stored_len = r.u32()?;
        let id = ChunkId(r.array()?);
        total += u64::from(blocks) * BLOCK;
        let stored = if stored_len == 0 {
            if id.0 != [0; 32] {
                return Err(r.malformed("hole with an id"));
            }
            None
        } else {
            if u64::from(blocks) * BLOCK > MAX_CHUNK_LEN as u64
                || stored_len as usize > MAX_STORED_LEN
                || stored_len as usize <= TAG_LEN
            {
                return Err(r.malformed("chunk of impossible size"));
            }
            Some(Stored {
                id,
                len: stored_len,
                pack: 0,
                offset: 0,
            })
        };
        if blocks == 0 {
            return Err(r.malformed("empty chunk"));
        }
        entries.push(Entry { blocks, stored });
    }
    if total != len {
        return Err(r.malformed("chunks do not add up to their space"));
    }
    Ok(entries)
}

fn read_packs(r: &mut Cursor<'_>) -> Result<Vec<Pack>, ManifestError> {
    let count = r.u32()?;
    r.expect(u64::from(count) * PACK_LEN as u64, "pack table cut short")?;
    (0..count)
        .map(|_| {
            Ok(Pack {
                digest: Digest(r.array()?),
                len: r.u64()?,
            })
        })
        .collect()
}

fn put32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Reads forward, never beyond the end.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn malformed(&self, what: &'static str) -> ManifestError {
        ManifestError::Malformed { at: self.at, what }
    }

    /// Fails unless `len` more bytes are there: called before anything is allocated for them.
    fn expect(&self, len: u64, what: &'static str) -> Result<(), ManifestError> {
        if len > (self.bytes.len() - self.at) as u64 {
            return Err(self.malformed(what));
        }
        Ok(())
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], ManifestError> {
        self.expect(len as u64, "cut short")?;
        let slice = &self.bytes[self.at..self.at + len];
        self.at += len;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ManifestError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, ManifestError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, ManifestError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
}
