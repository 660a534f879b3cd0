//! Where a pack of small files ends: decided by what was packed.

/// Files of at least this many bytes (512 KiB) are cut on their own; also the length of the cut.
/// The size that AWS Lambda settled on (Brooker et al., USENIX ATC 2023).
pub const LARGE: u64 = 512 << 10;

/// The mean length of a pack of small files, in bytes.
pub const PACK_TARGET: u64 = 512 << 10;

/// A pack is never shorter, but for the last of a layer, in bytes.
const PACK_MIN: u64 = 128 << 10;

/// A pack is never longer, in bytes: the longest chunk.
pub const PACK_MAX: u64 = lazyimg_convergent::MAX_CHUNK_LEN as u64;

/// Decides, file by file, where packs end.
///
/// A pack ends after a file whose content hash falls below a threshold that grows with the file's
/// length, so that packs have the same mean length whether files are small or large. One file more
/// or less changes its own pack; the next cut that does not depend on it brings both versions back
/// in step, as with any content-defined chunking.
#[derive(Debug, Default)]
pub struct PackCutter {
    len: u64,
}

impl PackCutter {
    /// Whether a file of `len` bytes (padded) must begin a new pack, since this one would overflow.
    pub fn overflows(&self, len: u64) -> bool {
        self.len + len > PACK_MAX
    }

    /// Forgets the pack: the next file begins a new one.
    pub fn reset(&mut self) {
        self.len = 0;
    }

    /// Adds a file of `len` bytes (padded to 4096) with this content hash; whether the pack ends here.
    pub fn add(&mut self, len: u64, hash: &[u8; 32]) -> bool {
        self.len += len;
        if self.len < PACK_MIN {
            return false;
        }
        let mut head = [0; 8];
        head.copy_from_slice(&hash[..8]);
        let draw = u64::from_le_bytes(head);
        // P(end) = len / (target − min): a Poisson process over bytes after the minimum.
        draw < (u64::MAX / (PACK_TARGET - PACK_MIN)).saturating_mul(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cuts(files: &[(u64, u32)]) -> Vec<Vec<u32>> {
        let mut cutter = PackCutter::default();
        let (mut packs, mut pack) = (Vec::new(), Vec::new());
        for &(len, name) in files {
            if cutter.overflows(len) {
                packs.push(std::mem::take(&mut pack));
                cutter.reset();
            }
            pack.push(name);
            if cutter.add(len, blake3::hash(&name.to_le_bytes()).as_bytes()) {
                packs.push(std::mem::take(&mut pack));
                cutter.reset();
            }
        }
        packs.push(pack);
        packs
    }

    #[test]
    fn packs_have_the_target_length_for_small_and_for_middling_files() {
        for len in [4096, 16384, 131072] {
            let files: Vec<_> = (0..40_000_000 / len).map(|n| (len, n as u32)).collect();
            let mean = 40_000_000 / cuts(&files).len() as u64;
            assert!(
                (PACK_TARGET * 3 / 4..PACK_TARGET * 5 / 4).contains(&mean),
                "{len}: {mean}"
            );
        }
    }

    #[test]
    fn no_pack_is_longer_than_a_chunk_may_be() {
        let files: Vec<_> = (0..3000)
            .map(|n| (4096 * (1 + u64::from(n) % 127), n))
            .collect();
        for pack in cuts(&files) {
            let len: u64 = pack.iter().map(|n| 4096 * (1 + u64::from(*n) % 127)).sum();
            assert!(len <= PACK_MAX);
        }
    }

    #[test]
    fn one_more_file_disturbs_its_neighbourhood_and_not_the_rest() {
        let files: Vec<_> = (0..5000).map(|n| (8192, n)).collect();
        let before: std::collections::HashSet<_> = cuts(&files).into_iter().collect();
        for at in [0, 17, 2500, 4999] {
            let mut more = files.clone();
            more.insert(at, (8192, 1_000_000 + at as u32));
            let changed = cuts(&more)
                .into_iter()
                .filter(|p| !before.contains(p))
                .count();
            assert!(changed <= 6, "{changed} packs changed by a file at {at}");
        }
    }
}
