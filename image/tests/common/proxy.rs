//! An HTTP proxy in front of a registry that misbehaves as a test wants and remembers what it saw.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// A request that arrived.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names in lower case.
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
    /// Which connection brought it, counted from 0.
    pub connection: usize,
    /// How many requests came before it.
    pub number: usize,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// What to do with a request.
pub enum Action {
    /// Pass it on and its answer back.
    Forward,
    /// Answer with a status, headers (`Name: value` lines) and a body.
    Answer(u16, Vec<String>, Vec<u8>),
    /// Pass it on without its `Range` header.
    ForwardWithoutRange,
    /// Pass it on, send back only so many bytes of the body, and close.
    Truncate(usize),
    /// Pass it on, and send the body back byte by byte, with a pause after each.
    Drip(Duration),
    /// Pass it on, and wait before the answer.
    Delay(Duration),
    /// Pass it on, and change the answer's body.
    Change(fn(&mut Vec<u8>)),
    /// Send these bytes as they are, and close.
    Raw(Vec<u8>),
    /// Close the connection without a word.
    Close,
    /// Never answer.
    Silence,
}

type Script = Arc<dyn Fn(&Seen) -> Action + Send + Sync>;

/// A running proxy; it ends with the runtime.
pub struct Proxy {
    pub address: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    connections: Arc<AtomicUsize>,
}

impl Proxy {
    /// Starts one in front of `upstream` (`host:port`), on a port of its own choice.
    pub async fn start(
        upstream: &str,
        script: impl Fn(&Seen) -> Action + Send + Sync + 'static,
    ) -> Self {
        Self::start_on("127.0.0.1", upstream, script).await
    }

    /// As [`Self::start`], on another loopback address: another host.
    pub async fn start_on(
        host: &str,
        upstream: &str,
        script: impl Fn(&Seen) -> Action + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind((host, 0)).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let connections = Arc::new(AtomicUsize::new(0));
        let proxy = Self {
            address,
            seen: seen.clone(),
            connections: connections.clone(),
        };
        let (upstream, script): (String, Script) = (upstream.to_owned(), Arc::new(script));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let connection = connections.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(serve(
                    stream,
                    connection,
                    upstream.clone(),
                    script.clone(),
                    seen.clone(),
                ));
            }
        });
        proxy
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().clone()
    }

    /// Forgets the requests so far.
    pub fn forget(&self) {
        self.seen.lock().clear();
    }

    /// `METHOD target` of all requests so far.
    pub fn log(&self) -> Vec<String> {
        self.seen()
            .iter()
            .map(|s| format!("{} {}", s.method, s.target))
            .collect()
    }

    /// How many connections were made so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

async fn serve(
    mut stream: TcpStream,
    connection: usize,
    upstream: String,
    script: Script,
    log: Arc<Mutex<Vec<Seen>>>,
) {
    let mut buffer = Vec::new();
    while let Some(mut seen) = read_request(&mut stream, &mut buffer, connection).await {
        seen.number = {
            let mut log = log.lock();
            log.push(seen.clone());
            log.len() - 1
        };
        match script(&seen) {
            Action::Close => return,
            Action::Raw(bytes) => {
                let _ = stream.write_all(&bytes).await;
                return;
            }
            Action::Silence => std::future::pending().await,
            Action::Answer(status, headers, body) => {
                let mut head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n", body.len());
                headers
                    .iter()
                    .for_each(|h| head.push_str(&format!("{h}\r\n")));
                head.push_str("\r\n");
                let body = if seen.method == "HEAD" {
                    Vec::new()
                } else {
                    body
                };
                if stream
                    .write_all(&[head.into_bytes(), body].concat())
                    .await
                    .is_err()
                {
                    return;
                }
            }
            action => {
                let keep_range = !matches!(action, Action::ForwardWithoutRange);
                let Some((head, mut body)) = forward(&upstream, &seen, keep_range).await else {
                    return;
                };
                if let Action::Change(change) = &action {
                    change(&mut body);
                }
                if let Action::Delay(pause) = &action {
                    tokio::time::sleep(*pause).await;
                }
                if stream.write_all(head.as_bytes()).await.is_err() {
                    return;
                }
                match action {
                    Action::Truncate(len) => {
                        let _ = stream.write_all(&body[..len.min(body.len())]).await;
                        return;
                    }
                    Action::Drip(pause) => {
                        for byte in body {
                            if stream.write_all(&[byte]).await.is_err() {
                                return;
                            }
                            tokio::time::sleep(pause).await;
                        }
                    }
                    _ => {
                        if stream.write_all(&body).await.is_err() {
                            return;
                        }
                    }
                }
            }
        }
    }
}

async fn read_request(
    stream: &mut TcpStream,
    buffer: &mut Vec<u8>,
    connection: usize,
) -> Option<Seen> {
    let end = read_head(stream, buffer).await?;
    let head = String::from_utf8(buffer.drain(..end).collect()).ok()?;
    let (line, headers) = split_head(&head);
    let mut words = line.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    assert!(
        !headers.contains_key("transfer-encoding"),
        "the proxy takes no chunked bodies: {head}"
    );
    let length: usize = headers
        .get("content-length")
        .map_or(0, |l| l.parse().unwrap());
    while buffer.len() < length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    let body = buffer.drain(..length).collect();
    Some(Seen {
        method,
        target,
        headers,
        body,
        connection,
        number: 0,
    })
}

async fn read_head(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<usize> {
    loop {
        if let Some(end) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            return Some(end + 4);
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}

fn split_head(head: &str) -> (String, HashMap<String, String>) {
    let mut lines = head.trim_end().split("\r\n");
    let line = lines.next().unwrap_or_default().to_owned();
    let headers = lines.filter_map(|l| l.split_once(':'));
    (
        line,
        headers
            .map(|(k, v)| (k.to_ascii_lowercase(), v.trim().to_owned()))
            .collect(),
    )
}

/// Passes a request on as HTTP/1.0, so that the answer ends with the connection and is not chunked.
async fn forward(upstream: &str, seen: &Seen, keep_range: bool) -> Option<(String, Vec<u8>)> {
    let mut stream = TcpStream::connect(upstream).await.ok()?;
    let mut head = format!("{} {} HTTP/1.0\r\n", seen.method, seen.target);
    for (name, value) in &seen.headers {
        if name != "connection" && (keep_range || name != "range") {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await.ok()?;
    stream.write_all(&seen.body).await.ok()?;
    let mut answer = Vec::new();
    let end = read_head(&mut stream, &mut answer).await?;
    let head = String::from_utf8(answer.drain(..end).collect()).ok()?;
    let (line, mut headers) = split_head(&head);
    let bodiless = seen.method == "HEAD";
    if !bodiless {
        stream.read_to_end(&mut answer).await.ok()?;
        headers.insert("content-length".into(), answer.len().to_string());
    }
    headers.remove("connection");
    let mut head = line.replacen("HTTP/1.0", "HTTP/1.1", 1) + "\r\n";
    headers
        .iter()
        .for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
    head.push_str("\r\n");
    Some((head, answer))
}
