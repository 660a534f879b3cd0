//! kill -9 of the store and of hosts at random moments: what was acknowledged is there, and right.
//!
//! `LAZYIMG_KILLS` says how many kills there are in all; one in ten is a host's.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use lazyimg_convergent::ChunkId;
use lazyimg_tests::sample::noise;
use lazyimg_tests::{Lazyimg, Registry, Sample, Store, WorkDir, say};

/// Kills in a usual run: the whole file takes some minutes.
const USUAL_KILLS: u64 = 500;

/// The store is killed no later than this after the load began.
const LATEST_KILL: Duration = Duration::from_millis(60);

/// Writers at once. With these a group of puts shares a sync.
const WRITERS: u64 = 3;

/// A store that has said nothing for so long is broken.
const SILENCE: Duration = Duration::from_secs(30);

fn kills() -> u64 {
    let wish = std::env::var("LAZYIMG_KILLS").ok();
    wish.map_or(USUAL_KILLS, |n| {
        n.parse().expect("LAZYIMG_KILLS is a number")
    })
}

/// A chunk that a store has or should have: its bytes come from its seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Made {
    id: ChunkId,
    seed: u64,
}

fn make(seed: u64) -> (Made, Vec<u8>) {
    let mut random = fastrand::Rng::with_seed(seed);
    // Most chunks of a real image are a few ten KiB.
    let len = random.usize(1..48 << 10);
    let bytes = noise(&mut random, len);
    let id = ChunkId::of(&bytes);
    (Made { id, seed }, bytes)
}

/// One connection to a store, HTTP/1.1 by hand: nothing of the product's client is between.
struct Connection {
    stream: TcpStream,
    rest: Vec<u8>,
}

impl Connection {
    fn open(port: u16) -> std::io::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE))?;
        let rest = Vec::new();
        Ok(Self { stream, rest })
    }

    fn more(&mut self) -> std::io::Result<()> {
        let mut buffer = [0; 16 << 10];
        match self.stream.read(&mut buffer)? {
            0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => {
                self.rest.extend_from_slice(&buffer[..n]);
                Ok(())
            }
        }
    }

    /// Sends a request and reads all of its answer: status and body.
    fn ask(&mut self, method: &str, id: &ChunkId, body: &[u8]) -> std::io::Result<(u16, Vec<u8>)> {
        let (id, len) = (id.hex(), body.len());
        let head = format!(
            "{method} /v1/chunks/{id} HTTP/1.1\r\nHost: store\r\nContent-Length: {len}\r\n\r\n"
        );
        self.stream.write_all(&[head.as_bytes(), body].concat())?;
        let end = loop {
            let end = self.rest.windows(4).position(|w| w == b"\r\n\r\n");
            match end {
                Some(end) => break end + 4,
                None => self.more()?,
            }
        };
        let head = String::from_utf8_lossy(&self.rest[..end]).to_ascii_lowercase();
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length:"))
            .and_then(|value| value.trim().parse::<usize>().ok());
        let (Some(status), Some(length)) = (status, length) else {
            panic!("not the answer of a store: {head}");
        };
        while self.rest.len() < end + length {
            self.more()?;
        }
        let next = self.rest.split_off(end + length);
        let answer = std::mem::replace(&mut self.rest, next);
        Ok((status, answer[end..].to_vec()))
    }
}

/// Puts chunks until the store is gone or `stop`. Gives those that it has acknowledged.
fn put_on(port: u16, first_seed: u64, stop: &AtomicBool) -> Vec<Made> {
    let mut acknowledged = Vec::new();
    let mut connection = Connection::open(port).expect("the store serves");
    for seed in first_seed.. {
        let (made, bytes) = make(seed);
        if stop.load(Relaxed) {
            break;
        }
        match connection.ask("PUT", &made.id, &bytes) {
            Ok((201, _)) => acknowledged.push(made),
            Ok((status, body)) => {
                panic!("a put got {status}: {}", String::from_utf8_lossy(&body));
            }
            // It was killed.
            Err(_) => break,
        }
    }
    acknowledged
}

/// Panics unless the store has all of these, right to the byte.
fn assert_there(port: u16, chunks: &[Made], when: &str) {
    let mut connection = Connection::open(port).expect("the store serves");
    for made in chunks {
        let answer = connection.ask("GET", &made.id, &[]);
        let (status, bytes) = answer.unwrap_or_else(|e| panic!("{when}: {e}"));
        assert_eq!(status, 200, "{when}: {} is LOST", made.id);
        assert!(
            bytes == make(made.seed).1,
            "{when}: WRONG BYTES of {}",
            made.id
        );
    }
}

/// How long each start took, from the process's start until it served.
fn summary(what: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let at = |part: usize| times[(times.len() - 1) * part / 100];
    say!(
        "{what}: {} times; median {:.1?}, 99 % {:.1?}, max {:.1?}",
        times.len(),
        at(50),
        at(99),
        at(100)
    );
}

#[test]
fn a_chunk_that_was_acknowledged_survives_kill_9_of_the_store_at_any_moment() {
    let rounds = kills() * 9 / 10;
    let work = WorkDir::new("kill-store");
    let mut store = Store::start(work.join("store"));
    let mut random = fastrand::Rng::with_seed(81);
    let mut acknowledged: Vec<Made> = Vec::new();
    let mut times = Vec::new();
    let mut rounds_with_puts = 0;
    for round in 0..rounds {
        let stop = AtomicBool::new(false);
        let port = store.port();
        let moment = Duration::from_micros(random.u64(..LATEST_KILL.as_micros() as u64));
        let new: Vec<Made> = std::thread::scope(|scope| {
            let writer = |n| {
                let (first_seed, stop) = ((round * WRITERS + n) << 20, &stop);
                scope.spawn(move || put_on(port, first_seed, stop))
            };
            let writers: Vec<_> = (0..WRITERS).map(writer).collect();
            std::thread::sleep(moment);
            store.kill();
            stop.store(true, Relaxed);
            let join = |w: std::thread::ScopedJoinHandle<'_, Vec<Made>>| w.join().unwrap();
            writers.into_iter().flat_map(join).collect()
        });
        rounds_with_puts += u64::from(!new.is_empty());

        let begun = Instant::now();
        store.restart();
        times.push(begun.elapsed());
        // All of this round, and some of those before it.
        let when = format!("round {round}, killed after {moment:?}");
        assert_there(port, &new, &when);
        let older: Vec<_> = (0..20.min(acknowledged.len()))
            .map(|_| acknowledged[random.usize(..acknowledged.len())])
            .collect();
        assert_there(port, &older, &when);
        acknowledged.extend(new);
    }
    assert_there(store.port(), &acknowledged, "after the last round");
    // A clean end and start changes nothing.
    store.stop();
    store.restart();
    assert_there(store.port(), &acknowledged, "after a clean restart");
    say!(
        "{} chunks were acknowledged in {rounds_with_puts} of {rounds} rounds",
        acknowledged.len()
    );
    summary("recovery of the store after kill -9", &mut times);
    assert!(
        rounds_with_puts * 4 > rounds,
        "the kills came before anything was put"
    );
}

#[test]
fn hosts_and_their_store_killed_while_chunks_are_written_back_leave_nothing_wrong() {
    let rounds = (kills() / 10).max(1);
    let work = WorkDir::new("kill-host");
    let sample = Sample::new(&work.dir("sample"), 82, 8);
    let registry = Registry::start(work.join("registry"));
    let reference = registry.push(&sample.layout, "v1", "app:v1");
    let converter = Lazyimg::new(work.join("converter"));
    converter.convert(&reference);
    let mut store = Store::start(work.join("store"));
    let url = store.url();
    let host = Lazyimg::new(work.join("host"));
    host.copy_secrets_from(&converter);
    let at = host.home().join("mnt");
    let flags = [
        "--store",
        url.as_str(),
        "--hot-bytes",
        "0",
        "--read-timeout",
        "20",
    ];
    let mut random = fastrand::Rng::with_seed(83);
    let read = AtomicU64::new(0);
    let mut times = Vec::new();
    for round in 0..rounds {
        // Now and then the store begins with nothing, so that all must be brought again.
        if round % 2 == 0 {
            store.kill();
            let _ = std::fs::remove_dir_all(store.data());
            store.restart();
        }
        let _ = std::fs::remove_dir_all(host.cache());
        host.mount_with(&reference, &at, &flags).leave();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = |n: u64| {
                let (stop, read, sample, at) = (&stop, &read, &sample, at.as_path());
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(round * 10 + n);
                    while !stop.load(Relaxed) {
                        // Errors are expected once the daemon is dead; wrong bytes are a panic.
                        match sample.check_piece(at, &mut random) {
                            Ok(()) => drop(read.fetch_add(1, Relaxed)),
                            Err(_) => std::thread::sleep(Duration::from_millis(1)),
                        }
                    }
                })
            };
            let readers: Vec<_> = (0..3).map(reader).collect();
            std::thread::sleep(Duration::from_micros(random.u64(..500_000)));
            // Either, or one right after the other.
            match round % 3 {
                0 => host.kill_daemon(),
                1 => {
                    store.kill();
                    host.kill_daemon();
                }
                _ => {
                    host.kill_daemon();
                    store.kill();
                }
            }
            stop.store(true, Relaxed);
            for reader in readers {
                reader.join().expect("no reader got wrong bytes");
            }
        });
        if round % 3 != 0 {
            store.restart();
        }
        let begun = Instant::now();
        let mount = host.mount_with(&reference, &at, &flags);
        times.push(begun.elapsed());
        // What the host kept, what the store has, and what is in neither.
        sample.assert_right(mount.dir());
        let status = mount.status();
        assert_eq!(mount.count("/errors"), 0, "round {round}: {status:#}");
        let corrupt = status["tiers"]["store"]["corrupt"].as_u64();
        assert_eq!(corrupt, Some(0), "round {round}: {status:#}");
        mount.leave();
        host.kill_daemon();
    }
    say!("{} pieces were read before the kills", read.load(Relaxed));
    assert!(
        read.load(Relaxed) > 0,
        "the kills came before anything was read"
    );
    summary("a new mount after kill -9 of its daemon", &mut times);
    // What half a round left in the store is right too, for a host that knows nothing.
    let fresh = Lazyimg::new(work.join("fresh"));
    fresh.copy_secrets_from(&converter);
    let mount = fresh.mount_with(&reference, fresh.home().join("mnt"), &flags);
    sample.assert_right(mount.dir());
    let status = mount.status();
    let corrupt = status["tiers"]["store"]["corrupt"].as_u64();
    assert_eq!(corrupt, Some(0), "{status:#}");
    assert_eq!(mount.count("/errors"), 0, "{status:#}");
}
