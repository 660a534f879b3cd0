//! The client: chunks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lazyimg_convergent::{ChunkId, MAX_STORED_LEN};
use reqwest::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode};
use tokio::sync::mpsc;

use super::error::StoreError;
use super::exchange::{self, Answer, Ask};
use super::fetch::{self, Effort};
use super::instances::{Instances, List, ranked};
use super::settings::{self, SettingsError, StoreSettings};
use super::token::TokenFile;
use crate::TierHealth;
use crate::guard::{Guards, retry};
use crate::wire::{IDS_TYPE, MAX_BATCH, REPAIR_HEADER, write_ids};

/// How often a request is sent that is not for chunks, where there is no patience for more; once to
/// each instance, if those are more, but not to more than these.
const ATTEMPTS: usize = 3;
const MOST_ATTEMPTS: usize = 8;
/// Length of the longest answer that is but a word, in bytes.
const MAX_WORD: usize = 64 << 10;

/// What the store says of a chunk asked for.
#[derive(Debug, Clone)]
pub enum Got {
    /// The ciphertext, **unverified**.
    Chunk(Bytes),
    /// It is not there, or not ours.
    Missing,
    /// It is not there, and we are to bring it.
    Yours,
    /// It is not there, and had not come when the wait was over: somebody else brings it.
    Coming,
    /// The store knows that its copy is damaged.
    Damaged,
    /// It could not be had now.
    Failed(Arc<StoreError>),
}

/// What became of a put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutOutcome {
    /// It is there now.
    Put,
    /// It was there before.
    Had,
}

/// Speaks with the store. Cheap to clone; all clones share connections and what is known of the
/// instances.
#[derive(Clone)]
pub struct StoreClient {
    pub(super) shared: Arc<Shared>,
}

pub(super) struct Shared {
    pub settings: StoreSettings,
    pub instances: Arc<Instances>,
    pub token: Option<TokenFile>,
    pub counters: Counters,
    /// Bytes of what is being put.
    pub uploading: AtomicU64,
    /// The addresses as they were given.
    pub origin: String,
}

#[derive(Default)]
pub(super) struct Counters {
    pub sent: AtomicU64,
    pub retries: AtomicU64,
    pub hedges: AtomicU64,
    pub hedges_won: AtomicU64,
}

impl std::fmt::Debug for StoreClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreClient")
            .field("origin", &self.shared.origin)
            .finish_non_exhaustive()
    }
}

impl StoreClient {
    /// A client. Nothing is asked yet. `guards` are those of the process.
    ///
    /// # Errors
    /// When an address cannot be one, or the certificates cannot be read.
    pub fn new(settings: StoreSettings, guards: &Guards) -> Result<Self, StoreError> {
        let setup = |e: SettingsError| StoreError::Setup(Box::new(e));
        let place = settings::parse(&settings.urls).map_err(setup)?;
        let instances = Arc::new(Instances::new(place, &settings, guards.clone())?);
        Ok(Self {
            shared: Arc::new(Shared {
                instances,
                token: settings.token_file.clone().map(TokenFile::new),
                counters: Counters::default(),
                uploading: AtomicU64::new(0),
                origin: settings.urls.join(" "),
                settings,
            }),
        })
    }

    /// The addresses, as they were given.
    pub fn origin(&self) -> &str {
        &self.shared.origin
    }

    /// Asks for chunks, from the instances in their turn, and sends what is said of each as soon as
    /// it is said: index and answer, in any order, one for each unless `sink` is closed. With `wait`
    /// the asker can bring what is missing: the store tells who is to, and waits so long for others.
    pub async fn get_many(
        &self,
        ids: &[ChunkId],
        wait: Option<Duration>,
        effort: Effort,
        sink: &mpsc::Sender<(usize, Got)>,
    ) {
        tokio::select! {
            () = fetch::get_many(&self.shared, ids, wait, effort, sink) => {}
            () = sink.closed() => {}
        }
    }

    /// Puts a chunk. `repair`: the store's copy gave wrong bytes; it is to look.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn put(
        &self,
        id: &ChunkId,
        ciphertext: Bytes,
        repair: bool,
    ) -> Result<PutOutcome, StoreError> {
        if ciphertext.is_empty() || ciphertext.len() > MAX_STORED_LEN {
            let len = ciphertext.len();
            let text = format!("a chunk of {len} bytes; the format allows 1 to {MAX_STORED_LEN}");
            return Err(StoreError::Limit(text));
        }
        let mut ask = self.ask("put a chunk", Method::PUT, vec!["chunks".into(), id.hex()]);
        ask.body = ciphertext;
        if repair {
            let name = HeaderName::from_static(REPAIR_HEADER);
            ask.headers.push((name, HeaderValue::from_static("1")));
        }
        let answer = self.call(id, &ask, MAX_WORD).await?;
        Ok(match answer.status {
            StatusCode::CREATED => PutOutcome::Put,
            _ => PutOutcome::Had,
        })
    }

    /// For each chunk whether it was put for us and need not be again.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn has(&self, ids: &[ChunkId]) -> Result<Vec<bool>, StoreError> {
        let mut all = Vec::with_capacity(ids.len());
        for batch in ids.chunks(MAX_BATCH) {
            let path = vec!["chunks".into(), "has".into()];
            let mut ask = self.ask("ask which chunks it has", Method::POST, path);
            let ids_type = HeaderValue::from_static(IDS_TYPE);
            ask.headers.push((CONTENT_TYPE, ids_type));
            ask.body = write_ids(batch).into();
            let flags = self.call(&batch[0], &ask, MAX_BATCH).await?.body;
            if flags.len() != batch.len() || flags.iter().any(|flag| *flag > 1) {
                return Err(StoreError::Protocol {
                    instance: self.origin().to_owned(),
                    what: ask.what,
                    reason: format!("{} bytes for {} chunks", flags.len(), batch.len()),
                });
            }
            all.extend(flags.iter().map(|flag| *flag == 1));
        }
        Ok(all)
    }

    /// What is known of the instances, and what was sent to them.
    pub fn health(&self) -> TierHealth {
        let counters = &self.shared.counters;
        let known = self.shared.instances.known();
        TierHealth {
            sent: counters.sent.load(Relaxed),
            retries: counters.retries.load(Relaxed),
            hedges: counters.hedges.load(Relaxed),
            hedges_won: counters.hedges_won.load(Relaxed),
            origins: known.iter().map(|i| i.guard.health()).collect(),
            ..TierHealth::default()
        }
    }

    pub(super) fn ask(&self, what: &'static str, method: Method, path: Vec<String>) -> Ask {
        Ask {
            what,
            method,
            path,
            headers: Vec::new(),
            body: Bytes::new(),
            stall: self.shared.settings.document_timeout,
            by_intent: Duration::ZERO,
        }
    }

    /// Sends a request to the instance that `key` ranks first, then to the next, until one answers,
    /// with at most `limit` bytes. In laps: when all that can be asked have failed, there is a pause.
    pub(super) async fn call(
        &self,
        key: &ChunkId,
        ask: &Ask,
        limit: usize,
    ) -> Result<Answer, StoreError> {
        let patience = self.shared.settings.patience;
        let patient = !patience.is_zero();
        let until = Instant::now() + patience;
        let mut tries = Tries::default();
        for lap in 1.. {
            let before = tries.sent;
            let list = match self.shared.instances.list().await {
                Ok(list) => Some(list),
                Err(error) => {
                    tries.last = Some(error);
                    None
                }
            };
            if let Some(list) = &list
                && let Some(answer) = self.lap(list, key, ask, limit, &mut tries).await?
            {
                return Ok(answer);
            }
            let Some(error) = tries.last.take() else {
                break;
            };
            let enough = most(list.as_ref().map_or(1, |list| list.len()));
            // A lap in which nobody could be asked: who has no patience does not wait for that.
            let over = tries.sent >= enough || tries.sent == before;
            if !error.is_passing() || error.needs_somebody() || (over && !patient) {
                return Err(error);
            }
            let pause = match retry::pause(lap, error.wish(), retry::random()) {
                None if patient => error.wish().unwrap_or_default(),
                None => return Err(error),
                Some(pause) => pause,
            };
            if patient && Instant::now() + pause >= until {
                return Err(error);
            }
            tracing::debug!(%error, lap, "asking again");
            tries.last = Some(error);
            tokio::time::sleep(pause).await;
            if let Some(list) = &list
                && patient
            {
                fetch::usable(list, until).await;
            }
        }
        Err(StoreError::NoInstance("none was asked".to_owned()))
    }

    /// Asks each instance that can be asked once, until one answers.
    async fn lap(
        &self,
        list: &List,
        key: &ChunkId,
        ask: &Ask,
        limit: usize,
        tries: &mut Tries,
    ) -> Result<Option<Answer>, StoreError> {
        let shared = &self.shared;
        let patient = !shared.settings.patience.is_zero();
        fetch::probe_resting(shared, list, key);
        let mut rank = ranked(list, key);
        let askable = fetch::askable(list);
        let resting = !askable.contains(&true);
        if resting {
            // The first tells why.
            rank.truncate(1);
        } else {
            rank.retain(|at| askable[*at]);
        }
        let enough = most(list.len());
        for (turn, at) in rank.into_iter().enumerate() {
            let (instance, again) = (&list[at], tries.sent > 0);
            // The first of a lap is paced by the pause before it, where there is patience. For the
            // others whoever is to have the request again pays.
            let free = !again || resting || (patient && turn == 0);
            if !patient && tries.sent >= enough || !free && !instance.guard.may_retry() {
                continue;
            }
            let answer = exchange::whole(shared, instance, ask, limit).await;
            let was_asked = answer.as_ref().err().is_none_or(StoreError::was_asked);
            tries.sent += usize::from(was_asked);
            let retries = u64::from(again && was_asked);
            shared.counters.retries.fetch_add(retries, Relaxed);
            match answer {
                Ok(answer) => return Ok(Some(answer)),
                Err(error) if !error.is_passing() => return Err(error),
                // What an instance said is worth more than that one was not asked.
                Err(error) if was_asked || tries.last.is_none() => tries.last = Some(error),
                Err(_) => {}
            }
        }
        Ok(None)
    }

    /// The instances in rank for `key`: for tests of who is asked.
    #[doc(hidden)]
    pub async fn rank_of(&self, key: &ChunkId) -> Result<Vec<String>, StoreError> {
        let list: List = self.shared.instances.list().await?;
        let rank = ranked(&list, key);
        Ok(rank.into_iter().map(|i| list[i].name.clone()).collect())
    }
}

/// What became of a call so far.
#[derive(Default)]
struct Tries {
    /// Requests that were sent.
    sent: usize,
    last: Option<StoreError>,
}

/// How many requests may be sent where there is no patience.
fn most(instances: usize) -> usize {
    instances.clamp(ATTEMPTS, MOST_ATTEMPTS)
}
