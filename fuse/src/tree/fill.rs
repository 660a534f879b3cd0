//! Has the kernel read the rest of a decoded chunk after a random read.
//!
//! Without it each 4 KiB read at random decodes 512 KiB for itself once the chunk has left the
//! small cache of decoded chunks; with it a chunk is decoded once, and its other pages are in the
//! page cache when they are asked for.
//!
//! The obvious way, FUSE's notification that stores pages, waits for the locks of pages that are
//! being read, uninterruptibly and with the device open. A process killed in that moment can't
//! die, so the device stays open, so the reads never fail, so the locks stay: readers hung once in
//! twenty kills under load. So it goes the other way round: a thread opens the file by its
//! inode number and advises the kernel to read (`POSIX_FADV_WILLNEED`). That waits for no page: the
//! kernel sends ordinary requests in the background, which the other threads answer.
//!
//! Opening asks nothing of us either, since whoever made the random read has the file open. It
//! takes the right to open by handle (CAP_DAC_READ_SEARCH): without root there is no filling.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use fuser::INodeNo;
use lru::LruCache;
use parking_lot::{Mutex, MutexGuard, RwLock};
use rustix::fs::{Advice, AtFlags, OFlags, StatxFlags};

/// Requests that may wait. Full means dropped: it is never worth waiting for.
const QUEUE: usize = 16;

/// Less than this beside a read is not worth the trouble, in bytes.
const MIN_FILL: u64 = 32 << 10;

/// How much the kernel takes from one piece of advice: its readahead, in bytes.
const ADVICE: u64 = 128 << 10;

/// Fills remembered, so that the requests they cause are told from a program's own.
const RECENT: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

/// The requests that a fill causes come within this time; later ones are a program's.
const FRESH: Duration = Duration::from_millis(250);

/// Shorter requests are a program's: a fill's are as long as the kernel's readahead, but for the last
/// of a chunk. In bytes.
const MIN_FILLING: u64 = 32 << 10;

/// The way to the filling thread. Without a thread (not started, not allowed, ended) nothing is
/// filled.
#[derive(Default)]
pub struct Filler {
    queue: RwLock<Option<SyncSender<Fill>>>,
    recent: Mutex<Option<LruCache<(u64, usize), Instant>>>,
    /// Held while a file of the mount is open.
    at_work: Arc<Mutex<()>>,
    filled_bytes: Arc<AtomicU64>,
}

/// A range of a file to read.
struct Fill {
    ino: INodeNo,
    range: Range<u64>,
}

/// The mount that files are opened in.
struct Place {
    dir: PathBuf,
    /// The device number of the mount: nothing is opened in what may lie over it.
    device: (u32, u32),
}

impl Filler {
    /// Starts the thread for the mount at `dir` with this device number. It ends with
    /// [`Filler::stop`].
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn start(&self, dir: &Path, device: (u32, u32)) -> io::Result<()> {
        let (send, receive) = sync_channel(QUEUE);
        let place = Place {
            dir: dir.to_owned(),
            device,
        };
        let (at_work, filled) = (Arc::clone(&self.at_work), Arc::clone(&self.filled_bytes));
        std::thread::Builder::new()
            .name("lazyimg-fill".to_owned())
            .spawn(move || fill_all(&receive, &place, &at_work, &filled))?;
        *self.recent.lock() = Some(LruCache::new(RECENT));
        *self.queue.write() = Some(send);
        Ok(())
    }

    /// Ends the thread after the fill it may be at.
    pub fn stop(&self) {
        self.queue.write().take();
    }

    /// While it is held, no file of the mount is open for filling, which would keep it busy.
    pub fn pause(&self) -> MutexGuard<'_, ()> {
        self.at_work.lock()
    }

    /// Bytes that the kernel was advised to read.
    pub fn filled_bytes(&self) -> u64 {
        self.filled_bytes.load(Relaxed)
    }

    /// Whether a read of `len` bytes in this extent of a file is likely caused by a fill.
    pub fn is_filling(&self, ino: INodeNo, extent: usize, len: u64) -> bool {
        if len < MIN_FILLING {
            return false;
        }
        let mut recent = self.recent.lock();
        let Some(recent) = recent.as_mut() else {
            return false;
        };
        recent
            .peek(&(ino.0, extent))
            .is_some_and(|at| at.elapsed() < FRESH)
    }

    /// Asks for the bytes `range` of a file, which lie in this extent, after a read of `read`.
    pub fn ask(&self, ino: INodeNo, extent: usize, range: Range<u64>, read: &Range<u64>) {
        let beside = read.start.saturating_sub(range.start) + range.end.saturating_sub(read.end);
        let queue = self.queue.read();
        let Some(queue) = queue.as_ref().filter(|_| beside >= MIN_FILL) else {
            return;
        };
        if queue.try_send(Fill { ino, range }).is_ok()
            && let Some(recent) = self.recent.lock().as_mut()
        {
            recent.put((ino.0, extent), Instant::now());
        }
    }
}

fn fill_all(queue: &Receiver<Fill>, place: &Place, at_work: &Mutex<()>, filled: &AtomicU64) {
    for Fill { ino, range } in queue {
        let _open = at_work.lock();
        match fill(place, ino, &range) {
            Ok(()) => {
                filled.fetch_add(range.end - range.start, Relaxed);
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                tracing::debug!("no filling of the page cache without the right to open by handle");
                return;
            }
            // Forgotten by the kernel, or taken off its directory.
            Err(error) => tracing::debug!("a fill came to nothing: {error}"),
        }
    }
}

fn fill(place: &Place, ino: INodeNo, range: &Range<u64>) -> io::Result<()> {
    let root = File::open(&place.dir)?;
    // From what the kernel knows: a question to ourselves is one that a kill could leave open.
    let known = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = rustix::fs::statx(&root, c"", known, StatxFlags::INO)?;
    if (found.stx_dev_major, found.stx_dev_minor) != place.device {
        return Err(io::Error::other("something else lies at the mount point"));
    }
    let file = open_by_number(root.as_fd(), ino)?;
    let mut at = range.start;
    while at < range.end {
        let len = ADVICE.min(range.end - at);
        rustix::fs::fadvise(&file, at, std::num::NonZeroU64::new(len), Advice::WillNeed)?;
        at += len;
    }
    Ok(())
}

/// `struct file_handle` with what FUSE puts into it (`fuse_encode_fh` in the kernel's
/// `fs/fuse/inode.c`): the number's upper half, its lower half, the generation.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    ino_high: u32,
    ino_low: u32,
    generation: u32,
}

/// `FILEID_INO64_GEN` in the kernel's `include/linux/exportfs.h`.
const FILEID_INO64_GEN: i32 = 0x81;

fn open_by_number(mount: impl AsFd, ino: INodeNo) -> io::Result<OwnedFd> {
    let mut handle = Handle {
        bytes: 12,
        kind: FILEID_INO64_GEN,
        ino_high: (ino.0 >> 32) as u32,
        ino_low: ino.0 as u32,
        generation: 0,
    };
    let flags = (OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY).bits();
    #[allow(unsafe_code)]
    // SAFETY: there is no safe form of this system call. `Handle` is laid out as `file_handle` with
    // its 12 bytes behind it, which `bytes` says; the kernel only reads it, during the call. What
    // it returns, if not negative, is a descriptor that nobody else owns.
    let opened = unsafe {
        let raw = libc::open_by_handle_at(
            mount.as_fd().as_raw_fd(),
            std::ptr::from_mut(&mut handle).cast(),
            flags as i32,
        );
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(raw)
    };
    Ok(opened)
}
