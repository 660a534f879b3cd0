//! The files of a layout: blobs that are complete or absent, an index that is old or new.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lazyimg_convergent::Digest;
use rustix::fs::{FlockOperation, flock};
use tempfile::NamedTempFile;

use super::Layout;
use crate::source::SourceError;
use crate::source::document::MAX_MANIFEST_BYTES;

/// What `oci-layout` holds.
const LAYOUT_FILE: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// The index of an empty layout.
const EMPTY_INDEX: &[u8] =
    br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#;

/// How long the lock of another writer is waited for. It is held for one small file.
const LOCK_WAIT: Duration = Duration::from_secs(30);

/// The largest `index.json`, in bytes.
const MAX_INDEX_BYTES: u64 = MAX_MANIFEST_BYTES;

/// A blob being written, gone unless it is kept.
pub(super) struct NewBlob {
    file: NamedTempFile,
}

impl NewBlob {
    pub(super) fn write_all(&mut self, bytes: &[u8]) -> Result<(), SourceError> {
        self.file
            .write_all(bytes)
            .map_err(|e| SourceError::io("write", self.file.path(), e))
    }
}

impl Layout {
    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    /// Opens a blob. Nothing but a regular file is opened: a FIFO would wait for ever.
    pub(super) fn open_blob(&self, digest: &Digest) -> Result<(File, PathBuf), SourceError> {
        let path = self.blob_path(digest);
        let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        match OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(&path)
        {
            Ok(file) => match file.metadata() {
                Ok(metadata) if metadata.is_file() => Ok((file, path)),
                Ok(_) => Err(SourceError::malformed(
                    path.display().to_string(),
                    "it is not a regular file",
                )),
                Err(e) => Err(SourceError::io("read", path, e)),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(SourceError::NotFound {
                what: format!("blob {digest}"),
                place: self.name(),
            }),
            Err(e) => Err(SourceError::io("open", path, e)),
        }
    }

    /// Opens a blob that must have a length.
    pub(super) fn open_sized(
        &self,
        digest: &Digest,
        size: u64,
    ) -> Result<(File, PathBuf), SourceError> {
        let (file, path) = self.open_blob(digest)?;
        let actual = file
            .metadata()
            .map_err(|e| SourceError::io("read", &*path, e))?
            .len();
        if actual != size {
            return Err(SourceError::SizeMismatch {
                what: format!("blob {digest}"),
                expected: size,
                actual,
            });
        }
        Ok((file, path))
    }

    /// Reads a blob and verifies it.
    pub(super) fn read_blob(&self, digest: &Digest, max: u64) -> Result<Bytes, SourceError> {
        let (file, path) = self.open_blob(digest)?;
        let what = format!("blob {digest}");
        let bytes = read_at_most(file, &path, max, &what)?;
        let actual = Digest::of(&bytes);
        if actual != *digest {
            return Err(SourceError::DigestMismatch {
                what,
                expected: digest.to_string(),
                actual: actual.to_string(),
            });
        }
        Ok(bytes)
    }

    /// Writes a blob whose digest was checked.
    pub(super) fn write_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<(), SourceError> {
        let mut blob = self.new_blob()?;
        blob.write_all(bytes)?;
        self.keep_blob(blob, digest)
    }

    /// Begins a blob under a temporary name; makes the layout where there is none.
    pub(super) fn new_blob(&self) -> Result<NewBlob, SourceError> {
        let dir = self.dir.join("blobs/sha256");
        std::fs::create_dir_all(&dir).map_err(|e| SourceError::io("create", &*dir, e))?;
        let layout = self.dir.join("oci-layout");
        if !layout.exists() {
            self.replace(&layout, LAYOUT_FILE)?;
        }
        Ok(NewBlob {
            file: temporary(&dir)?,
        })
    }

    /// Makes a blob durable and visible.
    pub(super) fn keep_blob(&self, blob: NewBlob, digest: &Digest) -> Result<(), SourceError> {
        persist(blob.file, &self.blob_path(digest))
    }

    /// Reads `index.json`.
    pub(super) fn read_index(&self) -> Result<Bytes, SourceError> {
        let path = self.dir.join("index.json");
        match File::open(&path) {
            Ok(file) => read_at_most(
                file,
                &path,
                MAX_INDEX_BYTES,
                &format!("the index of {}", self.name()),
            ),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                Err(SourceError::NotFound {
                    what: "index.json (is it an OCI layout?)".into(),
                    place: self.name(),
                })
            }
            Err(e) => Err(SourceError::io("open", path, e)),
        }
    }

    /// Reads `index.json`, changes it and replaces it, alone among all writers.
    pub(super) fn edit_index(
        &self,
        edit: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>),
    ) -> Result<(), SourceError> {
        let _lock = self.lock()?;
        let what = format!("the index of {}", self.name());
        let bytes = match self.read_index() {
            Ok(bytes) => bytes,
            Err(e) if e.is_not_found() => Bytes::from_static(EMPTY_INDEX),
            Err(e) => return Err(e),
        };
        let mut index =
            serde_json::from_slice(&bytes).map_err(|e| SourceError::malformed(&*what, e))?;
        edit(&mut index);
        let bytes = serde_json::to_vec(&index).map_err(|e| SourceError::malformed(&*what, e))?;
        if bytes.len() as u64 > MAX_INDEX_BYTES {
            return Err(SourceError::TooLarge {
                what,
                limit: MAX_INDEX_BYTES,
                unit: "bytes",
            });
        }
        self.replace(&self.dir.join("index.json"), &bytes)
    }

    /// A lock on `oci-layout`, the one file that nobody replaces; released when dropped.
    fn lock(&self) -> Result<File, SourceError> {
        let path = self.dir.join("oci-layout");
        let file = File::open(&path).map_err(|e| SourceError::io("open", &*path, e))?;
        let begun = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < LOCK_WAIT => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(e) => return Err(SourceError::io("lock", path, e.into())),
            }
        }
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> Result<(), SourceError> {
        let mut file = temporary(&self.dir)?;
        file.write_all(bytes)
            .map_err(|e| SourceError::io("write", path, e))?;
        persist(file, path)
    }
}

fn temporary(dir: &Path) -> Result<NamedTempFile, SourceError> {
    tempfile::Builder::new()
        .prefix(".lazyimg-")
        .permissions(Permissions::from_mode(0o644))
        .tempfile_in(dir)
        .map_err(|e| SourceError::io("create a file in", dir, e))
}

/// Flushes a file, gives it its name, and flushes the name.
fn persist(file: NamedTempFile, path: &Path) -> Result<(), SourceError> {
    let failed = |e| SourceError::io("write", path, e);
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|e| failed(e.error))?;
    match path.parent() {
        Some(dir) => File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map_err(failed),
        None => Ok(()),
    }
}

fn read_at_most(file: File, path: &Path, max: u64, what: &str) -> Result<Bytes, SourceError> {
    let mut out = Vec::new();
    file.take(max + 1)
        .read_to_end(&mut out)
        .map_err(|e| SourceError::io("read", path, e))?;
    if out.len() as u64 > max {
        return Err(SourceError::TooLarge {
            what: what.into(),
            limit: max,
            unit: "bytes",
        });
    }
    Ok(out.into())
}
