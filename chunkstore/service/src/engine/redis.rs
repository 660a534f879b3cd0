//! An engine in Redis or Valkey. It keeps what it is given as long as that server does: as the hot tier
//! in front of another engine, [`super::hot::HotEngine`], it may forget.
//!
//! OpenDAL's Redis service can neither list nor write only where nothing is; this speaks to the server
//! itself. Chunks and documents are strings, their names also lie in sorted sets, which list in order.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use lazyimg_convergent::{ChunkId, MAX_STORED_LEN};
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{ErrorKind, FromRedisValue, Pipeline, RedisError};
use zeroize::Zeroizing;

use super::{
    Engine, EngineError, RootId, When, check_chunk_put, check_doc_name, check_doc_put,
    parse_chunk_id,
};

/// Connections: answers come in the order of the requests, and one long answer holds up the others.
const CONNECTIONS: usize = 8;
/// Names taken from a sorted set at once.
const PAGE: usize = 1_000;

/// Which server, and how it is used.
#[derive(Clone)]
pub struct RedisOptions {
    /// `redis://HOST:PORT/DB` or `unix:///PATH`.
    pub endpoint: String,
    /// The user, where the server has any.
    pub username: Option<String>,
    /// The password.
    pub password: Option<Zeroizing<String>>,
    /// What all keys begin with.
    pub prefix: String,
    /// After how long a chunk is forgotten that nobody puts again.
    pub ttl: Option<Duration>,
    /// For connecting, and for one answer.
    pub timeout: Duration,
}

/// Chunks and documents in a Redis server.
pub struct RedisEngine {
    connections: Vec<ConnectionManager>,
    next: AtomicUsize,
    prefix: String,
    ttl: Option<Duration>,
}

impl RedisEngine {
    /// An engine over a server, which need not be there yet.
    pub fn open(options: &RedisOptions) -> Result<Self, EngineError> {
        let wrong = |e: RedisError| {
            EngineError::Setup(format!(
                "the Redis endpoint is not usable: {e}; write it like redis://127.0.0.1:6379/0 or \
                 unix:///run/redis/redis.sock"
            ))
        };
        let info = redis::IntoConnectionInfo::into_connection_info(options.endpoint.as_str())
            .map_err(wrong)?;
        let mut server = info.redis_settings().clone();
        if let Some(username) = &options.username {
            server = server.set_username(username);
        }
        if let Some(password) = &options.password {
            server = server.set_password(password.as_str());
        }
        let client = redis::Client::open(info.set_redis_settings(server)).map_err(wrong)?;
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(options.timeout))
            .set_response_timeout(Some(options.timeout))
            .set_number_of_retries(1)
            .set_max_delay(Duration::from_millis(500));
        let connections = (0..CONNECTIONS)
            .map(|_| ConnectionManager::new_lazy_with_config(client.clone(), config.clone()))
            .collect::<Result<_, _>>()
            .map_err(wrong)?;
        Ok(Self {
            connections,
            next: AtomicUsize::new(0),
            prefix: options.prefix.clone(),
            ttl: options.ttl,
        })
    }

    /// Does what may be done twice. A connection that has broken is made anew by who uses it next: that
    /// is this one.
    async fn ask<T: FromRedisValue>(&self, pipe: &Pipeline) -> Result<T, EngineError> {
        let mut connection = self.connection();
        match pipe.query_async(&mut connection).await {
            Err(e) if e.is_connection_dropped() => {
                pipe.query_async(&mut connection).await.map_err(error)
            }
            done => done.map_err(error),
        }
    }

    /// Does what must be done once.
    async fn ask_once<T: FromRedisValue>(&self, pipe: &Pipeline) -> Result<T, EngineError> {
        pipe.query_async(&mut self.connection())
            .await
            .map_err(error)
    }

    fn connection(&self) -> ConnectionManager {
        let turn = self.next.fetch_add(1, Relaxed) % self.connections.len();
        self.connections[turn].clone()
    }

    fn chunk_key(&self, root: RootId, id: &str) -> String {
        format!("{}:roots/{root}/chunks/{id}", self.prefix)
    }

    fn chunk_index(&self, root: RootId) -> String {
        format!("{}:index/roots/{root}/chunks", self.prefix)
    }

    fn doc_key(&self, name: &str) -> String {
        format!("{}:docs/{name}", self.prefix)
    }

    fn doc_index(&self) -> String {
        format!("{}:index/docs", self.prefix)
    }

    /// Sets a string and notes its name, both or none; false when it was there.
    async fn put(
        &self,
        key: String,
        index: String,
        name: &str,
        bytes: &[u8],
        when: When,
        ttl: Option<Duration>,
    ) -> Result<bool, EngineError> {
        let mut pipe = redis::pipe();
        let set = pipe.atomic().cmd("SET").arg(key).arg(bytes);
        if when == When::Absent {
            set.arg("NX");
        }
        if let Some(ttl) = ttl {
            set.arg("EX").arg(ttl.as_secs().max(1));
        }
        set.cmd("ZADD").arg(index).arg(0).arg(name).ignore();
        let (set,): (Option<String>,) = match when {
            When::Absent => self.ask_once(&pipe).await?,
            When::Always => self.ask(&pipe).await?,
        };
        Ok(set.is_some())
    }

    /// Names of a sorted set that begin with `prefix`, from the one after `after` on.
    async fn names(
        &self,
        index: &str,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<String>, EngineError> {
        let from = match after {
            Some(after) if after >= prefix => format!("({after}"),
            _ => format!("[{prefix}"),
        };
        // Behind every name that begins so: names are ASCII.
        let mut to = format!("({prefix}").into_bytes();
        to.push(0xff);
        let mut pipe = redis::pipe();
        pipe.cmd("ZRANGEBYLEX").arg(index).arg(from).arg(to);
        pipe.arg("LIMIT").arg(0).arg(limit);
        let (names,): (Vec<String>,) = self.ask(&pipe).await?;
        Ok(names)
    }

    /// Deletes strings and their names, page by page.
    async fn remove(
        &self,
        index: String,
        prefix: &str,
        key: impl Fn(&str) -> String + Send + Sync,
    ) -> Result<(), EngineError> {
        loop {
            let names = self.names(&index, prefix, None, PAGE).await?;
            if names.is_empty() {
                return Ok(());
            }
            let mut pipe = redis::pipe();
            pipe.atomic()
                .cmd("UNLINK")
                .arg(names.iter().map(|n| key(n)).collect::<Vec<_>>());
            pipe.cmd("ZREM").arg(&index).arg(names);
            let _: (u64, u64) = self.ask(&pipe).await?;
        }
    }
}

/// What an error of the server means. A reply names no password.
fn error(e: RedisError) -> EngineError {
    let text = format!("redis: {e}");
    // The server's own words; of several commands at once, each has its error in the text.
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    if says(&["OOM"]) {
        EngineError::Full(text)
    } else if e.kind() == ErrorKind::AuthenticationFailed
        || says(&["NOAUTH", "WRONGPASS", "NOPERM"])
    {
        EngineError::Setup(format!(
            "{text}; check user and password of the Redis server"
        ))
    } else if says(&["READONLY"]) {
        EngineError::Setup(format!("{text}; the endpoint must be the primary"))
    } else {
        EngineError::Unavailable(text)
    }
}

#[async_trait]
impl Engine for RedisEngine {
    fn name(&self) -> &str {
        "redis"
    }

    async fn put_chunk(
        &self,
        root: RootId,
        id: &ChunkId,
        bytes: Bytes,
    ) -> Result<bool, EngineError> {
        check_chunk_put(id, &bytes)?;
        let (hex, index) = (id.hex(), self.chunk_index(root));
        let key = self.chunk_key(root, &hex);
        self.put(key, index, &hex, &bytes, When::Absent, self.ttl)
            .await
    }

    async fn replace_chunk(
        &self,
        root: RootId,
        id: &ChunkId,
        bytes: Bytes,
    ) -> Result<(), EngineError> {
        check_chunk_put(id, &bytes)?;
        let (hex, index) = (id.hex(), self.chunk_index(root));
        let key = self.chunk_key(root, &hex);
        self.put(key, index, &hex, &bytes, When::Always, self.ttl)
            .await
            .map(|_| ())
    }

    async fn get_chunk(&self, root: RootId, id: &ChunkId) -> Result<Option<Bytes>, EngineError> {
        let mut pipe = redis::pipe();
        // Bounded, whatever lies there; a chunk is never empty.
        pipe.cmd("GETRANGE").arg(self.chunk_key(root, &id.hex()));
        pipe.arg(0).arg(MAX_STORED_LEN);
        let (bytes,): (Bytes,) = self.ask(&pipe).await?;
        Ok(Some(bytes).filter(|bytes| !bytes.is_empty()))
    }

    async fn stat_chunks(
        &self,
        root: RootId,
        ids: &[ChunkId],
    ) -> Result<Vec<Option<u32>>, EngineError> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipe = redis::pipe();
        for id in ids {
            pipe.cmd("STRLEN").arg(self.chunk_key(root, &id.hex()));
        }
        let lengths: Vec<u32> = self.ask(&pipe).await?;
        let there = |len: u32| Some(len).filter(|len| *len > 0);
        Ok(lengths.into_iter().map(there).collect())
    }

    async fn list_chunks(
        &self,
        root: RootId,
        after: Option<&ChunkId>,
        limit: usize,
    ) -> Result<Vec<(ChunkId, u32)>, EngineError> {
        let index = self.chunk_index(root);
        let mut after = after.map(|id| id.hex());
        let mut listed = Vec::new();
        while listed.len() < limit {
            let wanted = (limit - listed.len()).min(PAGE);
            let names = self.names(&index, "", after.as_deref(), wanted).await?;
            let ids: Vec<ChunkId> = names.iter().filter_map(|n| parse_chunk_id(n)).collect();
            let lengths = self.stat_chunks(root, &ids).await?;
            // What the server has forgotten is no more there.
            let there = ids.into_iter().zip(lengths);
            listed.extend(there.filter_map(|(id, len)| Some((id, len?))));
            if names.len() < wanted {
                break;
            }
            after = names.into_iter().next_back();
        }
        Ok(listed)
    }

    async fn remove_chunks(&self, root: RootId) -> Result<(), EngineError> {
        self.remove(self.chunk_index(root), "", |id| self.chunk_key(root, id))
            .await
    }

    async fn put_doc(&self, name: &str, bytes: Bytes, when: When) -> Result<bool, EngineError> {
        check_doc_put(name, &bytes)?;
        let key = self.doc_key(name);
        self.put(key, self.doc_index(), name, &bytes, when, None)
            .await
    }

    async fn put_docs(&self, docs: Vec<(String, Bytes)>) -> Result<(), EngineError> {
        for (name, bytes) in &docs {
            check_doc_put(name, bytes)?;
        }
        for (name, bytes) in docs {
            self.put_doc(&name, bytes, When::Always).await?;
        }
        Ok(())
    }

    async fn get_doc(&self, name: &str) -> Result<Option<Bytes>, EngineError> {
        check_doc_name(name)?;
        let mut pipe = redis::pipe();
        pipe.cmd("GET").arg(self.doc_key(name));
        let (bytes,): (Option<Bytes>,) = self.ask(&pipe).await?;
        Ok(bytes)
    }

    async fn has_docs(&self, names: &[String]) -> Result<Vec<bool>, EngineError> {
        names.iter().try_for_each(|name| check_doc_name(name))?;
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipe = redis::pipe();
        for name in names {
            pipe.cmd("EXISTS").arg(self.doc_key(name));
        }
        self.ask(&pipe).await
    }

    async fn delete_doc(&self, name: &str) -> Result<(), EngineError> {
        check_doc_name(name)?;
        let mut pipe = redis::pipe();
        pipe.atomic().cmd("UNLINK").arg(self.doc_key(name));
        pipe.cmd("ZREM").arg(self.doc_index()).arg(name);
        let _: (u64, u64) = self.ask(&pipe).await?;
        Ok(())
    }

    async fn list_docs(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<String>, EngineError> {
        self.names(&self.doc_index(), prefix, after, limit).await
    }

    async fn remove_docs(&self, prefix: &str) -> Result<(), EngineError> {
        self.remove(self.doc_index(), prefix, |name| self.doc_key(name))
            .await
    }

    async fn check(&self) -> Result<(), EngineError> {
        let mut pipe = redis::pipe();
        pipe.cmd("PING");
        let (_,): (String,) = self.ask(&pipe).await?;
        Ok(())
    }

    async fn used_bytes(&self) -> Result<Option<u64>, EngineError> {
        let mut pipe = redis::pipe();
        pipe.cmd("INFO").arg("memory");
        let (info,): (String,) = self.ask(&pipe).await?;
        let used = info.lines().find_map(|l| l.strip_prefix("used_memory:"));
        Ok(used.and_then(|n| n.trim().parse().ok()))
    }

    async fn close(&self) {}
}
