//! What the fuzz targets share.

use std::collections::HashMap;
use std::convert::Infallible;

use lazyimg_image::flatten::ContentSink;
use lazyimg_image::limits::Limits;
use lazyimg_image::tree::ContentId;

/// Small limits: the fuzzer reaches them, and one input takes milliseconds.
pub fn limits() -> Limits {
    Limits {
        layer_bytes: 4 << 20,
        image_bytes: 8 << 20,
        file_bytes: 1 << 40,
        entries_per_image: 2000,
        metadata_bytes: 1 << 20,
        compression_slack_bytes: 1 << 20,
        // A frame may ask for its window before it holds a byte.
        zstd_window_log: 20,
        ..Limits::default()
    }
}

/// Takes file bodies and keeps their sizes.
#[derive(Default)]
pub struct Sizes {
    /// Size of each content.
    pub of: HashMap<ContentId, u64>,
    now: u64,
    at: u64,
}

impl ContentSink for Sizes {
    type Error = Infallible;

    fn begin(&mut self, size: u64) -> Result<(), Infallible> {
        assert!(size > 0, "an empty file has no body");
        (self.now, self.at) = (size, 0);
        Ok(())
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Infallible> {
        assert!(!bytes.is_empty() && offset >= self.at, "slices grow");
        self.at = offset + bytes.len() as u64;
        assert!(self.at <= self.now, "a body stays within its size");
        Ok(())
    }

    fn finish(&mut self) -> Result<ContentId, Infallible> {
        let id = ContentId(u32::try_from(self.of.len()).expect("limits are far below"));
        self.of.insert(id, self.now);
        Ok(id)
    }
}

/// Splits an input in two at the place that its first four bytes say.
pub fn halves(data: &[u8]) -> (&[u8], &[u8]) {
    match data.split_first_chunk::<4>() {
        Some((at, rest)) => rest.split_at((u32::from_le_bytes(*at) as usize).min(rest.len())),
        None => (&[], &[]),
    }
}

/// An input that [`halves`] splits into these two.
pub fn join(first: &[u8], second: &[u8]) -> Vec<u8> {
    let at = u32::try_from(first.len()).expect("inputs are small");
    [&at.to_le_bytes()[..], first, second].concat()
}
