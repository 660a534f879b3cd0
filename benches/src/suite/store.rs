//! The regional store beside nginx, which serves the same chunks as files, and Redis, which has them in
//! memory; many chunks over a slow link; memory of the store and of a client.

mod load;
mod many;
mod memory;
mod servers;

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::error::{BenchError, at};
use crate::report::{Report, Row, number};
use crate::stats::Samples;
use crate::suite::Bench;

use load::{Language, Load, Target};
use servers::{CHUNK, Chunks, Server, Store};

const BENCH: &str = "store, 512 KiB chunks over loopback, page cache warm";

/// How many ask at once.
const CLIENTS: [usize; 3] = [1, 16, 256];

/// Requests per second of the load that leaves room: 1 GB/s is what a card of 10 Gbit/s carries.
const STEADY_PER_S: f64 = 2000.0;

/// Clients of that load.
const STEADY_CLIENTS: usize = 16;

/// Throughput, as a share of nginx's.
const SPEED_GOAL: f64 = 0.8;

/// Median latency with 16 clients, in ms.
const LATENCY_GOAL_MS: f64 = 1.0;

/// Runs of each load.
const RUNS: usize = 3;

/// Runs the bench.
pub fn run(bench: &Bench) -> Result<Report, BenchError> {
    let (mut report, memory) = against_peers(bench)?;
    report.extend(many::run(bench)?);
    report.rows.extend(memory);
    report.rows.push(memory::of_a_client(bench)?);
    Ok(report)
}

/// A server under load.
struct Candidate<'a> {
    server: &'a Server,
    target: Target,
}

/// What one candidate did under one load.
#[derive(Default)]
struct Measured {
    mb_per_s: Samples,
    p50: Samples,
    p99: Samples,
    p999: Samples,
    cpu_us: Samples,
}

/// Speeds; and what the store's memory was.
fn against_peers(bench: &Bench) -> Result<(Report, Vec<Row>), BenchError> {
    let chunks = Chunks::new(if bench.quick { 64 } else { 256 });
    let dir = bench.dir.join("store");
    let store = Store::start(&bench.lazyimg, &dir.join("lazyimg"), Ipv4Addr::LOCALHOST)?;
    store.fill(&chunks)?;
    let nginx = Server::nginx(&dir.join("nginx"), &chunks)?;
    let redis = Server::redis(&dir.join("redis"), &chunks)?;
    let target = |server: &Server, language, request: &dyn Fn(&str) -> String| {
        let ids = chunks.ids.iter();
        Target {
            address: server.address,
            language,
            requests: ids.map(|id| request(&id.hex()).into_bytes()).collect(),
            len: CHUNK,
        }
    };
    let token = &store.token;
    let of_store = |hex: &str| {
        format!(
            "GET /v1/chunks/{hex} HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {token}\r\n\r\n"
        )
    };
    let of_nginx = |hex: &str| format!("GET /{hex} HTTP/1.1\r\nhost: bench\r\n\r\n");
    let of_redis = |hex: &str| format!("*2\r\n$3\r\nGET\r\n$64\r\n{hex}\r\n");
    let candidates = [
        Candidate {
            server: &store.server,
            target: target(&store.server, Language::Http, &of_store),
        },
        Candidate {
            server: &nginx,
            target: target(&nginx, Language::Http, &of_nginx),
        },
        Candidate {
            server: &redis,
            target: target(&redis, Language::Resp, &of_redis),
        },
    ];
    let lasts = Duration::from_secs(if bench.quick { 1 } else { 2 });
    let mut rows = Vec::new();
    for clients in CLIENTS {
        let load = Load {
            clients,
            lasts,
            rate: None,
        };
        rows.extend(saturated(clients, &measure(bench, &candidates, load)?));
    }
    let load = Load {
        clients: STEADY_CLIENTS,
        lasts,
        rate: Some(STEADY_PER_S),
    };
    rows.extend(steady(&measure(bench, &candidates, load)?));
    let memory = memory::of_the_store(&store.server)?;
    drop((store, nginx, redis));
    std::fs::remove_dir_all(&dir).map_err(at(&dir))?;
    let report = Report {
        facts: vec![format!(
            "store: {} chunks of 512 KiB; clients run in this process, on half of the cores",
            chunks.ids.len()
        )],
        rows,
        tables: Vec::new(),
    };
    Ok((report, memory))
}

/// Measures A B C A B C … .
fn measure<const N: usize>(
    bench: &Bench,
    candidates: &[Candidate<'_>; N],
    load: Load,
) -> Result<[Measured; N], BenchError> {
    let mut all: [Measured; N] = std::array::from_fn(|_| Measured::default());
    for _ in 0..bench.runs.min(RUNS) {
        for (candidate, measured) in candidates.iter().zip(&mut all) {
            let before = candidate.server.cpu_s();
            let outcome = load::run(&candidate.target, load)?;
            let cpu = candidate.server.cpu_s() - before;
            // Warming up costs too, and is answered as fast.
            let answered = outcome.per_s * (load.lasts + load::WARM_UP).as_secs_f64();
            measured.cpu_us.push(cpu * 1e6 / answered);
            measured.mb_per_s.push(outcome.per_s * CHUNK as f64 / 1e6);
            measured.p50.push(outcome.quantile(0.5));
            measured.p99.push(outcome.quantile(0.99));
            measured.p999.push(outcome.quantile(0.999));
        }
    }
    Ok(all)
}

fn clients_in_words(clients: usize) -> String {
    match clients {
        1 => "1 client".to_owned(),
        n => format!("{n} clients"),
    }
}

/// Rows of a load in which each client asks again as soon as it is answered.
fn saturated(clients: usize, [ours, nginx, redis]: &[Measured; 3]) -> Vec<Row> {
    let who = clients_in_words(clients);
    let cpu = format!(
        "CPU per get: {:.0} µs (nginx {:.0}, Redis {:.0})",
        ours.cpu_us.median(),
        nginx.cpu_us.median(),
        redis.cpu_us.median()
    );
    let speed = Row::new(BENCH, format!("throughput, {who}"), "MB/s", &ours.mb_per_s)
        .peer("nginx", &nginx.mb_per_s)
        .ratio_at_least(SPEED_GOAL)
        .note(format!("Redis {:.0} MB/s; {cpu}", redis.mb_per_s.median()));
    let mut rows = vec![speed];
    rows.extend(latencies(&who, ours, nginx, redis, clients == 16));
    rows
}

/// Rows of the load that leaves room.
fn steady([ours, nginx, redis]: &[Measured; 3]) -> Vec<Row> {
    let who = format!("{STEADY_CLIENTS} clients with {STEADY_PER_S:.0} gets/s");
    latencies(&who, ours, nginx, redis, true)
}

fn latencies(
    who: &str,
    ours: &Measured,
    nginx: &Measured,
    redis: &Measured,
    has_goal: bool,
) -> Vec<Row> {
    type Pick = fn(&Measured) -> &Samples;
    let quantiles: [(&str, Pick); 3] = [
        ("p50", |m| &m.p50),
        ("p99", |m| &m.p99),
        ("p99.9", |m| &m.p999),
    ];
    let row = |(name, pick): (&str, Pick)| {
        let row = Row::new(BENCH, format!("{name}, {who}"), "ms", pick(ours))
            .peer("nginx", pick(nginx))
            .note(format!("Redis {} ms", number(pick(redis).median())));
        match has_goal && name == "p50" {
            true => row.at_most(LATENCY_GOAL_MS, ""),
            false => row,
        }
    };
    quantiles.into_iter().map(row).collect()
}
