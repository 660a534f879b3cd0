//! Encoders: plaintext chunks in, ciphertexts in a spool file out.
//!
//! A few threads compress and encrypt; what they make goes to one spool file in whatever order they
//! finish. Tickets keep the order of submission, so the result is the same on one thread or many.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};
use lazyimg_convergent::payload::Encoder;
use lazyimg_convergent::{ChunkId, ChunkKey, Salt, chunk};
use parking_lot::{Condvar, Mutex};

use crate::layout::{ChunkEncoder, Ticket};

/// An encoded chunk, in the spool.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// SHA-256 of the ciphertext.
    pub id: ChunkId,
    /// What opens it.
    pub key: ChunkKey,
    /// Length of the ciphertext in bytes.
    pub len: u32,
    /// Where it lies in the spool, in bytes.
    pub at: u64,
    /// Length of the plaintext in bytes.
    pub plain_len: u32,
}

/// Chunks that wait for an encoder, for each thread: enough to keep it busy, and a bound on memory.
const QUEUE_PER_THREAD: usize = 2;

struct Shared {
    spool: File,
    end: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    done: Vec<Option<Encoded>>,
    finished: usize,
    failure: Option<io::Error>,
}

/// A pool of encoder threads.
pub struct EncodePool {
    shared: Arc<Shared>,
    queue: Option<Sender<(Ticket, Vec<u8>)>>,
    threads: Vec<JoinHandle<()>>,
    next: u32,
    plain_bytes: u64,
}

impl EncodePool {
    /// `threads` encoders at zstd `level`, writing to the empty file `spool`.
    ///
    /// # Errors
    /// When threads or zstd contexts can't be made.
    pub fn new(spool: File, salt: &Salt, level: i32, threads: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            spool,
            end: AtomicU64::new(0),
            state: Mutex::new(State {
                done: Vec::new(),
                finished: 0,
                failure: None,
            }),
            changed: Condvar::new(),
        });
        let (queue, work) = bounded(threads * QUEUE_PER_THREAD);
        let threads = (0..threads.max(1))
            .map(|n| {
                let (shared, work, salt) = (shared.clone(), work.clone(), salt.clone());
                let encoder = Encoder::new(level)?;
                std::thread::Builder::new()
                    .name(format!("encode-{n}"))
                    .spawn(move || run(&shared, &work, &salt, encoder))
            })
            .collect::<io::Result<_>>()?;
        Ok(Self {
            shared,
            queue: Some(queue),
            threads,
            next: 0,
            plain_bytes: 0,
        })
    }

    /// Bytes of plaintext that were handed over.
    pub fn plain_bytes(&self) -> u64 {
        self.plain_bytes
    }

    /// Waits until everything handed over is encoded.
    ///
    /// # Errors
    /// The first failure of an encoder.
    pub fn wait(&self) -> io::Result<()> {
        let mut state = self.shared.state.lock();
        while state.finished < self.next as usize && state.failure.is_none() {
            self.shared.changed.wait(&mut state);
        }
        failure(&state)
    }

    /// What a ticket became; only after [`EncodePool::wait`].
    pub fn encoded(&self, ticket: Ticket) -> Encoded {
        let state = self.shared.state.lock();
        state.done[ticket.0 as usize]
            .clone()
            .expect("asked for after wait() succeeded")
    }

    /// A handle on the spool, for reading ciphertexts back.
    ///
    /// # Errors
    /// When the descriptor can't be duplicated.
    pub fn spool(&self) -> io::Result<File> {
        self.shared.spool.try_clone()
    }
}

impl ChunkEncoder for EncodePool {
    fn encode(&mut self, plain: Vec<u8>) -> io::Result<Ticket> {
        let ticket = Ticket(self.next);
        {
            let mut state = self.shared.state.lock();
            failure(&state)?;
            state.done.push(None);
        }
        self.plain_bytes += plain.len() as u64;
        self.next = self
            .next
            .checked_add(1)
            .ok_or_else(|| io::Error::other("too many chunks"))?;
        let queue = self
            .queue
            .as_ref()
            .expect("the queue lives as long as the pool");
        queue
            .send((ticket, plain))
            .map_err(|_| io::Error::other("encoder threads are gone"))?;
        Ok(ticket)
    }

    fn decode(&mut self, ticket: Ticket) -> io::Result<Vec<u8>> {
        let encoded = {
            let mut state = self.shared.state.lock();
            loop {
                failure(&state)?;
                match state.done.get(ticket.0 as usize) {
                    Some(Some(encoded)) => break encoded.clone(),
                    Some(None) => self.shared.changed.wait(&mut state),
                    None => return Err(io::Error::other("a ticket that was never given out")),
                }
            }
        };
        let mut bytes = vec![0; encoded.len as usize];
        self.shared.spool.read_exact_at(&mut bytes, encoded.at)?;
        chunk::open_owned(&encoded.key, bytes, encoded.plain_len as usize).map_err(io::Error::other)
    }
}

impl Drop for EncodePool {
    fn drop(&mut self) {
        self.queue = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn failure(state: &State) -> io::Result<()> {
    match &state.failure {
        // An io::Error can't be cloned; its kind and text are what callers need.
        Some(e) => Err(io::Error::new(e.kind(), e.to_string())),
        None => Ok(()),
    }
}

fn run(shared: &Shared, work: &Receiver<(Ticket, Vec<u8>)>, salt: &Salt, mut encoder: Encoder) {
    for (ticket, plain) in work {
        let result = (|| {
            let payload = encoder.encode(&plain);
            let plain_len = plain.len() as u32;
            drop(plain);
            let sealed = chunk::seal(salt, payload);
            let len = sealed.ciphertext.len();
            let at = shared.end.fetch_add(len as u64, Ordering::Relaxed);
            shared.spool.write_all_at(&sealed.ciphertext, at)?;
            Ok(Encoded {
                id: sealed.id,
                key: sealed.key,
                len: len as u32,
                at,
                plain_len,
            })
        })();
        let mut state = shared.state.lock();
        match result {
            Ok(encoded) => state.done[ticket.0 as usize] = Some(encoded),
            Err(e) if state.failure.is_none() => state.failure = Some(e),
            Err(_) => {}
        }
        state.finished += 1;
        shared.changed.notify_all();
    }
}
