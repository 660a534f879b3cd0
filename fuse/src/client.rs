//! Talking to the daemon of a cache directory, starting it where it is needed. Blocking: for
//! command line programs and tests.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lazyimg_chunkstore::{CacheStats, Scrubbed};
use lazyimg_convergent::Digest;
use lazyimg_image::reference::ImageRef;

use crate::log;
use crate::mountpoint::{self, Health, MountEntry, MountpointError, Unmount};
use crate::protocol::{
    Envelope, ErrorCode, KeySource, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, MountRequest, Reply,
    Request, SILENCE, StatusReport, VerifyReport, WirePath,
};
use crate::rendezvous::{self, LOG};

/// Daemons that end, and others that begin, are given so long to sort it out.
const SETTLE: Duration = Duration::from_secs(15);

/// The pause between two attempts meanwhile.
const SETTLE_PAUSE: Duration = Duration::from_millis(10);

/// How much of the log an error message shows, in bytes.
const LOG_TAIL: usize = 1500;

/// How to start a daemon: a program that calls [`crate::daemon::run`] with
/// [`crate::daemon::Start::Inherited`].
#[derive(Debug, Clone)]
pub struct DaemonCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments; no secrets, everybody on the host can see them.
    pub args: Vec<OsString>,
}

/// The client of one cache directory's daemon.
#[derive(Debug, Clone)]
pub struct Client {
    cache_dir: PathBuf,
    daemon: Option<DaemonCommand>,
}

/// A mount that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// Digest of the image.
    pub digest: Digest,
    /// Where, resolved.
    pub dir: PathBuf,
    /// What else was done, for the user to know.
    pub note: Option<String>,
}

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The daemon says no; its words say why.
    #[error("{message}")]
    Refused {
        /// For programs.
        code: ErrorCode,
        /// For people.
        message: String,
    },
    /// The cache directory can't be used.
    #[error("cannot use the cache directory {}: {cause}", dir.display())]
    CacheDir {
        /// Which.
        dir: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The request itself is wrong.
    #[error("{0}")]
    Request(String),
    /// No daemon could be started.
    #[error("cannot start the daemon {}: {cause}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The daemon ended in the middle of a request.
    #[error("the daemon ended before it answered{}", if log.is_empty() { String::new() } else { format!("; its log says:\n{log}") })]
    Died {
        /// The end of its log.
        log: String,
    },
    /// The daemon does not answer.
    #[error("the daemon of the cache {} does not answer: {cause}; its process id is in daemon.lock there", dir.display())]
    Silent {
        /// The cache directory.
        dir: PathBuf,
        /// What happened instead.
        #[source]
        cause: io::Error,
    },
    /// There is no daemon, so nothing is mounted.
    #[error("nothing is mounted with the cache {}", dir.display())]
    NoDaemon {
        /// The cache directory.
        dir: PathBuf,
    },
    /// The directory is not what was expected.
    #[error(transparent)]
    Mountpoint(#[from] MountpointError),
}

impl Client {
    /// For the daemon of `cache_dir`. Without a `daemon` none is started.
    pub fn new(cache_dir: &Path, daemon: Option<DaemonCommand>) -> Result<Self, ClientError> {
        let cache_dir = std::path::absolute(cache_dir).map_err(|cause| ClientError::CacheDir {
            dir: cache_dir.to_owned(),
            cause,
        })?;
        Ok(Self { cache_dir, daemon })
    }

    /// Where the daemon writes what nobody waits to hear.
    pub fn log_path(&self) -> PathBuf {
        self.cache_dir.join(LOG)
    }

    /// Mounts an image; starts the daemon if there is none. Returns when the tree can be used.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn mount(&self, request: MountRequest) -> Result<Mounted, ClientError> {
        let request = Request::Mount(Box::new(absolute(request)?));
        match self.ask(&request, true, &mut |_, _| {})? {
            Reply::Mounted { digest, dir, note } => Ok(Mounted {
                digest,
                dir: dir.0,
                note,
            }),
            other => Err(unexpected(&other)),
        }
    }

    /// Takes a mount off `dir`: through its daemon, or without one when that is gone or another
    /// cache's. True when files of it are still open (after a lazy one).
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn umount(&self, dir: &Path, how: Unmount) -> Result<bool, ClientError> {
        let dir = mountpoint::resolve(dir)?;
        match mountpoint::mounted_at(&dir)? {
            Some(entry) if entry.is_ours() => {}
            other => {
                let found = other.map(|entry: MountEntry| entry.fs_type);
                return Err(MountpointError::NotOurs { dir, found }.into());
            }
        }
        let namespace =
            mountpoint::namespace().map_err(|e| ClientError::Request(format!("/proc: {e}")))?;
        let request = Request::Umount {
            dir: WirePath(dir.clone()),
            how,
            namespace,
        };
        match self.ask(&request, false, &mut |_, _| {}) {
            Ok(Reply::Unmounted { in_use }) => return Ok(in_use),
            Ok(other) => return Err(unexpected(&other)),
            Err(error @ ClientError::Refused { code, .. })
                if !matches!(code, ErrorCode::NotMounted | ErrorCode::Namespace) =>
            {
                return Err(error);
            }
            // Nobody's, another cache's, or a daemon's that does not answer.
            Err(_) => {}
        }
        let how = match how {
            Unmount::Clean if mountpoint::probe(&dir) == Health::Stale => Unmount::Lazy,
            how => how,
        };
        mountpoint::unmount(&dir, how)?;
        Ok(false)
    }

    /// The daemon and its mounts; `None` when there is none.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn status(&self) -> Result<Option<StatusReport>, ClientError> {
        match self.ask(&Request::Status, false, &mut |_, _| {}) {
            Ok(Reply::Status(report)) => Ok(Some(*report)),
            Ok(other) => Err(unexpected(&other)),
            Err(ClientError::NoDaemon { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Checks every chunk of the mount at `dir`; `tiers`: the tiers' copies, not the host cache's.
    /// `progress` hears steps done and in all.
    ///
    /// # Errors
    /// See [`ClientError`]. Chunks that are bad or can't be reached are no error: they are in the
    /// report.
    pub fn verify(
        &self,
        dir: &Path,
        tiers: bool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<VerifyReport, ClientError> {
        let dir = WirePath(mountpoint::resolve(dir)?);
        match self.ask(&Request::Verify { dir, tiers }, false, progress)? {
            Reply::Verified(report) => Ok(report),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the daemon give up chunks until its host cache uses at most `bytes` of disk.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::NoDaemon`] when there is none, and the cache is free.
    pub fn cache_trim(&self, bytes: u64) -> Result<CacheStats, ClientError> {
        match self.ask(&Request::CacheTrim { bytes }, false, &mut |_, _| {})? {
            Reply::Cache(stats) => Ok(stats),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the daemon check every chunk in its host cache. `progress` hears bytes read and in all.
    ///
    /// # Errors
    /// As [`Client::cache_trim`].
    pub fn cache_verify(
        &self,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Scrubbed, ClientError> {
        match self.ask(&Request::CacheVerify, false, progress)? {
            Reply::Scrubbed(scrubbed) => Ok(scrubbed),
            other => Err(unexpected(&other)),
        }
    }

    /// Tells the daemon to unmount everything and end, and waits until it has. False when there was
    /// none.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn stop(&self) -> Result<bool, ClientError> {
        match self.ask(&Request::Stop, false, &mut |_, _| {}) {
            Ok(_) => {}
            Err(ClientError::NoDaemon { .. }) => return Ok(false),
            Err(error) => return Err(error),
        }
        let deadline = Instant::now() + SETTLE;
        while let Err(cause) = rendezvous::DaemonLock::take(&self.cache_dir) {
            if Instant::now() > deadline {
                return Err(ClientError::Silent {
                    dir: self.cache_dir.clone(),
                    cause,
                });
            }
            std::thread::sleep(SETTLE_PAUSE);
        }
        Ok(true)
    }

    /// One request and its reply. Comes again when the daemon is about to end, or when another
    /// client's daemon was faster than ours.
    fn ask(
        &self,
        request: &Request,
        start: bool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Reply, ClientError> {
        let mut line = serde_json::to_vec(&Envelope::new(request))
            .map_err(|e| ClientError::Request(e.to_string()))?;
        line.push(b'\n');
        if line.len() > MAX_REQUEST_BYTES {
            return Err(ClientError::Request(format!(
                "the request is longer than {MAX_REQUEST_BYTES} bytes"
            )));
        }
        let deadline = Instant::now() + SETTLE;
        loop {
            let log_from = std::fs::metadata(self.log_path()).map_or(0, |m| m.len());
            let (stream, ours) = match rendezvous::connect(&self.cache_dir)
                .map_err(|cause| self.cache_error(cause))?
            {
                Some(stream) => (stream, false),
                None if start => (self.start()?, true),
                None => {
                    return Err(ClientError::NoDaemon {
                        dir: self.cache_dir.clone(),
                    });
                }
            };
            match converse(stream, &line, progress) {
                Ok(Some(Reply::Error {
                    code: ErrorCode::Again,
                    ..
                })) if Instant::now() < deadline => {}
                // Cut off: it ended while we were in its queue. Ours has no queue: it failed.
                Ok(None) if !ours && Instant::now() < deadline => {}
                Ok(Some(Reply::Error { code, message })) => {
                    return Err(ClientError::Refused { code, message });
                }
                Ok(Some(reply)) => return Ok(reply),
                Ok(None) => {
                    return Err(ClientError::Died {
                        log: log::tail(&self.log_path(), log_from, LOG_TAIL),
                    });
                }
                Err(cause) => {
                    return Err(ClientError::Silent {
                        dir: self.cache_dir.clone(),
                        cause,
                    });
                }
            }
            std::thread::sleep(SETTLE_PAUSE);
        }
    }

    fn cache_error(&self, cause: io::Error) -> ClientError {
        ClientError::CacheDir {
            dir: self.cache_dir.clone(),
            cause,
        }
    }

    /// Starts a daemon; a connection to it.
    fn start(&self) -> Result<UnixStream, ClientError> {
        let Some(daemon) = &self.daemon else {
            return Err(ClientError::NoDaemon {
                dir: self.cache_dir.clone(),
            });
        };
        rendezvous::make_dir(&self.cache_dir).map_err(|cause| self.cache_error(cause))?;
        let log = log::open(&self.log_path()).map_err(|cause| self.cache_error(cause))?;
        let fail = |cause| ClientError::Start {
            program: daemon.program.clone(),
            cause,
        };
        let (ours, theirs) = UnixStream::pair().map_err(fail)?;
        let mut child = Command::new(&daemon.program)
            .args(&daemon.args)
            // It outlives the directory that we are in.
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(fail)?;
        // A caller that lives longer than the daemon should not keep its corpse.
        std::thread::Builder::new()
            .name("lazyimg-reap".to_owned())
            .spawn(move || child.wait())
            .map_err(fail)?;
        Ok(ours)
    }
}

/// Sends a line and reads replies until the final one; `None` when the peer hung up before it.
fn converse(
    mut stream: UnixStream,
    line: &[u8],
    progress: &mut dyn FnMut(u64, u64),
) -> io::Result<Option<Reply>> {
    let hung_up = |error: &io::Error| {
        matches!(
            error.kind(),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
        )
    };
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    // A daemon that refuses may have answered and hung up before we have said what we want: what it
    // said is still there to be read.
    if let Err(error) = stream.write_all(line)
        && !hung_up(&error)
    {
        return Err(error);
    }
    let mut replies = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        match (&mut replies)
            .take(MAX_REPLY_BYTES as u64)
            .read_until(b'\n', &mut line)
        {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(error) if hung_up(&error) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("silence for {SILENCE:?}"),
                ));
            }
            Err(error) => return Err(error),
        }
        if !line.ends_with(b"\n") {
            // It died in the middle of a word, or talks without end.
            return Ok(None);
        }
        match serde_json::from_slice::<Envelope<Reply>>(&line)?.message {
            Reply::Working { done, total } => progress(done, total),
            reply => return Ok(Some(reply)),
        }
    }
}

/// The request with every path absolute: the daemon lives in `/`.
fn absolute(mut request: MountRequest) -> Result<MountRequest, ClientError> {
    let wrong = |e: io::Error| ClientError::Request(e.to_string());
    let fix = |path: &mut WirePath| -> Result<(), ClientError> {
        path.0 = std::path::absolute(&path.0).map_err(wrong)?;
        Ok(())
    };
    fix(&mut request.dir)?;
    if let Some(path) = &mut request.source.docker_config {
        fix(path)?;
    }
    if let Some(credentials) = &mut request.source.credentials {
        credentials.files.iter_mut().try_for_each(fix)?;
    }
    if let KeySource::File(path) = &mut request.key {
        fix(path)?;
    }
    match request
        .image
        .parse::<ImageRef>()
        .map_err(|e| ClientError::Request(e.to_string()))?
    {
        ImageRef::Layout { dir, target } => {
            let dir = std::path::absolute(dir).map_err(wrong)?;
            request.image = ImageRef::Layout { dir, target }.to_string();
        }
        ImageRef::Registry(_) => {}
    }
    Ok(request)
}

fn unexpected(reply: &Reply) -> ClientError {
    ClientError::Refused {
        code: ErrorCode::Internal,
        message: format!("the daemon answered something else: {reply:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_came_before_the_question_is_heard() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let reply = Reply::Error {
            code: ErrorCode::Again,
            message: "another daemon of this cache was faster".to_owned(),
        };
        let mut line = serde_json::to_vec(&Envelope::new(&reply)).unwrap();
        line.push(b'\n');
        theirs.write_all(&line).unwrap();
        drop(theirs);
        let heard = converse(ours, b"{}\n", &mut |_, _| {}).unwrap();
        assert_eq!(heard, Some(reply));
    }

    #[test]
    fn a_daemon_that_is_gone_without_a_word_is_told_from_one_that_answers() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(converse(ours, b"{}\n", &mut |_, _| {}).unwrap(), None);
    }
}
