//! The chunk codec on one core, beside its parts.

use std::hint::black_box;
use std::time::Instant;

use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, KeyInit, Nonce};
use lazyimg_convergent::payload::{self, Encoder};
use lazyimg_convergent::{Digest, DomainSecret, Salt, chunk};

use crate::error::{BenchError, io};
use crate::report::{Report, Row, Table, number};
use crate::stats::Samples;
use crate::suite::Bench;

const BENCH: &str = "codec, one core, 512 KiB chunks of /usr/lib";

/// Length of a chunk, in bytes.
const CHUNK: usize = 512 << 10;

/// Levels that a conversion could use.
const LEVELS: [i32; 4] = [-1, 1, 2, 3];

/// Lengths of frames inside a chunk, in bytes; the first is the chunk itself.
const FRAMES: [usize; 5] = [CHUNK, 128 << 10, 64 << 10, 32 << 10, 16 << 10];

/// Runs the bench.
pub fn run(bench: &Bench) -> Result<Report, BenchError> {
    let chunks = if bench.quick { 64 } else { 128 };
    let plain = bench.workloads.corpus.sample(CHUNK, chunks)?;
    let plain: Vec<&[u8]> = plain.chunks_exact(CHUNK).collect();
    let salt = Salt::derive(&DomainSecret::from_bytes([7; 32]), "bench", 1);
    let measure = Measure {
        runs: bench.runs,
        bytes: plain.len() * CHUNK,
    };
    let level = payload::DEFAULT_LEVEL;
    let mut encoder = Encoder::new(level).map_err(io("a zstd context"))?;

    let payloads: Vec<Vec<u8>> = plain.iter().map(|p| encoder.encode(p)).collect();
    let sealed: Vec<_> = payloads
        .iter()
        .map(|p| chunk::seal(&salt, p.clone()))
        .collect();
    let key = Aes256Gcm::new(&[7; 32].into());
    let encrypt = |buf: &mut Vec<u8>| {
        key.encrypt_inout_detached(&Nonce::default(), &[], buf.as_mut_slice().into())
            .map(drop)
            .map_err(|e| BenchError::Setup(format!("AES-GCM: {e}")))
    };

    let compress = measure.speed(&plain, |p| Ok(encoder.encode(p)))?;
    let encode = measure.speed(&plain, |p| Ok(chunk::seal(&salt, encoder.encode(p))))?;
    let seal = measure.speed(&payloads, |p| Ok(chunk::seal(&salt, p.clone())))?;
    let hash = measure.speed(&payloads, |p| Ok(Digest::of(p)))?;
    let cipher = measure.speed(&payloads, |p| encrypt(&mut p.clone()))?;
    let open = measure.speed(&sealed, |s| {
        let opened = chunk::open(&s.key, &s.ciphertext, CHUNK);
        opened.map_err(|e| BenchError::Setup(e.to_string()))
    })?;
    let decompress = measure.speed(&payloads, |p| {
        let plain = payload::decode(p, CHUNK);
        plain.map_err(|e| BenchError::Setup(e.to_string()))
    })?;

    let row = |what: &str, samples: &Samples| Row::new(BENCH, what, "MB/s", samples);
    let ratio = stored_ratio(&plain, &payloads);
    Ok(Report {
        facts: Vec::new(),
        rows: vec![
            row("encode: compress, derive key, encrypt, name", &encode)
                .peer(format!("zstd -{level} alone"), &compress)
                .note(format!("ratio {ratio:.2}")),
            row("of that: derive key, encrypt, name", &seal)
                .peer("AES-256-GCM alone", &cipher)
                .note("two SHA-256 over the payload, one AES-256-GCM"),
            row("of that: one SHA-256", &hash),
            row("open: decrypt, authenticate, decompress", &open).peer("zstd alone", &decompress),
        ],
        tables: vec![
            levels(&plain, &salt, &measure)?,
            frames(&plain, &salt, bench.runs)?,
        ],
    })
}

fn stored_ratio(plain: &[&[u8]], payloads: &[Vec<u8>]) -> f64 {
    (plain.len() * CHUNK) as f64 / payloads.iter().map(Vec::len).sum::<usize>() as f64
}

/// What each zstd level costs and saves.
fn levels(plain: &[&[u8]], salt: &Salt, measure: &Measure) -> Result<Table, BenchError> {
    let mut rows = Vec::new();
    for level in LEVELS {
        let mut encoder = Encoder::new(level).map_err(io("a zstd context"))?;
        let payloads: Vec<_> = plain.iter().map(|p| encoder.encode(p)).collect();
        let encode = measure.speed(plain, |p| Ok(chunk::seal(salt, encoder.encode(p))))?;
        let decode = measure.speed(&payloads, |p| {
            payload::decode(p, CHUNK).map_err(|e| BenchError::Setup(e.to_string()))
        })?;
        rows.push(vec![
            level.to_string(),
            format!("{:.2}", stored_ratio(plain, &payloads)),
            number(encode.median()),
            number(decode.median()),
        ]);
    }
    let columns = ["zstd level", "ratio", "encode MB/s", "zstd decode MB/s"];
    Ok(Table {
        bench: BENCH,
        title: format!("{BENCH}: zstd levels"),
        columns: columns.map(str::to_owned).to_vec(),
        rows,
    })
}

/// What it would save to cut a payload into frames that decode on their own, and what it would cost:
/// the time to 4 KiB out of a chunk is what a random read on a full host cache waits for.
fn frames(plain: &[&[u8]], salt: &Salt, runs: usize) -> Result<Table, BenchError> {
    let mut rows = Vec::new();
    for len in FRAMES {
        let mut encoder = Encoder::new(payload::DEFAULT_LEVEL).map_err(io("a zstd context"))?;
        // A stand-in for a payload: its frames, one after another.
        let chunks: Vec<(Vec<u8>, chunk::Sealed)> = plain
            .iter()
            .map(|p| {
                let frames: Vec<_> = p.chunks(len).map(|f| encoder.encode(f)).collect();
                let middle = frames[frames.len() / 2].clone();
                (middle, chunk::seal(salt, frames.concat()))
            })
            .collect();
        let stored: usize = chunks.iter().map(|c| c.1.ciphertext.len()).sum();
        let mut micros = Samples::default();
        for _ in 0..runs {
            let started = Instant::now();
            for (frame, sealed) in &chunks {
                let opened = chunk::open_payload(&sealed.key, sealed.ciphertext.clone());
                black_box(opened.map_err(|e| BenchError::Setup(e.to_string()))?);
                let plain = payload::decode(frame, len);
                black_box(plain.map_err(|e| BenchError::Setup(e.to_string()))?);
            }
            micros.push(started.elapsed().as_secs_f64() * 1e6 / chunks.len() as f64);
        }
        rows.push(vec![
            format!("{} KiB", len >> 10),
            format!("{:.2}", (plain.len() * CHUNK) as f64 / stored as f64),
            number(micros.median()),
        ]);
    }
    let columns = ["frames of", "ratio", "µs to 4 KiB out of a chunk"];
    Ok(Table {
        bench: BENCH,
        title: format!("{BENCH}: frames inside a chunk"),
        columns: columns.map(str::to_owned).to_vec(),
        rows,
    })
}

/// Times a function over many chunks.
struct Measure {
    runs: usize,
    /// Bytes of plaintext in one run: the speed of every part is given for these.
    bytes: usize,
}

impl Measure {
    fn speed<T, R>(
        &self,
        items: &[T],
        mut f: impl FnMut(&T) -> Result<R, BenchError>,
    ) -> Result<Samples, BenchError> {
        (0..self.runs)
            .map(|_| {
                let started = Instant::now();
                items
                    .iter()
                    .try_for_each(|i| f(i).map(|made| drop(black_box(made))))?;
                Ok(self.bytes as f64 / 1e6 / started.elapsed().as_secs_f64())
            })
            .collect()
    }
}
