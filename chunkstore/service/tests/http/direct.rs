//! Chunks that the kernel sends from their files: one connection, HTTP/1.1, no TLS.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use lazyimg_chunkstore::wire::write_ids;
use lazyimg_convergent::ChunkId;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use crate::world::{ALPHA, BETA, PATIENCE, Setup, World, chunk, until, write_secret};

/// One connection, as a client without any library has it.
struct Connection {
    socket: TcpStream,
    buffer: Vec<u8>,
}

struct Answer {
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn status(&self) -> &str {
        &self.head["HTTP/1.1 ".len()..][..3]
    }
}

fn get(id: &ChunkId, token: &str) -> String {
    format!("GET /v1/chunks/{id} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n\r\n")
}

impl Connection {
    async fn to(w: &World) -> Self {
        Self {
            socket: TcpStream::connect(w.addr).await.unwrap(),
            buffer: Vec::new(),
        }
    }

    /// One that has room for little that it did not read yet.
    async fn with_little_room(w: &World) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        Self {
            socket: socket.connect(w.addr).await.unwrap(),
            buffer: Vec::new(),
        }
    }

    async fn send(&mut self, text: &str) {
        self.socket.write_all(text.as_bytes()).await.unwrap();
    }

    async fn more(&mut self) -> usize {
        let read = self.socket.read_buf(&mut self.buffer);
        tokio::time::timeout(PATIENCE, read).await.unwrap().unwrap()
    }

    async fn answer(&mut self) -> Answer {
        let end = loop {
            let found = self.buffer.windows(4).position(|w| w == b"\r\n\r\n");
            if let Some(at) = found {
                break at + 4;
            }
            assert!(self.more().await > 0, "closed before a head");
        };
        let head: Vec<u8> = self.buffer.drain(..end).collect();
        let head = String::from_utf8(head).unwrap();
        let field = head
            .lines()
            .find_map(|l| l.strip_prefix("content-length: "));
        let len: usize = field.map_or(0, |len| len.parse().unwrap());
        while self.buffer.len() < len {
            assert!(self.more().await > 0, "closed within a body: {head}");
        }
        let body = self.buffer.drain(..len).collect();
        Answer { head, body }
    }

    async fn ask(&mut self, id: &ChunkId, token: &str) -> Answer {
        self.send(&get(id, token)).await;
        self.answer().await
    }
}

/// Whether the kernel surely tells what is in the page cache of the store's files: `cachestat(2)` came with
/// Linux 6.5, may be forbidden by a seccomp filter, and may see nothing through overlayfs.
fn kernel_tells(w: &World) -> bool {
    const OVERLAYFS: u64 = 0x794c_7630;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|n| n.parse::<u32>().ok());
    let new = (numbers.next(), numbers.next()) >= (Some(6), Some(5));
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let free = status
        .lines()
        .any(|line| line.split_whitespace().eq(["Seccomp:", "0"]));
    let place = rustix::fs::statfs(w.dir.path()).unwrap();
    new && free && place.f_type as u64 != OVERLAYFS
}

async fn from_files(w: &World, token: &str) -> f64 {
    w.metric(token, "lazyimg_store_chunks_from_files_total")
        .await
}

fn segments(w: &World) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![w.dir.path().join("data").join("segments")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => found.push(path),
            }
        }
    }
    assert!(!found.is_empty());
    found
}

#[tokio::test]
async fn chunks_are_whole_asked_one_by_one_and_many_before_the_first_answer() {
    let w = World::start().await;
    let chunks: Vec<_> = [1, 100, 5_000, 512 << 10, 1 << 20]
        .iter()
        .enumerate()
        .map(|(n, len)| chunk(n as u8, *len))
        .collect();
    let mut ids = Vec::new();
    for bytes in &chunks {
        ids.push(w.put_chunk("", bytes).await);
    }
    let mut connection = Connection::to(&w).await;
    for round in 0..3 {
        for (id, bytes) in ids.iter().zip(&chunks) {
            let answer = connection.ask(id, "").await;
            assert_eq!(answer.status(), "200", "{}", answer.head);
            assert!(answer.head.contains(&format!("etag: \"{id}\"")));
            assert!(answer.head.contains("lazyimg-request-id: "));
            assert!(answer.body == *bytes, "round {round}");
        }
    }
    let all: String = ids.iter().cycle().take(40).map(|id| get(id, "")).collect();
    connection.send(&all).await;
    for bytes in chunks.iter().cycle().take(40) {
        assert!(connection.answer().await.body == *bytes);
    }
    let hits = w.metric("", "lazyimg_store_chunk_hits_total").await;
    assert_eq!(hits, 55.0);
    // The first read of each is the engine's.
    let sent = from_files(&w, "").await;
    match kernel_tells(&w) {
        true => assert_eq!(sent, 50.0),
        false => assert!([0.0, 50.0].contains(&sent), "{sent}"),
    }
    assert!(w.stop().await);
}

#[tokio::test]
async fn a_connection_goes_on_with_whatever_is_asked_next() {
    let w = World::start().await;
    let bytes = chunk(1, 300_000);
    let id = w.put_chunk("", &bytes).await;
    let missing = ChunkId::of(b"missing");
    let mut connection = Connection::to(&w).await;
    assert!(connection.ask(&id, "").await.body == bytes);
    let none = connection.ask(&missing, "").await;
    assert_eq!(none.status(), "404");
    assert!(String::from_utf8(none.body).unwrap().contains("not_found"));
    let has = write_ids(&[id, missing]);
    let mut both = get(&id, "").into_bytes();
    both.extend(
        format!(
            "POST /v1/chunks/has HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
            has.len()
        )
        .bytes(),
    );
    both.extend(&has);
    both.extend(get(&id, "").bytes());
    connection.socket.write_all(&both).await.unwrap();
    assert!(connection.answer().await.body == bytes);
    assert_eq!(connection.answer().await.body, [1, 0]);
    assert!(connection.answer().await.body == bytes);
    let cached = format!("GET /v1/chunks/{id} HTTP/1.1\r\nhost: x\r\nif-none-match: *\r\n\r\n");
    let mut fresh = Connection::to(&w).await;
    fresh.send(&cached).await;
    assert_eq!(fresh.answer().await.status(), "304");
    assert!(fresh.ask(&id, "").await.body == bytes);
}

#[tokio::test]
async fn only_who_put_a_chunk_gets_it_also_when_it_needs_no_more_looking() {
    let w = Setup::with_tenants().start().await;
    let bytes = chunk(1, 100_000);
    let id = w.put_chunk(ALPHA, &bytes).await;
    let mut connection = Connection::to(&w).await;
    for _ in 0..2 {
        assert!(connection.ask(&id, ALPHA).await.body == bytes);
        assert_eq!(connection.ask(&id, BETA).await.status(), "404");
        assert_eq!(connection.ask(&id, "nobody's token").await.status(), "401");
    }
    write_secret(&w.dir.path().join("alpha"), "another-token-of-alpha");
    until("the old token is not known any more", async || {
        w.handle.reload().await;
        connection.ask(&id, ALPHA).await.status() == "401"
    })
    .await;
}

#[tokio::test]
async fn a_slow_client_gets_all_of_it_though_the_page_cache_has_lost_it_meanwhile() {
    let w = World::start().await;
    let chunks: Vec<_> = (0..8).map(|n| chunk(n, 1 << 20)).collect();
    let mut ids = Vec::new();
    for bytes in &chunks {
        ids.push(w.put_chunk("", bytes).await);
    }
    let mut connection = Connection::with_little_room(&w).await;
    for id in &ids {
        connection.ask(id, "").await;
    }
    let all: String = ids.iter().map(|id| get(id, "")).collect();
    connection.send(&all).await;
    // More than the kernel's buffers hold is still to be sent.
    tokio::time::sleep(Duration::from_millis(200)).await;
    for path in segments(&w) {
        let file = File::open(path).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
    for bytes in &chunks {
        assert!(connection.answer().await.body == *bytes);
    }
}

#[tokio::test]
async fn who_does_not_take_a_chunk_is_cut_off() {
    let mut setup = Setup::new();
    setup.options.patience.stall = Duration::from_millis(400);
    let w = setup.start().await;
    let id = w.put_chunk("", &chunk(1, 1 << 20)).await;
    let mut connection = Connection::with_little_room(&w).await;
    connection.ask(&id, "").await;
    connection.send(&get(&id, "").repeat(50)).await;
    until("it is cut off", async || {
        w.metric("", "lazyimg_store_connections_stalled_total")
            .await
            >= 1.0
    })
    .await;
}

#[tokio::test]
async fn who_asks_while_the_store_ends_is_answered_and_sent_away() {
    let w = World::start().await;
    let bytes = chunk(1, 1 << 20);
    let id = w.put_chunk("", &bytes).await;
    let mut idle = Connection::to(&w).await;
    idle.ask(&id, "").await;
    let mut busy = Connection::with_little_room(&w).await;
    busy.ask(&id, "").await;
    busy.send(&get(&id, "").repeat(8)).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    w.handle.drain();
    assert_eq!(idle.more().await, 0, "nothing is under way there");
    let mut last = String::new();
    for _ in 0..8 {
        let answer = busy.answer().await;
        last = answer.head;
        match last.starts_with("HTTP/1.1 200 ") {
            true => assert!(answer.body == bytes),
            false => assert!(last.starts_with("HTTP/1.1 503 "), "{last}"),
        }
        if last.contains("connection: close") {
            break;
        }
    }
    assert!(last.contains("connection: close"), "{last}");
    assert!(w.stop().await);
}

#[tokio::test]
async fn a_file_that_lost_its_end_is_told_as_damage_and_a_repair_is_served() {
    let w = World::start().await;
    let bytes = chunk(1, 300_000);
    let id = w.put_chunk("", &bytes).await;
    let mut connection = Connection::to(&w).await;
    for _ in 0..2 {
        assert!(connection.ask(&id, "").await.body == bytes);
    }
    for path in segments(&w) {
        let file = File::options().write(true).open(path).unwrap();
        let len = file.metadata().unwrap().len();
        file.set_len(len - 200_000).unwrap();
        file.write_all_at(&[0; 16], len - 16).unwrap();
    }
    let told = connection.ask(&id, "").await;
    assert_eq!(told.status(), "503", "{}", told.head);
    let put = w.ask(reqwest::Method::PUT, &format!("/v1/chunks/{id}"));
    let repair = put.header("lazyimg-repair", "1").body(bytes.clone());
    assert!(repair.send().await.unwrap().status().is_success());
    for _ in 0..3 {
        assert!(connection.ask(&id, "").await.body == bytes);
    }
}
