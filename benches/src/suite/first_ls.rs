//! Mount to first `ls`, with an empty cache and a fresh daemon; against pull and unpack.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::{BenchError, at};
use crate::loops;
use crate::process;
use crate::report::{Report, Row};
use crate::setup::link::{FAR, Link};
use crate::setup::oci::{Compression, TAG};
use crate::setup::registry::Registry;
use crate::stats::Samples;
use crate::suite::Bench;

const BENCH: &str = "first-ls";

/// The slow link: 20 ms, 1 Gbit/s.
const ROUND_TRIP: Duration = Duration::from_millis(20);
const BITS_PER_S: f64 = 1e9;

/// Round trips that the goal allows besides the metadata's time on the wire.
const ROUND_TRIPS: f64 = 4.0;

/// Goal over loopback, in ms.
const LOOPBACK_GOAL_MS: f64 = 150.0;

/// Full pulls are slow and steady: so many are enough.
const PULLS: usize = 3;

/// In quick runs.
const QUICK_PULLS: usize = 1;

/// Runs the bench.
pub fn run(bench: &Bench) -> Result<Report, BenchError> {
    let image = bench.workloads.files40k()?;
    let storage = bench.dir.join("registry");
    let registry = Registry::on_loopback(&storage)?;
    registry.push(&image.layout(Compression::Gzip)?, "files40k")?;
    let reference = registry.reference("files40k");
    bench.lazyimg.convert(&reference, &[])?;
    let metadata = metadata_bytes(&bench.lazyimg.inspect(&reference)?)?;
    let mut report = Report {
        facts: vec![image.fact()],
        ..Report::default()
    };

    let local = measure(bench, &reference, || 0)?;
    drop(registry);
    let wire = "skopeo + umoci";
    let first = Row::new(BENCH, "mount → ls, loopback", "ms", &local.first_ls)
        .peer(wire, &local.pull)
        .at_most(LOOPBACK_GOAL_MS, "")
        .note(local.breakdown());
    report.rows.push(first);
    report.rows.push(local.all_names("loopback"));

    let link = Link::new(ROUND_TRIP, BITS_PER_S)?;
    let (connect_s, rate) = link.probe()?;
    let far = link.on_far(|| Registry::start(&storage, (FAR, 5000).into()))??;
    let reference = far.reference("files40k");
    let slow = link.on_near(|| measure(bench, &reference, || link.bytes_to_near()))??;
    let goal_ms = metadata as f64 * 8e3 / BITS_PER_S + ROUND_TRIPS * ms(ROUND_TRIP);
    let round_trips = (slow.first_ls.median() - local.first_ls.median()) / ms(ROUND_TRIP);
    report.facts.push(format!(
        "link: round trip {:.1} ms (a connect), one connection moves 40 MB at {:.0} MB/s",
        connect_s * 1e3,
        rate / 1e6
    ));
    let why = format!(
        ": {:.0} kB of metadata and manifest, 4 round trips",
        metadata as f64 / 1e3
    );
    let first = Row::new(BENCH, "mount → ls, 20 ms 1 Gbit/s", "ms", &slow.first_ls)
        .peer(wire, &slow.pull)
        .at_most(goal_ms, &why)
        .note(format!(
            "{}; loopback and {round_trips:.1} round trips",
            slow.breakdown()
        ));
    report.rows.push(first);
    report.rows.push(slow.all_names("20 ms 1 Gbit/s"));
    drop(far);
    Ok(report)
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// Stored bytes of the metadata and of the manifest.
fn metadata_bytes(inspected: &Value) -> Result<u64, BenchError> {
    let chunks = inspected["metadata"]["unique_stored_bytes"].as_u64();
    let manifest = inspected["manifest_bytes"].as_u64();
    chunks
        .zip(manifest)
        .map(|(a, b)| a + b)
        .ok_or_else(|| BenchError::Json {
            what: "lazyimg inspect".into(),
            cause: "no metadata.unique_stored_bytes or manifest_bytes".into(),
        })
}

/// What was measured over one kind of network; all in ms.
#[derive(Default)]
struct Measured {
    mount: Samples,
    ls: Samples,
    first_ls: Samples,
    find: Samples,
    pull: Samples,
    received: Samples,
}

impl Measured {
    fn breakdown(&self) -> String {
        let mut text = format!(
            "mount {:.0} + ls {:.0}",
            self.mount.median(),
            self.ls.median()
        );
        if self.received.median() > 0.0 {
            text += &format!("; {:.0} kB received", self.received.median() / 1e3);
        }
        text
    }

    fn all_names(&self, network: &str) -> Row {
        Row::new(
            BENCH,
            format!("mount → all names and stats, {network}"),
            "ms",
            &self.find,
        )
        .peer("skopeo + umoci", &self.pull)
    }
}

fn measure(
    bench: &Bench,
    reference: &str,
    received: impl Fn() -> u64,
) -> Result<Measured, BenchError> {
    let mut out = Measured::default();
    let pulls = if bench.quick { QUICK_PULLS } else { PULLS };
    for run in 0..bench.runs.max(PULLS) * 2 {
        let (dir, cache) = (bench.dir.join("mnt"), bench.dir.join("cache"));
        let before = received();
        let started = Instant::now();
        let (mounted, mount) = bench.lazyimg.mount(reference, &dir, &cache, &[])?;
        let ls = process::run(Command::new("ls").arg(&dir))?;
        let first = started.elapsed();
        out.received.push((received() - before) as f64);
        loops::find_stat(&dir)?;
        out.find.push(ms(started.elapsed()));
        out.mount.push(ms(mount.wall));
        out.ls.push(ms(ls.wall));
        out.first_ls.push(ms(first));
        mounted.end()?;
        fs::remove_dir_all(&cache).map_err(at(&cache))?;
        if run < pulls {
            out.pull.push(pull(&bench.dir, reference)?);
        }
    }
    Ok(out)
}

/// The peer: everything is fetched and unpacked, then listed. Milliseconds.
fn pull(dir: &Path, reference: &str) -> Result<f64, BenchError> {
    let (layout, bundle) = (dir.join("pulled"), dir.join("bundle"));
    let started = Instant::now();
    process::run(
        Command::new("skopeo")
            .args(["copy", "--quiet", "--src-tls-verify=false"])
            .arg(format!("docker://{reference}"))
            .arg(format!("oci:{}:{TAG}", layout.display())),
    )?;
    process::run(
        Command::new("umoci")
            .args(["unpack", "--image"])
            .arg(format!("{}:{TAG}", layout.display()))
            .arg(&bundle),
    )?;
    process::run(Command::new("ls").arg(bundle.join("rootfs")))?;
    let taken = ms(started.elapsed());
    for d in [layout, bundle] {
        fs::remove_dir_all(&d).map_err(at(&d))?;
    }
    Ok(taken)
}
