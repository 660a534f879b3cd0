//! The golden vectors of `docs/format.md`, for tests: the document has the numbers, once, and a test
//! that reads them fails when document and code disagree. Also included by the tests of `image`.
//!
//! A vector stands in a block fenced with `golden`: a name at the start of a line, then words, also
//! on indented lines below.

const DOCUMENT: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/format.md"));

/// The words of a vector.
pub(crate) fn words(name: &str) -> Vec<&'static str> {
    let mut fenced = false;
    let mut found: Option<Vec<&str>> = None;
    for line in DOCUMENT.lines() {
        if line.starts_with("```") {
            fenced = line == "```golden";
        } else if fenced {
            let mut line_words = line.split_ascii_whitespace();
            if !line.starts_with(' ') {
                if found.is_some() {
                    break;
                }
                if line_words.next() == Some(name) {
                    found = Some(Vec::new());
                }
            }
            if let Some(words) = &mut found {
                words.extend(line_words);
            }
        } else if found.is_some() {
            break;
        }
    }
    found.unwrap_or_else(|| panic!("docs/format.md has no golden vector {name}"))
}

/// A vector of text without spaces.
pub(crate) fn text(name: &str) -> String {
    words(name).concat()
}

/// A vector of bytes, which stands there in hex.
pub(crate) fn bytes(name: &str) -> Vec<u8> {
    let text = text(name);
    let byte = |pair: &[u8]| {
        let pair = std::str::from_utf8(pair).ok()?;
        u8::from_str_radix(pair, 16).ok()
    };
    let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(byte).collect();
    bytes.unwrap_or_else(|| panic!("the golden vector {name} of docs/format.md is not hex"))
}

/// A vector of exactly 32 bytes.
pub(crate) fn array(name: &str) -> [u8; 32] {
    let bytes = bytes(name);
    bytes
        .try_into()
        .unwrap_or_else(|_| panic!("the golden vector {name} of docs/format.md has not 32 bytes"))
}
