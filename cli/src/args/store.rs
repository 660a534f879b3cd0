//! `lazyimg store`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use lazyimg_store::engine::RootId;

/// `lazyimg store`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lazyimg store serve --data /srv/lazyimg
  lazyimg store token --out team-a.token
  lazyimg store serve --listen 0.0.0.0:7070 --data /srv/lazyimg --tenants tenants.toml --tls-cert c.pem --tls-key k.pem
  lazyimg store stats --store https://store.region:7070 --store-token-file admin.token
  lazyimg store rotate-root && lazyimg store gc --dry-run

A store holds ciphertext and no key. Chunks lie in roots: `rotate-root` begins a new one, `gc` copies what
lives out of the old ones and deletes them after the grace time.")]
pub struct StoreUpkeep {
    /// What to do.
    #[command(subcommand)]
    pub command: StoreCommand,
}

/// What to do with a regional store.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant, reason = "one is made in a process")]
pub enum StoreCommand {
    /// Run a store.
    Serve(StoreServe),
    /// Make a token for a tenant.
    Token(StoreToken),
    /// Show the roots, their states and alarms.
    Roots(StoreQuery),
    /// Begin a new root; the active one is retired.
    RotateRoot(StoreAct),
    /// Say that an alarm of a root was looked into: the count of days begins anew.
    Acknowledge(StoreAcknowledge),
    /// Collect garbage: move what lives out of retired roots, delete what expired long enough ago.
    Gc(StoreGc),
    /// Show what the store holds, by root and by tenant.
    Stats(StoreQuery),
}

/// `lazyimg store serve`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lazyimg store serve --data /srv/lazyimg
  lazyimg store serve --listen [::]:7070 --tenants /etc/lazyimg/tenants.toml --data /srv/lazyimg \\
      --tls-cert /etc/lazyimg/cert.pem --tls-key /etc/lazyimg/key.pem --audit-log /var/log/lazyimg-audit.log

A tenants file; token files lie beside it, mode 0600:
  [tenants.team-a]
  token-files = [\"team-a.token\"]
  rights = [\"read\", \"write\"]         # and \"administer\", \"observe\"
  quota = \"100GiB\"

Tenants, tokens and certificates are read again when they change, and on SIGHUP. To rotate a token, name the
new file beside the old one, give it to the hosts, then take the old one out. SIGTERM or SIGINT: requests
under way are finished; a second one ends at once.

Without --data the engine is what [engine.embedded], [engine.s3] and [engine.hot] of the configuration
file say: docs/operations.md.")]
pub struct StoreServe {
    /// Address and port to listen at; port 0 for any.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070")]
    pub listen: String,
    /// Directory of the embedded engine; made if missing.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// File with tenants, their tokens, rights and quotas (TOML). Without it the store listens on
    /// loopback only, and everybody on this machine may do everything.
    #[arg(long, value_name = "FILE")]
    pub tenants: Option<PathBuf>,
    /// File with the certificate and those that lead to its root (PEM).
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// File with the certificate's private key (PEM).
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// File for a line (JSON) about each administrative act [default: the log].
    #[arg(long, value_name = "FILE")]
    pub audit_log: Option<PathBuf>,
    /// Name of this instance, the same after a restart: needed where several instances share an engine
    /// [default: this machine's name, of those that have their own, `store`].
    #[arg(long, value_name = "NAME")]
    pub instance: Option<String>,
    /// Form of the log on standard error.
    #[arg(long, value_name = "FORM", value_enum, default_value_t = LogForm::Json)]
    pub log: LogForm,
    /// Print where it listens as JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// What clients may take.
    pub limits: StoreLimits,
}

/// What clients of a store may take.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub struct StoreLimits {
    /// Requests under way; who comes above is told to come again.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_requests: u32,
    /// Open connections; who comes above waits.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_connections: u32,
    /// Bytes of bodies in memory, such as 256MiB; requests wait for it.
    #[arg(long, value_name = "BYTES", default_value = "256MiB", value_parser = memory)]
    pub max_memory: u64,
    /// How long requests under way may go on after SIGTERM, such as 30s.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub drain_timeout: Duration,
}

/// Form of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogForm {
    /// Lines for people.
    Text,
    /// One JSON document a line.
    Json,
}

/// `lazyimg store token`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  lazyimg store token --out team-a.token
Name the file in the tenants file, and give a copy to the hosts: --store-token-file.")]
pub struct StoreToken {
    /// The file, which must not exist; only its owner may read it.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

/// Which store is meant.
#[derive(Debug, Args)]
#[command(next_help_heading = "Regional store")]
pub struct StoreAddress {
    /// URL of the store; of several, the first is asked.
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    pub store: Vec<String>,
    /// File with a token that has the right to administer.
    #[arg(long, value_name = "FILE")]
    pub store_token_file: Option<PathBuf>,
    /// File with certificates (PEM) to trust for the store, besides the system's.
    #[arg(long, value_name = "FILE")]
    pub store_ca: Option<PathBuf>,
}

/// `lazyimg store roots`, `lazyimg store stats`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  lazyimg store stats --store http://127.0.0.1:7070 --json")]
pub struct StoreQuery {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// Which store.
    pub at: StoreAddress,
}

/// `lazyimg store rotate-root`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  lazyimg store rotate-root --store http://127.0.0.1:7070
Prints the new root. What is read still comes from the old one; `lazyimg store gc` moves what lives.")]
pub struct StoreAct {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// Which store.
    pub at: StoreAddress,
}

/// `lazyimg store acknowledge`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lazyimg store acknowledge r00000001 --store http://127.0.0.1:7070
  lazyimg store acknowledge r00000001 --ignore-alarms --store http://127.0.0.1:7070
An alarm means that something read what no live image names. Find out what; then acknowledge it. When the
same goes on and on, and need not be kept, --ignore-alarms lets the root go all the same.")]
pub struct StoreAcknowledge {
    /// The root.
    #[arg(value_name = "ROOT")]
    pub root: RootId,
    /// From now on no alarm keeps this root: it goes after the grace time, whoever reads from it.
    #[arg(long)]
    pub ignore_alarms: bool,
    #[command(flatten)]
    /// Which store.
    pub at: StoreAddress,
}

/// `lazyimg store gc`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lazyimg store gc --dry-run --store http://127.0.0.1:7070
  lazyimg store gc --grace 14d --unused 90d
The pass goes on in the store if this command is interrupted.")]
pub struct StoreGc {
    /// Only tell what would be done.
    #[arg(long)]
    pub dry_run: bool,
    /// How long a root is kept after it has expired, such as 7d or 12h [default: 7d].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub grace: Option<Duration>,
    /// Drop images that nobody has asked for in so long, instead of moving them.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub unused: Option<Duration>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// Which store.
    pub at: StoreAddress,
}

/// Less than one long chunk could not be served at all.
fn memory(text: &str) -> Result<u64, String> {
    let bytes = lazyimg_store::tenants::parse_bytes(text).map_err(|e| e.to_string())?;
    match bytes >= 4 << 20 {
        true => Ok(bytes),
        false => Err("at least 4MiB are needed".into()),
    }
}

/// A number and a unit: `s`, `m`, `h`, `d`.
fn duration(text: &str) -> Result<Duration, String> {
    let units = [("s", 1), ("m", 60), ("h", 3600), ("d", 86_400)];
    let parsed = units.iter().find_map(|(unit, seconds)| {
        let number: u32 = text.strip_suffix(unit)?.parse().ok()?;
        Some(Duration::from_secs(u64::from(number) * seconds))
    });
    parsed.ok_or_else(|| "write a number with s, m, h or d, such as 30s or 7d".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        for (text, seconds) in [
            ("30s", 30),
            ("0s", 0),
            ("5m", 300),
            ("12h", 43_200),
            ("7d", 604_800),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "7", "d", "-1d", "1.5h", "7 d", "1w", "99999999999d"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
