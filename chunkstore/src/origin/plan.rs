//! Which ranges to ask for: neighbouring chunks of a pack become one request. Pure.

use lazyimg_convergent::{Digest, MAX_STORED_LEN};

use crate::{ChunkRef, FetchError};

/// Bytes between two chunks that are fetched and thrown away rather than asked around: what a
/// 20 ms round trip costs at 3 MB/s.
pub const MAX_GAP: u64 = 64 << 10;
/// Length of the largest request, in bytes: a reader of its first chunk waits for all of it, and
/// it lies in memory as a whole.
pub const MAX_RUN: u64 = 4 << 20;

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The blob to read.
    pub pack: Digest,
    /// From this byte on.
    pub offset: u64,
    /// So many bytes.
    pub len: u64,
    /// The chunks in it.
    pub members: Vec<Member>,
}

/// A chunk in a [`Run`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Index into the chunks asked for.
    pub index: usize,
    /// Where it begins in the answer, in bytes.
    pub start: usize,
    /// Its length, in bytes.
    pub len: usize,
}

/// The runs that serve `chunks`, in the order in which the first chunk of each was asked for; and
/// the chunks that no range can serve.
pub fn plan(chunks: &[ChunkRef]) -> (Vec<Run>, Vec<(usize, FetchError)>) {
    let mut refused = Vec::new();
    let mut wanted = Vec::with_capacity(chunks.len());
    for (index, chunk) in chunks.iter().enumerate() {
        match range(chunk) {
            Ok((pack, offset, end)) => wanted.push((pack, offset, end, index)),
            Err(e) => refused.push((index, e)),
        }
    }
    wanted.sort_unstable();
    let mut runs: Vec<Run> = Vec::new();
    for (pack, offset, end, index) in wanted {
        let joins = runs.last().is_some_and(|run| {
            run.pack == pack
                && offset <= run.offset + run.len + MAX_GAP
                && end - run.offset <= MAX_RUN
        });
        if !joins {
            runs.push(Run {
                pack,
                offset,
                len: 0,
                members: Vec::new(),
            });
        }
        if let Some(run) = runs.last_mut() {
            run.len = run.len.max(end - run.offset);
            run.members.push(Member {
                index,
                start: (offset - run.offset) as usize,
                len: (end - offset) as usize,
            });
        }
    }
    runs.sort_by_key(|run| run.members.iter().map(|m| m.index).min());
    (runs, refused)
}

fn range(chunk: &ChunkRef) -> Result<(Digest, u64, u64), FetchError> {
    let at = chunk
        .at
        .ok_or_else(|| FetchError::NotFound("the manifest names no pack for it".to_owned()))?;
    let len = u64::from(chunk.stored_len);
    if len == 0 || len > MAX_STORED_LEN as u64 {
        return Err(FetchError::Invalid(format!(
            "a chunk of {len} stored bytes; the format allows 1 to {MAX_STORED_LEN}"
        )));
    }
    let end = at
        .offset
        .checked_add(len)
        .filter(|end| i64::try_from(*end).is_ok())
        .ok_or_else(|| FetchError::Invalid(format!("a range from byte {}", at.offset)))?;
    Ok((at.pack, at.offset, end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PackRange;
    use lazyimg_convergent::ChunkId;
    use proptest::prelude::*;

    fn chunk(pack: u8, offset: u64, len: u32) -> ChunkRef {
        ChunkRef {
            id: ChunkId::default(),
            stored_len: len,
            at: Some(PackRange {
                pack: Digest([pack; 32]),
                offset,
            }),
        }
    }

    #[test]
    fn neighbours_become_one_request_whatever_their_order() {
        let (runs, refused) = plan(&[chunk(1, 100, 50), chunk(1, 0, 100), chunk(1, 150, 10)]);
        assert!(refused.is_empty());
        assert_eq!(runs.len(), 1);
        assert_eq!((runs[0].offset, runs[0].len), (0, 160));
    }

    #[test]
    fn far_chunks_and_other_packs_are_requests_of_their_own() {
        let (runs, _) = plan(&[
            chunk(1, 0, 100),
            chunk(1, 101 + MAX_GAP, 100),
            chunk(2, 100, 100),
        ]);
        assert_eq!(runs.len(), 3);
    }

    #[test]
    fn impossible_chunks_are_refused_alone() {
        let mut nowhere = chunk(1, 0, 10);
        nowhere.at = None;
        let (runs, refused) = plan(&[
            chunk(1, u64::MAX - 5, 10),
            chunk(1, 0, 0),
            chunk(1, 0, u32::MAX),
            nowhere,
            chunk(1, 0, 10),
        ]);
        assert_eq!(runs.len(), 1);
        assert_eq!(refused.len(), 4);
    }

    proptest! {
        #[test]
        fn every_chunk_is_served_once_within_bounds(list in prop::collection::vec((0u8..3, 0u64..20_000_000, 1u32..MAX_STORED_LEN as u32), 0..60)) {
            let chunks: Vec<_> = list.iter().map(|(p, o, l)| chunk(*p, *o, *l)).collect();
            let (runs, refused) = plan(&chunks);
            prop_assert!(refused.is_empty());
            let mut seen = vec![0; chunks.len()];
            for run in &runs {
                prop_assert!(run.len <= MAX_RUN);
                for m in &run.members {
                    seen[m.index] += 1;
                    let at = chunks[m.index].at.unwrap();
                    prop_assert_eq!(run.pack, at.pack);
                    prop_assert_eq!(run.offset + m.start as u64, at.offset);
                    prop_assert_eq!(m.len as u32, chunks[m.index].stored_len);
                    prop_assert!((m.start + m.len) as u64 <= run.len);
                }
            }
            prop_assert!(seen.iter().all(|n| *n == 1));
        }
    }
}
