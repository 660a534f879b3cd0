//! `lazyimg verify`.

use std::ops::ControlFlow;
use std::path::Path;
use std::str::FromStr;

use lazyimg_chunkstore::VerifyScope;
use lazyimg_fuse::protocol::VerifyReport;
use lazyimg_fuse::tally::Tally;
use lazyimg_image::erofs::{self, Reader};
use lazyimg_image::reference::ImageRef;
use serde::Serialize;

use crate::args::{Global, Verify};
use crate::cmd::opened::{self, OpenedImage};
use crate::exit::Error;
use crate::output::{self, bytes};
use crate::secrets;

/// Chunks that are asked for at once.
const BATCH: usize = 64;

/// Findings that are told one by one; the rest is counted.
const MAX_TOLD: usize = 100;

#[derive(Debug, Default, Serialize)]
struct Report {
    target: String,
    chunks: u64,
    /// Ciphertext of those chunks; null for mounts.
    stored_bytes: Option<u64>,
    /// Inodes that the metadata's walk met; null for mounts, and when it could not be walked.
    inodes: Option<u64>,
    /// Chunks whose copy in the host cache was checked; null for images.
    cached: Option<u64>,
    damaged: u64,
    /// Chunks that could not be checked.
    unreachable: u64,
    /// Bad copies in the host cache that were replaced (mounts only).
    healed: u64,
    /// The first findings of damage in words.
    findings: Vec<String>,
    /// Why chunks could not be checked, each cause once.
    unreachable_causes: Vec<String>,
}

impl Report {
    fn new(target: &str, found: VerifyReport) -> Self {
        Self {
            target: target.to_owned(),
            chunks: found.good + found.bad + found.unreachable,
            damaged: found.bad,
            unreachable: found.unreachable,
            healed: found.healed,
            findings: found.failures,
            unreachable_causes: found.unreachable_causes,
            ..Self::default()
        }
    }
}

/// Runs the command.
pub fn run(global: &Global, args: &Verify) -> Result<(), Error> {
    let report = if Path::new(&args.target).is_dir() {
        verify_mount(global, args)?
    } else {
        let reference = ImageRef::from_str(&args.target)
            .map_err(|e| Error::Usage(format!("{e}; and no directory has this name")))?;
        super::block_on(verify_image(global, args, &reference))?
    };
    if args.json {
        output::json(&report)?;
    } else {
        output::data(&text(&report))?;
    }
    verdict(&report)
}

/// Damage is the worse news: who hears of both acts on it first.
fn verdict(report: &Report) -> Result<(), Error> {
    let (chunks, target) = (report.chunks, &report.target);
    match (report.damaged, report.unreachable) {
        (0, 0) => Ok(()),
        (0, n) => Err(Error::Unreachable(format!(
            "{n} of {chunks} chunks of {target} could not be checked ({}); nothing is known to be damaged: \
             verify again when they can be reached",
            report.unreachable_causes.join("; ")
        ))),
        (n, _) => Err(Error::Damaged(format!(
            "{n} of {chunks} chunks of {target} are damaged: convert the image again, or restore the registry's blobs"
        ))),
    }
}

/// The host cache's copies of a mount, then, for what is not there, the tiers'.
fn verify_mount(global: &Global, args: &Verify) -> Result<Report, Error> {
    let client = super::mount::client(&args.cache)?;
    let bar = output::count_bar(global, "verifying");
    let found = client.verify(Path::new(&args.target), false, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    let cached = found.cached;
    Ok(Report {
        cached: Some(cached),
        ..Report::new(&args.target, found)
    })
}

async fn verify_image(
    global: &Global,
    args: &Verify,
    reference: &ImageRef,
) -> Result<Report, Error> {
    let tenant = secrets::tenant(&args.key)?.existing_tenant_key()?;
    let image = opened::open(reference, &args.source, &tenant).await?;
    let mut seen = std::collections::HashSet::new();
    let specs: Vec<_> = image
        .view
        .specs()
        .filter(|s| seen.insert(*s.id()))
        .cloned()
        .collect();
    let stored_bytes = specs.iter().map(|s| u64::from(s.chunk.stored_len)).sum();
    let bar = output::byte_bar(global, stored_bytes, "verifying");
    let mut tally = Tally::new(MAX_TOLD);
    for batch in specs.chunks(BATCH) {
        for (spec, outcome) in batch
            .iter()
            .zip(image.store.verify(batch, VerifyScope::Tiers).await)
        {
            bar.inc(u64::from(spec.chunk.stored_len));
            tally.add(outcome);
        }
    }
    bar.finish_and_clear();
    let mut report = Report {
        stored_bytes: Some(stored_bytes),
        ..Report::new(&args.target, tally.report())
    };
    if report.damaged + report.unreachable == 0 {
        walk(&image, &mut report).await?;
    }
    Ok(report)
}

/// Reads the whole tree: every inode, name and extent must make sense inside the data space.
async fn walk(image: &OpenedImage, report: &mut Report) -> Result<(), Error> {
    let specs: Vec<_> = image
        .view
        .meta()
        .iter()
        .filter_map(|e| e.spec.clone())
        .collect();
    let mut metadata = Vec::new();
    for chunk in image.store.read_many(&specs).await {
        // It was right a moment ago; now its registry may be gone.
        metadata.extend_from_slice(&chunk?);
    }
    let data_len = image.view.data_len();
    let damaged = |e: erofs::ReadError| Error::Damaged(format!("metadata: {e}"));
    let reader = Reader::open(metadata).map_err(damaged)?;
    let (mut inodes, mut findings) = (0, Vec::new());
    erofs::walk(&reader, &mut |path, info| {
        inodes += 1;
        let bad = match reader.data_start(info.nid) {
            Ok(Some(start)) => start
                .checked_add(info.size)
                .is_none_or(|end| end > data_len),
            Ok(None) => false,
            Err(_) => true,
        };
        if bad && findings.len() < MAX_TOLD {
            findings.push(format!(
                "{}: lies outside of the data space",
                String::from_utf8_lossy(path)
            ));
        }
        ControlFlow::Continue(())
    })
    .map_err(damaged)?;
    report.damaged += findings.len() as u64;
    report.findings.append(&mut findings);
    report.inodes = Some(inodes);
    Ok(())
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    for finding in &report.findings {
        out += &format!("damaged: {finding}\n");
    }
    for cause in &report.unreachable_causes {
        out += &format!("could not be checked: {cause}\n");
    }
    if report.healed > 0 {
        out += &format!(
            "healed: {} bad copies in the host cache were replaced\n",
            report.healed
        );
    }
    out += &format!(
        "{}: {} chunks",
        report.target,
        report.chunks - report.unreachable
    );
    if let Some(stored_bytes) = report.stored_bytes.filter(|_| report.unreachable == 0) {
        out += &format!(" ({})", bytes(stored_bytes));
    }
    out += " checked";
    if let Some(cached) = report.cached {
        out += &format!(", {cached} of them in the host cache");
    }
    if let Some(inodes) = report.inodes {
        out += &format!(", {inodes} inodes walked");
    }
    out += &format!(", {} damaged", report.damaged);
    if report.unreachable > 0 {
        out += &format!(", {} could not be checked", report.unreachable);
    }
    out + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(damaged: u64, unreachable: u64) -> Report {
        Report::new(
            "/mnt/app",
            VerifyReport {
                good: 3,
                bad: damaged,
                unreachable,
                unreachable_causes: vec!["registry: connection refused".to_owned()],
                ..VerifyReport::default()
            },
        )
    }

    #[test]
    fn an_outage_is_told_apart_from_damage_and_damage_counts_first() {
        assert!(verdict(&report(0, 0)).is_ok());
        let outage = verdict(&report(0, 2)).unwrap_err();
        assert!(matches!(outage, Error::Unreachable(_)), "{outage:?}");
        let words = outage.to_string();
        assert!(
            words.contains("2 of 5") && words.contains("connection refused"),
            "{words}"
        );
        assert!(!words.contains("convert"), "{words}");
        for unreachable in [0, 2] {
            let damage = verdict(&report(1, unreachable)).unwrap_err();
            assert!(matches!(damage, Error::Damaged(_)), "{damage:?}");
        }
    }

    #[test]
    fn what_was_not_looked_at_is_not_told() {
        let mount = Report {
            cached: Some(2),
            ..report(0, 0)
        };
        let told = text(&mount);
        assert!(
            told.ends_with("/mnt/app: 3 chunks checked, 2 of them in the host cache, 0 damaged\n"),
            "{told}"
        );
        let image = Report {
            stored_bytes: Some(5),
            inodes: Some(7),
            ..report(0, 0)
        };
        let told = text(&image);
        assert!(
            told.ends_with("3 chunks (5 B) checked, 7 inodes walked, 0 damaged\n"),
            "{told}"
        );
    }
}
