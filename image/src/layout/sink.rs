//! Takes the bodies of one layer's files as they stream by.
//!
//! Large files are cut and handed to the encoder at once, small ones as packs that are guessed
//! ([`Ahead`]), or they wait in a spool file until the layer's end, when the path order is known.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;

use crate::flatten::ContentSink;
use crate::tree::ContentId;

use super::ahead::{Ahead, Guessed, Key};
use super::{ChunkEncoder, LARGE, Plan, Ticket, blocks, is_zero};

/// Why a file's body could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The working files can't be written.
    #[error("working file of the conversion: {0}; free some space or set --work-dir")]
    Spool(#[source] io::Error),
    /// A chunk could not be encoded.
    #[error("encoding a chunk: {0}")]
    Encode(#[source] io::Error),
    /// More files than an image can have.
    #[error("image has more than {} files with content", u32::MAX)]
    TooMany,
}

/// One file's content.
#[derive(Debug)]
pub struct Content {
    /// BLAKE3 over non-zero windows, their places and the size: equal for equal bytes, however the
    /// layer wrote them.
    pub hash: [u8; 32],
    /// Length in bytes, holes included.
    pub size: u64,
    /// The layer that brought it.
    pub layer: u32,
    /// Where the bytes are.
    pub body: Body,
}

/// Where the bytes of a content are until the layout is known.
#[derive(Debug)]
pub enum Body {
    /// Nothing but zeros.
    Zero,
    /// A small file.
    Small(Small),
    /// Cut already: stored windows by index (of [`LARGE`] bytes); what is missing is zero.
    Large(BTreeMap<u64, Ticket>),
}

/// Where the bytes of a small file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Small {
    /// In a pack that was encoded ahead.
    Guessed(Guessed),
    /// At this byte offset of the layer's spool.
    Spooled(u64),
    /// In a lower layer.
    Below,
}

/// All contents of an image, by [`ContentId`].
#[derive(Debug, Default)]
pub struct Contents {
    all: Vec<Content>,
}

impl Contents {
    /// The content with this id.
    pub fn get(&self, id: ContentId) -> &Content {
        &self.all[id.0 as usize]
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
}

/// The [`ContentSink`] of one layer.
pub struct LayerSink<'a, E> {
    encoder: &'a mut E,
    contents: &'a mut Contents,
    layer: u32,
    spool: BufWriter<File>,
    spool_len: u64,
    current: Current,
    /// The layers below.
    below: &'a Plan,
    ahead: Ahead,
}

/// The file that is being taken.
struct Current {
    size: u64,
    hash: blake3::Hasher,
    /// Index of the window that `window` holds, if it holds any bytes.
    index: Option<u64>,
    window: Vec<u8>,
    tickets: BTreeMap<u64, Ticket>,
    /// Indexes of the windows that are not all zeros.
    filled: Vec<u64>,
}

impl<'a, E: ChunkEncoder> LayerSink<'a, E> {
    /// A sink for layer `layer` above those of `below`; `spool` is an empty file for the layer's small
    /// files.
    pub fn new(
        encoder: &'a mut E,
        contents: &'a mut Contents,
        below: &'a Plan,
        layer: u32,
        spool: File,
    ) -> Self {
        let current = Current {
            size: 0,
            hash: blake3::Hasher::new(),
            index: None,
            window: Vec::new(),
            tickets: BTreeMap::new(),
            filled: Vec::new(),
        };
        Self {
            encoder,
            contents,
            layer,
            spool: BufWriter::with_capacity(1 << 20, spool),
            spool_len: 0,
            current,
            below,
            ahead: Ahead::default(),
        }
    }

    /// The layer is complete: the spool, to read small files back from.
    ///
    /// # Errors
    /// When the spool can't be written, or an encoder failed.
    pub fn into_spool(mut self) -> Result<SmallFiles, SinkError> {
        self.ahead.end(self.encoder).map_err(SinkError::Encode)?;
        let file = self
            .spool
            .into_inner()
            .map_err(|e| SinkError::Spool(e.into_error()))?;
        Ok(SmallFiles {
            file,
            ahead: self.ahead,
        })
    }

    /// Ends the current window: hashed, and encoded if the file is large.
    fn flush_window(&mut self) -> Result<(), SinkError> {
        let Some(index) = self.current.index.take() else {
            return Ok(());
        };
        let window = std::mem::take(&mut self.current.window);
        if is_zero(&window) {
            self.current.window = window;
            return Ok(());
        }
        self.current.filled.push(index);
        self.current.hash.update(&window);
        if self.current.size >= LARGE {
            let mut plain = window;
            plain.resize(blocks(plain.len() as u64) as usize * 4096, 0);
            let ticket = self.encoder.encode(plain).map_err(SinkError::Encode)?;
            self.current.tickets.insert(index, ticket);
        } else {
            // The whole file: `finish` takes it.
            self.current.window = window;
        }
        Ok(())
    }
}

impl<E: ChunkEncoder> ContentSink for LayerSink<'_, E> {
    type Error = SinkError;

    fn entry(&mut self, path: &[u8]) {
        self.ahead.entry(path);
    }

    fn begin(&mut self, size: u64) -> Result<(), SinkError> {
        let current = &mut self.current;
        current.size = size;
        current.hash.reset();
        current.index = None;
        current.tickets.clear();
        current.filled.clear();
        Ok(())
    }

    fn data(&mut self, mut offset: u64, mut bytes: &[u8]) -> Result<(), SinkError> {
        while !bytes.is_empty() {
            let index = offset / LARGE;
            if self.current.index != Some(index) {
                self.flush_window()?;
                let len = (self.current.size - index * LARGE).min(LARGE) as usize;
                self.current.window.clear();
                self.current.window.resize(len, 0);
                self.current.index = Some(index);
            }
            let at = (offset - index * LARGE) as usize;
            let len = bytes.len().min(self.current.window.len() - at);
            self.current.window[at..at + len].copy_from_slice(&bytes[..len]);
            bytes = &bytes[len..];
            offset += len as u64;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<ContentId, SinkError> {
        self.flush_window()?;
        let current = &mut self.current;
        let hash = current.finish_hash();
        let body = if current.filled.is_empty() {
            Body::Zero
        } else if current.size >= LARGE {
            Body::Large(std::mem::take(&mut current.tickets))
        } else {
            Body::Small(self.take_small((hash, self.current.size))?)
        };
        let id = u32::try_from(self.contents.all.len()).map_err(|_| SinkError::TooMany)?;
        self.contents.all.push(Content {
            hash,
            size: self.current.size,
            layer: self.layer,
            body,
        });
        Ok(ContentId(id))
    }
}

impl<E: ChunkEncoder> LayerSink<'_, E> {
    /// Keeps the small file that is in the window.
    fn take_small(&mut self, key: Key) -> Result<Small, SinkError> {
        if self.below.holds(&key) {
            return Ok(Small::Below);
        }
        let window = &self.current.window;
        let guessed = self.ahead.add(key, window, self.encoder);
        if let Some(place) = guessed.map_err(SinkError::Encode)? {
            return Ok(Small::Guessed(place));
        }
        let at = self.spool_len;
        self.spool.write_all(window).map_err(SinkError::Spool)?;
        self.spool_len += key.1;
        Ok(Small::Spooled(at))
    }
}

impl Current {
    /// The bytes come first in the hash, so that BLAKE3 takes them in whole aligned pieces.
    fn finish_hash(&mut self) -> [u8; 32] {
        for index in &self.filled {
            self.hash.update(&index.to_le_bytes());
        }
        self.hash.update(&(self.filled.len() as u64).to_le_bytes());
        self.hash.update(&self.size.to_le_bytes());
        *self.hash.finalize().as_bytes()
    }
}

/// The small files of a layer, to be read back in path order.
pub struct SmallFiles {
    file: File,
    ahead: Ahead,
}

/// A guessed pack that was decoded to read files back: the next file is likely in it too.
pub type Decoded = Option<(u32, Vec<u8>)>;

impl SmallFiles {
    /// Reads the whole file at `place` into `buf`. `decoded` is kept between calls.
    ///
    /// # Errors
    /// When the spool can't be read, or a chunk not decoded.
    pub fn read<E: ChunkEncoder>(
        &self,
        place: Small,
        buf: &mut [u8],
        encoder: &mut E,
        decoded: &mut Decoded,
    ) -> io::Result<()> {
        let lost = || io::Error::other("the file's bytes are not where they were put");
        match place {
            Small::Spooled(at) => self.file.read_exact_at(buf, at),
            Small::Guessed(Guessed { pack, offset }) => {
                if decoded.as_ref().is_none_or(|(which, _)| *which != pack) {
                    let ticket = self.ahead.ticket(pack).ok_or_else(lost)?;
                    *decoded = Some((pack, encoder.decode(ticket)?));
                }
                let bytes = decoded.as_ref().map_or(&[][..], |(_, bytes)| bytes);
                let from = bytes.get(offset as usize..).unwrap_or_default();
                buf.copy_from_slice(from.get(..buf.len()).ok_or_else(lost)?);
                Ok(())
            }
            Small::Below => Err(lost()),
        }
    }

    /// The chunk of a pack of exactly these contents, if it was encoded ahead.
    pub fn encoded<'a>(&self, members: impl Iterator<Item = &'a Key>) -> Option<Ticket> {
        self.ahead.find(members)
    }
}
