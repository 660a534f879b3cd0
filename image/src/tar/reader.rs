//! Walks an archive entry by entry: extended headers are gathered, bodies are handed on.

use std::io::Read;

use super::BLOCK;
use super::error::{TarError, TarProblem, show};
use super::header::{Block, Format, Header, sparse_block, text};
use super::input::Input;
use super::pax::{Extended, records};
use super::sparse::{MapText, SparseMap, pairs};
use crate::limits::{Exceeded, Limits, within};
use crate::tree::{Meta, Mtime, Rdev};

/// One entry of an archive, as it stands there: names are not interpreted yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Byte offset of its header in the uncompressed stream.
    pub offset: u64,
    /// Name, without any promise: absolute, `..`, empty, trailing slash.
    pub path: Vec<u8>,
    /// Mode, owner, time, attributes.
    pub meta: Meta,
    /// What it is.
    pub kind: EntryKind,
    /// ACLs in text that were left out, because they name users without their numbers.
    pub dropped_acls: u64,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file of so many bytes, holes included. Its bytes: [`Reader::body`].
    File(u64),
    /// One more name for the entry of this name.
    HardLink(Vec<u8>),
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A character device.
    Char(Rdev),
    /// A block device.
    Block(Rdev),
    /// A directory.
    Dir,
    /// A named pipe.
    Fifo,
}

/// Why a body could not be handed on.
#[derive(Debug)]
pub enum BodyError<E> {
    /// The archive is bad.
    Tar(TarError),
    /// Whoever took the bytes refused them.
    Taker(E),
}

/// Reads the entries of an archive. See the module's text.
pub struct Reader<R> {
    input: Input<R>,
    limits: Limits,
    global: Extended,
    /// Body of the current entry, as far as not read: bytes, then padding to a block.
    left: u64,
    padding: u64,
    sparse: SparseMap,
    done: bool,
    /// The current entry's name, for messages.
    current: Option<Vec<u8>>,
}

/// What the headers before an entry's own said of it.
#[derive(Default)]
struct Before {
    pax: Option<Extended>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<R: Read> Reader<R> {
    /// Reads the archive that `inner` holds. Reads ahead, at most 256 KiB.
    pub fn new(inner: R, limits: &Limits) -> Self {
        Self {
            input: Input::new(inner),
            limits: limits.clone(),
            global: Extended::default(),
            left: 0,
            padding: 0,
            sparse: SparseMap::whole(0),
            done: false,
            current: None,
        }
    }

    /// The next entry, or `None` at the archive's end: two blocks of zeros, or (as in Go) the end of
    /// the stream between two entries. Skips what is left of the current entry's body.
    ///
    /// # Errors
    /// When the archive is damaged, truncated, or exceeds a limit. There is no going on after one.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        if self.done {
            return Ok(None);
        }
        let offset = self.input.offset();
        let result = self.skip_body().and_then(|()| {
            self.current = None;
            self.find_entry()
        });
        self.done = !matches!(result, Ok(Some(_)));
        result.map_err(|problem| self.error(offset, problem))
    }

    /// Hands the current file's bytes on, in slices of up to 256 KiB, each with its offset in the
    /// file; holes are left out. Small files come in one slice.
    ///
    /// # Errors
    /// When the archive is damaged, or the first error of `take`.
    pub fn body<E>(
        &mut self,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), BodyError<E>> {
        let extents = std::mem::take(&mut self.sparse.extents);
        for (start, len) in extents {
            let mut at = start;
            while at < start + len {
                let slice = match self.input.take(start + len - at) {
                    Ok(slice) => slice,
                    Err(problem) => {
                        self.done = true;
                        let offset = self.input.offset();
                        return Err(BodyError::Tar(self.error(offset, problem)));
                    }
                };
                take(at, slice).map_err(BodyError::Taker)?;
                at += slice.len() as u64;
                self.left -= slice.len() as u64;
            }
        }
        Ok(())
    }

    fn error(&self, offset: u64, problem: TarProblem) -> TarError {
        TarError {
            offset,
            entry: self.current.clone(),
            problem,
        }
    }

    fn skip_body(&mut self) -> Result<(), TarProblem> {
        let (left, padding) = (self.left, self.padding);
        (self.left, self.padding) = (0, 0);
        self.sparse = SparseMap::whole(0);
        self.input.skip(left)?;
        self.input.skip_padding(padding)
    }

    fn begin_body(&mut self, stored: u64) {
        self.left = stored;
        self.padding = stored.next_multiple_of(BLOCK as u64) - stored;
    }

    fn find_entry(&mut self) -> Result<Option<Entry>, TarProblem> {
        let mut before = Before::default();
        let dangling = |before: &Before| {
            before.pax.is_some() || before.long_name.is_some() || before.long_link.is_some()
        };
        loop {
            let offset = self.input.offset();
            let header = match self.input.block()? {
                None => None,
                Some(block) => match Block::parse(&block)? {
                    Block::Header(header) => Some(header),
                    Block::Zero => {
                        let second = self.input.block()?;
                        if second.is_some_and(|block| block.iter().any(|&b| b != 0)) {
                            return Err(TarProblem::LoneZeroBlock);
                        }
                        None
                    }
                },
            };
            let Some(header) = header else {
                return if dangling(&before) {
                    Err(TarProblem::DanglingHeader)
                } else {
                    Ok(None)
                };
            };
            match header.type_flag() {
                b'x' | b'X' => before.pax = Some(self.read_extended(&header)?),
                b'g' => self.read_global(&header)?,
                b'L' => before.long_name = Some(self.read_long(&header)?),
                b'K' => before.long_link = Some(self.read_long(&header)?),
                b'V' => {
                    self.begin_body(header.size()?);
                    self.skip_body()?;
                }
                _ => return self.entry(offset, &header, before).map(Some),
            }
        }
    }

    fn read_extended(&mut self, header: &Header) -> Result<Extended, TarProblem> {
        let body = self.read_meta(header)?;
        let mut extended = Extended::default();
        for record in records(&body) {
            let (key, value) = record?;
            extended.take(key, value, &self.limits)?;
        }
        Ok(extended)
    }

    fn read_global(&mut self, header: &Header) -> Result<(), TarProblem> {
        let body = self.read_meta(header)?;
        for record in records(&body) {
            let (key, value) = record?;
            if Extended::entry_only(key) {
                return Err(TarProblem::PaxGlobal(show(key)));
            }
            self.global.take(key, value, &self.limits)?;
        }
        Ok(())
    }

    fn read_long(&mut self, header: &Header) -> Result<Vec<u8>, TarProblem> {
        Ok(text(&self.read_meta(header)?).to_vec())
    }

    /// The body of an extended header or long name.
    fn read_meta(&mut self, header: &Header) -> Result<Vec<u8>, TarProblem> {
        let size = header.size()?;
        within(
            size,
            self.limits.pax_bytes as u64,
            "bytes in an extended header",
            Some("--max-pax-bytes"),
        )?;
        self.begin_body(size);
        let mut body = Vec::new();
        while self.left > 0 {
            let slice = self.input.take(self.left)?;
            body.extend_from_slice(slice);
            self.left -= slice.len() as u64;
        }
        self.skip_body()?;
        Ok(body)
    }

    fn entry(&mut self, offset: u64, header: &Header, before: Before) -> Result<Entry, TarProblem> {
        let pax = before.pax.unwrap_or_default();
        // As in Go, a GNU long name beats a PAX path; a sparse file's real name beats both.
        let path = (pax.sparse.name.clone())
            .or(before.long_name)
            .or_else(|| pax.path.clone())
            .unwrap_or_else(|| header.path());
        self.current = Some(path.clone());
        let pax = pax.over(&self.global);
        let link = before
            .long_link
            .or_else(|| pax.link.clone())
            .unwrap_or_else(|| header.link());
        let device = || {
            let (major, minor) = match (pax.dev_major, pax.dev_minor) {
                (Some(major), Some(minor)) => (major, minor),
                _ => header.device()?,
            };
            device_number(major, minor)
        };
        let is_dir = path.last() == Some(&b'/');
        let kind = match header.type_flag() {
            b'0' | b'7' => self.file(header, &pax)?,
            0 if !is_dir => self.file(header, &pax)?,
            b'S' if header.format == Format::Gnu => self.old_gnu_file(header, &pax)?,
            b'1' => EntryKind::HardLink(link),
            b'2' => EntryKind::Symlink(link),
            b'3' => EntryKind::Char(device()?),
            b'4' => EntryKind::Block(device()?),
            // As in Go, everything but a file has no body, whatever its size field says: old
            // writers put the size of a directory or of a link's target there.
            0 | b'5' => EntryKind::Dir,
            b'6' => EntryKind::Fifo,
            b'D' => {
                self.begin_body(stored_size(header, &pax)?);
                EntryKind::Dir
            }
            flag => return Err(TarProblem::UnknownType(flag)),
        };
        let mtime = match pax.mtime {
            Some(mtime) => mtime,
            None => Mtime {
                sec: header.mtime()?,
                nsec: 0,
            },
        };
        let dropped_acls = pax.dropped;
        let meta = Meta {
            mode: header.mode()?,
            uid: owner("uid", pax.uid, || header.uid())?,
            gid: owner("gid", pax.gid, || header.gid())?,
            mtime,
            xattrs: pax.into_xattrs(),
        };
        Ok(Entry {
            offset,
            path,
            meta,
            kind,
            dropped_acls,
        })
    }

    /// A regular file, sparse by PAX keywords or not.
    fn file(&mut self, header: &Header, pax: &Extended) -> Result<EntryKind, TarProblem> {
        let stored = stored_size(header, pax)?;
        self.begin_body(stored);
        let sparse = &pax.sparse;
        self.sparse = if !sparse.present() {
            SparseMap::whole(stored)
        } else {
            let real_size = sparse
                .real_size
                .ok_or(TarProblem::Sparse("the file's size is missing"))?;
            let extents = match (sparse.major, sparse.minor) {
                (Some(1), Some(0)) => self.leading_map()?,
                (None, None) | (Some(0), Some(0 | 1)) => pairs(&sparse.map)?,
                _ => return Err(TarProblem::Sparse("unknown version")),
            };
            SparseMap::new(extents, real_size, self.left)?
        };
        self.known_size()
    }

    fn old_gnu_file(&mut self, header: &Header, pax: &Extended) -> Result<EntryKind, TarProblem> {
        let (mut extents, mut extended, real_size) = header.old_gnu_sparse()?;
        while extended {
            let block = self.input.block()?.ok_or(TarProblem::Truncated)?;
            extended = sparse_block(&block[..505], &mut extents)?;
            self.check_extents(extents.len() as u64)?;
        }
        let stored = stored_size(header, pax)?;
        self.begin_body(stored);
        self.sparse = SparseMap::new(extents, real_size, stored)?;
        self.known_size()
    }

    /// Version 1.0 keeps its map in front of the data, in blocks of its own.
    fn leading_map(&mut self) -> Result<Vec<(u64, u64)>, TarProblem> {
        let mut map = MapText::default();
        loop {
            if self.left < BLOCK as u64 {
                return Err(TarProblem::Sparse("its map does not fit into the entry"));
            }
            let block = self.input.block()?.ok_or(TarProblem::Truncated)?;
            self.left -= BLOCK as u64;
            if map.feed(&block, self.limits.sparse_extents as u64)? {
                return map.into_extents();
            }
        }
    }

    fn check_extents(&self, actual: u64) -> Result<(), Exceeded> {
        let limit = self.limits.sparse_extents as u64;
        within(
            actual,
            limit,
            "extents in a sparse file",
            Some("--max-sparse-extents"),
        )
    }

    fn known_size(&self) -> Result<EntryKind, TarProblem> {
        let size = self.sparse.real_size;
        within(
            size,
            self.limits.file_bytes,
            "bytes in one file, holes included",
            Some("--max-file-bytes"),
        )?;
        Ok(EntryKind::File(size))
    }
}

/// Bytes that the archive holds for an entry.
fn stored_size(header: &Header, pax: &Extended) -> Result<u64, TarProblem> {
    let size = match pax.size {
        Some(size) => size,
        None => header.size()?,
    };
    // Room for the padding, and for Go's and everybody's signed offsets.
    i64::try_from(size)
        .ok()
        .and_then(|size| size.checked_add(BLOCK as i64))
        .ok_or_else(|| TarProblem::Number {
            field: "size",
            value: size.to_string(),
        })?;
    Ok(size)
}

/// A user or group number. The largest one means "nobody in particular" to Linux (`chown` leaves
/// the owner alone), so nothing can belong to it.
fn owner(
    field: &'static str,
    pax: Option<u64>,
    header: impl FnOnce() -> Result<i64, TarProblem>,
) -> Result<u32, TarProblem> {
    let value = match pax {
        Some(value) => i128::from(value),
        None => i128::from(header()?),
    };
    match u32::try_from(value) {
        Ok(id) if id != u32::MAX => Ok(id),
        _ => Err(TarProblem::Number {
            field,
            value: value.to_string(),
        }),
    }
}

/// Linux has 12 bits for the major number and 20 for the minor.
fn device_number(major: u64, minor: u64) -> Result<Rdev, TarProblem> {
    if major >= 1 << 12 || minor >= 1 << 20 {
        return Err(TarProblem::Number {
            field: "device",
            value: format!("{major}:{minor}"),
        });
    }
    Ok(Rdev {
        major: major as u32,
        minor: minor as u32,
    })
}

#[cfg(test)]
mod tests;
