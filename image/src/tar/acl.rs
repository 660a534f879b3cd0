//! POSIX ACLs in text, as GNU tar and star write them, to the extended attribute that Linux keeps.
//!
//! Text: entries `tag:qualifier:perms` separated by commas or newlines, with star's `:id` behind an
//! entry that names somebody. Binary: version 2, then 8 bytes for each entry, little endian: tag,
//! permissions, id (`include/uapi/linux/posix_acl_xattr.h`).

const VERSION: u32 = 2;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
const NO_ID: u32 = u32::MAX;

/// The attribute's value; `Some(None)` when the ACL says no more than the mode does; `None` when the
/// text is malformed or names somebody without a number.
pub(super) fn to_xattr(text: &[u8]) -> Option<Option<Vec<u8>>> {
    let text = std::str::from_utf8(text).ok()?;
    let mut entries = Vec::new();
    for entry in text.split([',', '\n']) {
        let entry = entry.split('#').next().unwrap_or_default().trim();
        if !entry.is_empty() {
            entries.push(parse(entry)?);
        }
    }
    entries.sort_unstable();
    if entries
        .iter()
        .all(|(tag, ..)| [USER_OBJ, GROUP_OBJ, OTHER].contains(tag))
    {
        return Some(None);
    }
    let mut out = VERSION.to_le_bytes().to_vec();
    for (tag, id, perms) in entries {
        out.extend_from_slice(&tag.to_le_bytes());
        out.extend_from_slice(&perms.to_le_bytes());
        out.extend_from_slice(&id.to_le_bytes());
    }
    Some(Some(out))
}

/// Tag, id, permissions: the kernel wants the entries in this order.
fn parse(entry: &str) -> Option<(u16, u32, u16)> {
    let mut fields = entry.split(':').map(str::trim);
    let (tag, who, perms) = (fields.next()?, fields.next()?, fields.next()?);
    let number = fields.next();
    let (own, named) = match tag {
        "user" | "u" => (USER_OBJ, USER),
        "group" | "g" => (GROUP_OBJ, GROUP),
        "mask" | "m" => (MASK, MASK),
        "other" | "o" => (OTHER, OTHER),
        _ => return None,
    };
    let mut bits = 0;
    for c in perms.chars() {
        bits |= match c {
            'r' => 4,
            'w' => 2,
            'x' => 1,
            '-' => 0,
            _ => return None,
        };
    }
    match who {
        "" => Some((own, NO_ID, bits)),
        _ if own == named => None,
        who => Some((named, number.unwrap_or(who).parse().ok()?, bits)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_the_attribute_that_setfacl_would_set() {
        let value = to_xattr(b"user::rwx,user:1000:r-x,group::r-x,mask::rwx,other::---").unwrap();
        let expected = [
            &2u32.to_le_bytes()[..],
            &[1, 0, 7, 0, 255, 255, 255, 255],
            &[2, 0, 5, 0, 0xe8, 3, 0, 0],
            &[4, 0, 5, 0, 255, 255, 255, 255],
            &[16, 0, 7, 0, 255, 255, 255, 255],
            &[32, 0, 0, 0, 255, 255, 255, 255],
        ]
        .concat();
        assert_eq!(value, Some(expected));
        let star = to_xattr(b"user::rwx\nuser:lisa:r-x:1000\ngroup::r-x\nmask::rwx\nother::---\n");
        assert_eq!(star.unwrap(), value);
    }

    #[test]
    fn an_acl_that_repeats_the_mode_is_no_attribute() {
        assert_eq!(to_xattr(b"user::rw-,group::r--,other::r--"), Some(None));
        assert_eq!(to_xattr(b""), Some(None));
    }

    #[test]
    fn names_without_numbers_can_not_be_kept() {
        for bad in [
            "user:lisa:r-x",
            "user::rwz",
            "nobody::r",
            "user",
            "mask:1:r",
            "user:1:r:x",
        ] {
            assert_eq!(to_xattr(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(to_xattr(&[0xff, 0xfe]), None);
    }
}
