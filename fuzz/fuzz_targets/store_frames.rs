//! Answers of a store to get many: however they are cut into pieces, the same frames come out, or the
//! same error.
#![no_main]

use bytes::Bytes;
use lazyimg_chunkstore::remote::{Frame, FrameError, FrameParser};
use lazyimg_chunkstore::wire::FrameKind;
use libfuzzer_sys::fuzz_target;

fn read(asked: usize, answer: &[u8], piece: usize) -> Result<Vec<Frame>, FrameError> {
    let mut parser = FrameParser::new(asked);
    let mut frames = Vec::new();
    for piece in answer.chunks(piece) {
        parser.push(Bytes::copy_from_slice(piece));
        while let Some(frame) = parser.next_frame()? {
            assert_eq!(frame.index, frames.len(), "in the order asked");
            assert_eq!(frame.kind == FrameKind::Chunk, !frame.chunk.is_empty());
            frames.push(frame);
        }
    }
    parser.finish()?;
    Ok(frames)
}

// The first two bytes: how many chunks were asked for, and the length of a piece.
fuzz_target!(|input: &[u8]| {
    let Some((&[asked, piece], answer)) = input.split_first_chunk::<2>() else {
        return;
    };
    let asked = usize::from(asked);
    let whole = read(asked, answer, answer.len().max(1));
    let cut = read(asked, answer, usize::from(piece) + 1);
    assert_eq!(whole, cut);
    if let Ok(frames) = whole {
        assert_eq!(frames.len(), asked);
    }
});
