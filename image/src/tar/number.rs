//! Numbers in tar headers and PAX records.

use crate::tree::Mtime;

/// A numeric header field: octal digits, or GNU's base-256 when the first byte has its top bit set
/// (two's complement, the bit below the marker is the sign). Empty fields are 0. As in Go, spaces
/// and NULs around the digits are dropped, and a NUL ends them.
pub(super) fn numeric(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => base_256(field),
        _ => octal(field),
    }
}

fn octal(field: &[u8]) -> Option<i64> {
    let blank = |b: &u8| *b == b' ' || *b == 0;
    let start = field.iter().position(|b| !blank(b)).unwrap_or(field.len());
    let digits = field[start..].split(|&b| b == 0).next()?.trim_ascii_end();
    digits.iter().try_fold(0i64, |n, &b| match b {
        b'0'..=b'7' => n.checked_mul(8)?.checked_add(i64::from(b - b'0')),
        _ => None,
    })
}

fn base_256(field: &[u8]) -> Option<i64> {
    let negative = field[0] & 0x40 != 0;
    // The marker bit becomes a copy of the sign, the rest is plain two's complement.
    let first = if negative { field[0] } else { field[0] & 0x7f };
    let start = if negative { -1i128 } else { 0 };
    let mut value = start;
    for (n, &b) in field.iter().enumerate() {
        let b = if n == 0 { first } else { b };
        value = (value << 8) | i128::from(b);
        // Sixteen bytes of i128 are never filled by wrong turns: stop once i64 is left.
        i64::try_from(value).ok()?;
    }
    i64::try_from(value).ok()
}

/// An unsigned decimal number: digits only.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |n, &b| match b {
        b'0'..=b'9' => n.checked_mul(10)?.checked_add(u64::from(b - b'0')),
        _ => None,
    })
}

/// A PAX time: decimal seconds, perhaps negative, perhaps with a fraction. Digits beyond the
/// nanosecond are cut off, as Go and GNU tar do.
pub(super) fn pax_time(text: &[u8]) -> Option<Mtime> {
    const SECOND: u32 = 1_000_000_000;
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |&b| b == b'.');
    let whole = decimal(parts.next()?)?;
    let mut nsec = 0;
    if let Some(fraction) = parts.next() {
        if !fraction.iter().all(u8::is_ascii_digit) {
            return None;
        }
        for place in 0..9 {
            nsec = nsec * 10 + u32::from(fraction.get(place).map_or(0, |b| b - b'0'));
        }
    }
    let sec = i64::try_from(whole).ok()?;
    Some(match (negative, nsec) {
        (false, nsec) => Mtime { sec, nsec },
        (true, 0) => Mtime { sec: -sec, nsec: 0 },
        (true, nsec) => Mtime {
            sec: -sec - 1,
            nsec: SECOND - nsec,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_fields_are_read_with_the_padding_of_every_writer() {
        for (field, value) in [
            (&b"0000644\0"[..], 0o644),
            (b" 644 \0\0\0", 0o644),
            (b"00000644", 0o644),
            (b"\0\0\0\0\0\0\0\0", 0),
            (b"        ", 0),
            (b"77777777777\0", 0o77777777777),
            (b"644\0garb", 0o644),
        ] {
            assert_eq!(numeric(field), Some(value), "{}", field.escape_ascii());
        }
        for bad in [
            &b"0000648\0"[..],
            b"-1",
            b"6 4",
            b"777777777777777777777777",
        ] {
            assert_eq!(numeric(bad), None, "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn base_256_holds_large_and_negative_numbers() {
        let field = |value: i64| {
            let mut f = [if value < 0 { 0xff } else { 0 }; 12];
            f[4..].copy_from_slice(&value.to_be_bytes());
            f[0] |= 0x80;
            f
        };
        for value in [0, 1, 0o77777777777 + 1, i64::MAX, -1, -1_000_000, i64::MIN] {
            assert_eq!(numeric(&field(value)), Some(value));
        }
        let short = [0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xfe];
        assert_eq!(numeric(&short), Some(4_294_967_294));
        assert_eq!(numeric(&[0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(
            numeric(&[0xbf, 255, 255, 255, 255, 255, 255, 255, 255]),
            None
        );
    }

    #[test]
    fn pax_times_keep_nanoseconds_and_round_down_before_1970() {
        let t = |sec, nsec| Some(Mtime { sec, nsec });
        assert_eq!(pax_time(b"1350244992.023960108"), t(1350244992, 23960108));
        assert_eq!(pax_time(b"1.5"), t(1, 500_000_000));
        assert_eq!(pax_time(b"1."), t(1, 0));
        assert_eq!(pax_time(b"0.9999999999"), t(0, 999_999_999));
        assert_eq!(pax_time(b"-1.5"), t(-2, 500_000_000));
        assert_eq!(pax_time(b"-0.000000001"), t(-1, 999_999_999));
        assert_eq!(pax_time(b"-3"), t(-3, 0));
        for bad in [
            &b""[..],
            b"-",
            b".5",
            b"1.x",
            b"+1",
            b"1e3",
            b"99999999999999999999",
        ] {
            assert_eq!(pax_time(bad), None, "{}", bad.escape_ascii());
        }
    }
}
