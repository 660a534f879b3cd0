//! kill -9 of the daemon: what programs see, and what comes after.

// A test that can't go on should say where.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use support::image::CHUNK;
use support::place::Place;
use support::{BuiltImage, ImageBuilder, noise, text};

fn image() -> BuiltImage {
    let mut b = ImageBuilder::oddities();
    for i in 0..12 {
        b.file(format!("data/{i}"), noise(100 + i, CHUNK));
    }
    b.file("large", text(5, 64 * CHUNK));
    b.build()
}

#[test]
fn after_kill_9_a_new_mount_cleans_up_and_says_so() {
    let place = Place::new(&image());
    place.ok(&["mount", "cache", "image", "mnt"]);
    for round in 0..3 {
        assert_eq!(
            fs::read(place.path("mnt/data/3")).unwrap(),
            noise(103, CHUNK)
        );
        place.kill(rustix::process::Signal::KILL);
        assert!(place.is_mounted("mnt"), "round {round}");
        // ECONNABORTED for who asks in the moment of the death; the kernel may open a directory by itself.
        let gone = [Some(libc::ENOTCONN), Some(libc::ECONNABORTED)];
        place.wait_until("the mount says that its daemon is dead", || {
            fs::read_dir(place.path("mnt"))
                .and_then(|mut dir| dir.next().transpose())
                .is_err_and(|error| gone.contains(&error.raw_os_error()))
        });
        assert!(
            place
                .ok(&["mount", "cache", "image", "mnt"])
                .contains("stale")
        );
    }
    assert_eq!(
        fs::read(place.path("mnt/data/3")).unwrap(),
        noise(103, CHUNK)
    );
    place.kill(rustix::process::Signal::KILL);
    place.ok(&["umount", "cache", "mnt", "clean"]);
    assert!(
        !place.is_mounted("mnt"),
        "an unmount copes with a dead daemon too"
    );
}

#[test]
fn kill_9_during_reads_and_cache_writes_never_leaves_wrong_bytes() {
    let place = Place::new(&image());
    for round in 0..12_u64 {
        place.ok(&["mount", "cache", "image", "mnt"]);
        let dir = place.path("mnt");
        let readers: Vec<_> = (0..4_u64)
            .map(|t| {
                let dir = dir.clone();
                std::thread::spawn(move || {
                    for i in 0..12 {
                        let i = (i * 5 + t + round) % 12;
                        if let Ok(bytes) = fs::read(dir.join(format!("data/{i}"))) {
                            assert!(bytes == noise(100 + i, CHUNK), "data/{i}");
                        }
                    }
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(3 + 7 * round));
        place.kill(rustix::process::Signal::KILL);
        for reader in readers {
            reader.join().unwrap();
        }
    }
    place.ok(&["mount", "cache", "image", "mnt"]);
    for i in 0..12 {
        let bytes = fs::read(place.path(&format!("mnt/data/{i}"))).unwrap();
        assert!(bytes == noise(100 + i, CHUNK), "data/{i}");
    }
}

/// Reads at random, so that the kernel is made to read the rest of chunks, until it fails.
fn read_at_random(file: &File, seed: u64, right: &[u8]) {
    let mut at = seed;
    let mut buffer = vec![0; 20_000];
    loop {
        at = at
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let offset = (at >> 33) as usize % (right.len() - buffer.len());
        match file.read_exact_at(&mut buffer, offset as u64) {
            Ok(()) => assert!(buffer == right[offset..offset + buffer.len()]),
            Err(_) => return,
        }
        // Out of the page cache again, or soon nobody would be asked.
        if at.is_multiple_of(40) {
            let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
        }
    }
}

#[test]
fn kill_9_during_random_reads_leaves_no_reader_hanging() {
    // More rounds by hand: LAZYIMG_KILLS=300.
    let rounds = std::env::var("LAZYIMG_KILLS").map_or(20, |n| n.parse().unwrap());
    let place = Place::new(&image());
    let right = text(5, 64 * CHUNK);
    for round in 0..rounds {
        place.ok(&["mount", "cache", "image", "mnt"]);
        let file = File::open(place.path("mnt/large")).unwrap();
        let (done, finished) = mpsc::channel();
        for t in 0..6 {
            let (file, right, done) = (file.try_clone().unwrap(), right.clone(), done.clone());
            std::thread::spawn(move || {
                read_at_random(&file, t + 100 * round, &right);
                let _ = done.send(());
            });
        }
        drop((file, done));
        std::thread::sleep(Duration::from_millis(100 + 13 * (round % 20)));
        if round == 5 {
            let filled = place.status().unwrap().mounts[0].filled_bytes;
            assert!(filled > 0, "this is about fills");
        }
        place.kill(rustix::process::Signal::KILL);
        let deadline = Instant::now() + Duration::from_secs(10);
        // The last sender gone is the end of the last reader.
        while Instant::now() < deadline {
            match finished.recv_timeout(Duration::from_millis(100)) {
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Ok(()) | Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
        }
        let left = matches!(finished.try_recv(), Err(mpsc::TryRecvError::Empty));
        assert!(!left, "a reader hangs after kill {round}");
    }
}
