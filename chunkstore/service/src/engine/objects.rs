//! An engine over an object store: any OpenDAL service that lists in order, S3 above all.
//!
//! Keys: `roots/ROOT/chunks/xx/ID` and `docs/NAME` below the operator's root. An object is there as a
//! whole or not at all, and the service keeps it; so there is nothing to recover here.

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use lazyimg_convergent::ChunkId;
use opendal::layers::{ConcurrentLimitLayer, RetryLayer, TimeoutLayer};
use opendal::options::{ListOptions, WriteOptions};
use opendal::{ErrorKind, Operator};
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{
    Engine, EngineError, RootId, When, check_chunk_put, check_doc_name, check_doc_put,
    parse_chunk_id,
};

#[cfg(test)]
mod tests;

/// Requests of one call under way at once.
const PARALLEL: usize = 32;
/// Requests of the engine under way at once.
const MAX_REQUESTS: usize = 256;
/// For one request without a body, and for a body that makes no progress.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Attempts after the first one.
const RETRIES: usize = 3;
const MIN_DELAY: Duration = Duration::from_millis(100);
const MAX_DELAY: Duration = Duration::from_secs(2);
/// Objects deleted with one request where the service can.
const DELETE_BATCH: usize = 1_000;

/// Chunks and documents as objects.
pub struct ObjectsEngine {
    name: &'static str,
    op: Operator,
    /// The same, but each request is made once: for those that must not be repeated unseen.
    once: Operator,
    /// Whether the service knows "only where nothing is".
    conditional: bool,
}

impl ObjectsEngine {
    /// An engine over `op`, which lies behind no layer yet; `name` is for logs. Writes an object to
    /// see whether it may, and whether the service knows conditional writes.
    pub async fn open(op: Operator, name: &'static str) -> Result<Self, EngineError> {
        let can = op.info().capability();
        if !(can.list && can.list_with_start_after && can.list_with_recursive) {
            return Err(EngineError::Setup(format!(
                "the service {name} cannot list objects in order; choose S3 or the embedded engine"
            )));
        }
        let op = op.layer(
            TimeoutLayer::new()
                .with_timeout(TIMEOUT)
                .with_io_timeout(TIMEOUT),
        );
        // One for both.
        let limit = ConcurrentLimitLayer::new(MAX_REQUESTS);
        let once = op.clone().layer(limit.clone());
        let op = op
            .layer(
                RetryLayer::new()
                    .with_jitter()
                    .with_min_delay(MIN_DELAY)
                    .with_max_delay(MAX_DELAY)
                    .with_max_times(RETRIES),
            )
            .layer(limit);
        let mut engine = Self {
            name,
            op,
            once,
            conditional: can.write_with_if_not_exists,
        };
        engine.conditional = engine.conditional && engine.probe().await?;
        if !engine.conditional {
            tracing::warn!(
                engine = name,
                "the service has no conditional writes: let one process only collect garbage"
            );
        }
        Ok(engine)
    }

    /// Whether "only where nothing is" works when these are told to be conditional: some services
    /// ignore the condition, some refuse it.
    async fn probe(&self) -> Result<bool, EngineError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let nanos = now.map_or(0, |d| d.as_nanos());
        let key = format!("probe/{}-{nanos}", std::process::id());
        let first = self.write_absent(&key, Bytes::from_static(b"1")).await;
        let works = match first {
            Ok(true) => matches!(
                self.write_absent(&key, Bytes::from_static(b"2")).await,
                Ok(false)
            ),
            // A precondition that does not hold where nothing is.
            Ok(false) => false,
            Err(_) => {
                // Refused, or nothing works at all.
                let plain = self.op.write(&key, Bytes::from_static(b"1")).await;
                plain.map_err(|e| self.error("write", &key, &e))?;
                false
            }
        };
        let deleted = self.op.delete(&key).await;
        deleted.map_err(|e| self.error("delete", &key, &e))?;
        Ok(works)
    }

    /// Writes where nothing is. An attempt that failed may have written all the same; the next one then
    /// finds something, and what it finds is compared: it is ours.
    async fn write_absent(&self, key: &str, bytes: Bytes) -> Result<bool, EngineError> {
        let mut delay = MIN_DELAY;
        let mut attempt = 0;
        loop {
            let options = WriteOptions {
                if_not_exists: true,
                ..WriteOptions::default()
            };
            let written = self.once.write_options(key, bytes.clone(), options).await;
            let Err(e) = written else { return Ok(true) };
            if matches!(
                e.kind(),
                ErrorKind::ConditionNotMatch | ErrorKind::AlreadyExists
            ) {
                let ours = attempt > 0 && self.get(key).await?.is_some_and(|found| found == bytes);
                return Ok(ours);
            }
            if attempt == RETRIES || !e.is_temporary() {
                return Err(self.error("write", key, &e));
            }
            attempt += 1;
            // Up to twice as long, so that many do not come again at once.
            let dice = RandomState::new().hash_one(attempt) as u32;
            tokio::time::sleep(delay + delay.mul_f64(f64::from(dice) / f64::from(u32::MAX))).await;
            delay = (delay * 2).min(MAX_DELAY);
        }
    }

    async fn put(&self, key: &str, bytes: Bytes, when: When) -> Result<bool, EngineError> {
        if when == When::Absent {
            if self.conditional {
                return self.write_absent(key, bytes).await;
            }
            if self.len(key).await?.is_some() {
                return Ok(false);
            }
        }
        let written = self.op.write(key, bytes).await;
        written.map_err(|e| self.error("write", key, &e))?;
        Ok(true)
    }

    async fn get(&self, key: &str) -> Result<Option<Bytes>, EngineError> {
        match self.op.read(key).await {
            Ok(bytes) => Ok(Some(bytes.to_bytes())),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(self.error("read", key, &e)),
        }
    }

    /// The length of an object.
    async fn len(&self, key: &str) -> Result<Option<u64>, EngineError> {
        match self.op.stat(key).await {
            Ok(meta) => Ok(Some(meta.content_length())),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(self.error("look for", key, &e)),
        }
    }

    /// Keys and lengths below `prefix`, in their order, from the one after `after` on.
    async fn list(
        &self,
        prefix: &str,
        after: Option<String>,
        limit: usize,
    ) -> Result<Vec<(String, u64)>, EngineError> {
        let options = ListOptions {
            recursive: true,
            start_after: after,
            limit: Some(limit.clamp(1, 1_000)),
            ..ListOptions::default()
        };
        let lister = self.op.lister_options(prefix, options).await;
        let entries = lister.map_err(|e| self.error("list", prefix, &e))?;
        entries
            .try_filter(|entry| std::future::ready(entry.metadata().is_file()))
            .map_ok(|entry| {
                let len = entry.metadata().content_length();
                (entry.path().to_owned(), len)
            })
            .take(limit)
            .try_collect()
            .await
            .map_err(|e| self.error("list", prefix, &e))
    }

    async fn remove(&self, prefix: &str) -> Result<(), EngineError> {
        loop {
            let found = self.list(prefix, None, DELETE_BATCH).await?;
            if found.is_empty() {
                return Ok(());
            }
            let keys = found.into_iter().map(|(key, _)| key);
            let deleted = self.op.delete_iter(keys).await;
            deleted.map_err(|e| self.error("delete", prefix, &e))?;
        }
    }

    /// What an error of OpenDAL means.
    fn error(&self, doing: &str, key: &str, e: &opendal::Error) -> EngineError {
        let text = format!("{}: cannot {doing} {key}: {e}", self.name);
        if says_full(e.message()) {
            return EngineError::Full(text);
        }
        match e.kind() {
            ErrorKind::ConfigInvalid => EngineError::Setup(format!(
                "{text}; check endpoint, bucket and region of the store's settings"
            )),
            ErrorKind::PermissionDenied => EngineError::Setup(format!(
                "{text}; check the credentials and what they may do"
            )),
            ErrorKind::Unsupported => EngineError::Setup(text),
            _ => EngineError::Unavailable(text),
        }
    }
}

/// Whether a service says that there is no room. Its words may have the key in them, and so what tenants
/// are called; keys have neither capitals nor spaces.
fn says_full(message: &str) -> bool {
    let codes = ["QuotaExceeded", "InsufficientStorage", "StorageFull"];
    let words = ["quota exceeded", "insufficient storage", "no space left"];
    let lower = message.to_lowercase();
    codes.iter().any(|code| message.contains(code)) || words.iter().any(|w| lower.contains(w))
}

fn chunks_of(root: RootId) -> String {
    format!("roots/{root}/chunks/")
}

fn chunk_key(root: RootId, id: &ChunkId) -> String {
    let hex = id.hex();
    format!("roots/{root}/chunks/{}/{hex}", &hex[..2])
}

/// The chunk of a key; `None` for an object of somebody else.
fn chunk_of(key: &str) -> Option<ChunkId> {
    parse_chunk_id(key.rsplit('/').next()?)
}

fn doc_key(name: &str) -> String {
    format!("docs/{name}")
}

#[async_trait]
impl Engine for ObjectsEngine {
    fn name(&self) -> &str {
        self.name
    }

    async fn put_chunk(
        &self,
        root: RootId,
        id: &ChunkId,
        bytes: Bytes,
    ) -> Result<bool, EngineError> {
        check_chunk_put(id, &bytes)?;
        self.put(&chunk_key(root, id), bytes, When::Absent).await
    }

    async fn replace_chunk(
        &self,
        root: RootId,
        id: &ChunkId,
        bytes: Bytes,
    ) -> Result<(), EngineError> {
        check_chunk_put(id, &bytes)?;
        let key = chunk_key(root, id);
        self.put(&key, bytes, When::Always).await.map(|_| ())
    }

    async fn get_chunk(&self, root: RootId, id: &ChunkId) -> Result<Option<Bytes>, EngineError> {
        self.get(&chunk_key(root, id)).await
    }

    async fn stat_chunks(
        &self,
        root: RootId,
        ids: &[ChunkId],
    ) -> Result<Vec<Option<u32>>, EngineError> {
        let keys: Vec<String> = ids.iter().map(|id| chunk_key(root, id)).collect();
        stream::iter(keys)
            .map(|key| async move {
                let len = self.len(&key).await?;
                Ok(len.map(|len| u32::try_from(len).unwrap_or(u32::MAX)))
            })
            .buffered(PARALLEL)
            .try_collect()
            .await
    }

    async fn list_chunks(
        &self,
        root: RootId,
        after: Option<&ChunkId>,
        limit: usize,
    ) -> Result<Vec<(ChunkId, u32)>, EngineError> {
        let mut after = after.map(|id| chunk_key(root, id));
        let mut chunks = Vec::new();
        while chunks.len() < limit {
            let wanted = limit - chunks.len();
            let found = self.list(&chunks_of(root), after.take(), wanted).await?;
            let all = found.len() < wanted;
            after = found.last().map(|(key, _)| key.clone());
            chunks.extend(found.iter().filter_map(|(key, len)| {
                Some((chunk_of(key)?, u32::try_from(*len).unwrap_or(u32::MAX)))
            }));
            if all {
                break;
            }
        }
        Ok(chunks)
    }

    async fn remove_chunks(&self, root: RootId) -> Result<(), EngineError> {
        self.remove(&chunks_of(root)).await
    }

    async fn put_doc(&self, name: &str, bytes: Bytes, when: When) -> Result<bool, EngineError> {
        check_doc_put(name, &bytes)?;
        self.put(&doc_key(name), bytes, when).await
    }

    async fn put_docs(&self, docs: Vec<(String, Bytes)>) -> Result<(), EngineError> {
        for (name, bytes) in &docs {
            check_doc_put(name, bytes)?;
        }
        stream::iter(docs.into_iter().map(Ok))
            .try_for_each_concurrent(PARALLEL, |(name, bytes)| async move {
                let key = doc_key(&name);
                self.put(&key, bytes, When::Always).await.map(|_| ())
            })
            .await
    }

    async fn get_doc(&self, name: &str) -> Result<Option<Bytes>, EngineError> {
        check_doc_name(name)?;
        self.get(&doc_key(name)).await
    }

    async fn has_docs(&self, names: &[String]) -> Result<Vec<bool>, EngineError> {
        names.iter().try_for_each(|name| check_doc_name(name))?;
        let keys: Vec<String> = names.iter().map(|name| doc_key(name)).collect();
        stream::iter(keys)
            .map(|key| async move { Ok(self.len(&key).await?.is_some()) })
            .buffered(PARALLEL)
            .try_collect()
            .await
    }

    async fn delete_doc(&self, name: &str) -> Result<(), EngineError> {
        check_doc_name(name)?;
        let key = doc_key(name);
        let deleted = self.op.delete(&key).await;
        deleted.map_err(|e| self.error("delete", &key, &e))
    }

    async fn list_docs(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<String>, EngineError> {
        if limit == 0 {
            return Ok(Vec::new());
        }
        let after = after.filter(|after| *after >= prefix).map(doc_key);
        let found = self.list(&doc_key(prefix), after, limit).await?;
        let name = |(key, _): (String, u64)| key.strip_prefix("docs/").map(str::to_owned);
        Ok(found.into_iter().filter_map(name).collect())
    }

    async fn remove_docs(&self, prefix: &str) -> Result<(), EngineError> {
        self.remove(&doc_key(prefix)).await
    }

    async fn check(&self) -> Result<(), EngineError> {
        self.len(&doc_key("meta/format")).await.map(|_| ())
    }

    async fn used_bytes(&self) -> Result<Option<u64>, EngineError> {
        Ok(None)
    }

    async fn close(&self) {}
}
