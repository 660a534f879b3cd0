//! What client and daemon say to each other: JSON, one message a line. `docs/control.md` has it in
//! prose.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lazyimg_chunkstore::{CacheStats, StatsSnapshot};
use lazyimg_convergent::Digest;
use lazyimg_convergent::provider::Provider;
use lazyimg_image::credentials::{CredentialPlaces, HELPER_VARIABLES};
use serde::{Deserialize, Serialize};

use crate::mount::MountFlags;
use crate::mountpoint::Unmount;
use crate::tree::{MAX_READ_TIMEOUT, TreeOptions};

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
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
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
}

/// Where whoever mounts has credentials: the places, never a secret.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
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

/// A path in JSON: a string, or `{"hex": "…"}` when it is not UTF-8.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WirePath(pub PathBuf);

impl From<&Path> for WirePath {
    fn from(path: &Path) -> Self {
        Self(path.to_owned())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum PathForm {
    Text(String),
    Hex { hex: String },
}

impl Serialize for WirePath {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let form = match self.0.to_str() {
            Some(text) => PathForm::Text(text.to_owned()),
            None => {
                let bytes = self.0.as_os_str().as_bytes();
                PathForm::Hex {
                    hex: bytes.iter().map(|b| format!("{b:02x}")).collect(),
                }
            }
        };
        form.serialize(s)
    }
}

impl<'de> Deserialize<'de> for WirePath {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let bytes = match PathForm::deserialize(d)? {
            PathForm::Text(text) => text.into_bytes(),
            PathForm::Hex { hex } => {
                let pair =
                    |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
                // `from_str_radix` would take a sign.
                if hex.len() % 2 != 0 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(D::Error::custom(
                        "a path in hex is made of pairs of hex digits",
                    ));
                }
                hex.as_bytes()
                    .chunks(2)
                    .map(pair)
                    .collect::<Option<Vec<u8>>>()
                    .ok_or_else(|| D::Error::custom("a path in hex has a digit that is none"))?
            }
        };
        if bytes.contains(&0) {
            return Err(D::Error::custom("a path has a zero byte"));
        }
        Ok(Self(PathBuf::from(OsString::from_vec(bytes))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount_request() -> MountRequest {
        MountRequest {
            image: "127.0.0.1:5000/x:v1".into(),
            dir: WirePath(PathBuf::from(OsString::from_vec(b"/mnt/\xff".to_vec()))),
            namespace: "mnt:[1]".into(),
            key: KeySource::File(WirePath("/k".into())),
            source: SourceSettings {
                credentials: Some(CredentialSettings {
                    files: vec![WirePath("/run/user/0/containers/auth.json".into())],
                    helper_env: BTreeMap::from([("PATH".into(), WirePath("/a:/b".into()))]),
                }),
                ..SourceSettings::default()
            },
            cache: CacheSettings {
                cache_bytes: Some(1),
                hot_bytes: None,
            },
            flags: MountFlags::default(),
            tree: TreeSettings::default(),
        }
    }

    #[test]
    fn every_message_survives_its_line() {
        let requests = [
            Request::Ping,
            Request::Mount(Box::new(mount_request())),
            Request::Umount {
                dir: WirePath("/a".into()),
                how: Unmount::Lazy,
                namespace: "n".into(),
            },
            Request::Status,
            Request::Verify {
                dir: WirePath("/a".into()),
                tiers: true,
            },
            Request::Stop,
        ];
        for request in requests {
            let line = serde_json::to_string(&Envelope::new(request.clone())).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(
                serde_json::from_str::<Envelope<Request>>(&line)
                    .unwrap()
                    .message,
                request,
                "{line}"
            );
        }
        let replies = [
            Reply::Working { done: 1, total: 0 },
            Reply::Mounted {
                digest: Digest::of(b"x"),
                dir: WirePath("/a".into()),
                note: None,
            },
            Reply::Verified(VerifyReport::default()),
            Reply::Error {
                code: ErrorCode::NotMounted,
                message: "a\nb".into(),
            },
        ];
        for reply in replies {
            let line = serde_json::to_string(&Envelope::new(reply.clone())).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(
                serde_json::from_str::<Envelope<Reply>>(&line)
                    .unwrap()
                    .message,
                reply,
                "{line}"
            );
        }
    }

    #[test]
    fn a_request_may_leave_out_what_has_a_default_and_may_say_more() {
        let line = r#"{"v":1,"op":"mount","image":"x","dir":"/m","namespace":"n","key":{"command":"k"},"news":1}"#;
        let Request::Mount(request) = serde_json::from_str::<Envelope<Request>>(line)
            .unwrap()
            .message
        else {
            panic!("not a mount");
        };
        assert_eq!(request.tree, TreeSettings::default());
        assert_eq!(request.key, KeySource::Command("k".into()));
        assert_eq!(request.source.credentials, None);
        assert_eq!(request.cache, CacheSettings::default());
        let old =
            r#"{"v":1,"reply":"verified","good":1,"healed":0,"cached":1,"bad":0,"failures":[]}"#;
        let reply = serde_json::from_str::<Envelope<Reply>>(old)
            .unwrap()
            .message;
        assert!(matches!(reply, Reply::Verified(report) if report.unreachable == 0));
    }

    #[test]
    fn credentials_arrive_as_they_were_sent_but_for_variables_that_helpers_do_not_need() {
        let places = CredentialPlaces {
            files: vec!["/a".into(), "/b".into()],
            helper_env: Some(vec![
                ("HOME".into(), "/h".into()),
                ("PATH".into(), "/p".into()),
            ]),
        };
        let mut settings = CredentialSettings::from(places.clone());
        let preload = WirePath("/evil.so".into());
        settings.helper_env.insert("LD_PRELOAD".into(), preload);
        assert_eq!(CredentialPlaces::from(settings), places);
    }

    #[test]
    fn a_read_timeout_from_a_stranger_is_bounded() {
        let mut settings = TreeSettings::default();
        for (asked, given) in [(0, Duration::from_millis(1)), (u64::MAX, MAX_READ_TIMEOUT)] {
            settings.read_timeout_ms = asked;
            assert_eq!(TreeOptions::from(&settings).read_timeout, given);
        }
    }

    #[test]
    fn paths_that_are_no_paths_are_refused() {
        for path in [
            r#"{"hex":"abc"}"#,
            r#"{"hex":"zz"}"#,
            r#"{"hex":"+1"}"#,
            "\"a\\u0000b\"",
            r#"{"hex":"é"}"#,
        ] {
            assert!(serde_json::from_str::<WirePath>(path).is_err(), "{path}");
        }
    }
}
