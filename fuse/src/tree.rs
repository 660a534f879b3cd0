//! The `tree` front end: an image as a FUSE file system.
//!
//! An image never changes, so the kernel is told to remember everything: names, absent names,
//! attributes, listings, link targets and pages, for a day at a time. `open` and `opendir` are
//! ENOSYS, which the kernel takes for "always fine, don't ask": there are no handles, and all
//! state of a mount is in the metadata.

mod fill;
mod meta;
mod read;

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request, TimeOrNow, WriteFlags,
};
use lazyimg_chunkstore::{ImageStore, MAX_FETCH};
use lazyimg_image::erofs::{ReadError, Reader};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use crate::attr::Inos;
use crate::faults::Faults;
use crate::meta::Metadata;
use crate::readahead::Streams;
use crate::view::ImageView;
use fill::Filler;

/// How long the kernel may remember what it was told. It would be for ever, were it not for the
/// memory that a look-up that is never made again holds.
const TTL: Duration = Duration::from_secs(24 * 3600);

/// The largest single request, in bytes: larger ones only cost memory, since a chunk is half that.
const MAX_REQUEST: u32 = 1 << 20;

/// Reads that the kernel may have under way in the background (readahead): beyond it, they queue
/// up in the kernel. Enough to keep a slow network busy.
const MAX_BACKGROUND: u16 = 64;

/// [`TreeOptions::read_timeout`] by default.
pub const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// The longest [`TreeOptions::read_timeout`]: no fetch lasts longer.
pub const MAX_READ_TIMEOUT: Duration = MAX_FETCH;

/// How a tree is served.
#[derive(Debug, Clone)]
pub struct TreeOptions {
    /// A read that can't be answered within this time fails with EIO.
    pub read_timeout: Duration,
    /// How far ahead of a program that reads in order chunks are fetched at most, in bytes; 0: not.
    pub readahead_bytes: u64,
    /// How far ahead the kernel reads, in bytes; its default and most is 128 KiB.
    pub kernel_readahead_bytes: u32,
    /// Whether the kernel is to read the rest of a chunk after a read at random. Only root can.
    pub fill: bool,
}

impl Default for TreeOptions {
    fn default() -> Self {
        Self {
            read_timeout: READ_TIMEOUT,
            readahead_bytes: 4 << 20,
            kernel_readahead_bytes: 128 << 10,
            fill: true,
        }
    }
}

/// What all threads and tasks of a mount share.
pub(crate) struct Shared {
    reader: Reader<Arc<Metadata>>,
    inos: Inos,
    view: Arc<ImageView>,
    store: ImageStore,
    faults: Arc<Faults>,
    streams: Mutex<Streams>,
    filler: Filler,
    options: TreeOptions,
    runtime: Handle,
}

impl Shared {
    /// Begins to fill the page cache of the mount at `dir`, which has this device number.
    pub(crate) fn start_filling(&self, dir: &Path, device: (u32, u32)) -> io::Result<()> {
        if self.options.fill {
            self.filler.start(dir, device)
        } else {
            Ok(())
        }
    }

    pub(crate) fn filler(&self) -> &Filler {
        &self.filler
    }

    /// Requests that were answered with an error.
    pub(crate) fn errors(&self) -> u64 {
        self.faults.total()
    }

    fn metadata(&self) -> &Metadata {
        self.reader.source()
    }
}

/// An image as a FUSE file system. Mount it with [`crate::mount::TreeMount`].
pub struct TreeFs(Arc<Shared>);

impl TreeFs {
    /// Opens the tree, which waits for superblock and root directory: call it where blocking is
    /// allowed.
    ///
    /// # Errors
    /// When these bytes can't be had or are not an image's.
    pub fn open(
        metadata: Arc<Metadata>,
        view: Arc<ImageView>,
        store: ImageStore,
        options: TreeOptions,
        runtime: Handle,
    ) -> Result<Self, ReadError> {
        let faults = Arc::clone(metadata.faults());
        let reader = Reader::open(metadata)?;
        Ok(Self(Arc::new(Shared {
            inos: Inos::new(reader.root()),
            reader,
            view,
            store,
            faults,
            streams: Mutex::default(),
            filler: Filler::default(),
            options,
            runtime,
        })))
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.0)
    }

    /// Runs `answer` here when all metadata has arrived; else on a thread that may wait for it.
    fn answer(&self, answer: impl FnOnce(&Arc<Shared>) + Send + 'static) {
        if self.0.metadata().is_complete() {
            return answer(&self.0);
        }
        let shared = Arc::clone(&self.0);
        self.0.runtime.spawn_blocking(move || answer(&shared));
    }
}

impl Filesystem for TreeFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let useful = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_EXPLICIT_INVAL_DATA
            | InitFlags::FUSE_EXPORT_SUPPORT
            | InitFlags::FUSE_NO_OPENDIR_SUPPORT
            | InitFlags::FUSE_NO_OPEN_SUPPORT
            | InitFlags::FUSE_PARALLEL_DIROPS;
        // Each of them can be missing; nothing depends on one.
        let _ = config.add_capabilities(useful & config.capabilities());
        let _ = config.set_max_write(MAX_REQUEST);
        let _ = config.set_max_background(MAX_BACKGROUND);
        if let Err(most) = config.set_max_readahead(self.0.options.kernel_readahead_bytes.max(4096))
        {
            let _ = config.set_max_readahead(most);
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if self.0.metadata().is_complete() {
            return self.0.lookup(parent, name, reply);
        }
        let name = name.to_owned();
        self.answer(move |shared| shared.lookup(parent, &name, reply));
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.answer(move |shared| shared.getattr(ino, reply));
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        self.answer(move |shared| shared.readlink(ino, reply));
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // "No need to ask", for good.
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.answer(move |shared| shared.read(ino, offset, size, reply));
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        self.answer(move |shared| shared.readdir(ino, offset, reply));
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        self.answer(move |shared| shared.readdirplus(ino, offset, reply));
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.0.statfs(reply);
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if !self.0.reader.has_xattrs() {
            return reply.error(Errno::ENOSYS);
        }
        let name = name.to_owned();
        self.answer(move |shared| shared.getxattr(ino, &name, size, reply));
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        if !self.0.reader.has_xattrs() {
            return reply.error(Errno::ENOSYS);
        }
        let privileged = req.uid() == 0;
        self.answer(move |shared| shared.listxattr(ino, privileged, size, reply));
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        self.answer(move |shared| shared.seek(ino, offset, whence, reply));
    }

    // The kernel checks permissions (`default_permissions`), knows that nothing needs flushing, and
    // asks each of these once.

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn poll(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _ph: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    // The mount is read-only, so the kernel refuses these itself; until somebody with the right to
    // remounts it read-write.

    fn setattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn link(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _parent: INodeNo,
        _name: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EROFS);
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // Never of use for reading either: the kernel copies on its own after this.
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }
}
