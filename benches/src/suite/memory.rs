//! Peak memory of the process behind a mount of 40,000 files.

use crate::error::{BenchError, at};
use crate::loops;
use crate::process::Usage;
use crate::report::{Report, Row};
use crate::setup::oci::Compression;
use crate::setup::registry::Registry;
use crate::stats::Samples;
use crate::suite::Bench;

const BENCH: &str = "memory of a mount of 40,000 files";

/// Goal: 64 MB beside its cache, in MB.
const GOAL_MB: f64 = 64.0;

/// Runs the bench.
pub fn run(bench: &Bench) -> Result<Report, BenchError> {
    let image = bench.workloads.files40k()?;
    let registry = Registry::on_loopback(&bench.dir.join("memory-registry"))?;
    registry.push(&image.layout(Compression::Gzip)?, "files40k")?;
    let reference = registry.reference("files40k");
    bench.lazyimg.convert(&reference, &[])?;
    let (mut first, mut names, mut all, mut anonymous) =
        <(Samples, Samples, Samples, Samples)>::default();
    for _ in 0..bench.runs {
        let (dir, cache) = (bench.dir.join("mnt"), bench.dir.join("cache"));
        let (mounted, _) = bench.lazyimg.mount(&reference, &dir, &cache, &[])?;
        let daemon = mounted.daemon()?;
        let usage =
            || Usage::of(daemon).ok_or_else(|| BenchError::Setup("the daemon is gone".into()));
        std::fs::read_dir(&dir).map_err(at(&dir))?;
        first.push(mb(usage()?.peak_bytes));
        loops::find_stat(&dir)?;
        names.push(mb(usage()?.peak_bytes));
        loops::read_files(&dir, &[])?;
        all.push(mb(usage()?.peak_bytes));
        anonymous.push(mb(usage()?.anonymous_bytes));
        mounted.end()?;
        std::fs::remove_dir_all(&cache).map_err(at(&cache))?;
    }
    let row = |what: &str, samples: &Samples| Row::new(BENCH, what, "MB", samples);
    Ok(Report {
        facts: vec![image.fact()],
        rows: vec![
            row("peak resident, after find and reading every byte", &all)
                .peer("after mount and ls alone", &first)
                .at_most(GOAL_MB, "")
                .note(
                    "default --hot-bytes (16 MiB of decoded chunks) counted in, nothing subtracted",
                ),
            row("peak resident, after find and stat", &names)
                .peer("after mount and ls alone", &first),
            row("anonymous memory at the end", &anonymous)
                .note("without pages of the program itself"),
        ],
        tables: Vec::new(),
    })
}

fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
