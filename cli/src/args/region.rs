//! The regional store, for commands that read or write through it.

use std::path::PathBuf;

use clap::Args;

/// The regional store.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Regional store")]
pub struct Region {
    /// Regional store: the URLs of its instances, or one dns+http(s)://NAME:PORT whose addresses are
    /// looked up.
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    pub store: Vec<String>,
    /// File with this tenant's token for the store; read again when it changes.
    #[arg(long, value_name = "FILE")]
    pub store_token_file: Option<PathBuf>,
    /// File with certificates (PEM) to trust for the store, besides the system's.
    #[arg(long, value_name = "FILE")]
    pub store_ca: Option<PathBuf>,
    /// Only the store: `mount` never asks the registry for chunks, `convert` pushes nothing to it.
    #[arg(long)]
    pub store_only: bool,
}
