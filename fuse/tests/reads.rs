//! The bytes of a mount: how programs read them, and what happens when they can't be had.

// A test that can't go on should say where.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lazyimg_fuse::mountpoint::{MountpointError, Unmount};
use lazyimg_fuse::tree::TreeOptions;
use support::image::{CHUNK, meta};
use support::{BuiltImage, Health, ImageBuilder, Mounted, Options, drop_caches, noise, text};

/// A file of this name and size, of bytes that say where they are from.
fn one_file(size: usize) -> (BuiltImage, Vec<u8>) {
    let bytes = text(42, size);
    let mut b = ImageBuilder::default();
    b.file("small", "small");
    b.file("large", bytes.clone());
    (b.build(), bytes)
}

fn impatient() -> Options {
    Options {
        tree: TreeOptions {
            read_timeout: Duration::from_millis(500),
            ..TreeOptions::default()
        },
        ..Options::default()
    }
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn bytes_are_right_at_any_offset_and_length() {
    let (image, bytes) = one_file(5 * CHUNK + 1234);
    let mounted = Mounted::new(&image);
    let file = File::open(mounted.path("large")).unwrap();
    let mut at = 1_u64;
    for round in 0..2000 {
        at = at
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let offset = (at >> 33) as usize % (bytes.len() + 5000);
        let len = [1, 100, 4096, 70_000, CHUNK + 3][round % 5];
        let mut buffer = vec![0; len];
        let got = file.read_at(&mut buffer, offset as u64).unwrap();
        let right = bytes
            .get(offset..)
            .map_or(&[][..], |rest| &rest[..len.min(rest.len())]);
        assert!(
            buffer[..got] == right[..got],
            "offset {offset} length {len}"
        );
        assert!(got == right.len() || got > 0, "short only where it ends");
        if round % 500 == 0 {
            drop_caches();
        }
    }
}

#[test]
fn direct_io_reads_the_same_bytes() {
    use std::os::unix::fs::OpenOptionsExt;
    let (image, bytes) = one_file(3 * CHUNK + 1234);
    let mounted = Mounted::new(&image);
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(mounted.path("large"))
        .unwrap();
    let mut all = vec![0; 4 * CHUNK];
    let (pad, len) = (all.as_ptr().align_offset(4096), 3 * CHUNK + 8192 - 4096);
    let got = file.read_at(&mut all[pad..pad + len], 4096).unwrap();
    assert!(all[pad..pad + got] == bytes[4096..4096 + got]);
    assert_eq!(got, bytes.len() - 4096);
}

#[test]
fn a_mapped_file_has_the_same_bytes() {
    let (image, bytes) = one_file(3 * CHUNK + 1234);
    let mounted = Mounted::new(&image);
    let file = File::open(mounted.path("large")).unwrap();
    let len = bytes.len();
    #[allow(unsafe_code)]
    // SAFETY: a private mapping of a file that never changes, unmapped at the end, used in bounds.
    unsafe {
        let map = rustix::mm::mmap(
            std::ptr::null_mut(),
            len,
            rustix::mm::ProtFlags::READ,
            rustix::mm::MapFlags::PRIVATE,
            &file,
            0,
        )
        .unwrap();
        let mapped = std::slice::from_raw_parts(map.cast::<u8>(), len);
        for offset in (0..len).rev().step_by(65_537) {
            assert_eq!(mapped[offset], bytes[offset], "offset {offset}");
        }
        assert!(mapped == bytes);
        rustix::mm::munmap(map, len).unwrap();
    }
}

#[test]
fn sendfile_moves_the_same_bytes() {
    let (image, bytes) = one_file(2 * CHUNK + 99);
    let mounted = Mounted::new(&image);
    let file = File::open(mounted.path("large")).unwrap();
    let mut out = tempfile::tempfile().unwrap();
    let mut offset = 0;
    while (offset as usize) < bytes.len() {
        assert!(rustix::fs::sendfile(&out, &file, Some(&mut offset), 1 << 20).unwrap() > 0);
    }
    let mut copy = Vec::new();
    io::Seek::rewind(&mut out).unwrap();
    out.read_to_end(&mut copy).unwrap();
    assert!(copy == bytes);
}

#[test]
fn a_program_runs_out_of_the_mount() {
    // Statically linked on Debian.
    let program = fs::read("/sbin/ldconfig").expect("this test runs ldconfig, which Debian has");
    let mut b = ImageBuilder::default();
    b.file_with("bin/ldconfig", meta(0o755), program);
    b.file_with("bin/script", meta(0o755), "#!/bin/sh\necho from a script\n");
    let mounted = Mounted::new(&b.build());
    let run = |name: &str, arg: &str| Command::new(mounted.path(name)).arg(arg).output().unwrap();
    let output = run("bin/ldconfig", "--version");
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("ldconfig"));
    assert_eq!(run("bin/script", "").stdout, b"from a script\n");
    let chrooted = Command::new("chroot")
        .arg(mounted.dir())
        .args(["/bin/ldconfig", "--version"])
        .output()
        .unwrap();
    assert!(chrooted.status.success());
}

#[test]
fn holes_read_as_zeros_are_never_fetched_and_can_be_sought() {
    let mut b = ImageBuilder::default();
    let mut sparse = vec![0; 8 * CHUNK];
    sparse[4 * CHUNK + 7] = 1;
    b.file("sparse", sparse.clone());
    b.file("zeros", vec![0; 3 * CHUNK]);
    let mounted = Mounted::new(&b.build());
    mounted.wait_for_metadata();
    mounted.origin.set(Health::Down);
    assert!(fs::read(mounted.path("zeros")).unwrap() == vec![0; 3 * CHUNK]);
    let file = File::open(mounted.path("sparse")).unwrap();
    let mut head = vec![1; 4 * CHUNK];
    file.read_exact_at(&mut head, 0).unwrap();
    assert!(head.iter().all(|&b| b == 0));
    let seek = |from| rustix::fs::seek(&file, from);
    assert_eq!(
        seek(rustix::fs::SeekFrom::Data(0)).unwrap(),
        4 * CHUNK as u64
    );
    assert_eq!(seek(rustix::fs::SeekFrom::Hole(0)).unwrap(), 0);
    assert_eq!(
        seek(rustix::fs::SeekFrom::Hole(4 * CHUNK as u64 + 9)).unwrap(),
        5 * CHUNK as u64
    );
    assert_eq!(
        seek(rustix::fs::SeekFrom::Data(5 * CHUNK as u64)),
        Err(rustix::io::Errno::NXIO)
    );
    assert_eq!(
        seek(rustix::fs::SeekFrom::Data(99 * CHUNK as u64)),
        Err(rustix::io::Errno::NXIO)
    );
    mounted.origin.set(Health::Good);
    assert!(fs::read(mounted.path("sparse")).unwrap() == sparse);
}

#[test]
fn a_read_of_a_few_bytes_fetches_one_chunk_and_reading_in_order_fetches_ahead() {
    let (image, bytes) = one_file(40 * CHUNK);
    let mounted = Mounted::new(&image);
    mounted.wait_for_metadata();
    let before = mounted.store.stats().snapshot().tiers[0].delivered.chunks;
    let file = File::open(mounted.path("large")).unwrap();
    let mut one = [0; 1];
    file.read_exact_at(&mut one, 20 * CHUNK as u64 + 5).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let fetched = mounted.store.stats().snapshot().tiers[0].delivered.chunks - before;
    assert_eq!(fetched, 1, "nothing that nobody reads");
    let mut head = vec![0; 4 * CHUNK];
    file.read_exact_at(&mut head, 0).unwrap();
    assert!(head == bytes[..4 * CHUNK]);
    std::thread::sleep(Duration::from_millis(500));
    let snapshot = mounted.store.stats().snapshot();
    assert!(snapshot.prefetched.chunks >= 2, "{snapshot:?}");
    let fetched = snapshot.tiers[0].delivered.chunks - before;
    assert!(
        (5..=1 + 4 + 4).contains(&fetched),
        "{fetched} chunks for a quarter of 16"
    );
}

#[test]
fn an_origin_that_fails_is_eio_in_time_and_reads_work_when_it_is_back() {
    let (image, bytes) = one_file(4 * CHUNK);
    for health in [Health::Down, Health::Silent, Health::Wrong] {
        let mounted = Mounted::with(&image, &impatient());
        mounted.wait_for_metadata();
        mounted.origin.set(health);
        for _ in 0..2 {
            let began = Instant::now();
            assert_eq!(
                errno(fs::read(mounted.path("large"))),
                libc::EIO,
                "{health:?}"
            );
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "{health:?} took {:?}",
                began.elapsed()
            );
        }
        assert!(mounted.mount.errors() >= 2, "counted");
        mounted.origin.set(Health::Good);
        assert!(
            fs::read(mounted.path("large")).unwrap() == bytes,
            "{health:?}"
        );
    }
}

#[test]
fn a_read_waits_as_long_as_its_timeout_however_long_fetches_take_by_default() {
    let (image, bytes) = one_file(4 * CHUNK);
    let options = Options {
        tree: TreeOptions {
            read_timeout: Duration::from_secs(12),
            ..TreeOptions::default()
        },
        fetch_deadline: Duration::from_millis(200),
        ..Options::default()
    };
    let mounted = Mounted::with(&image, &options);
    mounted.wait_for_metadata();
    mounted.origin.set(Health::Silent);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(mounted.path("large")));
        // More than twice the store's deadline: the kernel asks twice.
        std::thread::sleep(Duration::from_secs(2));
        mounted.origin.set(Health::Good);
        assert!(reader.join().unwrap().unwrap() == bytes);
    });
    assert_eq!(mounted.mount.errors(), 0);
}

#[test]
fn reads_that_hang_do_not_hold_up_reads_that_need_not() {
    let mut b = ImageBuilder::default();
    for i in 0..40 {
        b.file(format!("f{i}"), noise(i + 1, CHUNK));
    }
    let options = Options {
        tree: TreeOptions {
            read_timeout: Duration::from_secs(20),
            ..TreeOptions::default()
        },
        ..Options::default()
    };
    let mounted = Mounted::with(&b.build(), &options);
    mounted.wait_for_metadata();
    let cached = fs::read(mounted.path("f0")).unwrap();
    mounted.origin.set(Health::Silent);
    std::thread::scope(|scope| {
        // Far more than there are threads to serve them.
        for i in 1..33 {
            let path = mounted.path(&format!("f{i}"));
            scope.spawn(move || assert_eq!(fs::read(path).unwrap(), noise(i + 1, CHUNK)));
        }
        std::thread::sleep(Duration::from_millis(300));
        drop_caches();
        let began = Instant::now();
        assert!(fs::read(mounted.path("f0")).unwrap() == cached);
        assert!(fs::metadata(mounted.path("f39")).is_ok());
        assert!(fs::read_dir(mounted.dir()).unwrap().count() == 40);
        assert!(
            began.elapsed() < Duration::from_secs(18),
            "took {:?}",
            began.elapsed()
        );
        mounted.origin.set(Health::Good);
    });
}

#[test]
fn many_threads_read_right_bytes_while_the_origin_comes_and_goes() {
    let mut b = ImageBuilder::default();
    for i in 0..24 {
        b.file(format!("f{i}"), noise(i + 1, 3 * CHUNK / 2));
    }
    let mounted = Mounted::with(&b.build(), &impatient());
    let done = AtomicBool::new(false);
    let (right, failed) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..8_u64)
            .map(|t| {
                let (mounted, right, failed) = (&mounted, &right, &failed);
                scope.spawn(move || {
                    for round in 0..60 {
                        let i = (t * 7 + round * 5) % 24;
                        match fs::read(mounted.path(&format!("f{i}"))) {
                            Ok(bytes) => {
                                assert!(bytes == noise(i + 1, 3 * CHUNK / 2), "f{i}");
                                right.fetch_add(1, Ordering::SeqCst);
                            }
                            Err(error) => {
                                assert_eq!(error.raw_os_error(), Some(libc::EIO));
                                failed.fetch_add(1, Ordering::SeqCst);
                                std::thread::sleep(Duration::from_millis(20));
                            }
                        }
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            let mut health = [Health::Good, Health::Down, Health::Wrong, Health::Good]
                .into_iter()
                .cycle();
            while !done.load(Ordering::SeqCst) {
                mounted.origin.set(health.next().unwrap());
                std::thread::sleep(Duration::from_millis(20));
            }
            mounted.origin.set(Health::Good);
        });
        for reader in readers {
            reader.join().unwrap();
        }
        done.store(true, Ordering::SeqCst);
    });
    assert!(
        right.load(Ordering::SeqCst) > 100 && failed.load(Ordering::SeqCst) > 0,
        "{right:?} right, {failed:?} failed"
    );
}

#[test]
fn an_unmount_with_reads_under_way_ends_in_time() {
    let (image, _) = one_file(8 * CHUNK);
    for how in [Unmount::Lazy, Unmount::Force] {
        let options = Options {
            tree: TreeOptions {
                read_timeout: Duration::from_secs(if how == Unmount::Force { 20 } else { 2 }),
                ..TreeOptions::default()
            },
            ..Options::default()
        };
        let mounted = Mounted::with(&image, &options);
        mounted.wait_for_metadata();
        mounted.origin.set(Health::Silent);
        let reader = {
            let path = mounted.path("large");
            std::thread::spawn(move || fs::read(path))
        };
        std::thread::sleep(Duration::from_millis(200));
        assert!(matches!(
            mounted.mount.unmount(Unmount::Clean),
            Err(MountpointError::Busy { .. })
        ));
        let began = Instant::now();
        mounted.mount.unmount(how).unwrap();
        assert!(
            fs::read_dir(mounted.dir()).unwrap().next().is_none(),
            "gone at once for new users"
        );
        assert!(reader.join().unwrap().is_err());
        assert!(
            mounted.mount.wait(Duration::from_secs(10)),
            "the session ends"
        );
        // Forced, the reader does not wait for its timeout; else it may.
        let limit = Duration::from_secs(if how == Unmount::Force { 18 } else { 40 });
        assert!(
            began.elapsed() < limit,
            "{how:?} took {:?}",
            began.elapsed()
        );
    }
}

#[test]
fn filled_pages_are_right_and_spare_decoding() {
    let size = 16 * CHUNK + 777;
    let (image, bytes) = one_file(size);
    let reads = |fill: bool| {
        let options = Options {
            hot_bytes: 0,
            tree: TreeOptions {
                fill,
                ..TreeOptions::default()
            },
            ..Options::default()
        };
        let mounted = Mounted::with(&image, &options);
        let file = File::open(mounted.path("large")).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
        let mut at = 7_u64;
        let mut page = [0; 4096];
        for _ in 0..600 {
            at = at
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let offset = (at >> 33) % (size as u64 - 4096) / 4096 * 4096;
            file.read_exact_at(&mut page, offset).unwrap();
            assert!(page == bytes[offset as usize..offset as usize + 4096]);
            std::thread::sleep(Duration::from_micros(300));
        }
        assert!(fs::read(mounted.path("large")).unwrap() == bytes);
        let filled = mounted.mount.filled_bytes();
        (mounted.store.stats().snapshot().reads, filled)
    };
    let (without, none) = reads(false);
    let (with, filled) = reads(true);
    assert_eq!(none, 0);
    assert!(filled > size as u64 / 2, "filled {filled}");
    assert!(
        with * 2 < without,
        "{with} chunk reads with, {without} without"
    );
}

#[test]
fn fills_reads_and_an_unmount_at_once_do_not_lock_up() {
    let (image, bytes) = one_file(32 * CHUNK);
    for _ in 0..3 {
        let options = Options {
            hot_bytes: 1 << 20,
            ..Options::default()
        };
        let mounted = Mounted::with(&image, &options);
        let stop = AtomicBool::new(false);
        let began = Instant::now();
        std::thread::scope(|scope| {
            for t in 0..6_u64 {
                let (mounted, bytes, stop) = (&mounted, &bytes, &stop);
                scope.spawn(move || {
                    let Ok(file) = File::open(mounted.path("large")) else {
                        return;
                    };
                    let mut at = t;
                    let mut buffer = vec![0; 20_000];
                    while !stop.load(Ordering::SeqCst) {
                        at = at
                            .wrapping_mul(6364136223846793005)
                            .wrapping_add(1442695040888963407);
                        let offset = (at >> 33) as usize % (bytes.len() - buffer.len());
                        match file.read_exact_at(&mut buffer, offset as u64) {
                            Ok(()) => assert!(buffer == bytes[offset..offset + buffer.len()]),
                            // Forced off.
                            Err(_) => return,
                        }
                        if at % 50 == 0 {
                            let advice = rustix::fs::Advice::DontNeed;
                            rustix::fs::fadvise(&file, 0, None, advice).unwrap();
                        }
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(700));
            mounted.mount.unmount(Unmount::Force).unwrap();
            stop.store(true, Ordering::SeqCst);
        });
        assert!(mounted.mount.wait(Duration::from_secs(10)));
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "took {:?}",
            began.elapsed()
        );
        assert!(mounted.mount.filled_bytes() > 0);
    }
}

#[test]
fn setuid_and_devices_count_only_when_asked_for() {
    let program = fs::read("/usr/bin/id").unwrap();
    let mut b = ImageBuilder::default();
    b.file_with("id", meta(0o4755), program);
    b.add(
        "zero",
        meta(0o666),
        lazyimg_image::tree::Kind::Char(lazyimg_image::tree::Rdev { major: 1, minor: 5 }),
    );
    let image = b.build();
    for allowed in [false, true] {
        let flags = lazyimg_fuse::mount::MountFlags {
            suid: allowed,
            dev: allowed,
            ..Default::default()
        };
        let mounted = Mounted::with(
            &image,
            &Options {
                flags,
                ..Options::default()
            },
        );
        fs::set_permissions(mounted.scratch.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let uid = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(mounted.path("id"))
            .arg("-u")
            .output()
            .unwrap();
        assert_eq!(uid.stdout, if allowed { &b"0\n"[..] } else { b"65534\n" });
        assert_eq!(File::open(mounted.path("zero")).is_ok(), allowed);
    }
}

#[test]
fn file_handles_lead_back_to_their_files() {
    // What NFS and some users of fanotify do; also proves that numbers don't change.
    let mounted = Mounted::new(&ImageBuilder::oddities().build());
    let script = format!(
        "import ctypes,os\n\
         libc=ctypes.CDLL(None,use_errno=True)\n\
         class H(ctypes.Structure): _fields_=[('n',ctypes.c_uint),('t',ctypes.c_int),('b',ctypes.c_ubyte*128)]\n\
         h=H(128); m=ctypes.c_int()\n\
         assert libc.name_to_handle_at(-100,b'{0}/etc/hello',ctypes.byref(h),ctypes.byref(m),0)==0,ctypes.get_errno()\n\
         open('/proc/sys/vm/drop_caches','w').write('2')\n\
         d=os.open('{0}',os.O_RDONLY)\n\
         f=libc.open_by_handle_at(d,ctypes.byref(h),0)\n\
         assert f>=0,ctypes.get_errno()\n\
         assert os.read(f,100)==b'hello\\n'\n",
        mounted.dir().display()
    );
    let output = Command::new("python3")
        .arg("-c")
        .arg(script)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
