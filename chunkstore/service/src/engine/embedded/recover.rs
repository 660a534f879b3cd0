//! Makes the index and the segments agree when a store is opened, after whatever has happened.

use std::collections::BTreeMap;
use std::io;

use super::index::{Entries, Index};
use super::record::{SEGMENT_HEADER, SegmentId};
use super::rocks;
use super::segments::{Scan, Segments, has_header};
use crate::engine::EngineError;

/// Entries written at once.
const BATCH: usize = 10_000;

/// What was done.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Recovered {
    /// Records put into the index.
    pub records: u64,
    /// Bytes of torn records that were cut off.
    pub cut_bytes: u64,
    /// Segments of which something is missing that had been acknowledged.
    pub damaged: u64,
}

fn io_error(doing: &str, segment: SegmentId, e: &io::Error) -> EngineError {
    EngineError::Unavailable(format!("cannot {doing} segment {segment:?}: {e}"))
}

/// Does it. Idempotent: a crash in the midst costs nothing but the time.
pub fn reconcile(segments: &Segments, index: &Index) -> Result<Recovered, EngineError> {
    let rocks = |e: rocksdb::Error| rocks::error("index", &e);
    let mut done = Recovered::default();
    let roots = segments
        .roots()
        .map_err(|e| EngineError::Unavailable(format!("cannot list the roots: {e}")))?;
    let known: BTreeMap<SegmentId, u64> = index.tails().map_err(rocks)?.into_iter().collect();
    let mut purged = None;
    for segment in known.keys() {
        // The folder goes first when a root is deleted.
        if roots.binary_search(&segment.root).is_err() && purged != Some(segment.root) {
            tracing::info!(root = segment.root, "forgetting a root that was deleted");
            index.purge(segment.root).map_err(rocks)?;
            purged = Some(segment.root);
        }
    }
    let mut work = Work {
        segments,
        index,
        entries: Entries::default(),
        done: &mut done,
    };
    for root in roots {
        let found = segments
            .list(root)
            .map_err(|e| EngineError::Unavailable(format!("cannot list root {root}: {e}")))?;
        for (segment, _) in known
            .range(SegmentId { root, number: 0 }..)
            .take_while(|(s, _)| s.root == root)
        {
            if found.binary_search(segment).is_err() {
                tracing::error!(?segment, "a segment is missing: its chunks are lost");
                work.done.damaged += 1;
            }
        }
        for segment in &found {
            let newest = found.last() == Some(segment);
            work.segment(*segment, known.get(segment).copied(), newest)?;
        }
    }
    let dirty = work.entries.len() > 0;
    work.write()?;
    if dirty || done != Recovered::default() {
        index.flush().map_err(rocks)?;
    }
    Ok(done)
}

struct Work<'a> {
    segments: &'a Segments,
    index: &'a Index,
    entries: Entries,
    done: &'a mut Recovered,
}

impl Work<'_> {
    /// Reads what lies behind the tail that the index knows.
    fn segment(
        &mut self,
        id: SegmentId,
        known: Option<u64>,
        newest: bool,
    ) -> Result<(), EngineError> {
        let file = self
            .segments
            .file(id)
            .map_err(|e| io_error("open", id, &e))?;
        let len = file.metadata().map_err(|e| io_error("stat", id, &e))?.len();
        if known == Some(len) {
            return Ok(());
        }
        if let Some(known) = known.filter(|known| *known > len) {
            let lost = known - len;
            tracing::error!(segment = ?id, lost, "a segment is shorter than it was: chunks are lost");
            self.done.damaged += 1;
            return Ok(());
        }
        // Whole segments are read only when the index was lost; their chunks are checked when
        // they are asked for. What a crash may have torn is checked here.
        let bodies = known.is_some() || newest;
        let from = known.unwrap_or(SEGMENT_HEADER);
        let mut end = from.min(len);
        let mut records = 0;
        let mut scan = Scan::new(&file, id, from, len, bodies);
        while let Some((chunk, at)) = scan.next().map_err(|e| io_error("read", id, &e))? {
            if at.offset != end {
                tracing::error!(segment = ?id, from = end, to = at.offset, "a stretch of a segment is damaged");
            }
            self.entries.put(id.root, &chunk, at);
            end = at.end().unwrap_or(len);
            records += 1;
            if self.entries.len() >= BATCH {
                self.write()?;
            }
        }
        self.done.records += records;
        if records == 0
            && known.is_none()
            && !has_header(&file, id).map_err(|e| io_error("read", id, &e))?
        {
            // A crash while it was made, before anything was put into it.
            tracing::warn!(segment = ?id, "deleting a segment that was never finished");
            return self
                .segments
                .delete(id)
                .map_err(|e| io_error("delete", id, &e));
        }
        if end < len && (newest || known.is_some()) {
            tracing::warn!(segment = ?id, bytes = len - end, "cutting off what was never acknowledged");
            file.set_len(end)
                .and_then(|()| file.sync_all())
                .map_err(|e| io_error("cut", id, &e))?;
            self.done.cut_bytes += len - end;
        }
        // Otherwise the end of a full segment is damaged: there is nothing to append to it.
        let tail = if newest || known.is_some() { end } else { len };
        self.entries.tail(id, tail);
        Ok(())
    }

    fn write(&mut self) -> Result<(), EngineError> {
        let entries = std::mem::take(&mut self.entries);
        self.index
            .write(entries)
            .map_err(|e| rocks::error("index", &e))
    }
}
