//! Extended attributes of an inode: which ones are kept, and their bytes.
//!
//! All are stored inline, behind the inode: a header of 12 bytes, all zero because nothing is shared
//! between inodes, then the entries, each padded to 4 bytes: `name_len u8, prefix u8, value_len
//! u16, name, value`. The prefix stands for the beginning of the name.

use super::disk::{XATTR_HEADER_BYTES, le16, le32, put};
use super::write::Problem;
use crate::tree::Xattr;

/// Longest value of one attribute: its length has 16 bits. Linux allows one byte more.
pub const XATTR_VALUE_BYTES: usize = u16::MAX as usize;

/// Room for all attributes of one inode with their headers: its length, in units of 4 bytes, has 16
/// bits.
pub const XATTRS_BYTES: u32 = XATTR_HEADER_BYTES + 4 * (u16::MAX as u32 - 1);

/// Longest full name: Linux's `XATTR_NAME_MAX`. Nobody could ask for a longer one.
const NAME_BYTES: usize = 255;

const ENTRY_BYTES: usize = 4;
const ACL_ACCESS: u8 = 2;
const ACL_DEFAULT: u8 = 3;

/// The prefixes that Linux mounts answer for, as (number, prefix, whole name?).
const PREFIXES: [(u8, &[u8], bool); 5] = [
    (1, b"user.", false),
    (ACL_ACCESS, b"system.posix_acl_access", true),
    (ACL_DEFAULT, b"system.posix_acl_default", true),
    (4, b"trusted.", false),
    (6, b"security.", false),
];

/// The number that stands for the beginning of a name, and the rest of it.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|&(index, prefix, whole)| {
        let rest = name.strip_prefix(prefix)?;
        (rest.is_empty() == whole).then_some((index, rest))
    })
}

/// Whether an attribute can exist on Linux at all. Others (`com.apple.quarantine` in a layer made on
/// a Mac) are left out of the image, as every unpacker leaves them out: no Linux file system takes
/// them.
pub fn is_kept(name: &[u8]) -> bool {
    split(name).is_some()
}

/// An attribute as it will be stored.
struct Stored<'a> {
    prefix: u8,
    rest: &'a [u8],
    value: std::borrow::Cow<'a, [u8]>,
}

impl Stored<'_> {
    fn bytes(&self) -> usize {
        (ENTRY_BYTES + self.rest.len() + self.value.len()).next_multiple_of(4)
    }
}

fn store<'a>(name: &'a [u8], value: &'a [u8]) -> Result<Option<Stored<'a>>, Problem> {
    let Some((prefix, rest)) = split(name) else {
        return Ok(None);
    };
    let printable = || name.escape_ascii().to_string();
    if name.len() > NAME_BYTES || name.contains(&0) {
        return Err(Problem::XattrName { name: printable() });
    }
    if value.len() > XATTR_VALUE_BYTES {
        return Err(Problem::XattrValue {
            name: printable(),
            len: value.len(),
        });
    }
    let value = if matches!(prefix, ACL_ACCESS | ACL_DEFAULT) {
        match normal_acl(value).ok_or_else(|| Problem::Acl { name: printable() })? {
            None => return Ok(None),
            Some(acl) => acl.into(),
        }
    } else {
        value.into()
    };
    Ok(Some(Stored {
        prefix,
        rest,
        value,
    }))
}

/// A POSIX ACL as the kernel gives it back: the id of entries that have none is all ones.
/// `Some(None)` for an empty list, which is the same as no list; `None` for bytes that are no ACL,
/// over which the kernel would refuse to open the file.
fn normal_acl(value: &[u8]) -> Option<Option<Vec<u8>>> {
    const VERSION: u32 = 2;
    const ENTRY: usize = 8;
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    const WITHOUT_ID: [u16; 4] = [0x01, 0x04, 0x10, 0x20];
    if value.is_empty() {
        return Some(None);
    }
    if value.len() % ENTRY != 4 || le32(value, 0) != VERSION {
        return None;
    }
    let mut acl = value.to_vec();
    for entry in acl[4..].chunks_mut(ENTRY) {
        match le16(entry, 0) {
            USER | GROUP => (),
            tag if WITHOUT_ID.contains(&tag) => put(entry, 4, &[0xff; 4]),
            _ => return None,
        }
    }
    Some((acl.len() > 4).then_some(acl))
}

/// The bytes that an inode's attributes take behind it; 0 when none is kept.
pub(super) fn encoded_bytes(xattrs: &[Xattr]) -> Result<u32, Problem> {
    let mut total = 0usize;
    for (name, value) in xattrs {
        total += store(name, value)?.map_or(0, |s| s.bytes());
    }
    if total == 0 {
        return Ok(0);
    }
    total += XATTR_HEADER_BYTES as usize;
    u32::try_from(total)
        .ok()
        .filter(|&bytes| bytes <= XATTRS_BYTES)
        .ok_or(Problem::XattrTotal { len: total })
}

/// Writes attributes, in their order, into `room`, which is zero and as long as [`encoded_bytes`]
/// said.
pub(super) fn encode_into(room: &mut [u8], xattrs: &[Xattr]) -> Result<(), Problem> {
    let mut at = XATTR_HEADER_BYTES as usize;
    for (name, value) in xattrs {
        let Some(stored) = store(name, value)? else {
            continue;
        };
        let value_len = u16::try_from(stored.value.len()).expect("checked by store");
        room[at] = u8::try_from(stored.rest.len()).expect("checked by store");
        room[at + 1] = stored.prefix;
        put(room, at + 2, &value_len.to_le_bytes());
        put(room, at + ENTRY_BYTES, stored.rest);
        put(room, at + ENTRY_BYTES + stored.rest.len(), &stored.value);
        at += stored.bytes();
    }
    Ok(())
}

/// One attribute that was read: its name is `prefix` followed by `rest`.
pub(super) struct Read<'a> {
    pub prefix: &'static [u8],
    pub rest: &'a [u8],
    pub value: &'a [u8],
}

impl Read<'_> {
    pub fn is_named(&self, name: &[u8]) -> bool {
        name.strip_prefix(self.prefix) == Some(self.rest)
    }
}

/// The attributes in the bytes behind an inode (`bytes` is not empty).
pub(super) fn decode(bytes: &[u8]) -> impl Iterator<Item = Result<Read<'_>, &'static str>> {
    let header_is_empty = bytes
        .get(..XATTR_HEADER_BYTES as usize)
        .is_some_and(|header| header[4] == 0);
    let mut rest = bytes.get(XATTR_HEADER_BYTES as usize..).unwrap_or(&[]);
    let mut failed = false;
    std::iter::from_fn(move || {
        if failed {
            return None;
        }
        if !header_is_empty {
            failed = true;
            return Some(Err("shared extended attributes"));
        }
        if rest.is_empty() {
            return None;
        }
        let one = decode_one(rest);
        match one {
            Ok((read, taken)) => {
                rest = rest.get(taken..).unwrap_or(&[]);
                Some(Ok(read))
            }
            Err(what) => {
                failed = true;
                Some(Err(what))
            }
        }
    })
}

fn decode_one(bytes: &[u8]) -> Result<(Read<'_>, usize), &'static str> {
    const CUT: &str = "an extended attribute that does not end";
    let [name_len, index, v0, v1, body @ ..] = bytes else {
        return Err(CUT);
    };
    let (name_len, value_len) = (
        usize::from(*name_len),
        usize::from(u16::from_le_bytes([*v0, *v1])),
    );
    let &(_, prefix, whole) = PREFIXES
        .iter()
        .find(|(i, ..)| i == index)
        .ok_or("an extended attribute of an unknown kind")?;
    let (rest, value) = body.split_at_checked(name_len).ok_or(CUT)?;
    let value = value.get(..value_len).ok_or(CUT)?;
    if rest.is_empty() != whole || rest.contains(&0) {
        return Err("an extended attribute without a proper name");
    }
    let taken = (ENTRY_BYTES + name_len + value_len).next_multiple_of(4);
    Ok((
        Read {
            prefix,
            rest,
            value,
        },
        taken,
    ))
}
