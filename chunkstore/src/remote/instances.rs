//! The instances of the store, and which one is asked for what.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lazyimg_convergent::ChunkId;
use parking_lot::RwLock;
use reqwest::Url;
use sha2::{Digest as _, Sha256};

use super::error::StoreError;
use super::http::{Clients, MakeClient};
use super::settings::{Place, StoreSettings};
use crate::guard::{Guard, Guards};

/// How often a name is looked up again.
const LOOK_UP: Duration = Duration::from_secs(30);
/// How soon after a look-up that failed.
const LOOK_UP_AGAIN: Duration = Duration::from_secs(2);
/// How long a look-up may take.
const LONGEST_LOOK_UP: Duration = Duration::from_secs(5);
/// Addresses of a name that are used, at most.
const MAX_ADDRESSES: usize = 256;
/// How often the file of authorities is looked at.
const LOOK_AT_AUTHORITIES: Duration = Duration::from_secs(2);

/// One instance.
pub(super) struct Instance {
    /// Its address, for messages.
    pub name: String,
    pub url: Url,
    pub clients: Clients,
    pub guard: Arc<Guard>,
    seed: u64,
}

/// A list of instances at one time. Never empty once it was given out.
pub(super) type List = Arc<[Arc<Instance>]>;

pub(super) struct Instances {
    place: Place,
    make: Arc<MakeClient>,
    guards: Guards,
    state: RwLock<State>,
    /// Held by whoever changes the list.
    looking: tokio::sync::Mutex<()>,
}

struct State {
    list: List,
    /// When a name is to be looked up again; `None`: never was.
    next: Option<Instant>,
    /// Why the last look-up found nothing.
    failure: Option<String>,
    /// When the file of authorities is to be looked at again.
    next_authorities: Instant,
}

impl Instances {
    pub fn new(place: Place, settings: &StoreSettings, guards: Guards) -> Result<Self, StoreError> {
        let make = Arc::new(MakeClient::new(settings)?);
        let list: List = match &place {
            Place::Dns(_) => Arc::new([]),
            Place::List(urls) => of_urls(urls, &make, &guards)?,
        };
        Ok(Self {
            place,
            make,
            guards,
            state: RwLock::new(State {
                list,
                next: None,
                failure: None,
                next_authorities: Instant::now() + LOOK_AT_AUTHORITIES,
            }),
            looking: tokio::sync::Mutex::default(),
        })
    }

    /// The instances now. Looks a name up in the background when that is due; waits only when none
    /// is known.
    pub async fn list(self: &Arc<Self>) -> Result<List, StoreError> {
        let known = |state: &State| {
            let waits = state.next.is_some_and(|next| Instant::now() < next);
            match &state.failure {
                Some(failure) if waits && state.list.is_empty() => {
                    Err(StoreError::NoInstance(failure.clone()))
                }
                _ => Ok(Arc::clone(&state.list)),
            }
        };
        let (list, authorities_due, name_due) = {
            let (state, now) = (self.state.read(), Instant::now());
            (
                known(&state)?,
                self.make.ca_file().is_some() && now >= state.next_authorities,
                state.next.is_none_or(|next| now >= next),
            )
        };
        if authorities_due {
            let instances = Arc::clone(self);
            tokio::spawn(async move { instances.look_at_authorities().await });
        }
        let Place::Dns(url) = &self.place else {
            return Ok(list);
        };
        if list.is_empty() {
            let _looking = self.looking.lock().await;
            // Somebody else may have been faster.
            let list = known(&self.state.read())?;
            if !list.is_empty() {
                return Ok(list);
            }
            return self.look_up(url).await;
        }
        if name_due {
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
        let found = match self.addresses(url).await {
            Ok(addresses) => self.at_addresses(url, addresses).await,
            Err(error) => Err(error),
        };
        let mut state = self.state.write();
        let wait = if found.is_ok() {
            LOOK_UP
        } else {
            LOOK_UP_AGAIN
        };
        state.next = Some(Instant::now() + wait);
        match found {
            Ok(list) => {
                state.failure = None;
                state.list = Arc::clone(&list);
                Ok(list)
            }
            Err(error) => {
                state.failure = Some(match &error {
                    StoreError::NoInstance(text) => text.clone(),
                    other => other.to_string(),
                });
                Err(error)
            }
        }
    }

    async fn at_addresses(&self, url: &Url, at: Vec<SocketAddr>) -> Result<List, StoreError> {
        let (known, url) = (self.known(), url.clone());
        let (make, guards) = (Arc::clone(&self.make), self.guards.clone());
        aside(move || {
            at.into_iter()
                .map(|address| {
                    let name = format!("{}://{address}", url.scheme());
                    // An instance that stays keeps its connections.
                    match known.iter().find(|i| i.name == name) {
                        Some(known) => Ok(Arc::clone(known)),
                        None => {
                            let clients = make.clients(&url, Some(address))?;
                            Ok(Instance::new(name, &url, clients, &make, &guards))
                        }
                    }
                })
                .collect()
        })
        .await
    }

    /// New connections trust the authorities that the file has now.
    async fn look_at_authorities(&self) {
        // Whoever looks a name up has the list for now; the next request tries again.
        let Ok(_looking) = self.looking.try_lock() else {
            return;
        };
        self.state.write().next_authorities = Instant::now() + LOOK_AT_AUTHORITIES;
        let (place, known) = (self.place.clone(), self.known());
        let (make, guards) = (Arc::clone(&self.make), self.guards.clone());
        let list = aside(move || {
            if !make.reread() {
                return Ok(known);
            }
            match place {
                Place::List(urls) => of_urls(&urls, &make, &guards),
                Place::Dns(url) => known
                    .iter()
                    .map(|i| {
                        let clients = make.clients(&url, i.name_address())?;
                        Ok(Instance::new(i.name.clone(), &url, clients, &make, &guards))
                    })
                    .collect(),
            }
        });
        match list.await {
            Ok(list) => self.state.write().list = list,
            Err(error) => tracing::warn!(%error, "going on with the connections that were there"),
        }
    }

    async fn addresses(&self, url: &Url) -> Result<Vec<SocketAddr>, StoreError> {
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

impl Instance {
    fn new(
        name: String,
        url: &Url,
        clients: Clients,
        make: &MakeClient,
        guards: &Guards,
    ) -> Arc<Self> {
        // Who trusts other authorities may fail where others do not.
        let guard = match make.ca_file() {
            Some(path) if url.scheme() == "https" => {
                guards.of(&format!("{name} (trusting {})", path.display()))
            }
            _ => guards.of(&name),
        };
        Arc::new(Self {
            seed: seed(&name),
            guard,
            name,
            url: url.clone(),
            clients,
        })
    }

    /// The address in the name of an instance that DNS gave.
    fn name_address(&self) -> Option<SocketAddr> {
        self.name.split_once("://")?.1.parse().ok()
    }
}

/// The instances of a list. Those that speak TLS share their clients, and so do the others.
fn of_urls(urls: &[Url], make: &MakeClient, guards: &Guards) -> Result<List, StoreError> {
    let mut shared: HashMap<&str, Clients> = HashMap::new();
    let mut list = Vec::with_capacity(urls.len());
    for url in urls {
        let clients = match shared.get(url.scheme()) {
            Some(clients) => clients.clone(),
            None => {
                let made = make.clients(url, None)?;
                shared.insert(url.scheme(), made.clone());
                made
            }
        };
        let name = url.as_str().trim_end_matches('/').to_owned();
        list.push(Instance::new(name, url, clients, make, guards));
    }
    Ok(list.into())
}

/// What takes long enough to hold up a thread that serves others.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(StoreError::Setup(Box::new(e))))
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
        let none = found("dns+http://nothing.invalid:7");
        let looked = none.list().await;
        assert!(matches!(looked, Err(StoreError::NoInstance(_))));
        // Those who come next are told what the look-up has told.
        {
            let mut state = none.state.write();
            assert!(state.failure.is_some() && state.next.is_some());
            state.failure = Some("as it was".to_owned());
            state.next = Some(Instant::now() + Duration::from_secs(3600));
        }
        let _looking = none.looking.lock().await;
        let told = tokio::time::timeout(Duration::from_secs(30), none.list()).await;
        let told = told.expect("it was looked up").err().unwrap().to_string();
        assert!(told.ends_with("as it was"), "{told}");
    }
}
