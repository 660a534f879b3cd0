//! `lazyimg verify`.

use std::ops::ControlFlow;
use std::path::Path;
use std::str::FromStr;

use lazyimg_chunkstore::VerifyScope;
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
    stored_bytes: u64,
    /// Inodes that the metadata's walk met.
    inodes: u64,
    damaged: u64,
    /// Bad copies in the host cache that were replaced (mounts only).
    healed: u64,
    /// The first findings in words.
    findings: Vec<String>,
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
    match report.damaged {
        0 => Ok(()),
        n => Err(Error::Damaged(format!(
            "{n} of {} chunks of {} are damaged: convert the image again, or restore the registry's blobs",
            report.chunks, report.target
        ))),
    }
}

/// The host cache's copies of a mount, then, for what is not there, the tiers'.
fn verify_mount(global: &Global, args: &Verify) -> Result<Report, Error> {
    let client = super::mount::client(&args.cache)?;
    let bar = output::byte_bar(global, 0, "verifying");
    let result = client.verify(Path::new(&args.target), false, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    Ok(Report {
        target: args.target.clone(),
        chunks: result.good + result.bad,
        damaged: result.bad,
        healed: result.healed,
        findings: result.failures,
        ..Report::default()
    })
}

async fn verify_image(
    global: &Global,
    args: &Verify,
    reference: &ImageRef,
) -> Result<Report, Error> {
    let tenant = secrets::tenant(&args.key)?.existing_tenant_key()?;
    let image = opened::open(reference, &args.source, &tenant).await?;
    let mut report = Report {
        target: args.target.clone(),
        ..Report::default()
    };
    let mut seen = std::collections::HashSet::new();
    let specs: Vec<_> = image
        .view
        .specs()
        .filter(|s| seen.insert(*s.id()))
        .cloned()
        .collect();
    report.chunks = specs.len() as u64;
    report.stored_bytes = specs.iter().map(|s| u64::from(s.chunk.stored_len)).sum();
    let bar = output::byte_bar(global, report.stored_bytes, "verifying");
    for batch in specs.chunks(BATCH) {
        for (spec, result) in batch
            .iter()
            .zip(image.store.verify(batch, VerifyScope::Tiers).await)
        {
            bar.inc(u64::from(spec.chunk.stored_len));
            if let Err(error) = result {
                report.damaged += 1;
                if report.findings.len() < MAX_TOLD {
                    report.findings.push(error.to_string());
                }
            }
        }
    }
    bar.finish_and_clear();
    if report.damaged == 0 {
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
        metadata.extend_from_slice(&chunk.map_err(|e| Error::Damaged(e.to_string()))?);
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
    report.inodes = inodes;
    Ok(())
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    for finding in &report.findings {
        out += &format!("damaged: {finding}\n");
    }
    if report.healed > 0 {
        out += &format!(
            "healed: {} bad copies in the host cache were replaced\n",
            report.healed
        );
    }
    out += &format!(
        "{}: {} chunks ({}) checked, {} inodes walked, {} damaged\n",
        report.target,
        report.chunks,
        bytes(report.stored_bytes),
        report.inodes,
        report.damaged
    );
    out
}
