//! Benches of lazyimg: each number beside its peer in the same run, medians of several runs.
//!
//! The program under test is the `lazyimg` binary, used as its users use it; only the codec is
//! called as a library. Nothing asserts a time: the exit code is 0 unless something breaks.
//! `docs/benchmarks.md` says what is measured and holds the last full run.

mod error;
mod host;
mod loops;
mod process;
mod report;
mod setup;
mod stats;
mod suite;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use error::{BenchError, at, io};
use report::Report;
use setup::lazyimg::Lazyimg;
use setup::workload::{self, Scale, Workloads};
use suite::Bench;

/// The most that the benches put on the disk at one time, in bytes; quick runs need a quarter.
const DISK_BYTES: u64 = 24_000_000_000;

/// Results stand between these lines in docs/benchmarks.md.
const RECORD: (&str, &str) = (
    "<!-- begin: last full run -->\n",
    "<!-- end: last full run -->\n",
);

/// Measures lazyimg beside its peers.
#[derive(Debug, Parser)]
#[command(name = "lazyimg-bench")]
struct Args {
    /// The program under test.
    #[arg(long, value_name = "FILE")]
    lazyimg: PathBuf,
    /// Smaller images and fewer runs, about two minutes.
    #[arg(long)]
    quick: bool,
    /// Only these benches: codec, convert, first-ls, reads, hits, memory, cutters, eviction, store.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// How often each thing is measured [default: 5, quick 3].
    #[arg(long, value_name = "N")]
    runs: Option<usize>,
    /// Directory for images, caches and mounts, best on ext4 [default: the user's cache directory].
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Leaves the images and everything else in the work directory, for a profiler.
    #[arg(long)]
    keep: bool,
    /// Writes all numbers to a file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Puts the tables into a Markdown file, between its marks.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "lazyimg-bench: error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), BenchError> {
    host::check()?;
    let chosen = chosen(&args.only)?;
    let base = args.work_dir.clone().unwrap_or_else(default_work_dir);
    fs::create_dir_all(&base).map_err(at(&base))?;
    let dir = tempfile::Builder::new()
        .prefix("run-")
        .tempdir_in(&base)
        .map_err(at(&base))?;
    let needed = if args.quick {
        DISK_BYTES / 4
    } else {
        DISK_BYTES
    };
    if workload::free_bytes(dir.path())? < needed {
        let path = base.display();
        let gb = needed / 1_000_000_000;
        return Err(BenchError::Setup(format!(
            "{path} has less than {gb} GB free: see --work-dir"
        )));
    }
    let mut report = Report {
        facts: host::facts(dir.path())?,
        ..Report::default()
    };
    let scale = if args.quick {
        Scale::QUICK
    } else {
        Scale::FULL
    };
    let bench = Bench {
        lazyimg: Lazyimg::new(args.lazyimg.clone(), dir.path().join("home"))?,
        workloads: Workloads::new(dir.path().join("images"), scale)?,
        dir: dir.path().join("work"),
        runs: args.runs.unwrap_or(if args.quick { 3 } else { 5 }).max(1),
        quick: args.quick,
    };
    fs::create_dir_all(&bench.dir).map_err(at(&bench.dir))?;
    for (name, run) in chosen {
        let started = std::time::Instant::now();
        let found = run(&bench)?;
        say(&mut std::io::stdout(), &found.text())?;
        report.extend(found);
        let seconds = started.elapsed().as_secs_f64();
        say(
            &mut std::io::stderr(),
            &format!("[{name}: {seconds:.0} s]\n"),
        )?;
    }
    drop(bench);
    if args.keep {
        let kept = dir.keep();
        say(
            &mut std::io::stderr(),
            &format!("kept {}\n", kept.display()),
        )?;
    } else {
        dir.close().map_err(io("deleting what the benches made"))?;
    }
    write(args, &report)
}

fn write(args: &Args, report: &Report) -> Result<(), BenchError> {
    let missed = report
        .rows
        .iter()
        .filter(|r| r.goal.as_ref().is_some_and(|g| !g.met))
        .count();
    let goals = report.rows.iter().filter(|r| r.goal.is_some()).count();
    let facts = report.facts.join("\n");
    let end = format!("\n{facts}\n{} of {goals} goals met\n", goals - missed);
    say(&mut std::io::stdout(), &end)?;
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(report).map_err(|e| BenchError::Json {
            what: "the report".into(),
            cause: e.to_string(),
        })?;
        fs::write(path, text).map_err(at(path))?;
    }
    if let Some(path) = &args.record {
        record(path, &report.markdown())?;
    }
    Ok(())
}

fn say(out: &mut dyn Write, text: &str) -> Result<(), BenchError> {
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(io("printing"))
}

/// Replaces what stands between the marks of a file.
fn record(path: &Path, text: &str) -> Result<(), BenchError> {
    let old = fs::read_to_string(path).map_err(at(path))?;
    let new = (|| {
        let (head, rest) = old.split_once(RECORD.0)?;
        let (_, tail) = rest.split_once(RECORD.1)?;
        Some([head, RECORD.0, "\n", text, "\n", RECORD.1, tail].concat())
    })();
    let no_marks = || BenchError::Setup(format!("{} has no marks for results", path.display()));
    fs::write(path, new.ok_or_else(no_marks)?).map_err(at(path))
}

/// The benches to run, in their own order.
fn chosen(only: &[String]) -> Result<Vec<(&'static str, suite::Run)>, BenchError> {
    if let Some(unknown) = only
        .iter()
        .find(|o| !suite::ALL.iter().any(|(n, _)| n == o))
    {
        let names: Vec<_> = suite::ALL.iter().map(|(n, _)| *n).collect();
        let names = names.join(", ");
        return Err(BenchError::Setup(format!(
            "no bench is called {unknown}; there are {names}"
        )));
    }
    let wanted = |name: &str| only.is_empty() || only.iter().any(|o| o == name);
    Ok(suite::ALL
        .iter()
        .filter(|(name, _)| wanted(name))
        .copied()
        .collect())
}

fn default_work_dir() -> PathBuf {
    let home =
        || Path::new(&std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache");
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from);
    cache.join("lazyimg-bench")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_replace_the_results_before_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("b.md");
        fs::write(&path, format!("head\n{}old\n{}tail\n", RECORD.0, RECORD.1)).unwrap();
        record(&path, "new").unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, format!("head\n{}\nnew\n{}tail\n", RECORD.0, RECORD.1));
        fs::write(&path, "no marks").unwrap();
        assert!(record(&path, "new").is_err());
    }

    #[test]
    fn an_unknown_bench_is_refused_with_the_names_that_exist() {
        assert!(
            chosen(&["reads".into()])
                .unwrap()
                .iter()
                .all(|(n, _)| *n == "reads")
        );
        assert!(
            chosen(&["nope".into()])
                .unwrap_err()
                .to_string()
                .contains("first-ls")
        );
    }
}
