//! The instances of the store, and which one is asked for what.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lazyimg_convergent::ChunkId;
use parking_lot::RwLock;
use reqwest::{Certificate, Client, Url};
use sha2::{Digest as _, Sha256};

use super::error::StoreError;
use super::settings::{Http2, Place, StoreSettings};
use crate::guard::{Guard, Guards};

/// How often a name is looked up again.
const LOOK_UP: Duration = Duration::from_secs(30);
/// How soon after a look-up that failed.
const LOOK_UP_AGAIN: Duration = Duration::from_secs(2);
/// How long a look-up may take.
const LONGEST_LOOK_UP: Duration = Duration::from_secs(5);
/// Addresses of a name that are used, at most.
const MAX_ADDRESSES: usize = 256;
/// How long an idle connection is kept.
const POOL_IDLE: Duration = Duration::from_secs(60);
/// HTTP/2: bytes under way in one answer, and on one connection.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// One instance.
pub(super) struct Instance {
    /// Its address, for messages; the name of its guard.
    pub name: String,
    pub url: Url,
    pub http: Client,
    /// For a hedge to the same instance: other connections.
    pub hedge_http: Client,
    pub guard: Arc<Guard>,
    seed: u64,
}

/// A list of instances at one time.
pub(super) type List = Arc<[Arc<Instance>]>;

pub(super) struct Instances {
    place: Place,
    make: MakeClient,
    guards: Guards,
    state: RwLock<State>,
    looking: tokio::sync::Mutex<()>,
}

struct State {
    list: List,
    /// When a name is to be looked up again; `None`: never was.
    next: Option<Instant>,
}

impl Instances {
    pub fn new(place: Place, settings: &StoreSettings, guards: Guards) -> Result<Self, StoreError> {
        let make = MakeClient::new(settings)?;
        let list: List = match &place {
            Place::Dns(_) => Arc::new([]),
            Place::List(urls) => {
                let any_tls = urls.iter().any(|url| url.scheme() == "https");
                let (http, hedge_http) = (make.client(any_tls, None)?, make.client(any_tls, None)?);
                urls.iter()
                    .map(|url| {
                        let name = url.as_str().trim_end_matches('/').to_owned();
                        Arc::new(Instance {
                            seed: seed(&name),
                            guard: guards.of(&name),
                            name,
                            url: url.clone(),
                            http: http.clone(),
                            hedge_http: hedge_http.clone(),
                        })
                    })
                    .collect()
            }
        };
        Ok(Self {
            place,
            make,
            guards,
            state: RwLock::new(State { list, next: None }),
            looking: tokio::sync::Mutex::default(),
        })
    }

    /// The instances now. Looks a name up in the background when that is due; waits only when none
    /// is known.
    pub async fn list(self: &Arc<Self>) -> Result<List, StoreError> {
        let Place::Dns(url) = &self.place else {
            return Ok(Arc::clone(&self.state.read().list));
        };
        let (list, due) = {
            let state = self.state.read();
            let due = state.next.is_none_or(|next| Instant::now() >= next);
            (Arc::clone(&state.list), due)
        };
        if list.is_empty() {
            let _looking = self.looking.lock().await;
            // Somebody else may have been faster.
            let list = Arc::clone(&self.state.read().list);
            if !list.is_empty() {
                return Ok(list);
            }
            return self.look_up(url).await;
        }
        if due {
            let instances = Arc::clone(self);
            let url = url.clone();
            tokio::spawn(async move {
                if let Ok(_looking) = instances.looking.try_lock()
                    && let Err(error) = instances.look_up(&url).await
                {
                    tracing::warn!(%error, "going on with the instances that were known");
                }
            });
        }
        Ok(list)
    }

    /// What is known now, without a look-up.
    pub fn known(&self) -> List {
        Arc::clone(&self.state.read().list)
    }

    async fn look_up(&self, url: &Url) -> Result<List, StoreError> {
        let found = self.addresses(url).await;
        let mut state = self.state.write();
        let wait = if found.is_ok() {
            LOOK_UP
        } else {
            LOOK_UP_AGAIN
        };
        state.next = Some(Instant::now() + wait);
        let mut list = Vec::new();
        for address in found? {
            let name = format!("{}://{address}", url.scheme());
            // An instance that stays keeps its connections.
            let known = state.list.iter().find(|i| i.name == name);
            list.push(match known {
                Some(known) => Arc::clone(known),
                None => {
                    let tls = url.scheme() == "https";
                    let at = url.host_str().map(|host| (host, address));
                    Arc::new(Instance {
                        seed: seed(&name),
                        guard: self.guards.of(&name),
                        url: url.clone(),
                        http: self.make.client(tls, at)?,
                        hedge_http: self.make.client(tls, at)?,
                        name,
                    })
                }
            });
        }
        state.list = list.into();
        Ok(Arc::clone(&state.list))
    }

    async fn addresses(&self, url: &Url) -> Result<Vec<std::net::SocketAddr>, StoreError> {
        let host = url.host_str().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let port = url.port_or_known_default().unwrap_or(443);
        let looking = tokio::net::lookup_host((host, port));
        let mut found: Vec<_> = tokio::time::timeout(LONGEST_LOOK_UP, looking)
            .await
            .map_err(|_| {
                StoreError::NoInstance(format!("`{host}` was not found in {LONGEST_LOOK_UP:?}"))
            })?
            .map_err(|e| StoreError::NoInstance(format!("`{host}` cannot be looked up: {e}")))?
            .collect();
        found.sort_unstable();
        found.dedup();
        found.truncate(MAX_ADDRESSES);
        if found.is_empty() {
            let text = format!("`{host}` has no address");
            return Err(StoreError::NoInstance(text));
        }
        Ok(found)
    }
}

/// Makes HTTP clients that are alike.
struct MakeClient {
    http2: Http2,
    connect_timeout: Duration,
    authorities: Vec<Certificate>,
    loopback: bool,
}

impl MakeClient {
    fn new(settings: &StoreSettings) -> Result<Self, StoreError> {
        let authorities = match &settings.ca_file {
            None => Vec::new(),
            Some(path) => std::fs::read(path)
                .map_err(|e| format!("cannot read {}: {e}", path.display()))
                .and_then(|pem| {
                    let found = Certificate::from_pem_bundle(&pem)
                        .map_err(|e| format!("{} is not PEM: {e}", path.display()))?;
                    (!found.is_empty())
                        .then_some(found)
                        .ok_or_else(|| format!("{} has no certificate", path.display()))
                })
                .map_err(|text| StoreError::Setup(text.into()))?,
        };
        let local = ["127.0.0.1", "[::1]", "localhost"];
        Ok(Self {
            http2: settings.http2,
            connect_timeout: settings.connect_timeout,
            authorities,
            loopback: settings
                .urls
                .iter()
                .all(|url| local.iter().any(|host| url.contains(&format!("//{host}")))),
        })
    }

    fn client(
        &self,
        tls: bool,
        at: Option<(&str, std::net::SocketAddr)>,
    ) -> Result<Client, StoreError> {
        let mut builder = Client::builder()
            .user_agent(concat!("lazyimg/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            // What may be tried again, and where, is decided here.
            .retry(reqwest::retry::never())
            .connect_timeout(self.connect_timeout)
            .pool_idle_timeout(POOL_IDLE)
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(30))
            .http2_initial_stream_window_size(STREAM_WINDOW)
            .http2_initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(Duration::from_secs(15))
            .http2_keep_alive_timeout(Duration::from_secs(5))
            .referer(false);
        builder = match self.http2 {
            Http2::Negotiated => builder,
            Http2::Always => builder.http2_prior_knowledge(),
            Http2::Never => builder.http1_only(),
        };
        if self.loopback {
            builder = builder.no_proxy();
        }
        if !tls {
            // The system's certificates take some 30 ms to load.
            builder = builder.tls_certs_only([]);
        } else if !self.authorities.is_empty() {
            builder = builder.tls_certs_merge(self.authorities.clone());
        }
        if let Some((host, address)) = at {
            builder = builder.resolve(host, address);
        }
        builder.build().map_err(|e| StoreError::Setup(Box::new(e)))
    }
}

/// An instance's part of its score. The same for every host that names it alike.
fn seed(name: &str) -> u64 {
    let hash: [u8; 32] = Sha256::digest(name.as_bytes()).into();
    first_eight(&hash)
}

fn first_eight(bytes: &[u8; 32]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *bytes;
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// Rendezvous hashing (Thaler, Ravishankar 1998): the highest score is asked first. Mixed as in
/// splitmix64.
fn score(seed: u64, id: &ChunkId) -> u64 {
    let mut x = seed ^ first_eight(&id.0).rotate_left(17);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Indices of instances in the order in which they are asked for `id`.
pub(super) fn ranked(list: &[Arc<Instance>], id: &ChunkId) -> Vec<usize> {
    rank(list.iter().map(|instance| instance.seed), id)
}

fn rank(seeds: impl Iterator<Item = u64>, id: &ChunkId) -> Vec<usize> {
    let mut scored: Vec<_> = seeds
        .enumerate()
        .map(|(index, seed)| (std::cmp::Reverse(score(seed, id)), index))
        .collect();
    scored.sort_unstable();
    scored.into_iter().map(|(_, index)| index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seeds(n: usize) -> Vec<u64> {
        (0..n)
            .map(|n| seed(&format!("http://store-{n}:80")))
            .collect()
    }

    fn id(n: u32) -> ChunkId {
        ChunkId::of(&n.to_be_bytes())
    }

    #[test]
    fn instances_get_equal_shares() {
        let seeds = seeds(5);
        let mut shares = [0; 5];
        for n in 0..10_000 {
            shares[rank(seeds.iter().copied(), &id(n))[0]] += 1;
        }
        assert!(
            shares.iter().all(|n| (1_800..2_200).contains(n)),
            "{shares:?}"
        );
    }

    proptest! {
        #[test]
        fn without_an_instance_its_chunks_go_to_the_next_and_all_others_stay(n in any::<u32>(), gone in 0usize..5) {
            let all = seeds(5);
            let ranked = rank(all.iter().copied(), &id(n));
            let mut fewer = all.clone();
            fewer.remove(gone);
            let left: Vec<u64> = rank(fewer.iter().copied(), &id(n)).into_iter().map(|i| fewer[i]).collect();
            let expected: Vec<u64> = ranked.into_iter().filter(|i| *i != gone).map(|i| all[i]).collect();
            prop_assert_eq!(left, expected);
        }
    }

    #[tokio::test]
    async fn a_name_gives_its_addresses_and_one_that_is_unknown_an_error() {
        let found = |url: &str| {
            let settings = StoreSettings::new(vec![url.to_owned()]);
            let place = super::super::settings::parse(&settings.urls).unwrap();
            Arc::new(Instances::new(place, &settings, Guards::default()).unwrap())
        };
        let instances = found("dns+http://localhost:7");
        let list = instances.list().await.unwrap();
        assert!(!list.is_empty());
        assert!(list.iter().all(|i| i.name.ends_with(":7")));
        let again = instances.list().await.unwrap();
        assert!(Arc::ptr_eq(&list[0], &again[0]));
        let none = found("dns+http://nothing.invalid:7").list().await;
        assert!(matches!(none, Err(StoreError::NoInstance(_))));
    }
}
