//! What can be said on the command line. Every long flag is also an environment variable and a key
//! of the configuration file: see [`crate::config`].

mod region;
mod store;
mod upkeep;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use lazyimg_convergent::salt::MAX_DOMAIN_LEN;
use lazyimg_image::platform::Platform;
use lazyimg_image::reference::ImageRef;

pub use region::Region;
pub use store::{
    LogForm, StoreAcknowledge, StoreAct, StoreAddress, StoreCommand, StoreGc, StoreQuery,
    StoreServe, StoreToken, StoreUpkeep,
};
pub use upkeep::{CacheCommand, CacheStat, CacheTrim, CacheUpkeep, CacheVerify};

/// Starts any container image in the time its first bytes need.
///
/// Convert an image once, mount it anywhere: the tree is there at once, the bytes come when they are
/// read, are verified, and stay in the host's cache.
#[derive(Debug, Parser)]
#[command(
    name = "lazyimg",
    version,
    propagate_version = true,
    after_help = "\
Example:
  lazyimg convert registry.example:5000/app:v1
  lazyimg mount registry.example:5000/app:v1 /mnt/app
  chroot /mnt/app python3 --version
  lazyimg status
  lazyimg umount /mnt/app

Every --flag-name can also be given as the environment variable LAZYIMG_FLAG_NAME, or as
`flag-name = value` in the configuration file (--config, by default
$XDG_CONFIG_HOME/lazyimg/config.toml). The command line wins, then the environment; so it does
for flags that exclude each other, such as --key-file and --key-command.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 image not found or not converted,
4 wrong key or credentials, 5 registry or store can't be reached, 6 damaged data found."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Settings that every command knows.
    #[command(flatten)]
    pub global: Global,
}

/// Settings that every command knows.
#[derive(Debug, Args)]
pub struct Global {
    /// Configuration file (TOML).
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Say nothing on standard error but errors.
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Say more on standard error; twice for everything.
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// What to do.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant, reason = "one is made in a process")]
pub enum Command {
    /// Convert an image and push the result beside it.
    Convert(Convert),
    /// Mount a converted image; returns when the tree can be used.
    Mount(Mount),
    /// Unmount what `mount` mounted.
    Umount(Umount),
    /// Show the mounts of this cache: what was fetched, what hit the cache, what failed.
    Status(Status),
    /// Look at the host cache, make it smaller, check it.
    Cache(CacheUpkeep),
    /// Show what an image is made of, and what it shares with another.
    Inspect(Inspect),
    /// Check every chunk of an image or a mount: its id and its plaintext.
    Verify(Verify),
    /// Write an image as files: EROFS metadata and the assembled data blob.
    Export(Export),
    /// Seal an image's keys under another tenant key; no chunk is touched.
    RotateKey(RotateKey),
    /// Run a regional store, or look after one.
    Store(StoreUpkeep),
    /// Show what this host can do and which path will be used.
    Doctor(Doctor),
    /// The process behind the mounts of one cache; started by `mount`.
    #[command(hide = true)]
    Daemon(Daemon),
}

/// Where an image comes from.
#[derive(Debug, Clone, Args)]
pub struct Source {
    /// Platform of a multi-platform image, as os/arch or os/arch/variant [default: this host's].
    #[arg(long, value_name = "OS/ARCH")]
    pub platform: Option<Platform>,
    /// Speak HTTP without TLS to the registry. Loopback addresses need no flag.
    #[arg(long)]
    pub plain_http: bool,
    /// docker's config.json with credentials and credential helpers [default: docker's own places].
    #[arg(long, value_name = "FILE")]
    pub docker_config: Option<PathBuf>,
}

/// The tenant's key.
#[derive(Debug, Clone, Args)]
pub struct Key {
    /// File with the tenant key; made at first use by `convert` [default:
    /// $XDG_CONFIG_HOME/lazyimg/tenant.key].
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Shell command that prints the tenant key (64 hex digits), for a KMS.
    #[arg(long, value_name = "COMMAND")]
    pub key_command: Option<String>,
}

/// The salt that chunk keys are derived under.
#[derive(Debug, Clone, Args)]
pub struct Salt {
    /// Dedup domain: images of one domain and epoch share chunks.
    #[arg(long, value_name = "NAME", default_value = "default", value_parser = domain)]
    pub domain: String,
    /// Epoch of the salt. A new epoch shares no chunk with the one before.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub epoch: u32,
    /// File with the domain's secret; made at first use by `convert` [default:
    /// $XDG_CONFIG_HOME/lazyimg/domain-NAME.secret].
    #[arg(long, value_name = "FILE")]
    pub salt_file: Option<PathBuf>,
    /// Shell command that prints the domain's secret (64 hex digits).
    #[arg(long, value_name = "COMMAND")]
    pub salt_command: Option<String>,
}

/// `lazyimg convert`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lazyimg convert 127.0.0.1:5000/app:v1
  lazyimg convert oci:/srv/images/app:v1
  lazyimg convert registry.example/app:v1 --platform linux/arm64 --key-command 'kms-get lazyimg'
  lazyimg convert registry.example/app:v1 --store https://store.region:7070 --store-token-file tenant.token

The artifact is listed as a referrer of the image and tagged TAG-lazyimg. Converting an image again
uploads nothing; images with common layers share what those layers contribute.")]
pub struct Convert {
    /// The image: registry/repository:tag, …@sha256:…, or oci:DIR:TAG.
    #[arg(value_name = "REF")]
    pub image: ImageRef,
    #[command(flatten)]
    /// Where it comes from.
    pub source: Source,
    #[command(flatten)]
    /// Under which key.
    pub key: Key,
    #[command(flatten)]
    /// Under which salt.
    pub salt: Salt,
    #[command(flatten)]
    /// Where its chunks go besides the registry.
    pub region: Region,
    /// Don't tag the artifact TAG-lazyimg. Mounting takes two round trips more.
    #[arg(long)]
    pub no_tag: bool,
    /// zstd level of chunks, 1 (fast) to 19 (small).
    #[arg(long, value_name = "N", default_value_t = lazyimg_convergent::payload::DEFAULT_LEVEL,
          value_parser = clap::value_parser!(i32).range(1..=19))]
    pub level: i32,
    /// Encoder threads [default: one per core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: Option<u16>,
    /// Directory for working files, which take about the image's size [default: $TMPDIR or /var/tmp].
    #[arg(long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,
    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// What layers may ask for.
    pub limits: LimitFlags,
}

/// Limits on what layers may ask for; each refusal names the flag that raises it.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Limits")]
pub struct LimitFlags {
    /// Bytes of one layer, uncompressed.
    #[arg(long, value_name = "BYTES")]
    pub max_layer_bytes: Option<u64>,
    /// Bytes of all layers, uncompressed.
    #[arg(long, value_name = "BYTES")]
    pub max_image_bytes: Option<u64>,
    /// Bytes of one file, holes included.
    #[arg(long, value_name = "BYTES")]
    pub max_file_bytes: Option<u64>,
    /// Entries in all layers.
    #[arg(long, value_name = "N")]
    pub max_entries: Option<u64>,
    /// Layers.
    #[arg(long, value_name = "N")]
    pub max_layers: Option<u32>,
    /// Bytes of extended attributes of one entry.
    #[arg(long, value_name = "BYTES")]
    pub max_xattr_bytes: Option<usize>,
    /// Extended attributes of one entry.
    #[arg(long, value_name = "N")]
    pub max_xattr_count: Option<usize>,
    /// Bytes of one extended (PAX) header.
    #[arg(long, value_name = "BYTES")]
    pub max_pax_bytes: Option<usize>,
    /// Stretches of data in one sparse file.
    #[arg(long, value_name = "N")]
    pub max_sparse_extents: Option<usize>,
    /// Directories in one path.
    #[arg(long, value_name = "N")]
    pub max_path_depth: Option<usize>,
    /// Bytes of names, link targets and attributes in the whole tree.
    #[arg(long, value_name = "BYTES")]
    pub max_metadata_bytes: Option<u64>,
    /// Names looked up on the way to one entry, those inside symbolic links included.
    #[arg(long, value_name = "N")]
    pub max_resolve_steps: Option<usize>,
    /// How many times its compressed length a layer may inflate to.
    #[arg(long, value_name = "N")]
    pub max_compression_ratio: Option<u64>,
    /// Bytes of a layer, uncompressed, to which that ratio does not apply.
    #[arg(long, value_name = "BYTES")]
    pub max_compression_slack_bytes: Option<u64>,
    /// Base-2 logarithm of the largest zstd window, in bytes.
    #[arg(long, value_name = "N")]
    pub max_zstd_window_log: Option<u32>,
}

/// Where the host cache is.
#[derive(Debug, Clone, Args)]
pub struct CacheDir {
    /// Directory of the host cache [default: the first of $CACHE_DIRECTORY, which systemd sets for
    /// services with CacheDirectory=, else $XDG_CACHE_HOME/lazyimg].
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
}

/// The host cache, for commands that may start its daemon.
#[derive(Debug, Clone, Args)]
pub struct Cache {
    #[command(flatten)]
    /// Where it is.
    pub place: CacheDir,
    /// The most bytes that the host cache takes on disk [default: 21474836480].
    #[arg(long, value_name = "BYTES")]
    pub cache_bytes: Option<u64>,
    /// The most bytes of decoded chunks that are kept in memory [default: 16777216].
    #[arg(long, value_name = "BYTES")]
    pub hot_bytes: Option<u64>,
}

impl Cache {
    /// The bound on disk of a daemon that begins now.
    pub fn cache_bytes(&self) -> u64 {
        self.cache_bytes.unwrap_or(20 << 30)
    }

    /// The bound in memory of a daemon that begins now.
    pub fn hot_bytes(&self) -> u64 {
        self.hot_bytes.unwrap_or(16 << 20)
    }
}

/// `lazyimg mount`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lazyimg mount 127.0.0.1:5000/app:v1 /mnt/app
  lazyimg mount oci:/srv/images/app:v1 ./app --foreground
  lazyimg mount registry.example/app@sha256:… /mnt/app --read-timeout 10
  lazyimg mount registry.example/app:v1 /mnt/app --store https://store.region:7070 --store-only

Mounts are read-only, nosuid and nodev. Without root they go through fusermount3.")]
pub struct Mount {
    /// The image: registry/repository:tag, …@sha256:…, or oci:DIR:TAG.
    #[arg(value_name = "REF")]
    pub image: ImageRef,
    /// Where to mount it: an existing directory.
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    #[command(flatten)]
    /// Where it comes from.
    pub source: Source,
    #[command(flatten)]
    /// Under which key.
    pub key: Key,
    #[command(flatten)]
    /// The host cache.
    pub cache: Cache,
    #[command(flatten)]
    /// Where its chunks come from before the registry.
    pub region: Region,
    /// Don't bring chunks that came from the registry into the store.
    #[arg(long)]
    pub no_write_back: bool,
    /// Stay in the foreground until it is unmounted or a signal comes.
    #[arg(long)]
    pub foreground: bool,
    /// Seconds after which a read that can't be served ends in an I/O error.
    #[arg(long, value_name = "SECONDS", value_parser = read_timeout,
          default_value_t = lazyimg_fuse::tree::READ_TIMEOUT.as_secs_f64())]
    pub read_timeout: f64,
    /// Let set-user-id bits and file capabilities take effect (root only).
    #[arg(long)]
    pub suid: bool,
    /// Let device files work (root only).
    #[arg(long)]
    pub dev: bool,
    /// Don't have the kernel read the rest of a chunk after a random read: less page cache, but random
    /// reads of large files are several times slower.
    #[arg(long)]
    pub no_fill: bool,
    /// Let other users in; the modes in the image decide [default: when root].
    #[arg(long)]
    pub allow_other: bool,
}

/// `lazyimg umount`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lazyimg umount /mnt/app
  lazyimg umount /mnt/app --lazy     at once; open files stay readable until they are closed
  lazyimg umount --all               what this cache serves, as far as nothing uses it")]
pub struct Umount {
    /// The mount point.
    #[arg(value_name = "DIR", required_unless_present = "all")]
    pub dir: Option<PathBuf>,
    /// Unmount everything that this cache serves.
    #[arg(long, conflicts_with = "dir")]
    pub all: bool,
    /// Detach even if files are open.
    #[arg(long, short)]
    pub lazy: bool,
    /// Detach, and fail what is under way (root only).
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    /// The host cache.
    pub cache: CacheDir,
}

/// `lazyimg status`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lazyimg status
  lazyimg status --json | jq '.mounts[] | {mountpoint, fetched_bytes, stored_bytes}'")]
pub struct Status {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// The host cache.
    pub cache: CacheDir,
}

/// `lazyimg inspect`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lazyimg inspect 127.0.0.1:5000/app:v1
  lazyimg inspect 127.0.0.1:5000/app:v2 --with 127.0.0.1:5000/app:v1 --json")]
pub struct Inspect {
    /// The image.
    #[arg(value_name = "REF")]
    pub image: ImageRef,
    /// Another image: show what the two share.
    #[arg(long, value_name = "REF")]
    pub with: Option<ImageRef>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// Where it comes from.
    pub source: Source,
}

/// `lazyimg verify`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lazyimg verify 127.0.0.1:5000/app:v1     reads every chunk from the registry
  lazyimg verify /mnt/app                  reads what the mount's host cache holds, then heals it")]
pub struct Verify {
    /// An image, or the directory it is mounted at.
    #[arg(value_name = "REF|DIR")]
    pub target: String,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// Where it comes from.
    pub source: Source,
    #[command(flatten)]
    /// Under which key.
    pub key: Key,
    #[command(flatten)]
    /// The host cache.
    pub cache: CacheDir,
}

/// `lazyimg export`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  lazyimg export 127.0.0.1:5000/app:v1 /tmp/app
  fsck.erofs --device=/tmp/app/data.blob /tmp/app/meta.erofs
The kernel mounts the pair: mount(2) type erofs, source meta.erofs, option device=data.blob.")]
pub struct Export {
    /// The image.
    #[arg(value_name = "REF")]
    pub image: ImageRef,
    /// Directory for meta.erofs and data.blob; made if missing.
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Leave the data blob out.
    #[arg(long)]
    pub metadata_only: bool,
    #[command(flatten)]
    /// Where it comes from.
    pub source: Source,
    #[command(flatten)]
    /// Under which key.
    pub key: Key,
}

/// `lazyimg rotate-key`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lazyimg rotate-key 127.0.0.1:5000/app:v1 --new-key-file tenant-2027.key
  lazyimg rotate-key 127.0.0.1:5000/app:v1 --new-key-command 'kms-get lazyimg-2027' --delete-old

Both keys open the image until the artifacts under the old one are deleted: --delete-old does that
once the new one has proved to open, where the registry deletes at all.")]
pub struct RotateKey {
    /// The image.
    #[arg(value_name = "REF")]
    pub image: ImageRef,
    /// File with the new tenant key; made if missing. This or --new-key-command is needed.
    #[arg(long, value_name = "FILE")]
    pub new_key_file: Option<PathBuf>,
    /// Shell command that prints the new tenant key.
    #[arg(long, value_name = "COMMAND")]
    pub new_key_command: Option<String>,
    /// Delete the artifacts under the old key once the new one is in place and tested.
    #[arg(long)]
    pub delete_old: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// Where it comes from.
    pub source: Source,
    #[command(flatten)]
    /// The key that it is sealed under now.
    pub key: Key,
}

/// `lazyimg doctor`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lazyimg doctor
  lazyimg doctor --json | jq -e .ready")]
pub struct Doctor {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// docker's config.json with credentials and credential helpers [default: docker's own places].
    #[arg(long, value_name = "FILE")]
    pub docker_config: Option<PathBuf>,
    #[command(flatten)]
    /// Under which key.
    pub key: Key,
    #[command(flatten)]
    /// The host cache.
    pub cache: Cache,
}

/// `lazyimg daemon`.
#[derive(Debug, Args)]
pub struct Daemon {
    #[command(flatten)]
    /// The host cache.
    pub cache: Cache,
}

fn read_timeout(text: &str) -> Result<f64, String> {
    let most = lazyimg_fuse::tree::MAX_READ_TIMEOUT.as_secs_f64();
    let seconds: f64 = text.parse().map_err(|_| "not a number")?;
    if seconds > 0.0 && seconds <= most {
        Ok(seconds)
    } else {
        Err(format!("give seconds above 0 and up to {most}"))
    }
}

/// The name of a dedup domain; it becomes part of a file's name.
fn domain(name: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > MAX_DOMAIN_LEN || !name.chars().all(plain) {
        return Err(format!(
            "use 1 to {MAX_DOMAIN_LEN} of the characters a-z, A-Z, 0-9, `.`, `_` and `-`"
        ));
    }
    Ok(name.to_owned())
}
