//! Reads and walks on a mount whose host cache is full, against a plain directory.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{BenchError, at};
use crate::host;
use crate::loops::{self, Seen};
use crate::process;
use crate::report::{Report, Row};
use crate::setup::oci::Compression;
use crate::setup::registry::Registry;
use crate::setup::workload::{LARGE_FILE, NOISE_FILE};
use crate::stats::Samples;
use crate::suite::Bench;

const COLD: &str = "reads, page cache cold, host cache full";
const WARM: &str = "reads, page cache warm";

/// Goal with a warm page cache: within 10 % of a plain directory.
const WARM_GOAL: f64 = 1.10;

/// One loop on one tree. The number is a seed that is the same for both trees.
type Loop = fn(&Tree, u64) -> Result<Seen, BenchError>;

/// A loop with its goals. The cold ones are the upper ends of what a tuned FUSE prototype that
/// neither decompresses nor decrypts reached on the same data (one blob file, no codec).
struct Case {
    what: &'static str,
    cold_goal: Option<f64>,
    warm_goal: Option<f64>,
    run: Loop,
}

const CASES: &[Case] = &[
    Case {
        what: "find, stat",
        cold_goal: Some(0.73),
        warm_goal: Some(WARM_GOAL),
        run: |t, _| loops::find_stat(&t.root),
    },
    Case {
        what: "walk",
        cold_goal: Some(0.83),
        warm_goal: None,
        run: |t, _| loops::walk(&t.root),
    },
    Case {
        what: "sequential",
        cold_goal: Some(1.42),
        warm_goal: Some(WARM_GOAL),
        run: |t, _| loops::read_sequentially(&t.large),
    },
    Case {
        what: "sequential, incompressible",
        cold_goal: None,
        warm_goal: None,
        run: |t, _| loops::read_sequentially(&t.noise),
    },
    Case {
        what: "random 4K",
        cold_goal: Some(2.4),
        warm_goal: Some(WARM_GOAL),
        run: |t, seed| loops::read_randomly(&t.large, 4 << 10, t.scaled(8000), seed),
    },
    Case {
        what: "random 4K, incompressible",
        cold_goal: None,
        warm_goal: None,
        run: |t, seed| loops::read_randomly(&t.noise, 4 << 10, t.scaled(8000), seed),
    },
    Case {
        what: "random 128K",
        cold_goal: Some(1.6),
        warm_goal: Some(WARM_GOAL),
        run: |t, seed| loops::read_randomly(&t.large, 128 << 10, t.scaled(1500), seed),
    },
    Case {
        what: "all small files",
        cold_goal: Some(0.65),
        warm_goal: Some(WARM_GOAL),
        run: |t, _| loops::read_files(&t.root, &[t.large.clone(), t.noise.clone()]),
    },
];

/// A tree to read.
struct Tree {
    root: PathBuf,
    large: PathBuf,
    noise: PathBuf,
    quick: bool,
}

impl Tree {
    fn new(root: &Path, quick: bool) -> Self {
        Self {
            root: root.into(),
            large: root.join(LARGE_FILE),
            noise: root.join(NOISE_FILE),
            quick,
        }
    }

    /// Quick runs have a file of a quarter, and read a quarter of it.
    fn scaled(&self, count: u64) -> u64 {
        if self.quick { count / 4 } else { count }
    }
}

/// Runs the bench.
pub fn run(bench: &Bench) -> Result<Report, BenchError> {
    let image = bench.workloads.mixed()?;
    let plain = bench.dir.join("plain");
    std::fs::create_dir_all(&plain).map_err(at(&plain))?;
    for tar in &image.tars {
        process::run(
            Command::new("tar")
                .arg("-xf")
                .arg(&tar.path)
                .arg("-C")
                .arg(&plain),
        )?;
    }
    let registry = Registry::on_loopback(&bench.dir.join("reads-registry"))?;
    registry.push(&image.layout(Compression::Gzip)?, "mixed")?;
    let reference = registry.reference("mixed");
    bench.lazyimg.convert(&reference, &[])?;
    let (dir, cache) = (bench.dir.join("mnt"), bench.dir.join("cache"));
    let (mounted, _) = bench.lazyimg.mount(&reference, &dir, &cache, &[])?;
    loops::read_files(&dir, &[])?;
    // What is not in the host cache now can't be read any more, and would be noticed.
    drop(registry);

    let name = host::filesystem(&plain)?;
    let (ours, peer) = (Tree::new(&dir, bench.quick), Tree::new(&plain, bench.quick));
    let mut report = Report {
        facts: vec![image.fact()],
        ..Report::default()
    };
    for (group, cold) in [(COLD, true), (WARM, false)] {
        for case in CASES {
            let (a, b) = compare(bench, case, &ours, &peer, cold)?;
            let row = Row::new(group, case.what, "s", &a).peer(&name, &b);
            report
                .rows
                .push(match if cold { case.cold_goal } else { case.warm_goal } {
                    Some(goal) => row.ratio_at_most(goal),
                    None => row,
                });
        }
    }
    mounted.end()?;
    for d in [plain, cache] {
        std::fs::remove_dir_all(&d).map_err(at(&d))?;
    }
    Ok(report)
}

/// Measures A B A B … .
fn compare(
    bench: &Bench,
    case: &Case,
    ours: &Tree,
    peer: &Tree,
    cold: bool,
) -> Result<(Samples, Samples), BenchError> {
    let (mut a, mut b) = (Samples::default(), Samples::default());
    for run in 0..bench.runs {
        let seed = run as u64 * 7919 + 1;
        let once = |tree: &Tree| {
            if cold {
                host::drop_caches()?;
            } else {
                (case.run)(tree, seed)?;
            }
            loops::timed(|| (case.run)(tree, seed))
        };
        let (ours, seen) = once(ours)?;
        let (theirs, expected) = once(peer)?;
        if seen != expected {
            return Err(BenchError::Setup(format!(
                "{}: the mount gives {seen:?}, the plain directory {expected:?}",
                case.what
            )));
        }
        a.push(ours);
        b.push(theirs);
    }
    Ok((a, b))
}
