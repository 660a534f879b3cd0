//! Quantities of bytes as people write them.

/// A text that is no quantity of bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no quantity of bytes: write 1048576, \"512MiB\", \"100GiB\" or \"2TB\"")]
pub struct ParseQuantityError(pub String);

/// Bytes from a number with a unit: none or `B`; `kB`, `MB`, `GB`, `TB`, `PB` of 1000; `KiB`, `MiB`, `GiB`,
/// `TiB`, `PiB` of 1024. Fractions and signs are not allowed.
///
/// # Errors
/// [`ParseQuantityError`], also when it does not fit in 64 bits.
pub fn parse_bytes(text: &str) -> Result<u64, ParseQuantityError> {
    let error = || ParseQuantityError(text.chars().take(40).collect());
    let trimmed = text.trim();
    let digits = trimmed
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let (base, power) = match unit.trim_start() {
        "" | "B" => (1, 0),
        "kB" => (1000, 1),
        "MB" => (1000, 2),
        "GB" => (1000, 3),
        "TB" => (1000, 4),
        "PB" => (1000, 5),
        "KiB" => (1024, 1),
        "MiB" => (1024, 2),
        "GiB" => (1024, 3),
        "TiB" => (1024, 4),
        "PiB" => (1024, 5),
        _ => return Err(error()),
    };
    let number: u64 = number.parse().map_err(|_| error())?;
    let factor = u64::pow(base, power);
    number.checked_mul(factor).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_they_are_written() {
        for (text, bytes) in [
            ("0", 0),
            ("17", 17),
            ("17B", 17),
            ("3kB", 3_000),
            ("3KiB", 3_072),
            ("100GiB", 100 << 30),
            ("100 GiB", 100 << 30),
            (" 2TB ", 2_000_000_000_000),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "GiB",
            "-1",
            "+1",
            "1.5GiB",
            "1gib",
            "1 G iB",
            "99999999PiB",
            "1e9",
        ] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
