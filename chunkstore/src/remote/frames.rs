//! The frames of an answer to get many, parsed as they come. Pure.

use bytes::{Buf, Bytes, BytesMut};

use crate::wire::{FRAME_HEAD, FrameHead, FrameKind, WireError};

/// One frame: what it says of the chunk whose turn it was, and the chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Which chunk of those asked for.
    pub index: usize,
    /// What is said of it. Never [`FrameKind::End`].
    pub kind: FrameKind,
    /// The ciphertext, unverified; empty unless `kind` is [`FrameKind::Chunk`].
    pub chunk: Bytes,
}

/// Why an answer is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A frame that version 1 does not have.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// More frames than chunks were asked for, or bytes behind the end.
    #[error("there is more in it than was asked for")]
    TooMuch,
    /// The end frame came too early.
    #[error("it ends after {0} of {1} chunks")]
    TooFew(usize, usize),
    /// No end frame.
    #[error("it was cut off after {0} of {1} chunks")]
    CutOff(usize, usize),
}

/// Takes an answer in pieces of any length and gives its frames. It holds one chunk at most, beside
/// the piece that was pushed last.
#[derive(Debug)]
pub struct FrameParser {
    asked: usize,
    /// Frames given.
    given: usize,
    state: State,
    piece: Bytes,
}

#[derive(Debug)]
enum State {
    Head(BytesMut),
    Chunk { len: usize, got: BytesMut },
    Ended,
}

impl FrameParser {
    /// Of the answer to a request for so many chunks.
    pub fn new(asked: usize) -> Self {
        Self {
            asked,
            given: 0,
            state: State::Head(BytesMut::with_capacity(FRAME_HEAD)),
            piece: Bytes::new(),
        }
    }

    /// The next piece of the answer. Call it when [`FrameParser::next_frame`] has nothing more.
    pub fn push(&mut self, piece: Bytes) {
        debug_assert!(self.piece.is_empty(), "the last piece has been read");
        self.piece = piece;
    }

    /// The next frame; `None` when more bytes are needed, or all has been said.
    ///
    /// # Errors
    /// [`FrameError`]. Nothing more can be read then.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            match &mut self.state {
                State::Ended if self.piece.is_empty() => return Ok(None),
                State::Ended => return Err(FrameError::TooMuch),
                State::Head(got) => {
                    move_up_to(&mut self.piece, got, FRAME_HEAD);
                    let Some(head) = got.first_chunk::<FRAME_HEAD>() else {
                        return Ok(None);
                    };
                    let head = FrameHead::parse(*head)?;
                    match head.kind {
                        FrameKind::End if self.given == self.asked => self.state = State::Ended,
                        FrameKind::End => {
                            return Err(FrameError::TooFew(self.given, self.asked));
                        }
                        _ if self.given == self.asked => return Err(FrameError::TooMuch),
                        FrameKind::Chunk => {
                            let len = head.len as usize;
                            // The length is bounded by the format, and most of it is on its way.
                            let got = BytesMut::with_capacity(len);
                            self.state = State::Chunk { len, got };
                        }
                        kind => {
                            got.clear();
                            return Ok(Some(self.frame(kind, Bytes::new())));
                        }
                    }
                }
                State::Chunk { len, got } => {
                    move_up_to(&mut self.piece, got, *len);
                    if got.len() < *len {
                        return Ok(None);
                    }
                    let chunk = std::mem::take(got).freeze();
                    self.state = State::Head(BytesMut::with_capacity(FRAME_HEAD));
                    return Ok(Some(self.frame(FrameKind::Chunk, chunk)));
                }
            }
        }
    }

    /// The connection has ended.
    ///
    /// # Errors
    /// [`FrameError::CutOff`] unless the end frame has come.
    pub fn finish(&self) -> Result<(), FrameError> {
        match self.state {
            State::Ended => Ok(()),
            _ => Err(FrameError::CutOff(self.given, self.asked)),
        }
    }

    /// Whether the end frame has come.
    pub fn is_ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }

    fn frame(&mut self, kind: FrameKind, chunk: Bytes) -> Frame {
        self.given += 1;
        Frame {
            index: self.given - 1,
            kind,
            chunk,
        }
    }
}

/// Moves bytes until `to` has `len`.
fn move_up_to(from: &mut Bytes, to: &mut BytesMut, len: usize) {
    let n = (len - to.len()).min(from.len());
    to.extend_from_slice(&from[..n]);
    from.advance(n);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(frames: &[(FrameKind, Vec<u8>)]) -> Vec<u8> {
        let mut out = Vec::new();
        for (kind, chunk) in frames {
            let len = chunk.len() as u32;
            out.extend(FrameHead { kind: *kind, len }.to_bytes());
            out.extend(chunk);
        }
        out.extend(FrameHead::bare(FrameKind::End).to_bytes());
        out
    }

    fn read(
        asked: usize,
        bytes: &[u8],
        pieces: impl Iterator<Item = usize>,
    ) -> Result<Vec<Frame>, FrameError> {
        let mut parser = FrameParser::new(asked);
        let mut rest = bytes;
        let mut frames = Vec::new();
        for len in pieces {
            let (piece, behind) = rest.split_at(len.min(rest.len()));
            rest = behind;
            parser.push(Bytes::copy_from_slice(piece));
            while let Some(frame) = parser.next_frame()? {
                frames.push(frame);
            }
            if rest.is_empty() {
                break;
            }
        }
        parser.finish()?;
        Ok(frames)
    }

    fn frames() -> impl Strategy<Value = Vec<(FrameKind, Vec<u8>)>> {
        let frame = prop_oneof![
            prop::collection::vec(any::<u8>(), 1..200).prop_map(|c| (FrameKind::Chunk, c)),
            Just((FrameKind::Missing, Vec::new())),
            Just((FrameKind::Yours, Vec::new())),
            Just((FrameKind::Coming, Vec::new())),
            Just((FrameKind::Failed, Vec::new())),
            Just((FrameKind::Damaged, Vec::new())),
        ];
        prop::collection::vec(frame, 0..20)
    }

    proptest! {
        #[test]
        fn frames_come_back_however_the_answer_is_cut(frames in frames(), pieces in prop::collection::vec(1usize..50, 1..30)) {
            let bytes = written(&frames);
            let read = read(frames.len(), &bytes, pieces.into_iter().cycle()).unwrap();
            let got: Vec<_> = read.iter().map(|f| (f.kind, f.chunk.to_vec())).collect();
            prop_assert_eq!(got, frames);
            prop_assert!(read.iter().enumerate().all(|(n, f)| f.index == n));
        }

        #[test]
        fn an_answer_that_is_cut_off_is_never_complete(frames in frames(), cut in any::<prop::sample::Index>()) {
            let bytes = written(&frames);
            let short = &bytes[..cut.index(bytes.len())];
            let cut_off = matches!(
                read(frames.len(), short, std::iter::repeat(7)),
                Err(FrameError::CutOff(..))
            );
            prop_assert!(cut_off);
        }

        #[test]
        fn any_bytes_end_in_frames_or_an_error(asked in 0usize..5, bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(frames) = read(asked, &bytes, std::iter::repeat(11)) {
                prop_assert_eq!(frames.len(), asked);
            }
        }
    }

    #[test]
    fn answers_with_more_or_less_than_was_asked_are_refused() {
        let one = (FrameKind::Missing, Vec::new());
        let two = written(&[one.clone(), one]);
        let all = || std::iter::once(usize::MAX);
        assert_eq!(read(1, &two, all()), Err(FrameError::TooMuch));
        assert_eq!(read(3, &two, all()), Err(FrameError::TooFew(2, 3)));
        let behind = [two, vec![0]].concat();
        assert_eq!(read(2, &behind, all()), Err(FrameError::TooMuch));
        let huge = [0, 0, 0, 0, 255, 255, 255, 255];
        assert!(matches!(read(1, &huge, all()), Err(FrameError::Wire(_))));
    }
}
