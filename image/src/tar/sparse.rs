//! Which bytes of a sparse file an archive holds.

use super::error::TarProblem;
use super::header::Extent;
use super::number::decimal;

/// The data extents of a file: sorted, disjoint, none empty, inside the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SparseMap {
    pub extents: Vec<Extent>,
    /// Apparent size of the file.
    pub real_size: u64,
}

impl SparseMap {
    /// Checks a map against the file's size and the number of bytes that the archive holds.
    pub(super) fn new(
        extents: Vec<Extent>,
        real_size: u64,
        stored: u64,
    ) -> Result<Self, TarProblem> {
        let mut end = 0u64;
        let mut sum = 0u64;
        for &(offset, len) in &extents {
            if offset < end {
                return Err(TarProblem::Sparse("extents overlap or are out of order"));
            }
            end = offset
                .checked_add(len)
                .filter(|end| *end <= real_size)
                .ok_or(TarProblem::Sparse("an extent ends behind the file's end"))?;
            sum += len;
        }
        if sum != stored {
            return Err(TarProblem::Sparse(
                "its extents and the bytes in the archive differ in length",
            ));
        }
        let extents = extents.into_iter().filter(|&(_, len)| len > 0).collect();
        Ok(Self { extents, real_size })
    }

    /// A file without holes.
    pub(super) fn whole(size: u64) -> Self {
        Self {
            extents: if size > 0 { vec![(0, size)] } else { vec![] },
            real_size: size,
        }
    }
}

/// Pairs offsets and lengths that alternate (0.0, 0.1).
pub(super) fn pairs(map: &[u64]) -> Result<Vec<Extent>, TarProblem> {
    if !map.len().is_multiple_of(2) {
        return Err(TarProblem::Sparse("an extent has no length"));
    }
    Ok(map.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

/// Reads the map of version 1.0, which stands in front of the data: decimal numbers, one a line,
/// first how many extents there are. Fed with whole blocks, because it ends at a block's end.
#[derive(Debug, Default)]
pub(super) struct MapText {
    number: Vec<u8>,
    expected: Option<u64>,
    values: Vec<u64>,
}

impl MapText {
    /// Takes a block; true when the map is complete (what is left of the block is padding).
    pub(super) fn feed(&mut self, block: &[u8], max_extents: u64) -> Result<bool, TarProblem> {
        const BAD: TarProblem = TarProblem::Sparse("its map holds something other than numbers");
        for &b in block {
            if b != b'\n' {
                if self.number.len() == 20 {
                    return Err(BAD);
                }
                self.number.push(b);
                continue;
            }
            let value = decimal(&self.number).ok_or(BAD)?;
            self.number.clear();
            match self.expected {
                None => {
                    crate::limits::within(
                        value,
                        max_extents,
                        "extents in a sparse file",
                        Some("--max-sparse-extents"),
                    )?;
                    self.expected = Some(value);
                }
                Some(_) => self.values.push(value),
            }
            if self
                .expected
                .is_some_and(|n| self.values.len() as u64 == 2 * n)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The extents, once [`MapText::feed`] said that they are complete.
    pub(super) fn into_extents(self) -> Result<Vec<Extent>, TarProblem> {
        pairs(&self.values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_that_contradict_themselves_are_refused() {
        assert!(SparseMap::new(vec![(0, 1), (4, 2), (10, 0)], 10, 3).is_ok());
        for (extents, stored) in [
            (vec![(4, 2), (0, 1)], 3),
            (vec![(0, 5), (4, 2)], 7),
            (vec![(9, 2)], 2),
            (vec![(u64::MAX, 2)], 2),
            (vec![(0, 1)], 2),
            (vec![(0, 2)], 1),
        ] {
            assert!(SparseMap::new(extents, 10, stored).is_err());
        }
    }

    #[test]
    fn a_map_in_front_of_the_data_may_span_blocks() {
        let mut map = MapText::default();
        assert!(!map.feed(b"2\n0\n51", 10).unwrap());
        assert!(map.feed(b"2\n1024\n7\n\0\0\0", 10).unwrap());
        assert_eq!(map.into_extents().unwrap(), [(0, 512), (1024, 7)]);
        assert!(MapText::default().feed(b"0\n\0\0", 10).unwrap());
        assert!(MapText::default().feed(b"x\n", 10).is_err());
        assert!(MapText::default().feed(&[b'0'; 512], 10).is_err());
        assert!(MapText::default().feed(b"11\n", 10).is_err());
    }
}
