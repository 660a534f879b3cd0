//! HTTP/2, TLS, and clients that do not keep up their side.

use std::time::Duration;

use reqwest::{Client, Version};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::world::{PATIENCE, Setup, World, certificate, chunk, tls, until};

#[tokio::test]
async fn http_2_is_spoken_in_clear_to_who_knows_it() {
    let mut w = World::start().await;
    w.client = Client::builder().http2_prior_knowledge().build().unwrap();
    let bytes = chunk(1, 512 << 10);
    let id = w.put_chunk("", &bytes).await;
    let path = format!("/v1/chunks/{id}");
    let all = (0..32).map(|_| async {
        let got = w.get("", &path).await;
        assert_eq!(
            (got.version(), got.status().as_u16()),
            (Version::HTTP_2, 200)
        );
        assert!(got.bytes().await.unwrap() == bytes);
    });
    futures_util::future::join_all(all).await;
    let text = w.get("", "/metrics").await.text().await.unwrap();
    assert!(
        text.contains("lazyimg_store_connections 1"),
        "one connection for all: {text}"
    );
    assert!(w.stop().await);
}

#[tokio::test]
async fn tls_offers_both_versions_and_takes_a_new_certificate_without_a_restart() {
    let mut setup = Setup::new();
    let (server, trusted) = tls(setup.dir.path());
    setup.options.tls = Some(server);
    let mut w = setup.start().await;
    let client = |cert: &reqwest::Certificate| Client::builder().tls_certs_only([cert.clone()]);
    w.client = client(&trusted).build().unwrap();
    let id = w.put_chunk("", &chunk(1, 100_000)).await;
    let path = format!("/v1/chunks/{id}");
    assert_eq!(w.get("", &path).await.version(), Version::HTTP_2, "by ALPN");
    w.client = client(&trusted).http1_only().build().unwrap();
    assert_eq!(w.get("", &path).await.version(), Version::HTTP_11);
    let (.., new) = certificate(w.dir.path());
    // A new connection each time.
    until("the new certificate is shown", async || {
        let client = client(&new).pool_max_idle_per_host(0).build().unwrap();
        client
            .get(format!("{}/healthz", w.base))
            .send()
            .await
            .is_ok()
    })
    .await;
    std::fs::write(w.dir.path().join("cert.pem"), "nothing").unwrap();
    w.handle.reload().await;
    let still = client(&new).build().unwrap();
    assert!(
        still
            .get(format!("{}/healthz", w.base))
            .send()
            .await
            .is_ok()
    );
}

/// Sends some bytes, then nothing; gives what the store says until it closes the connection.
async fn send_and_wait(w: &World, bytes: &[u8]) -> String {
    let mut socket = TcpStream::connect(w.addr).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    let mut said = Vec::new();
    // A reset is an end too.
    let _ = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut said))
        .await
        .expect("it is closed");
    String::from_utf8_lossy(&said).into_owned()
}

fn impatient() -> Setup {
    let mut setup = Setup::new();
    setup.options.patience.head = Duration::from_millis(300);
    setup.options.patience.stall = Duration::from_millis(500);
    setup.limits.body_idle = Duration::from_millis(300);
    setup
}

#[tokio::test]
async fn who_sends_no_head_or_no_body_is_not_waited_for() {
    let w = impatient().start().await;
    assert_eq!(send_and_wait(&w, b"").await, "");
    assert_eq!(send_and_wait(&w, b"GET /healthz HT").await, "");
    let put = format!(
        "PUT /v1/chunks/{} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nabc",
        "0".repeat(64)
    );
    let said = send_and_wait(&w, put.as_bytes()).await;
    assert!(
        said.starts_with("HTTP/1.1 400 ") && said.contains("no byte of the body"),
        "{said}"
    );
    until("they are counted", async || {
        w.metric("", "lazyimg_store_connections_stalled_total")
            .await
            >= 2.0
    })
    .await;
}

#[tokio::test]
async fn who_does_not_take_its_answer_is_cut_off_and_its_memory_given_back() {
    let w = impatient().start().await;
    let mut ids = Vec::new();
    for n in 0..40 {
        ids.push(w.put_chunk("", &chunk(n, 1 << 20)).await);
    }
    let body = lazyimg_chunkstore::wire::write_ids(&ids);
    let head = format!(
        "POST /v1/chunks/get HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut socket = TcpStream::connect(w.addr).await.unwrap();
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(&body).await.unwrap();
    // 40 MiB are more than the kernel's buffers take; nothing is read.
    until("it is cut off", async || {
        w.metric("", "lazyimg_store_connections_stalled_total")
            .await
            >= 1.0
    })
    .await;
    until("its memory is given back", async || {
        w.metric("", "lazyimg_store_body_memory_bytes").await == 0.0
    })
    .await;
    drop(socket);
}

#[tokio::test]
async fn http_2_is_no_way_to_hold_what_an_answer_takes() {
    let w = impatient().start().await;
    let id = w.put_chunk("", &chunk(1, 1 << 20)).await;
    // It lets one byte come, and is alive otherwise.
    let client = Client::builder()
        .http2_prior_knowledge()
        .http2_initial_stream_window_size(1)
        .http2_keep_alive_interval(Duration::from_millis(50))
        .http2_keep_alive_while_idle(true);
    let client = client.build().unwrap();
    let url = format!("{}/v1/chunks/{id}", w.base);
    let held: Vec<_> = (0..4).map(|_| client.get(&url).send()).collect();
    let held = futures_util::future::join_all(held).await;
    assert!(
        held.iter()
            .all(|answer| answer.as_ref().unwrap().status() == 200)
    );
    until("it is cut off", async || {
        w.metric("", "lazyimg_store_connections_stalled_total")
            .await
            >= 1.0
    })
    .await;
    until("its memory is given back", async || {
        w.metric("", "lazyimg_store_body_memory_bytes").await == 0.0
    })
    .await;
}

#[tokio::test]
async fn an_http_2_connection_without_requests_is_closed_however_often_it_pings() {
    let mut setup = Setup::new();
    setup.options.patience.idle = Duration::from_millis(400);
    let w = setup.start().await;
    let client = Client::builder()
        .http2_prior_knowledge()
        .http2_keep_alive_interval(Duration::from_millis(50))
        .http2_keep_alive_while_idle(true);
    let client = client.build().unwrap();
    let answer = client.get(format!("{}/healthz", w.base)).send().await;
    assert_eq!(answer.unwrap().status(), 200);
    until("only the one that asks is left", async || {
        w.metric("", "lazyimg_store_connections").await == 1.0
    })
    .await;
    drop(client);
}

#[tokio::test]
async fn a_body_that_comes_a_byte_now_and_then_is_not_waited_for() {
    let w = impatient().start().await;
    let mut socket = TcpStream::connect(w.addr).await.unwrap();
    let head = format!(
        "PUT /v1/chunks/{} HTTP/1.1\r\nhost: x\r\ncontent-length: 10000\r\n\r\n",
        "0".repeat(64)
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    let (mut from, mut to) = socket.into_split();
    let drip = tokio::spawn(async move {
        while to.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let mut said = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, from.read_to_end(&mut said))
        .await
        .expect("it is closed");
    drip.abort();
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("comes too slowly"), "{said}");
}

#[tokio::test]
async fn connections_are_bounded_and_the_next_one_waits() {
    let mut setup = Setup::new();
    setup.options.max_connections = 2;
    let w = setup.start().await;
    let hold = [
        TcpStream::connect(w.addr).await.unwrap(),
        TcpStream::connect(w.addr).await.unwrap(),
    ];
    let next = tokio::spawn(reqwest::get(format!("{}/healthz", w.base)));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!next.is_finished(), "there is no room");
    drop(hold);
    let answer = tokio::time::timeout(PATIENCE, next)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(answer.status(), 200);
}
