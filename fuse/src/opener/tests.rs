//! Opening through a store that lies or hangs. Against real ones: `tests/tests/region.rs`.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lazyimg_convergent::Digest;
use parking_lot::Mutex;

use super::{ImageOpener, OpenError, RegistryOpener};
use crate::protocol::{
    ErrorCode, KeySource, MountRequest, SourceSettings, StoreSettings, WirePath,
};

/// A server of HTTP that notes what it is asked.
struct Server {
    host: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// `answer` gives status and JSON for a request's line; `None`: there is no answer, ever.
    fn start(answer: impl Fn(&str) -> Option<(u16, String)> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (noted, answer) = (Arc::clone(&asked), Arc::new(answer));
        // Both end with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (noted, answer) = (Arc::clone(&noted), Arc::clone(&answer));
                std::thread::spawn(move || serve(stream, &noted, &*answer));
            }
        });
        Self { host, asked }
    }

    /// A store that knows every reference as `image`, and a registry without anything.
    fn that_calls_everything(image: Digest) -> Self {
        Self::start(move |line| {
            Some(match line.starts_with("GET /v1/refs/") {
                true => (200, format!(r#"{{"image":"{image}","at":1}}"#)),
                false => (404, r#"{"error":"not_found","message":"x"}"#.to_owned()),
            })
        })
    }

    fn asked(&self, what: &str) -> usize {
        let asked = self.asked.lock();
        asked.iter().filter(|line| line.contains(what)).count()
    }

    fn store(&self, only: bool) -> StoreSettings {
        StoreSettings {
            urls: vec![format!("http://{}", self.host)],
            only,
            ..StoreSettings::default()
        }
    }
}

fn serve(
    stream: TcpStream,
    noted: &Mutex<Vec<String>>,
    answer: &dyn Fn(&str) -> Option<(u16, String)>,
) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    loop {
        let first = lines.next()?.ok()?;
        noted.lock().push(first.clone());
        while !lines.next()?.ok()?.is_empty() {}
        let Some((status, json)) = answer(&first) else {
            // Until the asker hangs up.
            while lines.next()?.is_ok() {}
            return None;
        };
        let len = json.len();
        let head = format!("HTTP/1.1 {status} x\r\ncontent-type: application/json\r\n");
        let text = format!("{head}content-length: {len}\r\n\r\n{json}");
        (&stream).write_all(text.as_bytes()).ok()?;
    }
}

async fn open(image: String, store: StoreSettings) -> Result<(), OpenError> {
    let key = "0123456789abcdef".repeat(4);
    let request = MountRequest {
        image,
        dir: WirePath("/m".into()),
        namespace: String::new(),
        key: KeySource::Command(format!("echo {key}")),
        source: SourceSettings {
            store: Some(store),
            platform: Some("linux/amd64".to_owned()),
            ..SourceSettings::default()
        },
        cache: Default::default(),
        flags: Default::default(),
        tree: Default::default(),
    };
    RegistryOpener::default().open(&request).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_store_calls_a_digest_is_never_mounted_for_it() {
    let (named, other) = (Digest::of(b"named"), Digest::of(b"other"));
    for only in [true, false] {
        let server = Server::that_calls_everything(other);
        let image = format!("{}/app@{named}", server.host);
        let error = open(image, server.store(only)).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound, "{error}");
        assert!(server.asked(&format!("/images/{named}/")) > 0, "{error}");
        // Only for the index that would prove it, and there is none.
        let of_other = server.asked(&format!("/images/{other}/"));
        let indexes = server.asked(&format!("/images/{other}/profiles/index-"));
        assert_eq!((of_other, indexes), (1, 1), "{error}");
        // It may be an index's: then it says what to do.
        let advice = format!("name {}/app@{other}", server.host);
        assert_eq!(error.message.contains(&advice), only, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_hangs_holds_a_mount_up_for_seconds_where_there_is_a_registry() {
    let store = Server::start(|_| None);
    let registry = Server::start(|_| Some((404, "{}".to_owned())));
    for name in ["app:v1".to_owned(), format!("app@{}", Digest::of(b"x"))] {
        let begun = Instant::now();
        let error = open(format!("{}/{name}", registry.host), store.store(false)).await;
        let error = error.unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound, "{error}");
        // Three attempts of a document's own time would be thirty seconds, for each document.
        let waited = begun.elapsed();
        assert!(waited < Duration::from_secs(15), "{waited:?}");
    }
    assert!(store.asked("") > 0 && registry.asked("/v2/app/") > 0);
    assert_eq!(store.asked("PUT"), 0);
}
