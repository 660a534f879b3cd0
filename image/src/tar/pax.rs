//! PAX extended headers: records of `"%d %s=%s\n"`, and what they say about an entry.

use std::collections::BTreeMap;

use super::acl;
use super::error::{TarProblem, show};
use super::number::{decimal, pax_time};
use crate::limits::{Limits, within};
use crate::tree::Mtime;

/// Splits the body of an extended header into keyword and value.
///
/// A record begins with its own length in decimal, which counts everything up to its newline.
pub(super) fn records(mut body: &[u8]) -> impl Iterator<Item = Result<(&[u8], &[u8]), TarProblem>> {
    std::iter::from_fn(move || {
        // Star pads the body with NULs.
        if body.iter().all(|&b| b == 0) {
            return None;
        }
        let record = split_record(body);
        body = match &record {
            Ok((_, _, rest)) => rest,
            Err(_) => &[],
        };
        Some(
            record
                .map(|(key, value, _)| (key, value))
                .map_err(TarProblem::Pax),
        )
    })
}

/// Keyword, value, and what follows the record.
type Record<'a> = (&'a [u8], &'a [u8], &'a [u8]);

fn split_record(body: &[u8]) -> Result<Record<'_>, &'static str> {
    // 20 digits hold any u64; a longer run of digits is an attack on whoever searches for its end.
    let space = body
        .iter()
        .take(21)
        .position(|&b| b == b' ')
        .ok_or("a record has no length")?;
    let len = decimal(&body[..space]).ok_or("a record's length is not a number")?;
    let len = usize::try_from(len).map_err(|_| "a record is longer than its header")?;
    if len > body.len() {
        return Err("a record is longer than its header");
    }
    if len < space + 2 {
        return Err("a record is shorter than its own length field");
    }
    let (record, rest) = body.split_at(len);
    let text = record[space + 1..]
        .strip_suffix(b"\n")
        .ok_or("a record does not end with a newline")?;
    let equals = text
        .iter()
        .position(|&b| b == b'=')
        .ok_or("a record has no '='")?;
    let (key, value) = (&text[..equals], &text[equals + 1..]);
    if key.is_empty() || key.contains(&0) {
        return Err("a record has no keyword, or one with a NUL byte in it");
    }
    Ok((key, value, rest))
}

/// What extended headers said about one entry (or, as the global state, about all that follow).
#[derive(Debug, Clone, Default)]
pub(super) struct Extended {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u64>,
    pub gid: Option<u64>,
    pub mtime: Option<Mtime>,
    pub dev_major: Option<u64>,
    pub dev_minor: Option<u64>,
    pub sparse: SparseKeys,
    /// `SCHILY.xattr.*`: raw values.
    schily: BTreeMap<Vec<u8>, Vec<u8>>,
    /// `LIBARCHIVE.xattr.*`, decoded, and `SCHILY.acl.*` as the attributes that they stand for.
    other: BTreeMap<Vec<u8>, Vec<u8>>,
    /// ACLs in text that could not be kept.
    pub dropped: u64,
}

/// The `GNU.sparse.*` keywords.
#[derive(Debug, Clone, Default)]
pub(super) struct SparseKeys {
    pub major: Option<u64>,
    pub minor: Option<u64>,
    pub name: Option<Vec<u8>>,
    /// `GNU.sparse.realsize` (1.0) or `GNU.sparse.size` (0.0, 0.1).
    pub real_size: Option<u64>,
    pub block_count: Option<u64>,
    /// Offsets and lengths, alternating: of `GNU.sparse.map` (0.1), or of the repeated
    /// `GNU.sparse.offset` and `GNU.sparse.numbytes` (0.0).
    pub map: Vec<u64>,
}

impl SparseKeys {
    /// True when any version's keywords make the entry a sparse file.
    pub(super) fn present(&self) -> bool {
        self.major.is_some() || self.real_size.is_some() || self.block_count.is_some()
    }
}

impl Extended {
    /// Takes a record. An empty value gives the header's own field back its force, except for
    /// extended attributes, which may be empty (Go drops those; GNU tar and star keep them).
    pub(super) fn take(
        &mut self,
        key: &[u8],
        value: &[u8],
        limits: &Limits,
    ) -> Result<(), TarProblem> {
        match key {
            b"path" => self.path = text(value)?,
            b"linkpath" => self.link = text(value)?,
            b"size" => self.size = number("size", value)?,
            b"uid" => self.uid = number("uid", value)?,
            b"gid" => self.gid = number("gid", value)?,
            b"mtime" => self.mtime = time(value)?,
            b"SCHILY.devmajor" => self.dev_major = number("SCHILY.devmajor", value)?,
            b"SCHILY.devminor" => self.dev_minor = number("SCHILY.devminor", value)?,
            b"SCHILY.acl.access" => self.acl("system.posix_acl_access", value),
            b"SCHILY.acl.default" => self.acl("system.posix_acl_default", value),
            _ => {
                if let Some(name) = key.strip_prefix(b"GNU.sparse.") {
                    self.take_sparse(name, value, limits)?;
                } else if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.schily.insert(name.to_vec(), value.to_vec());
                    self.check_xattrs(limits)?;
                } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    let name = url_decode(name).ok_or(TarProblem::Pax(
                        "a LIBARCHIVE.xattr name is not URL-encoded",
                    ))?;
                    let value = base64_decode(value)
                        .ok_or(TarProblem::Pax("a LIBARCHIVE.xattr value is not base64"))?;
                    self.other.insert(name, value);
                    self.check_xattrs(limits)?;
                }
                // atime, ctime, uname, gname, comment, hdrcharset, and what vendors add: nothing
                // that an image keeps.
            }
        }
        Ok(())
    }

    fn take_sparse(
        &mut self,
        name: &[u8],
        value: &[u8],
        limits: &Limits,
    ) -> Result<(), TarProblem> {
        let sparse = &mut self.sparse;
        match name {
            b"major" => sparse.major = number("GNU.sparse.major", value)?,
            b"minor" => sparse.minor = number("GNU.sparse.minor", value)?,
            b"name" => sparse.name = text(value)?,
            b"realsize" | b"size" => sparse.real_size = number("GNU.sparse.size", value)?,
            b"numblocks" => sparse.block_count = number("GNU.sparse.numblocks", value)?,
            b"map" => {
                sparse.map = value
                    .split(|&b| b == b',')
                    .filter(|field| !field.is_empty())
                    .map(|field| required("GNU.sparse.map", field))
                    .collect::<Result<_, _>>()?;
            }
            b"offset" | b"numbytes" => {
                if (name == b"offset") != sparse.map.len().is_multiple_of(2) {
                    return Err(TarProblem::Sparse("offsets and lengths do not alternate"));
                }
                sparse.map.push(required("GNU.sparse.offset", value)?);
            }
            _ => {}
        }
        within(
            (sparse.map.len() / 2) as u64,
            limits.sparse_extents as u64,
            "extents in a sparse file",
            Some("--max-sparse-extents"),
        )?;
        Ok(())
    }

    fn acl(&mut self, attribute: &str, value: &[u8]) {
        match acl::to_xattr(value) {
            Some(Some(binary)) => {
                self.other.insert(attribute.into(), binary);
            }
            Some(None) => {
                self.other.remove(attribute.as_bytes());
            }
            // Names of users can't be resolved without the system that wrote the archive. No other
            // reader of layers looks at these keywords at all.
            None => self.dropped += 1,
        }
    }

    fn check_xattrs(&self, limits: &Limits) -> Result<(), TarProblem> {
        let all = || self.schily.iter().chain(&self.other);
        within(
            all().count() as u64,
            limits.xattr_count_per_entry as u64,
            "extended attributes on one entry",
            Some("--max-xattr-count"),
        )?;
        within(
            all().map(|(n, v)| n.len() + v.len()).sum::<usize>() as u64,
            limits.xattr_bytes_per_entry as u64,
            "bytes of extended attributes on one entry",
            Some("--max-xattr-bytes"),
        )?;
        Ok(())
    }

    /// Lays the records of one entry over the global ones.
    pub(super) fn over(mut self, global: &Self) -> Self {
        self.uid = self.uid.or(global.uid);
        self.gid = self.gid.or(global.gid);
        self.mtime = self.mtime.or(global.mtime);
        for (mine, theirs) in [
            (&mut self.schily, &global.schily),
            (&mut self.other, &global.other),
        ] {
            for (name, value) in theirs {
                if !mine.contains_key(name) {
                    mine.insert(name.clone(), value.clone());
                }
            }
        }
        self
    }

    /// The keyword, when a global header must not have set it.
    pub(super) fn entry_only(key: &[u8]) -> bool {
        matches!(
            key,
            b"path" | b"linkpath" | b"size" | b"SCHILY.devmajor" | b"SCHILY.devminor"
        ) || key.starts_with(b"GNU.sparse.")
    }

    /// All extended attributes, sorted by name. `SCHILY.xattr` wins, being the raw form.
    pub(super) fn into_xattrs(self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut all = self.other;
        all.extend(self.schily);
        all.into_iter().collect()
    }
}

fn text(value: &[u8]) -> Result<Option<Vec<u8>>, TarProblem> {
    if value.contains(&0) {
        return Err(TarProblem::Pax("a path contains a NUL byte"));
    }
    Ok((!value.is_empty()).then(|| value.to_vec()))
}

fn number(field: &'static str, value: &[u8]) -> Result<Option<u64>, TarProblem> {
    if value.is_empty() {
        return Ok(None);
    }
    required(field, value).map(Some)
}

fn required(field: &'static str, value: &[u8]) -> Result<u64, TarProblem> {
    decimal(value).ok_or_else(|| TarProblem::Number {
        field,
        value: show(value),
    })
}

fn time(value: &[u8]) -> Result<Option<Mtime>, TarProblem> {
    if value.is_empty() {
        return Ok(None);
    }
    let bad = || TarProblem::Number {
        field: "mtime",
        value: show(value),
    };
    pax_time(value).map(Some).ok_or_else(bad)
}

fn url_decode(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&b, tail)) = rest.split_first() {
        if b == b'%' {
            let hex = std::str::from_utf8(tail.get(..2)?).ok()?;
            out.push(u8::from_str_radix(hex, 16).ok()?);
            rest = &tail[2..];
        } else {
            out.push(b);
            rest = tail;
        }
    }
    Some(out)
}

/// RFC 4648 base64; libarchive writes it without padding, others with.
fn base64_decode(text: &[u8]) -> Option<Vec<u8>> {
    let text = text.strip_suffix(b"=").unwrap_or(text);
    let text = text.strip_suffix(b"=").unwrap_or(text);
    let mut out = Vec::with_capacity(text.len() / 4 * 3 + 2);
    for group in text.chunks(4) {
        if group.len() == 1 {
            return None;
        }
        let mut bits = 0u32;
        for place in 0..4 {
            let six = match group.get(place) {
                None => 0,
                Some(b @ b'A'..=b'Z') => b - b'A',
                Some(b @ b'a'..=b'z') => b - b'a' + 26,
                Some(b @ b'0'..=b'9') => b - b'0' + 52,
                Some(b'+') => 62,
                Some(b'/') => 63,
                Some(_) => return None,
            };
            bits = bits << 6 | u32::from(six);
        }
        out.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        crate::tar::tests_support::pax_record(key.as_bytes(), value)
    }

    fn extended(body: &[u8]) -> Result<Extended, TarProblem> {
        let mut e = Extended::default();
        for r in records(body) {
            let (key, value) = r?;
            e.take(key, value, &Limits::default())?;
        }
        Ok(e)
    }

    #[test]
    fn a_record_may_hold_newlines_and_equal_signs() {
        let body = [record("path", b"a\nb=c"), record("mtime", b"1.25")].concat();
        let e = extended(&body).unwrap();
        assert_eq!(e.path.as_deref(), Some(&b"a\nb=c"[..]));
        assert_eq!(
            e.mtime,
            Some(Mtime {
                sec: 1,
                nsec: 250_000_000
            })
        );
    }

    #[test]
    fn an_empty_value_takes_an_earlier_one_back() {
        let body = [record("path", b"a"), record("path", b"")].concat();
        assert_eq!(extended(&body).unwrap().path, None);
    }

    #[test]
    fn both_ways_to_write_an_attribute_are_read_and_the_raw_one_wins() {
        let body = [
            record("LIBARCHIVE.xattr.user.a%20b%3d", b"AAEC/w"),
            record("LIBARCHIVE.xattr.user.x", b"bG9zZXM="),
            record("SCHILY.xattr.user.x", b"wins\0\n"),
            record("SCHILY.xattr.user.empty", b""),
        ]
        .concat();
        assert_eq!(
            extended(&body).unwrap().into_xattrs(),
            [
                (b"user.a b=".to_vec(), vec![0, 1, 2, 255]),
                (b"user.empty".to_vec(), vec![]),
                (b"user.x".to_vec(), b"wins\0\n".to_vec()),
            ]
        );
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            &b"path=x\n"[..],
            b"99 path=x\n",
            b"3 x\n",
            b"0 path=x\n",
            b"9 path=xx",
            b"7 path\n",
            b"5 =x\n",
            b"18446744073709551616 path=x\n",
            b"99999999999999999999999999 path=x\n",
        ] {
            assert!(extended(bad).is_err(), "{}", bad.escape_ascii());
        }
        assert!(extended(&record("size", b"-1")).is_err());
        assert!(extended(&record("path", b"a\0b")).is_err());
        assert!(extended(&record("LIBARCHIVE.xattr.user.x", b"A")).is_err());
        assert!(extended(&record("LIBARCHIVE.xattr.user.%x", b"AA")).is_err());
        assert!(extended(&record("GNU.sparse.numbytes", b"1")).is_err());
    }

    #[test]
    fn endless_attributes_are_stopped_by_count_and_by_bytes() {
        let mut e = Extended::default();
        let limits = Limits {
            xattr_count_per_entry: 3,
            xattr_bytes_per_entry: 100,
            ..Limits::default()
        };
        let mut take = |n: usize, len: usize| {
            e.take(
                format!("SCHILY.xattr.user.{n}").as_bytes(),
                &vec![b'x'; len],
                &limits,
            )
        };
        for n in 0..3 {
            take(n, 1).unwrap();
        }
        let refused = take(3, 1).unwrap_err().to_string();
        assert!(refused.contains("--max-xattr-count"), "{refused}");
        let mut e = Extended::default();
        let refused = e
            .take(b"SCHILY.xattr.user.a", &[0; 95], &limits)
            .unwrap_err()
            .to_string();
        assert!(refused.contains("more than 100 bytes") && refused.contains("--max-xattr-bytes"));
    }
}
