//! The embedded engine through kill -9, damage and full disks.
#![allow(clippy::unwrap_used)]

mod engines_support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use engines_support::{bytes, chunk, root};
use lazyimg_store::engine::embedded::{EmbeddedEngine, EmbeddedOptions};
use lazyimg_store::engine::{Engine, EngineError, RootId, When};

/// Rounds of the crash test; other tests ask for more.
const ROUNDS: &str = "LAZYIMG_TEST_CRASH_ROUNDS";
/// Makes the crash test the process that is killed: the data directory, and the round.
const CHILD: &str = "LAZYIMG_TEST_CRASH_CHILD";

fn options(dir: &Path) -> EmbeddedOptions {
    EmbeddedOptions {
        // Small, so that there are many of them.
        segment_bytes: Some(1 << 20),
        ..EmbeddedOptions::new(dir)
    }
}

fn open(dir: &Path) -> EmbeddedEngine {
    EmbeddedEngine::open(&options(dir)).unwrap()
}

/// The chunk of a number: its length too.
fn numbered(n: u64) -> (lazyimg_convergent::ChunkId, Bytes) {
    let len = 1 + n.wrapping_mul(2_654_435_761) % 60_000;
    chunk(n, len as usize)
}

/// Says something to the parent; what was said is out when this returns.
fn say(line: String) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").unwrap();
    out.flush().unwrap();
}

/// Puts chunks and documents and deletes roots, until it is killed. Says what was acknowledged.
async fn child(dir: &Path, round: u64) {
    let engine = Arc::new(open(dir));
    say("open".to_owned());
    let mut tasks = Vec::new();
    for task in 0..12u64 {
        let engine = Arc::clone(&engine);
        tasks.push(tokio::spawn(async move {
            for k in 0.. {
                let n = (round * 100 + task) * 1_000_000 + k;
                let (id, content) = numbered(n);
                let name = format!("d/{n}");
                match task {
                    0 => {
                        // A root of its own, deleted every now and then.
                        let of = u32::try_from(1000 + round * 1000 + k / 8).unwrap();
                        engine.put_chunk(root(of), &id, content).await.unwrap();
                        if k % 8 == 7 {
                            say(format!("removing {of}"));
                            engine.remove_chunks(root(of)).await.unwrap();
                            say(format!("removed {of}"));
                        } else {
                            say(format!("chunk {of} {n}"));
                        }
                    }
                    1 | 2 => {
                        let content = bytes(n, (n % 5000) as usize);
                        engine.put_doc(&name, content, When::Absent).await.unwrap();
                        say(format!("doc {n}"));
                        if k % 5 == 4 {
                            say(format!("deleting {n}"));
                            engine.delete_doc(&name).await.unwrap();
                            say(format!("deleted {n}"));
                        }
                    }
                    3 => {
                        let docs = (0..4).map(|i| (format!("{name}/{i}"), bytes(n + i, 40)));
                        engine.put_docs(docs.collect()).await.unwrap();
                        say(format!("docs {n}"));
                    }
                    4 => {
                        engine.put_chunk(root(2), &id, bytes(1, 10)).await.unwrap();
                        engine.replace_chunk(root(2), &id, content).await.unwrap();
                        say(format!("chunk 2 {n}"));
                    }
                    _ => {
                        engine.put_chunk(root(1), &id, content).await.unwrap();
                        say(format!("chunk 1 {n}"));
                    }
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

/// What the child said.
#[derive(Default)]
struct Said {
    chunks: BTreeSet<(RootId, u64)>,
    docs: BTreeMap<u64, Option<bool>>,
    several: BTreeSet<u64>,
    removed: BTreeMap<RootId, bool>,
}

impl Said {
    fn hear(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |i: usize| words[i].parse::<u64>().unwrap();
        let root_of = |i: usize| root(words[i].parse().unwrap());
        match words[0] {
            "chunk" => drop(self.chunks.insert((root_of(1), number(2)))),
            "doc" => drop(self.docs.insert(number(1), Some(true))),
            "deleting" => drop(self.docs.insert(number(1), None)),
            "deleted" => drop(self.docs.insert(number(1), Some(false))),
            "docs" => drop(self.several.insert(number(1))),
            "removing" => drop(self.removed.insert(root_of(1), false)),
            "removed" => drop(self.removed.insert(root_of(1), true)),
            // The test harness has a word to say too.
            _ => {}
        }
    }

    async fn check(&self, engine: &EmbeddedEngine) {
        for (of, n) in &self.chunks {
            if self.removed.contains_key(of) {
                continue;
            }
            let (id, content) = numbered(*n);
            let got = engine.get_chunk(*of, &id).await.unwrap();
            assert!(
                got.as_ref() == Some(&content),
                "chunk {n} of {of} is lost or wrong"
            );
        }
        for (of, done) in &self.removed {
            if *done {
                assert_eq!(
                    engine.list_chunks(*of, None, 10).await.unwrap(),
                    [],
                    "{of} is back"
                );
            }
        }
        for (n, there) in &self.docs {
            let got = engine.get_doc(&format!("d/{n}")).await.unwrap();
            let right = Some(bytes(*n, (n % 5000) as usize));
            match there {
                Some(true) => assert!(got == right, "document {n} is lost or wrong"),
                Some(false) => assert_eq!(got, None, "document {n} is back"),
                None => assert!(got.is_none() || got == right, "document {n} is wrong"),
            }
        }
        for n in &self.several {
            for i in 0..4 {
                let got = engine.get_doc(&format!("d/{n}/{i}")).await.unwrap();
                assert!(
                    got == Some(bytes(n + i, 40)),
                    "document {n}/{i} is lost or wrong"
                );
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_kill_9() {
    if let Ok(words) = std::env::var(CHILD) {
        let (round, dir) = words.split_once(' ').unwrap();
        return child(Path::new(dir), round.parse().unwrap()).await;
    }
    let rounds: u64 = std::env::var(ROUNDS).map_or(30, |n| n.parse().expect(ROUNDS));
    let dir = tempfile::tempdir().unwrap();
    let mut all = Vec::new();
    let mut acknowledged = 0;
    for round in 0..rounds {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "what_was_acknowledged_survives_kill_9",
                "--nocapture",
            ])
            .env(CHILD, format!("{round} {}", dir.path().display()))
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut said = Said::default();
        // Killed after so many words: early, in the midst, or while it opens.
        let words = [0, 1, 3, 20, 77, 150, 400, 800][(round % 8) as usize];
        for _ in 0..words {
            said.hear(&lines.next().unwrap().unwrap());
        }
        // And not always right behind one.
        std::thread::sleep(Duration::from_micros(round * 7919 % 20_000));
        child.kill().unwrap();
        for line in lines {
            said.hear(&line.unwrap());
        }
        let status = child.wait().unwrap();
        assert_eq!(
            status.code(),
            None,
            "the child has ended by itself: {status}"
        );
        let engine = open(dir.path());
        said.check(&engine).await;
        acknowledged += said.chunks.len() + said.docs.len() + said.several.len();
        all.push(said);
        // What earlier rounds have put too, every now and then.
        if round % 10 == 9 || round + 1 == rounds {
            for said in &all {
                said.check(&engine).await;
            }
        }
        engine.close().await;
    }
    assert!(acknowledged as u64 > rounds, "nothing was put");
}

/// A directory with `n` chunks in root 1, closed.
async fn filled(dir: &Path, n: u64) {
    let engine = open(dir);
    for n in 0..n {
        let (id, content) = numbered(n);
        engine.put_chunk(root(1), &id, content).await.unwrap();
    }
    engine
        .put_doc("a/document", bytes(1, 100), When::Always)
        .await
        .unwrap();
    engine
        .put_doc("a/long-one", bytes(2, 100_000), When::Always)
        .await
        .unwrap();
    engine.close().await;
}

async fn missing(engine: &EmbeddedEngine, n: u64) -> Vec<u64> {
    let mut missing = Vec::new();
    for n in 0..n {
        let (id, content) = numbered(n);
        match engine.get_chunk(root(1), &id).await {
            Ok(Some(got)) => assert_eq!(got, content),
            Ok(None) | Err(EngineError::Damaged(_)) => missing.push(n),
            Err(e) => panic!("{e}"),
        }
    }
    missing
}

fn segments(dir: &Path) -> Vec<PathBuf> {
    let folder = dir.join("segments/r00000001");
    let mut found: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    found.sort();
    found
}

#[tokio::test]
async fn an_index_that_is_lost_or_damaged_is_built_anew() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path(), 100).await;
    assert!(segments(dir.path()).len() > 2);
    // Lost; then each of its files damaged in turn.
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    let engine = open(dir.path());
    assert_eq!(missing(&engine, 100).await, [] as [u64; 0]);
    assert_eq!(
        engine.list_chunks(root(1), None, 1000).await.unwrap().len(),
        100
    );
    engine.close().await;
    let mut damaged = 0;
    for name in ["sst", "MANIFEST", "CURRENT"] {
        let files = fs::read_dir(dir.path().join("index")).unwrap();
        let files: Vec<_> = files.map(|e| e.unwrap().path()).collect();
        let is_meant = |p: &&PathBuf| p.to_string_lossy().contains(name);
        for path in files.iter().filter(is_meant) {
            let mut content = fs::read(path).unwrap();
            content.iter_mut().for_each(|b| *b ^= 0x55);
            fs::write(path, content).unwrap();
            damaged += 1;
        }
        // Damage in a table shows when it is read; then the next start mends it.
        if let Ok(engine) = EmbeddedEngine::open(&options(dir.path())) {
            missing(&engine, 100).await;
            engine.close().await;
        }
        let engine = open(dir.path());
        assert_eq!(missing(&engine, 100).await, [] as [u64; 0], "{name}");
        assert_eq!(
            engine.get_doc("a/document").await.unwrap(),
            Some(bytes(1, 100))
        );
        engine.close().await;
    }
    assert!(damaged >= 3);
}

#[tokio::test]
async fn a_torn_record_is_cut_off_and_the_segment_goes_on() {
    for (garbage, keep_index) in [
        (10, true),
        (60, true),
        (5000, true),
        (10, false),
        (5000, false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), 10).await;
        let last = segments(dir.path()).pop().unwrap();
        let len = fs::metadata(&last).unwrap().len();
        // The beginning of a real record of this segment, and garbage.
        let mut torn = fs::read(&last).unwrap()[32..][..garbage].to_vec();
        torn.extend_from_slice(&bytes(3, 77));
        let file = fs::OpenOptions::new().write(true).open(&last).unwrap();
        file.write_all_at(&torn, len).unwrap();
        if !keep_index {
            fs::remove_dir_all(dir.path().join("index")).unwrap();
        }
        let engine = open(dir.path());
        assert_eq!(
            fs::metadata(&last).unwrap().len(),
            len,
            "{garbage} {keep_index}"
        );
        assert_eq!(missing(&engine, 10).await, [] as [u64; 0]);
        let (id, content) = numbered(11);
        assert!(
            engine
                .put_chunk(root(1), &id, content.clone())
                .await
                .unwrap()
        );
        engine.close().await;
        let engine = open(dir.path());
        assert_eq!(engine.get_chunk(root(1), &id).await.unwrap(), Some(content));
        engine.close().await;
    }
}

#[tokio::test]
async fn a_flipped_bit_costs_one_chunk_and_repair_brings_it_back() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path(), 20).await;
    // In the body of the first record, and in the header of the second.
    let (_, first) = numbered(0);
    let path = &segments(dir.path())[0];
    let mut content = fs::read(path).unwrap();
    content[32 + 52 + first.len() / 2] ^= 1;
    content[32 + 52 + first.len() + 20] ^= 1;
    fs::write(path, content).unwrap();
    for lost_index in [false, true] {
        if lost_index {
            fs::remove_dir_all(dir.path().join("index")).unwrap();
        }
        let engine = open(dir.path());
        assert_eq!(missing(&engine, 20).await, [0, 1], "{lost_index}");
        let (id, _) = numbered(0);
        if !lost_index {
            let error = engine.get_chunk(root(1), &id).await.unwrap_err();
            assert!(matches!(error, EngineError::Damaged(_)), "{error}");
        }
        engine.close().await;
    }
    let engine = open(dir.path());
    for n in [0, 1] {
        let (id, content) = numbered(n);
        engine.replace_chunk(root(1), &id, content).await.unwrap();
    }
    assert_eq!(missing(&engine, 20).await, [] as [u64; 0]);
    engine.close().await;
    // The later copy wins when the index is built anew.
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    let engine = open(dir.path());
    assert_eq!(missing(&engine, 20).await, [] as [u64; 0]);
    engine.close().await;
}

#[tokio::test]
async fn a_missing_segment_is_noticed_and_the_rest_is_read() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path(), 100).await;
    fs::remove_file(&segments(dir.path())[1]).unwrap();
    let engine = open(dir.path());
    let lost = missing(&engine, 100).await;
    assert!(!lost.is_empty() && lost.len() < 60, "{lost:?}");
    let (id, content) = numbered(lost[0]);
    let error = engine.get_chunk(root(1), &id).await.unwrap_err();
    assert!(error.to_string().contains("missing"), "{error}");
    engine.replace_chunk(root(1), &id, content).await.unwrap();
    assert_eq!(missing(&engine, 100).await, lost[1..]);
    engine.close().await;
}

#[tokio::test]
async fn a_deletion_that_a_crash_has_interrupted_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path(), 50).await;
    let folder = dir.path().join("segments/r00000001");
    let gone = dir.path().join("segments/r00000001.gone");
    fs::rename(&folder, &gone).unwrap();
    let engine = open(dir.path());
    assert!(!gone.exists());
    assert_eq!(engine.list_chunks(root(1), None, 10).await.unwrap(), []);
    let (id, content) = numbered(1);
    assert!(
        engine
            .put_chunk(root(1), &id, content.clone())
            .await
            .unwrap()
    );
    assert_eq!(engine.get_chunk(root(1), &id).await.unwrap(), Some(content));
    engine.close().await;
}

#[tokio::test]
async fn deleting_a_root_gives_its_room_back() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let empty = engine.used_bytes().await.unwrap().unwrap();
    for n in 0..20 {
        let (id, content) = chunk(n, 1 << 20);
        engine.put_chunk(root(5), &id, content).await.unwrap();
    }
    assert!(engine.used_bytes().await.unwrap().unwrap() >= empty + (20 << 20));
    engine.remove_chunks(root(5)).await.unwrap();
    let (id, _) = chunk(1, 1 << 20);
    assert_eq!(engine.get_chunk(root(5), &id).await.unwrap(), None);
    assert!(engine.used_bytes().await.unwrap().unwrap() < empty + (2 << 20));
    engine.close().await;
}

#[tokio::test]
async fn one_process_owns_the_directory_and_others_learn_which() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let Err(e) = EmbeddedEngine::open(&options(dir.path())) else {
        panic!("two engines in one directory");
    };
    assert!(matches!(e, EngineError::Setup(_)));
    assert!(
        e.to_string()
            .contains(&format!("process {}", std::process::id())),
        "{e}"
    );
    drop(engine);
    open(dir.path()).close().await;
}

#[tokio::test]
async fn a_directory_of_something_else_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("thesis.txt"), "years of work").unwrap();
    let Err(e) = EmbeddedEngine::open(&options(dir.path())) else {
        panic!("took over a directory");
    };
    assert!(e.to_string().contains("thesis.txt"), "{e}");
    assert!(!dir.path().join("segments").exists());
    fs::remove_file(dir.path().join("thesis.txt")).unwrap();
    open(dir.path()).close().await;
    let version = dir.path().join("VERSION");
    let text = fs::read_to_string(&version).unwrap();
    fs::write(&version, text.replace(" 1 ", " 7 ")).unwrap();
    assert!(EmbeddedEngine::open(&options(dir.path())).is_err());
    fs::write(&version, text).unwrap();
    open(dir.path()).close().await;
}

#[tokio::test]
async fn after_close_everything_is_unavailable_and_nothing_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let (id, content) = numbered(1);
    engine
        .put_chunk(root(1), &id, content.clone())
        .await
        .unwrap();
    engine.close().await;
    engine.close().await;
    let is_closed = |r: Result<(), EngineError>| matches!(r, Err(EngineError::Unavailable(_)));
    assert!(is_closed(
        engine.put_chunk(root(1), &id, content).await.map(|_| ())
    ));
    assert!(is_closed(engine.get_chunk(root(1), &id).await.map(|_| ())));
    assert!(is_closed(
        engine
            .put_doc("a", Bytes::new(), When::Always)
            .await
            .map(|_| ())
    ));
    assert!(is_closed(engine.get_doc("a").await.map(|_| ())));
    assert!(is_closed(engine.check().await));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_full_and_loses_nothing() {
    for reserve in [None, Some(0)] {
        // A file system of its own; needs root.
        let place = tempfile::tempdir().unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=96m", "tmpfs"])
            .arg(place.path())
            .status()
            .unwrap();
        assert!(
            mount.success(),
            "this test must run as root: it mounts a tmpfs"
        );
        let result = tokio::spawn(fill(place.path().join("data"), reserve)).await;
        let unmount = Command::new("umount").arg(place.path()).status().unwrap();
        result.unwrap();
        assert!(unmount.success());
    }
}

/// Fills the disk, looks, makes room, goes on.
async fn fill(dir: PathBuf, reserve: Option<u64>) {
    let options = EmbeddedOptions {
        min_free_bytes: reserve,
        ..options(&dir)
    };
    let engine = EmbeddedEngine::open(&options).unwrap();
    let mut kept = Vec::new();
    let mut full = 0;
    for n in 0..400 {
        let (id, content) = chunk(n, 300_000);
        match engine
            .put_chunk(root(1 + (n % 2) as u32), &id, content)
            .await
        {
            Ok(_) => kept.push(n),
            Err(EngineError::Full(_)) => full += 1,
            Err(e) => panic!("{e}"),
        }
    }
    assert!(full > 10 && kept.len() > 100, "{full} {}", kept.len());
    if reserve.is_none() {
        assert!(matches!(engine.check().await, Err(EngineError::Full(_))));
        // Deleting documents needs no room beyond the reserve.
        engine.delete_doc("x").await.unwrap();
        let put = engine.put_doc("y", bytes(1, 1 << 20), When::Always).await;
        assert!(matches!(put, Err(EngineError::Full(_))), "{put:?}");
    }
    let check = async |engine: &EmbeddedEngine, roots: &[u64]| {
        for n in kept.iter().filter(|n| roots.contains(&(*n % 2))) {
            let (id, content) = chunk(*n, 300_000);
            let got = engine
                .get_chunk(root(1 + (n % 2) as u32), &id)
                .await
                .unwrap();
            assert_eq!(got, Some(content));
        }
    };
    check(&engine, &[0, 1]).await;
    // Room comes back, and it goes on.
    engine.remove_chunks(root(1)).await.unwrap();
    let (id, content) = chunk(1000, 300_000);
    assert!(engine.put_chunk(root(3), &id, content).await.unwrap());
    engine
        .put_doc("y", bytes(1, 100), When::Always)
        .await
        .unwrap();
    engine.check().await.unwrap();
    engine.close().await;
    let engine = EmbeddedEngine::open(&options).unwrap();
    check(&engine, &[1]).await;
    assert_eq!(engine.get_doc("y").await.unwrap(), Some(bytes(1, 100)));
    engine.close().await;
}
