//! A TCP proxy in front of a registry or a store that misbehaves on demand.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// The connection closes without an answer.
    Close,
    /// This status, with a short body.
    Status(u16),
    /// The answer's head comes and says the true length, then this many bytes, then the connection closes.
    Truncate(u64),
    /// The answer stops after this many bytes of the body and the connection stays open, until the fault changes.
    Stall(u64),
    /// The lowest bit of the body's byte at this offset is flipped.
    Flip(u64),
    /// Each answer waits this many milliseconds.
    Delay(u64),
    /// The connection is reset (RST) after this many bytes of the body.
    Reset(u64),
    /// The body is that of another answer, as far as one of at least that length has come by.
    Swap,
    /// The body comes in pieces of this many bytes, ten a second.
    Trickle(u64),
}

/// Which requests get the fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Reads of blobs: packs, manifests of converted images, layers.
    Blobs,
    /// Every read; of a store also many chunks at once.
    Reads,
    /// Reads whose address has this in it.
    Naming(&'static str),
}

/// A request that came by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Request {
    /// Its first line: method, path and version.
    pub line: String,
    /// Its `Range` header.
    pub range: Option<String>,
}

#[derive(Debug)]
struct Shared {
    upstream: u16,
    fault: Mutex<(Fault, Target)>,
    /// How many requests the fault still hits.
    left: AtomicU64,
    stop: AtomicBool,
    requests: Mutex<Vec<Request>>,
    /// How many requests have had a fault.
    faulted: AtomicU64,
    /// The longest body that has come by, for [`Fault::Swap`].
    longest: Mutex<Vec<u8>>,
}

/// The proxy. Ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Starts one in front of `127.0.0.1:upstream`.
    pub fn start(upstream: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
        let port = listener.local_addr().expect("it is bound").port();
        let shared = Arc::new(Shared {
            upstream,
            fault: Mutex::new((Fault::None, Target::Blobs)),
            left: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            requests: Mutex::default(),
            faulted: AtomicU64::new(0),
            longest: Mutex::default(),
        });
        let serving = Arc::clone(&shared);
        let listener = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if serving.stop.load(Relaxed) {
                    return;
                }
                let shared = Arc::clone(&serving);
                std::thread::spawn(move || {
                    // A broken connection is what this is about; nobody needs to hear of it.
                    let _ = serve(&shared, stream);
                });
            }
        });
        Self {
            port,
            shared,
            listener: Some(listener),
        }
    }

    /// Where it listens, as a URL.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// A reference to `name` through it.
    pub fn reference(&self, name: &str) -> String {
        format!("127.0.0.1:{}/{name}", self.port)
    }

    /// From now on, all requests of this kind get the fault.
    pub fn set(&self, fault: Fault, target: Target) {
        self.set_times(fault, target, u64::MAX);
    }

    /// The next `times` requests of this kind get the fault.
    pub fn set_times(&self, fault: Fault, target: Target, times: u64) {
        *self.shared.fault.lock().expect("no holder panics") = (fault, target);
        self.shared.left.store(times, Relaxed);
    }

    /// No faults any more.
    pub fn heal(&self) {
        self.set(Fault::None, Target::Blobs);
    }

    /// First lines of the requests so far.
    pub fn requests(&self) -> Vec<String> {
        self.seen().into_iter().map(|r| r.line).collect()
    }

    /// The requests so far.
    pub fn seen(&self) -> Vec<Request> {
        let requests = self.shared.requests.lock();
        requests.expect("no holder panics").clone()
    }

    /// How many requests have had a fault so far.
    pub fn faulted(&self) -> u64 {
        self.shared.faulted.load(Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        // The listener looks at `stop` when somebody knocks.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

impl Shared {
    fn fault_for(&self, first_line: &str) -> Fault {
        let (fault, target) = *self.fault.lock().expect("no holder panics");
        let meant = is_read(first_line)
            && match target {
                Target::Reads => true,
                Target::Blobs => first_line.contains("/blobs/"),
                Target::Naming(part) => first_line.contains(part),
            };
        if fault == Fault::None || !meant {
            return Fault::None;
        }
        let take = |n: u64| n.checked_sub(1);
        let hit = self.left.fetch_update(Relaxed, Relaxed, take).is_ok();
        if !hit {
            return Fault::None;
        }
        self.faulted.fetch_add(1, Relaxed);
        fault
    }

    /// Waits for as long as this fault is on.
    fn stall(&self, fault: Fault) {
        while !self.stop.load(Relaxed) && self.fault.lock().expect("no holder panics").0 == fault {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Serves the requests of one connection.
fn serve(shared: &Shared, mut client: TcpStream) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    let mut rest = Vec::new();
    while let Some(head) = read_head(&mut client, &mut rest)? {
        let first_line = head.lines().next().unwrap_or_default().to_owned();
        let request = Request {
            line: first_line.clone(),
            range: header(&head, "range").map(str::to_owned),
        };
        let mut requests = shared.requests.lock().expect("no holder panics");
        requests.push(request);
        drop(requests);
        let fault = shared.fault_for(&first_line);
        match fault {
            Fault::Close => return client.shutdown(Shutdown::Both),
            Fault::Status(status) => {
                let body = "broken on purpose";
                let len = body.len();
                write!(
                    client,
                    "HTTP/1.1 {status} Fault\r\nContent-Length: {len}\r\n\r\n{body}"
                )?;
                continue;
            }
            Fault::Delay(ms) => std::thread::sleep(Duration::from_millis(ms)),
            _ => {}
        }
        let mut upstream = TcpStream::connect(("127.0.0.1", shared.upstream))?;
        upstream.set_nodelay(true)?;
        upstream.write_all(without_keep_alive(&head).as_bytes())?;
        if !is_read(&first_line) {
            upstream.write_all(&rest)?;
            return tunnel(client, upstream);
        }
        if first_line.starts_with("POST ") {
            pass_body(&head, &mut rest, &mut client, &mut upstream)?;
        }
        let is_head = first_line.starts_with("HEAD ");
        if !answer(shared, &mut client, &mut upstream, fault, is_head)? {
            return match fault {
                // Dropped, it is reset.
                Fault::Reset(_) => Ok(()),
                _ => client.shutdown(Shutdown::Both),
            };
        }
    }
    Ok(())
}

/// Whether a request only reads: a list of chunks that are asked for is a body.
fn is_read(first_line: &str) -> bool {
    [
        "GET ",
        "HEAD ",
        "POST /v1/chunks/get ",
        "POST /v1/chunks/has ",
    ]
    .iter()
    .any(|start| first_line.starts_with(start))
}

/// Passes the body of a request on; what came after it stays in `rest`.
fn pass_body(
    head: &str,
    rest: &mut Vec<u8>,
    client: &mut TcpStream,
    upstream: &mut TcpStream,
) -> std::io::Result<()> {
    let length = header(head, "content-length").and_then(|v| v.parse::<usize>().ok());
    let length = length.filter(|n| *n <= 1 << 20).unwrap_or(0);
    let mut buffer = vec![0; 64 << 10];
    while rest.len() < length {
        match client.read(&mut buffer)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => rest.extend_from_slice(&buffer[..n]),
        }
    }
    let next = rest.split_off(length);
    upstream.write_all(&std::mem::replace(rest, next))
}

/// The body that stands in for another one, if one is long enough; notes this one for the next.
fn swapped(
    shared: &Shared,
    length: usize,
    upstream: &mut TcpStream,
    body: &mut Vec<u8>,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    while body.len() < length {
        match upstream.read(&mut buffer)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => body.extend_from_slice(&buffer[..n]),
        }
    }
    let mut longest = shared.longest.lock().expect("no holder panics");
    if longest.len() >= length && longest[..length] != body[..] {
        // Not always the same one.
        let other = longest[..length].to_vec();
        *longest = std::mem::replace(body, other);
    } else if longest.len() < length {
        *longest = body.clone();
    }
    Ok(())
}

/// Passes an answer on; whether the connection can be used again.
fn answer(
    shared: &Shared,
    client: &mut TcpStream,
    upstream: &mut TcpStream,
    fault: Fault,
    is_head: bool,
) -> std::io::Result<bool> {
    let mut body = Vec::new();
    let Some(head) = read_head(upstream, &mut body)? else {
        return Ok(false);
    };
    client.write_all(without_connection(&head).as_bytes())?;
    if is_head {
        return Ok(true);
    }
    let length = header(&head, "content-length").and_then(|v| v.parse::<u64>().ok());
    if let (Fault::Swap, Some(length)) = (fault, length.filter(|n| *n <= 64 << 20)) {
        swapped(shared, length as usize, upstream, &mut body)?;
    }
    let mut sent = 0;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let mut piece = body.split_off(0);
        if piece.is_empty() {
            if length.is_some_and(|length| sent >= length) {
                return Ok(true);
            }
            let n = upstream.read(&mut buffer)?;
            if n == 0 {
                return Ok(false);
            }
            piece.extend_from_slice(&buffer[..n]);
        }
        let end = sent + piece.len() as u64;
        match fault {
            Fault::Flip(at) if (sent..end).contains(&at) => piece[(at - sent) as usize] ^= 1,
            Fault::Truncate(at) if end > at => {
                client.write_all(&piece[..(at - sent) as usize])?;
                return Ok(false);
            }
            Fault::Reset(at) if end > at => {
                client.write_all(&piece[..(at - sent) as usize])?;
                // Closing with bytes unread, and not waiting for the rest to be taken, resets.
                rustix::net::sockopt::set_socket_linger(&*client, Some(Duration::ZERO))?;
                return Ok(false);
            }
            Fault::Trickle(step) => {
                for drop in piece.chunks(step.max(1) as usize) {
                    client.write_all(drop)?;
                    std::thread::sleep(Duration::from_millis(100));
                    if shared.stop.load(Relaxed) {
                        return Ok(false);
                    }
                }
                sent = end;
                continue;
            }
            Fault::Stall(at) if end > at => {
                client.write_all(&piece[..(at - sent) as usize])?;
                shared.stall(fault);
                return Ok(false);
            }
            _ => {}
        }
        client.write_all(&piece)?;
        sent = end;
    }
}

/// Passes bytes in both directions until both are done.
fn tunnel(client: TcpStream, upstream: TcpStream) -> std::io::Result<()> {
    let (mut from, mut to) = (client.try_clone()?, upstream.try_clone()?);
    let up = std::thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
    });
    let (mut from, mut to) = (upstream, client);
    let result = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Both);
    let _ = up.join();
    result.map(|_| ())
}

/// Reads up to the empty line; what came after it is in `rest`. None at the end of the stream.
fn read_head(stream: &mut TcpStream, rest: &mut Vec<u8>) -> std::io::Result<Option<String>> {
    let mut bytes = std::mem::take(rest);
    let mut buffer = [0; 8192];
    loop {
        if let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            *rest = bytes.split_off(end + 4);
            return Ok(Some(String::from_utf8_lossy(&bytes).into_owned()));
        }
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Ok(None);
        }
        bytes.extend_from_slice(&buffer[..n]);
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let pairs = head.lines().filter_map(|line| line.split_once(':'));
    pairs
        .filter(|(key, _)| key.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim())
        .next()
}

fn without_connection(head: &str) -> String {
    let is_connection = |line: &&str| line.to_ascii_lowercase().starts_with("connection:");
    head.split_inclusive("\r\n")
        .filter(|line| !is_connection(line))
        .collect()
}

/// The upstream connection serves one request only.
fn without_keep_alive(head: &str) -> String {
    let head = without_connection(head);
    format!(
        "{}Connection: close\r\n\r\n",
        head.trim_end_matches("\r\n").to_owned() + "\r\n"
    )
}
