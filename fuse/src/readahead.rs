//! Which files are read in order, and what they will want next. Pure.
//!
//! The kernel opens nothing here (`open` is ENOSYS), so there is no handle to keep this in: it is
//! kept per inode, for the inodes read most recently.

use std::num::NonZeroUsize;
use std::ops::Range;

use lru::LruCache;

/// Files whose reading is followed at once: more than any program reads in turns, at 48 bytes each.
pub const MAX_STREAMS: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// Reads in a row before something is fetched ahead. Two may be a header and its body.
pub const MIN_STREAK: u32 = 3;

/// A read that begins this far around the end of the last one still continues it, in bytes: the
/// kernel's own readahead reorders requests among its threads.
pub const SLACK: u64 = 1 << 20;

/// How far ahead a reader is fetched for at first, in bytes: two chunks of the usual size.
pub const MIN_WINDOW: u64 = 1 << 20;

/// How far ahead of a reader in order chunks are decoded, in bytes: while one chunk is copied out, a
/// second core decodes the next.
pub const DECODE_WINDOW: u64 = 1 << 20;

/// The readers of all files.
#[derive(Debug)]
pub struct Streams(LruCache<u64, Stream>);

#[derive(Debug, Clone, Copy)]
struct Stream {
    /// Where the run began, in bytes of the file.
    begun: u64,
    /// The end of the furthest read, in bytes of the file.
    end: u64,
    /// Reads in a row.
    streak: u32,
    /// Up to here bytes have been asked for ahead.
    ahead: u64,
    /// Up to here chunks have been decoded ahead.
    decoded: u64,
}

/// What a read says beside those before it. Ranges are bytes of the file, beyond this read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Advice {
    /// It jumps; otherwise it begins a file or continues a read.
    pub random: bool,
    /// Worth fetching now.
    pub fetch: Option<Range<u64>>,
    /// Worth decoding now, if it is on this host.
    pub decode: Option<Range<u64>>,
}

impl Stream {
    fn begin(range: &Range<u64>) -> Self {
        Self {
            begun: range.start,
            end: range.end,
            streak: 1,
            ahead: range.end,
            decoded: range.end,
        }
    }

    /// What lies ahead and was not asked for yet, once it is half a window or the rest of the file.
    fn fetch(&mut self, size: u64, max_window: u64) -> Option<Range<u64>> {
        let window = ((self.end - self.begun) / 4)
            .max(MIN_WINDOW)
            .min(max_window);
        let until = self.end.saturating_add(window).min(size);
        let from = self.ahead.max(self.end);
        if from >= until || (until < size && until - from < window / 2) {
            return None;
        }
        self.ahead = until;
        Some(from..until)
    }

    fn decode(&mut self, size: u64) -> Option<Range<u64>> {
        let until = self.end.saturating_add(DECODE_WINDOW).min(size);
        let from = self.decoded.max(self.end);
        if from >= until {
            return None;
        }
        self.decoded = until;
        Some(from..until)
    }
}

impl Default for Streams {
    fn default() -> Self {
        Self(LruCache::new(MAX_STREAMS))
    }
}

impl Streams {
    /// Takes note of a read of the bytes `range` of file `ino`, which is `size` bytes long.
    /// `max_window` is how far ahead of the reader to fetch at most, in bytes; 0 turns it off. The
    /// window is a quarter of what was read in order, from [`MIN_WINDOW`] up: who stops early has
    /// dragged in little, who goes on is not held up by round trips.
    pub fn note(&mut self, ino: u64, range: Range<u64>, size: u64, max_window: u64) -> Advice {
        let random = |random| Advice {
            random,
            ..Advice::default()
        };
        let Some(stream) = self.0.get_mut(&ino) else {
            self.0.put(ino, Stream::begin(&range));
            return random(range.start != 0);
        };
        let continues = range.start <= stream.end.saturating_add(SLACK)
            && range.end.saturating_add(SLACK) > stream.end;
        if !continues {
            *stream = Stream::begin(&range);
            return random(true);
        }
        // Inside the slack and not the next bytes: reads of a small file at random, or reordered
        // ones. They count for nothing, and don't break a run that goes on around them.
        let adjoins = range.start == stream.end;
        if adjoins {
            stream.streak = stream.streak.saturating_add(1);
        }
        stream.end = stream.end.max(range.end);
        if stream.streak < MIN_STREAK {
            return random(!adjoins);
        }
        Advice {
            random: false,
            fetch: stream.fetch(size, max_window),
            decode: stream.decode(size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1024;
    const SIZE: u64 = 64 << 20;
    const WINDOW: u64 = 1 << 20;

    #[test]
    fn reading_in_order_looks_ahead_from_the_third_read_on_and_at_nothing_twice() {
        let mut streams = Streams::default();
        let (mut fetched, mut decoded) = (Vec::new(), Vec::new());
        for i in 0..64 {
            let range = i * 128 * K..(i + 1) * 128 * K;
            let advice = streams.note(7, range.clone(), SIZE, WINDOW);
            assert!(!advice.random, "read {i} is in order");
            assert!(i >= 2 || advice == Advice::default(), "too early");
            for ahead in advice.fetch.iter().chain(&advice.decode) {
                assert!(ahead.start >= range.end && ahead.end <= range.end + WINDOW);
            }
            fetched.extend(advice.fetch);
            decoded.extend(advice.decode);
        }
        for all in [&fetched, &decoded] {
            assert!(all.windows(2).all(|w| w[0].end == w[1].start), "{all:?}");
        }
        assert!(fetched.len() <= 16 && decoded.len() > 50);
    }

    #[test]
    fn a_long_reader_is_fetched_for_further_ahead_up_to_the_limit() {
        let mut streams = Streams::default();
        let max = 4 << 20;
        let mut furthest = 0;
        for i in 0..512 {
            let range = i * 128 * K..(i + 1) * 128 * K;
            if let Some(ahead) = streams.note(7, range.clone(), 1 << 30, max).fetch {
                furthest = furthest.max(ahead.end - range.end);
            }
        }
        assert_eq!(furthest, max);
        let off = streams.note(7, 512 * 128 * K..513 * 128 * K, 1 << 30, 0);
        assert_eq!(off.fetch, None);
    }

    #[test]
    fn random_reads_look_at_nothing_ahead() {
        let mut streams = Streams::default();
        let mut at = 12345_u64;
        for _ in 0..1000 {
            at = at
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let start = (at >> 33) % (SIZE / 4096) * 4096;
            let advice = streams.note(7, start..start + 4096, SIZE, WINDOW);
            assert_eq!((advice.fetch, advice.decode), (None, None));
        }
    }

    #[test]
    fn the_end_of_a_file_ends_the_window() {
        let mut streams = Streams::default();
        let size = 600 * K;
        let all: Vec<_> = (0..5)
            .map(|i| streams.note(7, i * 128 * K..(i + 1) * 128 * K, size, WINDOW))
            .collect();
        assert_eq!(all[2].fetch, Some(384 * K..size));
        assert_eq!(all[3].fetch, None, "it was all asked for at the third read");
    }

    #[test]
    fn requests_reordered_by_the_kernel_stay_in_order() {
        let mut streams = Streams::default();
        let mut fetched = 0;
        for i in [0_u64, 1, 2, 4, 3, 5, 7, 6, 8, 9, 10] {
            let advice = streams.note(7, i * 128 * K..(i + 1) * 128 * K, SIZE, WINDOW);
            assert!(!advice.random || i > 2 && fetched == 0);
            fetched += advice.fetch.map_or(0, |ahead| ahead.end - ahead.start);
        }
        assert!(fetched >= WINDOW);
    }

    #[test]
    fn the_memory_of_streams_is_bounded() {
        let mut streams = Streams::default();
        for ino in 0..10_000 {
            streams.note(ino, 0..4096, SIZE, WINDOW);
        }
        assert_eq!(streams.0.len(), MAX_STREAMS.get());
    }
}
