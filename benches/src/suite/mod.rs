//! The benches, each a function from a [`Bench`] to a [`Report`].

pub mod codec;
pub mod convert;
pub mod cutters;
pub mod eviction;
pub mod first_ls;
pub mod hits;
pub mod memory;
pub mod reads;
pub mod store;

use std::path::PathBuf;

use crate::error::BenchError;
use crate::report::Report;
use crate::setup::lazyimg::Lazyimg;
use crate::setup::workload::Workloads;

/// What every bench is given.
pub struct Bench {
    /// The program under test.
    pub lazyimg: Lazyimg,
    /// The images.
    pub workloads: Workloads,
    /// For everything else; deleted at the end.
    pub dir: PathBuf,
    /// How often each thing is measured.
    pub runs: usize,
    /// Whether this is a quick look.
    pub quick: bool,
}

/// A bench.
pub type Run = fn(&Bench) -> Result<Report, BenchError>;

/// All benches, in the order in which they run.
pub const ALL: &[(&str, Run)] = &[
    ("codec", codec::run),
    ("convert", convert::run),
    ("first-ls", first_ls::run),
    ("reads", reads::run),
    ("hits", hits::run),
    ("memory", memory::run),
    ("cutters", cutters::run),
    ("eviction", eviction::run),
    ("store", store::run),
];
