//! Reading the bytes of files.
//!
//! What is on this host is answered by the thread that took the request. What must be fetched is
//! answered by a task of the runtime, so that a slow network never takes the threads away from
//! reads that can be served.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use fuser::{Errno, INodeNo, ReplyData, ReplyLseek};
use lazyimg_chunkstore::ChunkSpec;
use lazyimg_image::erofs::{DataPlace, FileType, InodeInfo};

use super::Shared;
use crate::errno::Failure;
use crate::readahead::Advice;
use crate::view::Segment;

/// A part of an answer.
#[derive(Debug)]
enum Piece {
    Zeros(usize),
    Bytes(Bytes),
}

/// A read of a regular file, placed.
struct Request {
    ino: INodeNo,
    /// Offsets in the file; ends within it.
    range: Range<u64>,
    size: u64,
    /// Where the file begins in the data space.
    data_start: u64,
}

impl Shared {
    /// Answers a read of up to `len` bytes at `offset`.
    pub(super) fn read(self: &Arc<Self>, ino: INodeNo, offset: u64, len: u32, reply: ReplyData) {
        let info = match self.inode(ino) {
            Ok(info) => info,
            Err(failure) => return reply.error(self.failed("read", &failure)),
        };
        let range = offset..offset.saturating_add(u64::from(len)).min(info.size);
        if info.file_type == FileType::Directory {
            return reply.error(Errno::EISDIR);
        }
        if range.is_empty() {
            return reply.data(&[]);
        }
        match info.data {
            DataPlace::Empty => reply.data(&[]),
            DataPlace::Hole => reply.data(&vec![0; (range.end - range.start) as usize]),
            DataPlace::Data(data_start) => self.read_data(
                Request {
                    ino,
                    range,
                    size: info.size,
                    data_start,
                },
                reply,
            ),
            DataPlace::Meta => reply.error(Errno::EINVAL),
        }
    }

    fn read_data(self: &Arc<Self>, request: Request, reply: ReplyData) {
        let segments: Vec<Segment> = self
            .view
            .segments(
                request.data_start + request.range.start..request.data_start + request.range.end,
            )
            .collect();
        let len = request.range.end - request.range.start;
        let filling = segments
            .first()
            .is_some_and(|s| self.filler.is_filling(request.ino, s.extent, len));
        let advice = if filling {
            Advice::default()
        } else {
            self.note(&request)
        };
        let mut pieces: Vec<Option<Piece>> = segments.iter().map(|s| self.local_piece(s)).collect();
        if pieces.iter().all(Option::is_some) {
            answer(reply, pieces.iter().flatten());
            if advice.random {
                self.fill_rest(&request, &segments);
            }
            self.look_ahead(&request, &advice);
            return;
        }
        let shared = Arc::clone(self);
        self.runtime.spawn(async move {
            match shared.fetch(&segments, &mut pieces).await {
                Ok(()) => answer(reply, pieces.iter().flatten()),
                Err(failure) => reply.error(shared.failed("read", &failure)),
            }
        });
        self.look_ahead(&request, &advice);
    }

    fn spec(&self, segment: &Segment) -> Option<&ChunkSpec> {
        self.view.data()[segment.extent].spec.as_ref()
    }

    fn local_piece(&self, segment: &Segment) -> Option<Piece> {
        match self.spec(segment) {
            None => Some(Piece::Zeros(
                (segment.within.end - segment.within.start) as usize,
            )),
            Some(spec) => self
                .store
                .try_read_local(spec)
                .map(|chunk| piece(&chunk, segment)),
        }
    }

    /// Fills in the pieces that are not there, within half of the read timeout: the kernel asks
    /// twice for a page that it does not get, ahead of the reader, then for the page alone. The fetch
    /// goes on meanwhile, so two halves wait as long as one whole.
    async fn fetch(
        &self,
        segments: &[Segment],
        pieces: &mut [Option<Piece>],
    ) -> Result<(), Failure> {
        let half = self.options.read_timeout / 2;
        let missing: Vec<(usize, &ChunkSpec)> = segments
            .iter()
            .enumerate()
            .filter(|&(i, _)| pieces[i].is_none())
            .filter_map(|(i, segment)| Some((i, self.spec(segment)?)))
            .collect();
        if let [(i, spec)] = missing[..] {
            pieces[i] = Some(piece(
                &self.store.read_within(spec, half).await?,
                &segments[i],
            ));
            return Ok(());
        }
        let specs: Vec<ChunkSpec> = missing.iter().map(|&(_, spec)| spec.clone()).collect();
        let chunks = self.store.read_many_within(&specs, half).await;
        for ((i, _), chunk) in missing.into_iter().zip(chunks) {
            pieces[i] = Some(piece(&chunk?, &segments[i]));
        }
        Ok(())
    }

    fn note(&self, request: &Request) -> Advice {
        self.streams.lock().note(
            request.ino.0,
            request.range.clone(),
            request.size,
            self.options.readahead_bytes,
        )
    }

    fn look_ahead(self: &Arc<Self>, request: &Request, advice: &Advice) {
        let segments = |ahead: &Range<u64>| {
            self.view
                .segments(request.data_start + ahead.start..request.data_start + ahead.end)
        };
        if let Some(ahead) = &advice.fetch {
            let specs: Vec<ChunkSpec> = segments(ahead)
                .filter_map(|s| self.spec(&s).cloned())
                .collect();
            if !specs.is_empty() {
                self.store.prefetch(specs);
            }
        }
        if let Some(ahead) = &advice.decode {
            // Of the chunk in which a range begins, the range before has taken care.
            for segment in segments(ahead).filter(|s| s.within.start == 0) {
                let shared = Arc::clone(self);
                // What it returns stays among the decoded chunks in memory.
                self.runtime
                    .spawn_blocking(move || shared.local_piece(&segment).map(drop));
            }
        }
    }

    /// Asks for the rest of the chunks that this read has decoded.
    fn fill_rest(&self, request: &Request, segments: &[Segment]) {
        let file = request.data_start..request.data_start + request.size;
        for segment in segments.iter().filter(|s| self.spec(s).is_some()) {
            let extent = &self.view.data()[segment.extent];
            let part = file.start.max(extent.start)..file.end.min(extent.start + extent.len);
            let range = part.start - file.start..part.end - file.start;
            self.filler
                .ask(request.ino, segment.extent, range, &request.range);
        }
    }

    /// Answers `SEEK_DATA` and `SEEK_HOLE`, at the granularity of chunks.
    pub(super) fn seek(&self, ino: INodeNo, offset: i64, whence: i32, reply: ReplyLseek) {
        let info = match self.inode(ino) {
            Ok(info) => info,
            Err(failure) => return reply.error(self.failed("lseek", &failure)),
        };
        let want_data = match whence {
            libc::SEEK_DATA => true,
            libc::SEEK_HOLE => false,
            _ => return reply.error(Errno::EINVAL),
        };
        let found = u64::try_from(offset)
            .ok()
            .and_then(|offset| self.seek_in(&info, offset, want_data));
        match found.and_then(|found| i64::try_from(found).ok()) {
            Some(found) => reply.offset(found),
            None => reply.error(Errno::ENXIO),
        }
    }

    /// The first byte of data, or of a hole, at or behind `offset`; the end of a file is a hole.
    fn seek_in(&self, info: &InodeInfo, offset: u64, want_data: bool) -> Option<u64> {
        if offset >= info.size {
            return None;
        }
        match info.data {
            DataPlace::Hole => (!want_data).then_some(offset),
            DataPlace::Data(start) => {
                let mut segments = self.view.segments(start + offset..start + info.size);
                let found = segments
                    .find(|s| self.spec(s).is_some() == want_data)
                    .map(|s| self.view.data()[s.extent].start + s.within.start - start);
                found.or((!want_data).then_some(info.size))
            }
            DataPlace::Empty | DataPlace::Meta => Some(if want_data { offset } else { info.size }),
        }
    }
}

fn piece(chunk: &Bytes, segment: &Segment) -> Piece {
    Piece::Bytes(chunk.slice(segment.within.start as usize..segment.within.end as usize))
}

fn answer<'a>(reply: ReplyData, pieces: impl Iterator<Item = &'a Piece> + Clone) {
    let mut rest = pieces.clone();
    if let (Some(Piece::Bytes(only)), None) = (rest.next(), rest.next()) {
        return reply.data(only);
    }
    let mut all = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Zeros(len) => all.resize(all.len() + len, 0),
            Piece::Bytes(bytes) => all.extend_from_slice(bytes),
        }
    }
    reply.data(&all);
}
