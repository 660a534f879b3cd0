//! `lazyimg convert` against `zstd -3 -T2` over the same tars.

use std::fs;
use std::process::Command;

use crate::error::{BenchError, at};
use crate::process;
use crate::report::{Report, Row};
use crate::setup::oci::{Compression, TAG, clone_layout};
use crate::setup::registry::Registry;
use crate::setup::workload::Image;
use crate::stats::Samples;
use crate::suite::Bench;

const BENCH: &str = "convert";

/// Goal: this part of zstd's speed.
const SPEED_GOAL: f64 = 0.7;

/// Goal for peak memory, in MB.
const MEMORY_GOAL_MB: f64 = 1000.0;

/// More runs of 6 GB tell no more.
const MOST_RUNS: usize = 3;

/// Runs the bench.
pub fn run(bench: &Bench) -> Result<Report, BenchError> {
    let files40k = bench.workloads.files40k()?;
    let mut report = Report::default();
    for image in std::iter::once(files40k).chain(bench.workloads.big()?) {
        report.extend(one(bench, image)?);
    }
    report.rows.push(through_registry(bench, files40k)?);
    Ok(report)
}

fn one(bench: &Bench, image: &Image) -> Result<Report, BenchError> {
    let runs = bench.runs.min(MOST_RUNS);
    let layouts = Compression::ALL
        .into_iter()
        .map(|with| Ok((with, image.layout(with)?)))
        .collect::<Result<Vec<_>, BenchError>>()?;
    let mut report = Report {
        facts: vec![image.fact()],
        ..Report::default()
    };
    let (mut peer, mut peer_cpu) = <(Samples, Samples)>::default();
    let mut ours: Vec<_> = layouts
        .iter()
        .map(|_| <(Samples, Samples, Samples)>::default())
        .collect();
    let mut notes = vec![String::new(); layouts.len()];
    let mut same_level = Samples::default();
    for _ in 0..runs {
        for (n, (_, layout)) in layouts.iter().enumerate() {
            let copy = bench.dir.join("layout");
            clone_layout(layout, &copy)?;
            // Blobs of the run before must not be written back during this one.
            rustix::fs::sync();
            let name = format!("oci:{}:{TAG}", copy.display());
            let (printed, done) = bench.lazyimg.convert(&name, &[])?;
            ours[n].0.push(done.wall.as_secs_f64());
            ours[n].1.push(done.peak_bytes as f64 / 1e6);
            ours[n].2.push(done.cpu_s);
            let stored = printed["stored_bytes"].as_u64().unwrap_or(0);
            notes[n] = format!("ratio {:.2}", image.file_bytes as f64 / stored as f64);
            fs::remove_dir_all(&copy).map_err(at(&copy))?;
        }
        if let Some((_, layout)) = layouts.last() {
            let copy = bench.dir.join("layout");
            clone_layout(layout, &copy)?;
            rustix::fs::sync();
            let name = format!("oci:{}:{TAG}", copy.display());
            let (_, done) = bench.lazyimg.convert(&name, &["--level", "3"])?;
            same_level.push(done.wall.as_secs_f64());
            fs::remove_dir_all(&copy).map_err(at(&copy))?;
        }
        rustix::fs::sync();
        let (wall, cpu) = zstd(bench, image)?;
        peer.push(wall);
        peer_cpu.push(cpu);
    }
    let speed = |s: &Samples| s.map(|v| image.tar_bytes() as f64 / 1e6 / v);
    for (n, (with, _)) in layouts.iter().enumerate() {
        let (wall, memory, cpu) = &ours[n];
        let what = format!("{}, {} layers", image.name, with.name());
        let note = format!(
            "{:.1} s, CPU {:.1} s (zstd {:.1} s), {}",
            wall.median(),
            cpu.median(),
            peer_cpu.median(),
            notes[n]
        );
        report.rows.push(
            Row::new(BENCH, what.as_str(), "MB/s", &speed(wall))
                .peer("zstd -3 -T2", &speed(&peer))
                .ratio_at_least(SPEED_GOAL)
                .note(note),
        );
        report.rows.push(
            Row::new(BENCH, format!("{what}: peak memory"), "MB", memory)
                .at_most(MEMORY_GOAL_MB, ""),
        );
    }
    if let Some((with, _)) = layouts.last() {
        let what = format!("{}, {} layers, --level 3", image.name, with.name());
        report.rows.push(
            Row::new(BENCH, what, "MB/s", &speed(&same_level)).peer("zstd -3 -T2", &speed(&peer)),
        );
    }
    Ok(report)
}

/// The peer: each tar on standard input, its compressed form in a file. Seconds: wall
/// clock, CPU.
fn zstd(bench: &Bench, image: &Image) -> Result<(f64, f64), BenchError> {
    let out = bench.dir.join("peer.zst");
    let (mut wall, mut cpu) = (0.0, 0.0);
    for tar in &image.tars {
        let mut command = Command::new("zstd");
        command.args(["-3", "-T2", "-q", "-f", "-o"]).arg(&out);
        let done = process::run_with_input(&mut command, &tar.path)?;
        wall += done.wall.as_secs_f64();
        cpu += done.cpu_s;
    }
    fs::remove_file(&out).map_err(at(&out))?;
    Ok((wall, cpu))
}

/// From a registry and back to it: what a user waits for.
fn through_registry(bench: &Bench, image: &Image) -> Result<Row, BenchError> {
    let (mut ours, mut peer) = (Samples::default(), Samples::default());
    for run in 0..bench.runs.min(MOST_RUNS) {
        let dir = bench.dir.join(format!("convert-registry-{run}"));
        let registry = Registry::on_loopback(&dir)?;
        registry.push(&image.layout(Compression::Gzip)?, image.name)?;
        rustix::fs::sync();
        let (_, done) = bench
            .lazyimg
            .convert(&registry.reference(image.name), &[])?;
        drop(registry);
        ours.push(image.tar_bytes() as f64 / 1e6 / done.wall.as_secs_f64());
        rustix::fs::sync();
        peer.push(image.tar_bytes() as f64 / 1e6 / zstd(bench, image)?.0);
        fs::remove_dir_all(&dir).map_err(at(&dir))?;
    }
    let what = format!("{}, gzip layers, from a registry and back", image.name);
    Ok(Row::new(BENCH, what, "MB/s", &ours).peer("zstd -3 -T2", &peer))
}
