//! Buffered reading in blocks and in large slices.

use std::io::{self, Read};

use super::BLOCK;
use super::error::TarProblem;

/// Bytes of the buffer, which is also the largest slice handed on: fits a core's L2 cache.
const CAPACITY: usize = 256 << 10;

/// The smallest slice handed on while more is to come. Below it the buffer is filled first, so that
/// the taker's cost per call does not count.
const MIN_SLICE: usize = 64 << 10;

/// A stream that is read in pieces of the reader's choice.
pub(super) struct Input<R> {
    inner: R,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Offset of `start` in the stream.
    offset: u64,
}

impl<R: Read> Input<R> {
    pub(super) fn new(inner: R) -> Self {
        Self {
            inner,
            buffer: vec![0; CAPACITY].into_boxed_slice(),
            start: 0,
            end: 0,
            offset: 0,
        }
    }

    /// How many bytes were taken so far.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The next block; `None` at the end of the stream.
    pub(super) fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarProblem> {
        self.fill(BLOCK)?;
        match self.buffer[self.start..self.end].first_chunk() {
            Some(&block) => {
                self.consume(BLOCK);
                Ok(Some(block))
            }
            None if self.start == self.end => Ok(None),
            None => Err(TarProblem::Truncated),
        }
    }

    /// Some of the next `max` bytes, at least one and at least [`MIN_SLICE`] while there are as many.
    pub(super) fn take(&mut self, max: u64) -> Result<&[u8], TarProblem> {
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        self.fill(max.min(MIN_SLICE))?;
        let len = (self.end - self.start).min(max);
        if len == 0 {
            return Err(TarProblem::Truncated);
        }
        self.consume(len);
        Ok(&self.buffer[self.start - len..self.start])
    }

    pub(super) fn skip(&mut self, mut len: u64) -> Result<(), TarProblem> {
        while len > 0 {
            len -= self.take(len)?.len() as u64;
        }
        Ok(())
    }

    /// Skips padding; the end of the stream may take its place. Go's writer, when it is not closed,
    /// ends an archive right behind the last body, Go's reader takes it, and so images are made of
    /// such layers (umoci 0.4 `insert`). A stream cut there by accident fails its diff id.
    pub(super) fn skip_padding(&mut self, len: u64) -> Result<(), TarProblem> {
        self.fill(len as usize)?;
        self.consume((self.end - self.start).min(len as usize));
        Ok(())
    }

    fn consume(&mut self, len: usize) {
        self.start += len;
        self.offset += len as u64;
    }

    /// Makes at least `want` bytes available, fewer only at the end of the stream.
    fn fill(&mut self, want: usize) -> Result<(), TarProblem> {
        if self.end - self.start >= want {
            return Ok(());
        }
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        while self.end < want {
            match self.inner.read(&mut self.buffer[self.end..]) {
                Ok(0) => break,
                Ok(n) => self.end += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(TarProblem::Read(e)),
            }
        }
        Ok(())
    }
}
