//! The load: clients that ask for random chunks, one after the other, on a connection each.
//!
//! The same code asks every server. It reads answers into one buffer and looks at no byte of a body, so
//! that it takes as little as it can of the machine that it shares with the server.

use std::cell::RefCell;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::LocalSet;

use crate::error::{BenchError, io};
use crate::setup::workload::Random;

/// What answers are read into, in bytes; one for all connections of a thread.
const BUFFER: usize = 256 << 10;

/// Longest head of an answer, in bytes.
const MAX_HEAD: usize = 4096;

/// What is not counted yet when a load begins.
pub const WARM_UP: Duration = Duration::from_millis(500);

/// How a server is asked.
#[derive(Debug, Clone, Copy)]
pub enum Language {
    /// HTTP/1.1 with `content-length`.
    Http,
    /// Redis.
    Resp,
}

/// Who is asked for what.
pub struct Target {
    /// Where it listens.
    pub address: SocketAddr,
    /// How it is asked.
    pub language: Language,
    /// Requests, each for one chunk.
    pub requests: Vec<Vec<u8>>,
    /// Length of each chunk, in bytes.
    pub len: usize,
}

/// How many ask, and how fast.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Connections.
    pub clients: usize,
    /// How long it is measured.
    pub lasts: Duration,
    /// Requests per second of all clients together; `None`: each asks again as soon as it is answered.
    pub rate: Option<f64>,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Outcome {
    /// How long each request took, in milliseconds, in order.
    millis: Vec<f64>,
    /// Answers per second.
    pub per_s: f64,
}

impl Outcome {
    /// The time below which this share of the requests was answered.
    pub fn quantile(&self, share: f64) -> f64 {
        let at = (self.millis.len() as f64 * share) as usize;
        let last = self.millis.len().saturating_sub(1);
        self.millis.get(at.min(last)).copied().unwrap_or(f64::NAN)
    }
}

/// Puts the load on the server, from as many threads as half of the cores.
pub fn run(target: &Target, load: Load) -> Result<Outcome, BenchError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (cores / 2).clamp(1, load.clients);
    let from = Instant::now() + WARM_UP;
    let mut outcome = Outcome::default();
    let parts = std::thread::scope(|scope| {
        let parts: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || on_thread(target, load, from, thread, threads)))
            .collect();
        let joined = parts.into_iter().map(|part| part.join());
        joined.collect::<Vec<_>>()
    });
    for part in parts {
        let part = part.map_err(|_| BenchError::Setup("a client panicked".into()))?;
        outcome.millis.extend(part?);
    }
    if outcome.millis.is_empty() {
        return Err(BenchError::Setup(format!(
            "{} answered nothing in {:?}",
            target.address, load.lasts
        )));
    }
    outcome.millis.sort_by(f64::total_cmp);
    outcome.per_s = outcome.millis.len() as f64 / load.lasts.as_secs_f64();
    Ok(outcome)
}

/// Every `threads`th client.
fn on_thread(
    target: &Target,
    load: Load,
    from: Instant,
    thread: usize,
    threads: usize,
) -> Result<Vec<f64>, BenchError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(io("starting a client"))?;
    let buffer = Rc::new(RefCell::new(vec![0; BUFFER]));
    LocalSet::new().block_on(&runtime, async {
        // The tasks of a LocalSet live as long as it: what they use is theirs.
        let target = Rc::new(Target {
            address: target.address,
            language: target.language,
            requests: target.requests.clone(),
            len: target.len,
        });
        let clients: Vec<_> = (thread..load.clients)
            .step_by(threads)
            .map(|client| {
                let (target, buffer) = (Rc::clone(&target), Rc::clone(&buffer));
                tokio::task::spawn_local(
                    async move { ask(&target, &buffer, load, from, client).await },
                )
            })
            .collect();
        let mut millis = Vec::new();
        for client in clients {
            let client = client.await.map_err(|e| BenchError::Setup(e.to_string()))?;
            millis.extend(client.map_err(io(format!("asking {}", target.address)))?);
        }
        Ok(millis)
    })
}

async fn ask(
    target: &Target,
    buffer: &RefCell<Vec<u8>>,
    load: Load,
    from: Instant,
    client: usize,
) -> std::io::Result<Vec<f64>> {
    let mut stream = TcpStream::connect(target.address).await?;
    stream.set_nodelay(true)?;
    let mut random = Random(0x9E37_79B9_7F4A_7C15 ^ (client as u64 + 1));
    let period = load
        .rate
        .map(|rate| Duration::from_secs_f64(load.clients as f64 / rate));
    // Clients do not all begin at one moment.
    let share = client as f64 / load.clients as f64;
    let mut next = Instant::now() + period.unwrap_or_default().mul_f64(share);
    let until = from + load.lasts;
    let mut millis = Vec::new();
    loop {
        let mut begun = Instant::now();
        if let Some(period) = period {
            if begun < next {
                tokio::time::sleep_until(next.into()).await;
                // A timer that is late is not the server's fault.
                begun = Instant::now();
            } else {
                // An answer that was late delays the next request: that counts.
                begun = next;
            }
            next += period;
        }
        if begun >= until {
            return Ok(millis);
        }
        let request = &target.requests[(random.draw() % target.requests.len() as u64) as usize];
        stream.write_all(request).await?;
        answer(target, &stream, buffer).await?;
        let end = Instant::now();
        if begun >= from && end <= until {
            millis.push((end - begun).as_secs_f64() * 1e3);
        }
    }
}

/// Reads one answer to its end.
async fn answer(
    target: &Target,
    stream: &TcpStream,
    buffer: &RefCell<Vec<u8>>,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut seen = 0;
    let mut left = None;
    while left != Some(0) {
        stream.readable().await?;
        // No await while it is borrowed.
        let mut buffer = buffer.borrow_mut();
        let most = left.unwrap_or(BUFFER).min(BUFFER);
        let read = match stream.try_read(&mut buffer[..most]) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => continue,
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            read => read?,
        };
        seen += read;
        left = Some(match left {
            Some(left) => left - read,
            None => {
                head.extend_from_slice(&buffer[..read.min(MAX_HEAD)]);
                let Some((head_len, body_len)) = parse(target.language, &head, target.len)? else {
                    continue;
                };
                (head_len + body_len)
                    .checked_sub(seen)
                    .ok_or(ErrorKind::InvalidData)?
            }
        });
    }
    Ok(())
}

/// Lengths of an answer's head and of what follows it; `None` when more of the head is needed.
fn parse(
    language: Language,
    bytes: &[u8],
    expected: usize,
) -> std::io::Result<Option<(usize, usize)>> {
    let bad = || {
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
        std::io::Error::new(ErrorKind::InvalidData, start)
    };
    let end: &[u8] = match language {
        Language::Http => b"\r\n\r\n",
        Language::Resp => b"\r\n",
    };
    let Some(at) = bytes.windows(end.len()).position(|w| w == end) else {
        return match bytes.len() < MAX_HEAD {
            true => Ok(None),
            false => Err(bad()),
        };
    };
    let head = std::str::from_utf8(&bytes[..at]).map_err(|_| bad())?;
    let (len, after) = match language {
        Language::Resp => (head.strip_prefix('$'), 2),
        Language::Http => {
            let len = head.starts_with("HTTP/1.1 200 ").then(|| {
                head.lines().find_map(|line| {
                    let (name, value) = line.split_once(':')?;
                    name.eq_ignore_ascii_case("content-length")
                        .then(|| value.trim())
                })
            });
            (len.flatten(), 0)
        }
    };
    let len: usize = len.and_then(|len| len.parse().ok()).ok_or_else(bad)?;
    match len == expected {
        true => Ok(Some((at + end.len(), len + after))),
        false => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_the_length_that_its_head_says() {
        let http = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
        assert_eq!(parse(Language::Http, http, 5).unwrap(), Some((38, 5)));
        assert_eq!(parse(Language::Http, &http[..30], 5).unwrap(), None);
        assert_eq!(parse(Language::Resp, b"$5\r\nhe", 5).unwrap(), Some((4, 7)));
    }

    #[test]
    fn an_answer_that_is_not_the_chunk_is_an_error() {
        let missing = b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\n";
        assert!(parse(Language::Http, missing, 5).is_err());
        assert!(parse(Language::Resp, b"$-1\r\n", 5).is_err());
        assert!(parse(Language::Resp, b"$4\r\n", 5).is_err());
    }

    #[test]
    fn quantiles_are_of_the_answers_in_order() {
        let outcome = Outcome {
            millis: (1..=1000).map(f64::from).collect(),
            per_s: 1.0,
        };
        assert_eq!(outcome.quantile(0.5), 501.0);
        assert_eq!(outcome.quantile(0.999), 1000.0);
        assert!(Outcome::default().quantile(0.5).is_nan());
    }
}
