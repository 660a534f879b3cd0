//! How to reach a source: platform, credentials, deadlines, retries.

use std::path::PathBuf;
use std::time::Duration;

use crate::credentials::CredentialPlaces;
use crate::platform::Platform;

/// How a repository is opened. `Default` is right for a public registry over TLS.
#[derive(Debug, Clone, Default)]
pub struct SourceOptions {
    /// Which image of an index; the host's when absent. When given, an image of another platform is
    /// refused even without an index.
    pub platform: Option<Platform>,
    /// Plain HTTP to any host. Loopback hosts are always reached in plain HTTP.
    pub plain_http: bool,
    /// Docker's configuration: `config.json` or the directory that holds it. When absent, the
    /// places that docker and podman use are asked (see [`crate::credentials`]).
    pub docker_config: Option<PathBuf>,
    /// Where credentials are looked up, when another process has found that out; `docker_config` is
    /// not looked at then.
    pub credentials: Option<CredentialPlaces>,
    /// Deadlines.
    pub timeouts: Timeouts,
    /// Retries.
    pub retry: RetryPolicy,
    /// How many small requests (manifests, ranges) may be in flight at once.
    pub parallelism: Parallelism,
}

/// Deadlines of one HTTP exchange. Nothing waits for ever.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// Name resolution, TCP and TLS together.
    pub connect: Duration,
    /// From the end of the request to the head of the answer.
    pub response: Duration,
    /// Between two pieces of a body.
    pub idle: Duration,
    /// A manifest, a range or another small exchange, retries and waits included.
    pub request: Duration,
    /// A credential helper: some talk to a cloud's metadata service.
    pub helper: Duration,
    /// Length of the window in which a long body must bring [`MIN_WINDOW_BYTES`].
    pub stall_window: Duration,
}

/// What a long body must bring in each [`Timeouts::stall_window`] of waiting, in bytes: a modem's
/// pace. Below it the peer keeps the connection open with drips.
pub const MIN_WINDOW_BYTES: u64 = 64 * 1024;

/// When and how often a failed exchange is tried again.
#[derive(Debug, Clone, Copy)]
pub struct RetryPolicy {
    /// Attempts in all, the first included; at least 1.
    pub attempts: u32,
    /// The first pause is random between half of this and this; each further one twice as long.
    pub base: Duration,
    /// The longest pause of our own choice.
    pub cap: Duration,
    /// The longest `Retry-After` that is waited for; a longer one is an error at once.
    pub longest_retry_after: Duration,
}

/// A number of requests in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parallelism(pub usize);

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            response: Duration::from_secs(30),
            idle: Duration::from_secs(30),
            request: Duration::from_secs(60),
            helper: Duration::from_secs(30),
            stall_window: Duration::from_secs(60),
        }
    }
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 5,
            base: Duration::from_millis(200),
            cap: Duration::from_secs(5),
            longest_retry_after: Duration::from_secs(30),
        }
    }
}

impl Default for Parallelism {
    /// 32: hides a 20 ms round trip behind ranges of some 100 KiB at 1 Gbit/s, and is what registries
    /// tolerate from one client.
    fn default() -> Self {
        Self(32)
    }
}
