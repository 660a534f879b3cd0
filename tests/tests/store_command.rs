//! `lazyimg store` as the one who runs a store meets it: the process, its signals, and the commands
//! that look after it.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use lazyimg_convergent::ChunkId;
use lazyimg_tests::process::{kill, wait_for};
use lazyimg_tests::{Lazyimg, WorkDir};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

/// A store that serves; ended when dropped.
struct Store {
    child: Child,
    listen: String,
    url: String,
    log: PathBuf,
}

impl Store {
    #[track_caller]
    fn start(lazyimg: &Lazyimg, args: &[&str]) -> Self {
        let log = lazyimg.home().join("store.log");
        let all = [
            &["store", "serve", "--json", "--listen", "127.0.0.1:0"],
            args,
        ]
        .concat();
        let mut child = lazyimg
            .command(&all)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let started: Value = serde_json::from_str(&line).unwrap_or_else(|e| {
            kill(&mut child);
            panic!("{line:?}: {e}\n{}", fs::read_to_string(&log).unwrap())
        });
        Self {
            child,
            listen: started["listen"].as_str().unwrap().to_owned(),
            url: started["url"].as_str().unwrap().to_owned(),
            log,
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Its exit code.
    #[track_caller]
    fn ended(&mut self) -> Option<i32> {
        let mut code = None;
        wait_for("the store ends", PATIENCE, || {
            code = self.child.try_wait().unwrap();
            code.is_some()
        });
        code.unwrap().code()
    }

    /// One request on a connection of its own; the whole answer as text and its body.
    fn ask(&self, method: &str, path: &str, token: &str, body: &[u8]) -> (String, Vec<u8>) {
        let mut socket = TcpStream::connect(&self.listen).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: store\r\nconnection: close\r\n\
             authorization: Bearer {token}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all(head.as_bytes()).unwrap();
        socket.write_all(body).unwrap();
        let mut said = Vec::new();
        socket.read_to_end(&mut said).unwrap();
        let end = said.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
        let head = String::from_utf8_lossy(&said[..end]).into_owned();
        (head, said[end + 4..].to_vec())
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        kill(&mut self.child);
    }
}

const TENANTS: &str = r#"
[tenants.team-a]
token-files = ["a.token"]
rights = ["read", "write"]
quota = "1GiB"
[tenants.admin]
token-files = ["admin.token"]
rights = ["administer"]
"#;

#[test]
fn a_store_serves_is_looked_after_and_keeps_what_it_has_over_a_restart() {
    let work = WorkDir::new("store-command");
    let lazyimg = Lazyimg::new(work.join("home"));
    for name in ["a.token", "admin.token"] {
        lazyimg.ok(&["store", "token", "--out", name]);
    }
    let error = lazyimg.fails(1, &["store", "token", "--out", "a.token"]);
    assert!(error.contains("exists"), "{error}");
    fs::write(lazyimg.home().join("tenants.toml"), TENANTS).unwrap();
    let read = |name: &str| fs::read_to_string(lazyimg.home().join(name)).unwrap();
    let (a, admin) = (read("a.token"), read("admin.token"));
    let (a, admin) = (a.trim(), admin.trim());
    let args = [
        "--data",
        "data",
        "--tenants",
        "tenants.toml",
        "--audit-log",
        "audit.log",
    ];
    let mut store = Store::start(&lazyimg, &args);
    let bytes = vec![7; 300_000];
    let path = format!("/v1/chunks/{}", ChunkId::of(&bytes));
    let (head, _) = store.ask("PUT", &path, a, &bytes);
    assert!(head.starts_with("HTTP/1.1 201 "), "{head}");

    let url = store.url.clone();
    let ask = |words: &[&str]| {
        let at = ["--store", url.as_str(), "--store-token-file", "admin.token"];
        lazyimg.ok(&[words, &at].concat())
    };
    let stats: Value = serde_json::from_str(&ask(&["store", "stats", "--json"])).unwrap();
    assert_eq!(stats["roots"][0]["chunks"], 1);
    let text = ask(&["store", "stats"]);
    assert!(
        text.contains("team-a") && text.contains("embedded"),
        "{text}"
    );
    assert_eq!(ask(&["store", "rotate-root"]).trim(), "r00000002");
    let roots = ask(&["store", "roots"]);
    assert!(
        roots.contains("retired") && roots.contains("active"),
        "{roots}"
    );
    let would = ask(&["store", "gc", "--dry-run", "--grace", "0s"]);
    assert!(
        would.contains("nothing was changed") && would.contains("r00000001"),
        "{would}"
    );
    ask(&["store", "gc"]);

    let stats = ["store", "stats", "--store", url.as_str()];
    let error = lazyimg.fails(4, &stats);
    assert!(error.contains("--store-token-file"), "{error}");
    let wrong = [&stats[..], &["--store-token-file", "a.token"]].concat();
    assert!(lazyimg.fails(4, &wrong).contains("administer"));
    let token = ["--store", url.as_str(), "--store-token-file", "admin.token"];
    lazyimg.fails(
        3,
        &[&["store", "acknowledge", "r00000009"][..], &token].concat(),
    );
    lazyimg.fails(2, &["store", "stats"]);

    store.signal(Signal::TERM);
    assert_eq!(store.ended(), Some(0), "{}", store.log());
    lazyimg.fails(5, &[&["store", "stats"][..], &token].concat());
    let log = store.log();
    assert!(
        !log.contains(a) && !log.contains(admin),
        "a token is in the log"
    );
    let put = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap_or_else(|e| panic!("{line}: {e}")))
        .find(|line| line["method"] == "PUT")
        .unwrap();
    assert_eq!(
        (&put["status"], &put["tenant"]),
        (&201.into(), &"team-a".into())
    );
    assert_eq!(put["request"].as_str().unwrap().len(), 16);
    let audit = read("audit.log");
    let acts = audit
        .lines()
        .map(|l| serde_json::from_str::<Value>(l).unwrap()["what"].clone());
    let acts: Vec<Value> = acts.collect();
    assert_eq!(acts, ["rotate-root", "gc", "acknowledge"]);

    let store = Store::start(&lazyimg, &args);
    let (head, body) = store.ask("GET", &path, a, b"");
    assert!(head.starts_with("HTTP/1.1 200 ") && body == bytes, "{head}");
}

#[test]
fn a_store_without_tenants_says_so_and_stays_on_this_machine() {
    let work = WorkDir::new("store-local");
    let lazyimg = Lazyimg::new(work.join("home"));
    let store = Store::start(&lazyimg, &["--data", "data", "--log", "text"]);
    let log = store.log();
    assert!(
        log.contains("everybody on this machine may do everything"),
        "{log}"
    );
    let stats = lazyimg.json(&["store", "stats", "--store", &store.url]);
    assert_eq!(stats["tenants"][0]["tenant"], "local");
    for (args, word) in [
        (
            &["--data", "other", "--listen", "0.0.0.0:0"][..],
            "--tenants",
        ),
        (&[], "--data"),
        (&["--data", "other", "--tls-cert", "c.pem"], "--tls-key"),
        (
            &["--data", "other", "--tenants", "nowhere.toml"],
            "nowhere.toml",
        ),
        (&["--data", "other", "--max-memory", "1KiB"], "4MiB"),
    ] {
        let error = lazyimg.fails(2, &[&["store", "serve"], args].concat());
        assert!(error.contains(word), "{word} is not in: {error}");
    }
    let error = lazyimg.fails(
        1,
        &[
            "store",
            "serve",
            "--data",
            "data",
            "--listen",
            "127.0.0.1:0",
        ],
    );
    assert!(error.contains("data"), "one directory, one store: {error}");
}

#[test]
fn tenants_are_read_again_on_sighup_and_a_second_signal_ends_at_once() {
    let work = WorkDir::new("store-signals");
    let lazyimg = Lazyimg::new(work.join("home"));
    for name in ["a.token", "admin.token", "new.token"] {
        lazyimg.ok(&["store", "token", "--out", name]);
    }
    let file = lazyimg.home().join("tenants.toml");
    fs::write(&file, TENANTS).unwrap();
    let read = |name: &str| fs::read_to_string(lazyimg.home().join(name)).unwrap();
    let (new, admin) = (read("new.token"), read("admin.token"));
    let args = [
        "--data",
        "data",
        "--tenants",
        "tenants.toml",
        "--drain-timeout",
        "1h",
    ];
    let mut store = Store::start(&lazyimg, &args);
    let status = |store: &Store| store.ask("GET", "/v1/images", new.trim(), b"").0;
    assert!(status(&store).starts_with("HTTP/1.1 401 "));
    fs::write(
        &file,
        TENANTS.replace("\"a.token\"", "\"a.token\", \"new.token\""),
    )
    .unwrap();
    store.signal(Signal::HUP);
    wait_for("the new token is known", PATIENCE, || {
        status(&store).starts_with("HTTP/1.1 200 ")
    });
    // A request that does not end: its body never comes.
    let mut socket = TcpStream::connect(&store.listen).unwrap();
    let head = format!(
        "PUT /v1/chunks/{} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-length: 9\r\n\r\n",
        "0".repeat(64),
        new.trim()
    );
    socket.write_all(head.as_bytes()).unwrap();
    let under_way = || {
        let metrics = store.ask("GET", "/metrics", admin.trim(), b"").1;
        String::from_utf8_lossy(&metrics).contains("lazyimg_store_requests_under_way 2")
    };
    wait_for("it is under way", PATIENCE, under_way);
    store.signal(Signal::TERM);
    wait_for("nobody else is let in", PATIENCE, || {
        TcpStream::connect(&store.listen).is_err()
    });
    assert!(
        store.child.try_wait().unwrap().is_none(),
        "it waits for the request"
    );
    store.signal(Signal::INT);
    assert_eq!(store.ended(), Some(1), "{}", store.log());
}
