//! Many chunks over a slow link: in one request, in one after the other, and over six connections.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use lazyimg_chunkstore::wire::{FRAME_HEAD, write_ids};
use lazyimg_convergent::ChunkId;

use crate::error::{BenchError, io};
use crate::report::{Report, Row};
use crate::setup::link::{FAR, Link};
use crate::stats::Samples;
use crate::suite::Bench;

use super::servers::{CHUNK, Chunks, Store, connect};

const BENCH: &str = "store, 100 chunks over 20 ms and 1 Gbit/s";

const ROUND_TRIP: Duration = Duration::from_millis(20);
const BITS_PER_S: f64 = 1e9;

/// Chunks in one request.
const CHUNKS: usize = 100;

/// Connections of the peer that fetches side by side: as many as browsers open.
const CONNECTIONS: usize = 6;

/// Runs this part.
pub fn run(bench: &Bench) -> Result<Report, BenchError> {
    let chunks = Chunks::new(CHUNKS);
    let link = Link::new(ROUND_TRIP, BITS_PER_S)?;
    let (connect_s, rate) = link.probe()?;
    let dir = bench.dir.join("store-many");
    let store = link.on_far(|| {
        let store = Store::start(&bench.lazyimg, &dir, FAR)?;
        store.fill(&chunks)?;
        Ok::<_, BenchError>(store)
    })??;
    let ids = &chunks.ids;
    let (mut many, mut one, mut six) = <(Samples, Samples, Samples)>::default();
    for _ in 0..bench.runs.min(3) {
        many.push(link.on_near(|| timed(|| get_many(&store, ids)))??);
        six.push(link.on_near(|| timed(|| side_by_side(&store, ids)))??);
        one.push(link.on_near(|| timed(|| get_each(&store, ids)))??);
    }
    drop(store);
    std::fs::remove_dir_all(&dir).map_err(io("the store of the bench"))?;
    let wire_ms = (CHUNKS * CHUNK) as f64 * 8e3 / BITS_PER_S;
    let fact = format!(
        "link to the store: round trip {:.1} ms, one connection moves 40 MB at {:.0} MB/s; {CHUNKS} chunks need {wire_ms:.0} ms on the wire",
        connect_s * 1e3,
        rate / 1e6
    );
    let row = |peer: &str, samples: &Samples| {
        Row::new(BENCH, format!("get many, against {peer}"), "ms", &many).peer(peer, samples)
    };
    Ok(Report {
        facts: vec![fact],
        rows: vec![
            row("100 gets, one after the other", &one).ratio_at_most(1.0),
            row("100 gets over 6 connections", &six).note("new connections in every run"),
        ],
        tables: Vec::new(),
    })
}

/// In milliseconds.
fn timed(f: impl FnOnce() -> Result<(), BenchError>) -> Result<f64, BenchError> {
    let started = Instant::now();
    f()?;
    Ok(started.elapsed().as_secs_f64() * 1e3)
}

fn side_by_side(store: &Store, ids: &[ChunkId]) -> Result<(), BenchError> {
    std::thread::scope(|scope| {
        let parts: Vec<_> = ids
            .chunks(ids.len().div_ceil(CONNECTIONS))
            .map(|part| scope.spawn(move || get_each(store, part)))
            .collect();
        for part in parts {
            part.join()
                .map_err(|_| BenchError::Setup("a client panicked".into()))??;
        }
        Ok(())
    })
}

fn get_each(store: &Store, ids: &[ChunkId]) -> Result<(), BenchError> {
    let mut stream = BufReader::new(connect(store.server.address)?);
    let mut body = vec![0; CHUNK];
    for id in ids {
        let request = format!(
            "GET /v1/chunks/{} HTTP/1.1\r\nhost: store\r\nauthorization: Bearer {}\r\n\r\n",
            id.hex(),
            store.token
        );
        let mut get = || {
            stream.get_mut().write_all(request.as_bytes())?;
            head(&mut stream)?;
            stream.read_exact(&mut body)
        };
        get().map_err(io("a get over the slow link"))?;
    }
    Ok(())
}

fn get_many(store: &Store, ids: &[ChunkId]) -> Result<(), BenchError> {
    let mut stream = BufReader::new(connect(store.server.address)?);
    let body = write_ids(ids);
    let mut request = format!(
        "POST /v1/chunks/get HTTP/1.1\r\nhost: store\r\nauthorization: Bearer {}\r\ncontent-length: {}\r\n\r\n",
        store.token,
        body.len()
    )
    .into_bytes();
    request.extend_from_slice(&body);
    let mut get = || {
        stream.get_mut().write_all(&request)?;
        head(&mut stream)?;
        chunked(&mut stream)
    };
    let bytes = get().map_err(io("a get of many over the slow link"))?;
    // A frame for each chunk, and one that ends the answer.
    let expected = ids.len() * (FRAME_HEAD + CHUNK) + FRAME_HEAD;
    if bytes != expected {
        return Err(BenchError::Setup(format!(
            "get many gave {bytes} bytes, not {expected}"
        )));
    }
    Ok(())
}

/// Reads a head that says that all is well.
fn head(stream: &mut BufReader<TcpStream>) -> std::io::Result<()> {
    let mut status = String::new();
    stream.read_line(&mut status)?;
    if !status.starts_with("HTTP/1.1 200 ") {
        return Err(std::io::Error::other(status));
    }
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        if stream.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Reads a body in pieces (RFC 9112, 7.1), without trailers; its length.
fn chunked(stream: &mut impl BufRead) -> std::io::Result<usize> {
    let mut total = 0;
    let mut piece = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let len = usize::from_str_radix(line.trim_end(), 16).map_err(std::io::Error::other)?;
        // Its end of line included.
        piece.resize(len + 2, 0);
        stream.read_exact(&mut piece)?;
        if len == 0 {
            return Ok(total);
        }
        total += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_in_pieces_is_as_long_as_they_are() {
        let body = b"5\r\nhello\r\nA\r\n0123456789\r\n0\r\n\r\n";
        assert_eq!(chunked(&mut &body[..]).unwrap(), 15);
        assert!(chunked(&mut &body[..20]).is_err(), "it was cut off");
    }
}
