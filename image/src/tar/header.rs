//! One 512-byte header block, read without touching anything else.

use super::BLOCK;
use super::error::{TarProblem, show};
use super::number::numeric;

/// Which of the historical formats a block is in, told by its magic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// No magic: Unix version 7.
    V7,
    /// POSIX ustar, and PAX, whose headers look the same.
    Ustar,
    /// Schilling's star before it spoke PAX: a shorter prefix, then times.
    Star,
    /// GNU tar.
    Gnu,
}

/// A header block whose checksum is right.
pub(super) struct Header {
    block: [u8; BLOCK],
    pub format: Format,
}

/// What a block turned out to be.
pub(super) enum Block {
    /// All zeros: half of the end mark.
    Zero,
    /// A header.
    Header(Box<Header>),
}

/// An old GNU sparse entry: offset and length of a data extent.
pub(super) type Extent = (u64, u64);

impl Block {
    /// Reads a block.
    pub(super) fn parse(block: &[u8; BLOCK]) -> Result<Self, TarProblem> {
        if block.iter().all(|&b| b == 0) {
            return Ok(Self::Zero);
        }
        let stated = numeric(&block[148..156]).ok_or(TarProblem::Checksum)?;
        // The checksum field counts as spaces. Some old writers summed signed bytes.
        let sum = |byte: fn(u8) -> i64| {
            let field = block[148..156].iter().map(|&b| byte(b)).sum::<i64>();
            block.iter().map(|&b| byte(b)).sum::<i64>() - field + 8 * i64::from(b' ')
        };
        if stated != sum(i64::from) && stated != sum(|b| i64::from(b as i8)) {
            return Err(TarProblem::Checksum);
        }
        let format = match (&block[257..263], &block[263..265]) {
            (b"ustar\0", _) if &block[508..512] == b"tar\0" => Format::Star,
            (b"ustar\0", _) => Format::Ustar,
            (b"ustar ", b" \0") => Format::Gnu,
            _ => Format::V7,
        };
        Ok(Self::Header(Box::new(Header {
            block: *block,
            format,
        })))
    }
}

impl Header {
    pub(super) fn type_flag(&self) -> u8 {
        self.block[156]
    }

    /// The name, with ustar's prefix in front.
    pub(super) fn path(&self) -> Vec<u8> {
        let prefix = match self.format {
            Format::Ustar => text(&self.block[345..500]),
            Format::Star => text(&self.block[345..476]),
            Format::V7 | Format::Gnu => b"",
        };
        let name = text(&self.block[..100]);
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(&self.block[157..257]).to_vec()
    }

    /// The permission bits; whatever else a writer put into the field is not of interest.
    pub(super) fn mode(&self) -> Result<u16, TarProblem> {
        Ok((self.number("mode", 100, 8)? & 0o7777) as u16)
    }

    pub(super) fn uid(&self) -> Result<i64, TarProblem> {
        self.number("uid", 108, 8)
    }

    pub(super) fn gid(&self) -> Result<i64, TarProblem> {
        self.number("gid", 116, 8)
    }

    pub(super) fn size(&self) -> Result<u64, TarProblem> {
        self.unsigned("size", 124, 12)
    }

    pub(super) fn mtime(&self) -> Result<i64, TarProblem> {
        self.number("mtime", 136, 12)
    }

    pub(super) fn device(&self) -> Result<(u64, u64), TarProblem> {
        Ok((
            self.unsigned("devmajor", 329, 8)?,
            self.unsigned("devminor", 337, 8)?,
        ))
    }

    /// Old GNU sparse files: the first four extents, whether extension blocks follow, and the
    /// apparent size.
    pub(super) fn old_gnu_sparse(&self) -> Result<(Vec<Extent>, bool, u64), TarProblem> {
        let mut extents = Vec::new();
        let extended = sparse_block(&self.block[386..483], &mut extents)?;
        Ok((extents, extended, self.unsigned("realsize", 483, 12)?))
    }

    fn number(&self, field: &'static str, at: usize, len: usize) -> Result<i64, TarProblem> {
        let bytes = &self.block[at..at + len];
        numeric(bytes).ok_or_else(|| TarProblem::Number {
            field,
            value: show(bytes),
        })
    }

    fn unsigned(&self, field: &'static str, at: usize, len: usize) -> Result<u64, TarProblem> {
        let value = self.number(field, at, len)?;
        u64::try_from(value).map_err(|_| TarProblem::Number {
            field,
            value: value.to_string(),
        })
    }
}

/// Reads the extents of a header (4) or of an extension block (21), each 12 + 12 bytes and ended
/// by an empty one, and the flag behind them that says that another block follows.
pub(super) fn sparse_block(area: &[u8], extents: &mut Vec<Extent>) -> Result<bool, TarProblem> {
    let (maps, flag) = area.split_at(area.len() / 24 * 24);
    for map in maps.chunks_exact(24) {
        if map[0] == 0 || map[12] == 0 {
            break;
        }
        let number = |bytes: &[u8]| {
            numeric(bytes)
                .and_then(|n| u64::try_from(n).ok())
                .ok_or_else(|| TarProblem::Number {
                    field: "sparse map",
                    value: show(bytes),
                })
        };
        extents.push((number(&map[..12])?, number(&map[12..])?));
    }
    Ok(flag.first().is_some_and(|&f| f != 0))
}

/// A text field: up to the first NUL, or full.
pub(super) fn text(field: &[u8]) -> &[u8] {
    field.split(|&b| b == 0).next().unwrap_or_default()
}
