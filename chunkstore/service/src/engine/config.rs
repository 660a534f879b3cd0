//! From settings to an engine.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use opendal::Operator;
use opendal::services::S3;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::embedded::{EmbeddedEngine, EmbeddedOptions};
use super::hot::{HotCounters, HotEngine, HotOptions};
use super::objects::ObjectsEngine;
use super::redis::{RedisEngine, RedisOptions};
use super::{Engine, EngineError};

/// A file with a secret is no longer than this, in bytes.
const MAX_SECRET: u64 = 16 << 10;

/// Where a store keeps what it holds: exactly one of `embedded` and `s3`, and a hot tier if wanted.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct EngineSettings {
    /// On the store's own disk.
    pub embedded: Option<EmbeddedSettings>,
    /// In an object store.
    pub s3: Option<S3Settings>,
    /// A Redis or Valkey server in front of either.
    pub hot: Option<RedisSettings>,
}

/// On the store's own disk.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct EmbeddedSettings {
    /// The data directory; made if it is not there.
    pub data_dir: PathBuf,
    /// Bytes of its filesystem that stay free; by default a twentieth, from 24 MiB to 1 GiB.
    pub min_free_bytes: Option<u64>,
}

/// In a bucket of an object store.
///
/// Without files, the credentials come from where all programs find them: `AWS_ACCESS_KEY_ID` and
/// `AWS_SECRET_ACCESS_KEY`, `AWS_PROFILE`, a web identity, the instance.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct S3Settings {
    /// `https://HOST[:PORT]`; by default Amazon's.
    pub endpoint: Option<String>,
    /// The bucket, which must be there.
    pub bucket: String,
    /// Its region; for most services other than Amazon's any word will do.
    pub region: String,
    /// What all keys begin with.
    #[serde(default)]
    pub prefix: String,
    /// A file with the access key's id.
    pub access_key_id_file: Option<PathBuf>,
    /// A file with the secret access key.
    pub secret_access_key_file: Option<PathBuf>,
    /// Whether the bucket is part of the host's name, as Amazon wants it for new buckets.
    #[serde(default)]
    pub virtual_host_style: bool,
}

/// A Redis or Valkey server.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RedisSettings {
    /// `redis://HOST:PORT/DB` or `unix:///PATH`; without a password in it.
    pub endpoint: String,
    /// The user, where the server has any.
    pub username: Option<String>,
    /// A file with the password.
    pub password_file: Option<PathBuf>,
    /// What all keys begin with.
    #[serde(default = "default_prefix")]
    pub prefix: String,
    /// After how long a chunk is forgotten that nobody puts again; 0 for never.
    #[serde(default = "default_ttl")]
    pub ttl_seconds: u64,
    /// How long a read may take until the engine behind is asked.
    #[serde(default = "default_deadline")]
    pub deadline_ms: u64,
}

impl fmt::Debug for RedisSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the endpoint: somebody may have written a password into it after all.
        f.debug_struct("RedisSettings")
            .field("prefix", &self.prefix)
            .field("ttl_seconds", &self.ttl_seconds)
            .field("deadline_ms", &self.deadline_ms)
            .finish_non_exhaustive()
    }
}

fn default_prefix() -> String {
    "lazyimg".to_owned()
}

fn default_ttl() -> u64 {
    7 * 24 * 3600
}

fn default_deadline() -> u64 {
    50
}

/// An engine, ready for use.
pub struct Opened {
    /// The engine.
    pub engine: Arc<dyn Engine>,
    /// What its hot tier was good for, where it has one.
    pub hot: Option<Arc<HotCounters>>,
}

impl EngineSettings {
    /// An engine in a directory, without a hot tier.
    pub fn embedded(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            embedded: Some(EmbeddedSettings {
                data_dir: data_dir.into(),
                min_free_bytes: None,
            }),
            ..Self::default()
        }
    }

    /// Opens the engine that these settings describe.
    pub async fn open(&self) -> Result<Opened, EngineError> {
        let durable: Arc<dyn Engine> = match (&self.embedded, &self.s3) {
            (Some(embedded), None) => Arc::new(embedded.open().await?),
            (None, Some(s3)) => Arc::new(s3.open().await?),
            _ => {
                return Err(EngineError::Setup(
                    "the store's settings need exactly one of `embedded` and `s3`".to_owned(),
                ));
            }
        };
        let Some(hot) = &self.hot else {
            return Ok(Opened {
                engine: durable,
                hot: None,
            });
        };
        let options = HotOptions {
            deadline: Duration::from_millis(hot.deadline_ms.clamp(1, 10_000)),
            ..HotOptions::default()
        };
        let engine = HotEngine::new(Arc::new(hot.open()?), durable, options);
        let counters = engine.counters();
        Ok(Opened {
            engine: Arc::new(engine),
            hot: Some(counters),
        })
    }
}

impl EmbeddedSettings {
    async fn open(&self) -> Result<EmbeddedEngine, EngineError> {
        let options = EmbeddedOptions {
            min_free_bytes: self.min_free_bytes,
            ..EmbeddedOptions::new(&self.data_dir)
        };
        let opened = tokio::task::spawn_blocking(move || EmbeddedEngine::open(&options));
        opened
            .await
            .map_err(|e| EngineError::Unavailable(format!("opening was broken off: {e}")))?
    }
}

impl S3Settings {
    /// Opens the engine; writes an object to see whether it may.
    pub async fn open(&self) -> Result<ObjectsEngine, EngineError> {
        let mut s3 = S3::default()
            .bucket(&self.bucket)
            .region(&self.region)
            .root(&self.prefix);
        if let Some(endpoint) = &self.endpoint {
            s3 = s3.endpoint(endpoint);
        }
        if self.virtual_host_style {
            s3 = s3.enable_virtual_host_style();
        }
        match (&self.access_key_id_file, &self.secret_access_key_file) {
            (Some(id), Some(secret)) => {
                s3 = s3
                    .access_key_id(&read_secret(id)?)
                    .secret_access_key(&read_secret(secret)?);
            }
            (None, None) => {}
            _ => {
                return Err(EngineError::Setup(
                    "`access-key-id-file` and `secret-access-key-file` go together".to_owned(),
                ));
            }
        }
        // OpenDAL's HTTP client; without it S3 has none. Any number of times is fine.
        opendal::install_default();
        let op = Operator::new(s3).map_err(|e| {
            EngineError::Setup(format!("the store's settings for S3 are not usable: {e}"))
        })?;
        ObjectsEngine::open(op, "s3").await
    }
}

impl RedisSettings {
    /// An engine over the server, which need not be there yet.
    pub fn open(&self) -> Result<RedisEngine, EngineError> {
        // Words after the scheme and before an `@` are a user and a password.
        if self.endpoint.contains('@') {
            return Err(EngineError::Setup(
                "the Redis endpoint holds a user or a password: name them with `username` and \
                 `password-file`"
                    .to_owned(),
            ));
        }
        RedisEngine::open(&RedisOptions {
            endpoint: self.endpoint.clone(),
            username: self.username.clone(),
            password: self.password_file.as_deref().map(read_secret).transpose()?,
            prefix: self.prefix.clone(),
            ttl: Some(self.ttl_seconds)
                .filter(|seconds| *seconds > 0)
                .map(Duration::from_secs),
            timeout: Duration::from_secs(2),
        })
    }
}

/// The secret in a file, without the newline at its end.
fn read_secret(path: &Path) -> Result<Zeroizing<String>, EngineError> {
    use std::io::Read;
    let failed = |why: String| {
        EngineError::Setup(format!(
            "cannot read the secret in {}: {why}",
            path.display()
        ))
    };
    let mut text = Zeroizing::new(String::new());
    let file = std::fs::File::open(path).map_err(|e| failed(e.to_string()))?;
    let read = file.take(MAX_SECRET + 1).read_to_string(&mut text);
    read.map_err(|e| failed(e.to_string()))?;
    let secret = Zeroizing::new(text.trim_end().to_owned());
    if secret.is_empty() || text.len() as u64 > MAX_SECRET {
        return Err(failed(format!(
            "it is empty, or longer than {MAX_SECRET} bytes"
        )));
    }
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<EngineSettings, toml::de::Error> {
        toml::from_str(text)
    }

    #[tokio::test]
    async fn settings_name_exactly_one_durable_engine() {
        for text in [
            "",
            "[embedded]\ndata-dir = '/x'\n[s3]\nbucket = 'b'\nregion = 'r'",
        ] {
            let Err(e) = parse(text).unwrap().open().await else {
                panic!("opened {text:?}");
            };
            assert!(e.to_string().contains("exactly one"), "{e}");
        }
    }

    #[test]
    fn settings_that_nobody_knows_are_refused() {
        for text in [
            "[embedded]\ndata-dir = '/x'\nsize = 3",
            "[s3]\nbucket = 'b'\nregion = 'r'\nsecret-access-key = 'x'",
            "[hot]\nendpoint = 'redis://h'\npassword = 'x'",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn an_embedded_engine_opens_with_a_hot_tier_that_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = EngineSettings::embedded(dir.path().join("data"));
        settings.hot = Some(toml::from_str("endpoint = 'unix:///nowhere/redis.sock'").unwrap());
        let opened = settings.open().await.unwrap();
        assert_eq!(opened.engine.name(), "redis+embedded");
        assert!(opened.hot.is_some());
        opened.engine.close().await;
    }

    #[test]
    fn a_password_in_the_endpoint_is_refused_and_not_repeated() {
        let hot: RedisSettings = toml::from_str("endpoint = 'redis://:hunter2@h:1'").unwrap();
        let Err(e) = hot.open() else {
            panic!("opened");
        };
        assert!(e.to_string().contains("password-file"));
        assert!(!format!("{e} {hot:?}").contains("hunter2"));
    }

    #[test]
    fn a_secret_is_read_without_its_newline_and_within_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        std::fs::write(&path, "abc\n").unwrap();
        assert_eq!(read_secret(&path).unwrap().as_str(), "abc");
        std::fs::write(&path, "\n").unwrap();
        assert!(read_secret(&path).is_err());
        std::fs::write(&path, vec![b'x'; MAX_SECRET as usize + 1]).unwrap();
        assert!(read_secret(&path).is_err());
        assert!(read_secret(&dir.path().join("none")).is_err());
    }
}
