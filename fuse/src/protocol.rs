//! What client and daemon say to each other: JSON, one message a line. `docs/control.md` has it in
//! prose.

mod path;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use lazyimg_chunkstore::{CacheStats, Scrubbed, StatsSnapshot};
use lazyimg_convergent::Digest;
use lazyimg_convergent::provider::Provider;
use lazyimg_image::credentials::{CredentialPlaces, HELPER_VARIABLES};
use serde::{Deserialize, Serialize};

use crate::mount::MountFlags;
use crate::mountpoint::Unmount;
use crate::tree::{MAX_READ_TIMEOUT, TreeOptions};

pub use path::WirePath;

/// Version of the protocol. It changes when an old peer would misunderstand; new fields do not.
pub const VERSION: u32 = 1;

/// The longest request, in bytes: paths and a reference at their limits, and a long `PATH`, escaped.
pub const MAX_REQUEST_BYTES: usize = 256 << 10;

/// The longest reply, in bytes: the status of some thousand mounts.
pub const MAX_REPLY_BYTES: usize = 16 << 20;

/// While a request takes its time, the daemon sends [`Reply::Working`] at least this often.
pub const HEARTBEAT: Duration = Duration::from_secs(2);

/// A peer that has been silent for so long is taken for dead.
pub const SILENCE: Duration = Duration::from_secs(20);

/// A message in its envelope.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Envelope<T> {
    /// [`VERSION`] of the sender.
    pub v: u32,
    /// The message; its fields stand beside `v`.
    #[serde(flatten)]
    pub message: T,
}

impl<T> Envelope<T> {
    /// Puts a message into an envelope of this version.
    pub fn new(message: T) -> Self {
        Self {
            v: VERSION,
            message,
        }
    }
}

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Is there a daemon? Answer: [`Reply::Pong`].
    Ping,
    /// Mount an image. Answer: [`Reply::Mounted`].
    Mount(Box<MountRequest>),
    /// Take a mount off. Answer: [`Reply::Unmounted`].
    Umount {
        /// Where it is mounted.
        dir: WirePath,
        /// How.
        how: Unmount,
        /// The mount namespace in which `dir` is meant.
        namespace: String,
    },
    /// What is mounted, and how is it doing? Answer: [`Reply::Status`].
    Status,
    /// Check every chunk of a mount. Answer: [`Reply::Verified`], with [`Reply::Working`] before it.
    Verify {
        /// Where it is mounted.
        dir: WirePath,
        /// Check the copies in the tiers, not those in the host cache.
        tiers: bool,
    },
    /// Give up the least useful chunks of the host cache. Answer: [`Reply::Cache`].
    CacheTrim {
        /// Bytes of disk that it may use afterwards.
        bytes: u64,
    },
    /// Check every chunk in the host cache. Answer: [`Reply::Scrubbed`], with [`Reply::Working`]
    /// before it.
    CacheVerify,
    /// Unmount everything and end. Answer: [`Reply::Stopping`].
    Stop,
}

/// What a daemon answers: any number of `Working`, then one of the others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// Still at it.
    Working {
        /// Steps done, where they can be counted.
        done: u64,
        /// Steps in all; 0: unknown.
        total: u64,
    },
    /// To [`Request::Ping`].
    Pong {
        /// The daemon's process.
        pid: u32,
        /// Its version.
        version: String,
    },
    /// To [`Request::Mount`]: it can be used.
    Mounted {
        /// Digest of the image.
        digest: Digest,
        /// Where it is mounted, resolved.
        dir: WirePath,
        /// What else was done, for the user to know.
        note: Option<String>,
    },
    /// To [`Request::Umount`]: it is gone from its directory.
    Unmounted {
        /// Whether something still holds files of it open.
        in_use: bool,
    },
    /// To [`Request::Status`].
    Status(Box<StatusReport>),
    /// To [`Request::Verify`].
    Verified(VerifyReport),
    /// To [`Request::CacheTrim`]: what the cache is like now.
    Cache(CacheStats),
    /// To [`Request::CacheVerify`].
    Scrubbed(Scrubbed),
    /// To [`Request::Stop`].
    Stopping,
    /// It did not work.
    Error {
        /// For programs.
        code: ErrorCode,
        /// For people: what failed, why, and what to do.
        message: String,
    },
}

/// Why a request failed, as far as a program may care.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// Daemon and client are of different versions.
    Version,
    /// The request can't be understood.
    BadRequest,
    /// The peer is another user.
    Forbidden,
    /// The daemon lives in another mount namespace.
    Namespace,
    /// This daemon ends, or never began since there is another: connect again.
    Again,
    /// Nothing of this daemon is mounted there.
    NotMounted,
    /// The mount is in use.
    Busy,
    /// The image is not there, or nobody converted it.
    NotFound,
    /// The tenant key or the registry's credentials are not the right ones.
    Key,
    /// The registry can't be reached or is in trouble.
    Unreachable,
    /// Reads in flight are slow: mounts that run go first. Try again later.
    Overloaded,
    /// The image's manifest or metadata is not what it should be.
    Damaged,
    /// The image can't be opened for another reason.
    Image,
    /// The host cache can't be used.
    Cache,
    /// The directory can't be mounted on.
    Mount,
    /// The daemon failed at something that is nobody's fault.
    Internal,
}

/// What to mount, where and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MountRequest {
    /// The image, as [`lazyimg_image::reference::ImageRef`] reads it; a layout's directory is
    /// absolute.
    pub image: String,
    /// The directory to mount at, absolute.
    pub dir: WirePath,
    /// The client's mount namespace ([`crate::mountpoint::namespace`]).
    pub namespace: String,
    /// Where the tenant key comes from. The key itself never travels.
    pub key: KeySource,
    /// How the image is fetched.
    #[serde(default)]
    pub source: SourceSettings,
    /// What the host cache is expected to be.
    #[serde(default)]
    pub cache: CacheSettings,
    /// How the tree is mounted.
    #[serde(default)]
    pub flags: MountFlags,
    /// How the tree is served.
    #[serde(default)]
    pub tree: TreeSettings,
}

/// Where a tenant key comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeySource {
    /// A key file, absolute.
    File(WirePath),
    /// A shell command that prints the key.
    Command(String),
}

impl KeySource {
    /// As the key provider takes it.
    pub fn provider(&self) -> Provider {
        match self {
            Self::File(path) => Provider::File(path.0.clone()),
            Self::Command(command) => Provider::Command(command.clone()),
        }
    }
}

/// How an image is fetched.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct SourceSettings {
    /// `os/architecture[/variant]`; the host's when absent.
    pub platform: Option<String>,
    /// Plain HTTP to hosts that are not loopback.
    pub plain_http: bool,
    /// Docker's `config.json` or its directory, absolute; the daemon's defaults when absent.
    pub docker_config: Option<WirePath>,
    /// Where the client found that credentials are; `docker_config` is not looked at then.
    pub credentials: Option<CredentialSettings>,
    /// The regional store to read through; none when absent.
    pub store: Option<StoreSettings>,
}

/// A regional store, and how a mount uses it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct StoreSettings {
    /// Its instances, `http(s)://host:port` each, or one `dns+http(s)://name:port`.
    pub urls: Vec<String>,
    /// File with the tenant's token, absolute.
    pub token_file: Option<WirePath>,
    /// File with certificates to trust besides the system's, absolute.
    pub ca_file: Option<WirePath>,
    /// Never ask the registry.
    pub only: bool,
    /// Don't bring what came from the registry into the store.
    pub no_write_back: bool,
}

/// Where whoever mounts has credentials: the places, never a secret.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct CredentialSettings {
    /// Credential files, absolute, in the order in which they are asked. They need not exist.
    pub files: Vec<WirePath>,
    /// [`HELPER_VARIABLES`] for credential helpers; others are ignored.
    pub helper_env: BTreeMap<String, WirePath>,
}

impl From<CredentialPlaces> for CredentialSettings {
    fn from(places: CredentialPlaces) -> Self {
        let env = places.helper_env.unwrap_or_default().into_iter();
        Self {
            files: places.files.into_iter().map(WirePath).collect(),
            helper_env: env.map(|(n, v)| (n, WirePath(v.into()))).collect(),
        }
    }
}

impl From<CredentialSettings> for CredentialPlaces {
    fn from(settings: CredentialSettings) -> Self {
        let env = settings.helper_env.into_iter();
        let known = env.filter(|(name, _)| HELPER_VARIABLES.contains(&name.as_str()));
        Self {
            files: settings.files.into_iter().map(|file| file.0).collect(),
            helper_env: Some(known.map(|(n, v)| (n, v.0.into_os_string())).collect()),
        }
    }
}

/// What a client asks of the host cache. It is the daemon's, made by the first mount: a later one is
/// told when it differs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CacheSettings {
    /// Bytes on disk, at most; absent: whatever it is.
    pub cache_bytes: Option<u64>,
    /// Bytes of decoded chunks in memory, at most; absent: whatever it is.
    pub hot_bytes: Option<u64>,
}

/// [`TreeOptions`] on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TreeSettings {
    /// Milliseconds after which a read that can't be answered fails.
    pub read_timeout_ms: u64,
    /// Bytes fetched ahead of a reader in order, at most.
    pub readahead_bytes: u64,
    /// Bytes that the kernel reads ahead.
    pub kernel_readahead_bytes: u32,
    /// Whether the kernel is to read the rest of a chunk after a random read.
    pub fill: bool,
}

impl Default for TreeSettings {
    fn default() -> Self {
        Self::from(&TreeOptions::default())
    }
}

impl From<&TreeOptions> for TreeSettings {
    fn from(options: &TreeOptions) -> Self {
        Self {
            read_timeout_ms: u64::try_from(options.read_timeout.as_millis()).unwrap_or(u64::MAX),
            readahead_bytes: options.readahead_bytes,
            kernel_readahead_bytes: options.kernel_readahead_bytes,
            fill: options.fill,
        }
    }
}

impl From<&TreeSettings> for TreeOptions {
    fn from(settings: &TreeSettings) -> Self {
        Self {
            read_timeout: Duration::from_millis(settings.read_timeout_ms.max(1))
                .min(MAX_READ_TIMEOUT),
            readahead_bytes: settings.readahead_bytes,
            kernel_readahead_bytes: settings.kernel_readahead_bytes,
            fill: settings.fill,
        }
    }
}

/// A daemon and its mounts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// The daemon's process.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Its cache directory.
    pub cache_dir: WirePath,
    /// Milliseconds since it began.
    pub uptime_ms: u64,
    /// The host cache; absent until the first mount needs it.
    pub cache: Option<CacheStats>,
    /// The mounts, oldest first.
    pub mounts: Vec<MountStatus>,
    /// What the mounts have in common.
    #[serde(default)]
    pub resident: Resident,
}

/// Chunks of all mounts in the host cache, which keeps one copy of each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resident {
    /// Chunks, counted once for every image that has them.
    pub named_chunks: u64,
    /// Their ciphertext in bytes.
    pub named_bytes: u64,
    /// Chunks, counted once.
    pub chunks: u64,
    /// Their ciphertext in bytes.
    pub bytes: u64,
}

/// A mount.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MountStatus {
    /// The image, as it was asked for.
    pub image: String,
    /// Digest of its manifest.
    pub digest: Digest,
    /// Where it is mounted.
    pub dir: WirePath,
    /// What serves it: `tree`.
    pub frontend: String,
    /// Taken off its directory, and only kept by open files.
    pub detached: bool,
    /// Milliseconds since it was mounted.
    pub uptime_ms: u64,
    /// Bytes in regular files, hard links counted once, holes included.
    pub file_bytes: u64,
    /// Bytes of the data space and the metadata together: the image, decompressed.
    pub image_bytes: u64,
    /// Bytes of ciphertext that the image consists of.
    pub stored_bytes: u64,
    /// Of these, bytes in the host cache now.
    pub resident_bytes: u64,
    /// Chunks that the image consists of.
    pub chunks: u64,
    /// Of these, chunks in the host cache now.
    pub resident_chunks: u64,
    /// Whether all metadata has arrived.
    pub metadata_complete: bool,
    /// Requests of programs that were answered with an error.
    pub errors: u64,
    /// Bytes that the kernel was advised to read before anybody asked.
    pub filled_bytes: u64,
    /// Reads, hits, and what each tier gave.
    pub stats: StatsSnapshot,
}

/// What a verification found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Chunks whose id and plaintext are right.
    pub good: u64,
    /// Of these, chunks whose copy in the host cache was bad and was replaced.
    pub healed: u64,
    /// Of these, chunks checked in the host cache; the others were checked in a tier.
    pub cached: u64,
    /// Chunks that are damaged or gone: without a good copy.
    pub bad: u64,
    /// Why, for the first [`MAX_FAILURES`] of them.
    pub failures: Vec<String>,
    /// Chunks that could not be checked: not here, and where they are could not be reached.
    #[serde(default)]
    pub unreachable: u64,
    /// Why, each cause once, the first [`MAX_FAILURES`] of them.
    #[serde(default)]
    pub unreachable_causes: Vec<String>,
}

/// Failures that a [`VerifyReport`] lists: enough to see a pattern.
pub const MAX_FAILURES: usize = 20;
