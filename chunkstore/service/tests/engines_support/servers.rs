//! The real servers of the end-to-end tests, with settings of the engines for them.

use lazyimg_store::engine::config::{RedisSettings, S3Settings};
pub use lazyimg_tests::servers::{Garage, Redis};

/// Settings for the Redis server; keys begin with `prefix`.
pub fn redis(server: &Redis, prefix: &str) -> RedisSettings {
    RedisSettings {
        endpoint: server.endpoint(),
        username: None,
        password_file: None,
        prefix: prefix.to_owned(),
        ttl_seconds: 3600,
        deadline_ms: 200,
    }
}

/// Settings for the S3 server; keys begin with `prefix`.
pub fn s3(server: &Garage, prefix: &str) -> S3Settings {
    S3Settings {
        endpoint: Some(server.endpoint().to_owned()),
        bucket: Garage::BUCKET.to_owned(),
        region: Garage::REGION.to_owned(),
        prefix: prefix.to_owned(),
        access_key_id_file: Some(server.access_key_id_file()),
        secret_access_key_file: Some(server.secret_access_key_file()),
        virtual_host_style: false,
    }
}
