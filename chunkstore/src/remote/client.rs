//! The client: chunks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use lazyimg_convergent::{ChunkId, MAX_STORED_LEN};
use reqwest::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use reqwest::{Method, Response, StatusCode};
use tokio::sync::mpsc;

use super::error::StoreError;
use super::exchange::{self, Ask};
use super::fetch;
use super::instances::{Instance, Instances, List, ranked};
use super::settings::{self, SettingsError, StoreSettings};
use super::token::TokenFile;
use crate::TierHealth;
use crate::guard::{Guards, retry};
use crate::wire::{IDS_TYPE, MAX_BATCH, REPAIR_HEADER, write_ids};

/// How often a request is sent that is not for chunks.
const ATTEMPTS: u32 = 3;

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
    /// Each chunk is tried `attempts` times, first with the next instance in rank.
    pub async fn get_many(
        &self,
        ids: &[ChunkId],
        wait: Option<Duration>,
        attempts: u32,
        sink: &mpsc::Sender<(usize, Got)>,
    ) {
        tokio::select! {
            () = fetch::get_many(&self.shared, ids, wait, attempts.max(1), sink) => {}
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
        let (_, response) = self.call(id, &ask).await?;
        Ok(match response.status() {
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
            let (instance, response) = self.call(&batch[0], &ask).await?;
            let flags = exchange::body(&instance, &ask, response, MAX_BATCH).await?;
            if flags.len() != batch.len() || flags.iter().any(|flag| *flag > 1) {
                return Err(StoreError::Protocol {
                    instance: instance.name.clone(),
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
        }
    }

    /// Sends a request to the instance that `key` ranks first, then to the next, until one answers.
    pub(super) async fn call(
        &self,
        key: &ChunkId,
        ask: &Ask,
    ) -> Result<(Arc<Instance>, Response), StoreError> {
        let list = self.shared.instances.list().await?;
        let rank = ranked(&list, key);
        let mut attempt = 1;
        loop {
            let instance = &list[rank[(attempt as usize - 1) % rank.len()]];
            let error = match self.shared.send(instance, ask).await {
                Ok(response) => return Ok((Arc::clone(instance), response)),
                Err(error) => error,
            };
            let last = attempt >= ATTEMPTS.max(rank.len().min(8) as u32);
            if last || !error.is_passing() {
                return Err(error);
            }
            let asked = !matches!(error, StoreError::Resting(_));
            if asked && !instance.guard.may_retry() {
                return Err(error);
            }
            tracing::debug!(%error, attempt, "asking again");
            // Another instance at once; the same one after a pause.
            if attempt as usize >= rank.len() {
                let wish = match &error {
                    StoreError::Refused { retry_after, .. } => *retry_after,
                    _ => None,
                };
                let Some(pause) = retry::pause(attempt, wish, retry::random()) else {
                    return Err(error);
                };
                tokio::time::sleep(pause).await;
            }
            self.shared
                .counters
                .retries
                .fetch_add(u64::from(asked), Relaxed);
            attempt += 1;
        }
    }

    /// The instances in rank for `key`: for tests of who is asked.
    #[doc(hidden)]
    pub async fn rank_of(&self, key: &ChunkId) -> Result<Vec<String>, StoreError> {
        let list: List = self.shared.instances.list().await?;
        let rank = ranked(&list, key);
        Ok(rank.into_iter().map(|i| list[i].name.clone()).collect())
    }
}

impl Shared {
    /// One request under the instance's guard.
    async fn send(&self, instance: &Arc<Instance>, ask: &Ask) -> Result<Response, StoreError> {
        let pass = instance.guard.enter().map_err(StoreError::Resting)?;
        self.counters.sent.fetch_add(1, Relaxed);
        let answer = exchange::send(instance, &instance.http, self.token.as_ref(), ask).await;
        match &answer {
            Err(error) if error.is_passing() => pass.failed(error),
            _ => pass.succeeded(),
        }
        answer
    }
}
