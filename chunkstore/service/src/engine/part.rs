//! A chunk as a part of a file: what the kernel can send without a copy of it.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

/// Some bytes of an open file that were in the page cache when this was made.
#[derive(Clone)]
pub struct FilePart {
    file: Arc<File>,
    offset: u64,
    len: u32,
    doubt: Arc<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for FilePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FilePart")
            .field("offset", &self.offset)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl FilePart {
    /// `len` bytes at `offset`; `doubt` tells the engine that they could not be read.
    pub(crate) fn new(
        file: Arc<File>,
        offset: u64,
        len: u32,
        doubt: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        Self {
            file,
            offset,
            len,
            doubt: Arc::new(doubt),
        }
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where the bytes begin.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How many there are.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there are none. A chunk has some.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether what lies from `at` to the end is in the page cache still, as far as can be told.
    pub(crate) fn is_cached(&self, at: u64) -> bool {
        let end = self.offset + u64::from(self.len);
        is_cached(&self.file, at, end.saturating_sub(at)) != Cached::No
    }

    /// Reads what lies from `at` to the end, so that it is in the page cache. Blocks.
    ///
    /// # Errors
    /// Those of the disk.
    pub(crate) fn warm(&self, at: u64) -> io::Result<()> {
        let end = self.offset + u64::from(self.len);
        let mut rest = vec![0; usize::try_from(end.saturating_sub(at)).unwrap_or_default()];
        self.file.read_exact_at(&mut rest, at)
    }

    /// They could not be read: next time the engine looks at them itself, and says what is wrong.
    pub(crate) fn doubt(&self) {
        (self.doubt)();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum Cached {
    /// All of it.
    Yes,
    /// Not all of it.
    No,
    /// The kernel does not tell (before Linux 6.5), or may not be asked.
    Unknown,
}

/// Whether a part of a file is in the page cache as a whole: `cachestat(2)`.
pub(in crate::engine) fn is_cached(file: &File, offset: u64, len: u64) -> Cached {
    /// `struct cachestat_range`, include/uapi/linux/mman.h.
    #[repr(C)]
    struct Range {
        offset: u64,
        len: u64,
    }
    /// `struct cachestat`.
    #[repr(C)]
    #[derive(Default)]
    struct Stat {
        cached: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    /// The same number on every architecture that this is built for.
    const SYS_CACHESTAT: libc::c_long = 451;
    let page = rustix::param::page_size() as u64;
    let pages = (offset + len.max(1) - 1) / page - offset / page + 1;
    let (range, mut stat) = (Range { offset, len }, Stat::default());
    // SAFETY: the file is open while it is borrowed; both structs have the kernel's layout,
    // and live until the call is over, which keeps no pointer to them.
    #[allow(unsafe_code)]
    let done = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            &raw const range,
            &raw mut stat,
            0_u32,
        )
    };
    match done {
        0 if stat.cached >= pages => Cached::Yes,
        0 => Cached::No,
        _ => Cached::Unknown,
    }
}
