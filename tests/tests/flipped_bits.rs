//! A flipped bit anywhere is noticed, never reaches a reader, and is healed where the origin is good.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::ops::Range;
use std::path::{Path, PathBuf};

use lazyimg_tests::flip::{self, files_below};
use lazyimg_tests::{Lazyimg, Mounted, Registry, Sample, WorkDir};
use serde_json::Value;

/// What a reader gets where no good copy is to be had.
const EIO: i32 = 5;

struct Setup {
    lazyimg: Lazyimg,
    registry: Registry,
    reference: String,
    sample: Sample,
    work: WorkDir,
}

impl Setup {
    fn new(name: &str, megabytes: usize) -> Self {
        let work = WorkDir::new(name);
        let sample = Sample::new(&work.dir("sample"), 7, megabytes);
        let registry = Registry::start(work.join("registry"));
        let reference = registry.push(&sample.layout, "v1", "app:v1");
        let lazyimg = Lazyimg::new(work.join("home"));
        lazyimg.convert(&reference);
        Self {
            lazyimg,
            registry,
            reference,
            sample,
            work,
        }
    }

    /// A mount whose reads ask the cache on disk, not the memory.
    fn mount(&self) -> Mounted<'_> {
        self.lazyimg.mount_with(
            &self.reference,
            self.work.join("mnt"),
            &["--hot-bytes", "0", "--read-timeout", "5"],
        )
    }

    /// The digests of the artifact's layers: the manifest, then the packs.
    fn layers(&self) -> Vec<String> {
        let inspect = self.lazyimg.json(&["inspect", &self.reference]);
        let artifact = self.registry.blob(inspect["artifact"].as_str().unwrap());
        layer_digests(&artifact)
    }

    /// Fills the host cache with the whole image and ends the daemon.
    fn fill_cache(&self) {
        let mount = self.mount();
        self.sample.assert_right(mount.dir());
        mount.umount();
        self.lazyimg.stop();
    }

    fn segments(&self) -> Vec<PathBuf> {
        let files = files_below(&self.lazyimg.cache().join("segments"));
        assert!(
            !files.is_empty(),
            "no segments in {}",
            self.lazyimg.cache().display()
        );
        files
    }
}

fn layer_digests(artifact: &[u8]) -> Vec<String> {
    let artifact: Value = serde_json::from_slice(artifact).unwrap();
    let layers = artifact["layers"].as_array().unwrap();
    layers
        .iter()
        .map(|l| l["digest"].as_str().unwrap().to_owned())
        .collect()
}

fn len(path: &Path) -> u64 {
    path.metadata().unwrap().len()
}

/// The parts of a manifest, by docs/format.md.
fn regions(manifest: &[u8]) -> [(&'static str, Range<usize>); 4] {
    let word = |at: usize| u32::from_le_bytes(manifest[at..at + 4].try_into().unwrap()) as usize;
    let header = 192;
    let entries = word(32) + word(36);
    let chunks = header + 40 * entries;
    let stored = (0..entries)
        .filter(|i| word(header + 40 * i + 4) != 0)
        .count();
    let packs = chunks + 4 + 40 * word(chunks) + 12 * stored;
    let keys = packs + 4 + word(packs);
    assert_eq!(
        keys,
        manifest.len(),
        "docs/format.md and the manifest agree"
    );
    [
        ("header", 0..header),
        ("chunk table", header..chunks),
        ("pack table", chunks..packs),
        ("key table", packs..keys),
    ]
}

/// Some offsets of each region: its ends and random ones.
fn positions(manifest: &[u8], each: usize) -> Vec<(&'static str, usize)> {
    let mut random = fastrand::Rng::with_seed(3);
    let mut all = Vec::new();
    for (name, range) in regions(manifest) {
        let more: Vec<usize> = (0..each).map(|_| random.usize(range.clone())).collect();
        all.extend(
            [range.start, range.end - 1]
                .into_iter()
                .chain(more)
                .map(|at| (name, at)),
        );
    }
    all
}

#[test]
fn a_flipped_bit_in_the_manifest_is_noticed_by_its_digest() {
    let setup = Setup::new("flip-manifest", 3);
    let at = setup.work.dir("mnt").to_string_lossy().into_owned();
    let manifest = setup.layers()[0].clone();
    let blob = setup.registry.blob_path(&manifest);
    for (region, offset) in positions(&setup.registry.blob(&manifest), 1) {
        let flipped = flip::bit(&blob, offset as u64, (offset % 8) as u8);
        let error = setup.lazyimg.fails(6, &["mount", &setup.reference, &at]);
        assert!(
            error.contains("digest") || error.contains("sha256"),
            "{region}, {flipped}: {error}"
        );
        setup.lazyimg.fails(6, &["verify", &setup.reference]);
        flipped.restore();
    }
    setup.sample.assert_right(setup.mount().dir());
}

/// Whoever can write to a store can make its digests fit. Then it is the sealed key table that tells.
#[test]
fn a_forged_manifest_whose_digests_fit_is_noticed_by_the_sealed_keys() {
    let work = WorkDir::new("forged");
    let sample = Sample::new(&work.dir("sample"), 8, 2);
    let lazyimg = Lazyimg::new(work.join("home"));
    lazyimg.convert(&sample.layout.reference("v1"));
    let inspect = lazyimg.json(&["inspect", &sample.layout.reference("v1")]);
    let artifact = std::fs::read(
        sample
            .layout
            .blob_path(inspect["artifact"].as_str().unwrap()),
    )
    .unwrap();
    let digest = layer_digests(&artifact)[0].clone();
    let manifest = std::fs::read(sample.layout.blob_path(&digest)).unwrap();
    let at = work.dir("mnt").to_string_lossy().into_owned();
    for (n, (region, offset)) in positions(&manifest, 10).into_iter().enumerate() {
        let forged = sample.layout.duplicate(work.join(format!("forged-{n}")));
        let mut bytes = manifest.clone();
        bytes[offset] ^= 1 << (n % 8);
        forged.replace_blob(&digest, &bytes);
        let what = format!("{region}, byte {offset}");
        // The pack table also says how long packs are, which no read depends on.
        let verified = lazyimg.run(&["verify", &forged.reference("v1")]);
        let harmless = verified.code == 0 && region == "pack table";
        assert!(
            harmless || matches!(verified.code, 4 | 6),
            "{what} is not noticed: {verified}"
        );
        let mounted = lazyimg.run(&["mount", &forged.reference("v1"), &at, "--read-timeout", "5"]);
        if mounted.code == 0 {
            // Where chunks lie is not sealed: a lie there leads to bytes that are refused.
            assert_eq!(region, "pack table", "{what} is mounted");
            let unreadable = sample.unreadable(Path::new(&at));
            assert!(
                unreadable.iter().all(|(_, errno)| *errno == EIO),
                "{what}: {unreadable:?}"
            );
            // The other way round it may be: what came along with the manifest is right whatever its
            // pack table says.
            assert!(
                unreadable.is_empty() || !harmless,
                "{what}: verify disagrees"
            );
            lazyimg.ok(&["umount", &at]);
            // Other locations must not find the good copies in the cache of the attempt before.
            lazyimg.stop();
            std::fs::remove_dir_all(lazyimg.cache()).unwrap();
        } else {
            assert!(matches!(mounted.code, 4 | 6), "{what}: {mounted}");
        }
        std::fs::remove_dir_all(forged.dir()).unwrap();
    }
    let mount = lazyimg.mount(&sample.layout.reference("v1"), &at);
    sample.assert_right(mount.dir());
}

#[test]
fn a_flipped_bit_in_a_pack_never_reaches_a_reader_and_reads_work_when_the_origin_is_good_again() {
    let setup = Setup::new("flip-pack", 6);
    let packs = setup.layers()[1..].to_vec();
    assert!(packs.len() >= 2, "data and metadata: {packs:?}");
    let mut random = fastrand::Rng::with_seed(5);
    // The last pack is the metadata's.
    for pack in &packs[..packs.len() - 1] {
        let path = setup.registry.blob_path(pack);
        let flips: Vec<_> = (0..4)
            .map(|_| flip::bit(&path, random.u64(..len(&path)), random.u8(..8)))
            .collect();
        let verified = setup.lazyimg.run(&["verify", &setup.reference, "--json"]);
        assert_eq!(verified.code, 6, "{verified}");
        let report: Value = serde_json::from_slice(&verified.stdout).unwrap();
        assert!(report["damaged"].as_u64().unwrap() >= 1, "{report:#}");

        let mount = setup.mount();
        let unreadable = setup.sample.unreadable(mount.dir());
        assert!(!unreadable.is_empty(), "no file is hit");
        assert!(
            unreadable.len() < setup.sample.files.len(),
            "one bad chunk spoils its own files only"
        );
        assert!(
            unreadable.iter().all(|(_, errno)| *errno == EIO),
            "{unreadable:?}"
        );
        let corrupt = mount.count("/stats/tiers/0/corrupt");
        assert!(corrupt >= 1, "{:#}", mount.status());
        assert!(
            setup.lazyimg.log().contains("WARN"),
            "nothing is logged: {}",
            setup.lazyimg.log()
        );

        flips.into_iter().for_each(flip::Flipped::restore);
        setup.sample.assert_right(mount.dir());
        mount.umount();
        setup.lazyimg.stop();
        // What is in the cache now is right as well.
        std::fs::remove_dir_all(setup.lazyimg.cache()).unwrap();
    }
}

#[test]
fn a_flipped_bit_in_the_metadatas_pack_never_shows_a_wrong_name() {
    let setup = Setup::new("flip-metadata", 2);
    let truth = lazyimg_tests::tree::snapshot(&setup.sample.source);
    let path = setup.registry.blob_path(setup.layers().last().unwrap());
    let at = setup.work.dir("mnt").to_string_lossy().into_owned();
    for i in 0..8 {
        let flipped = flip::bit(&path, len(&path) * i / 8 + i, i as u8);
        let mounted = setup
            .lazyimg
            .run(&["mount", &setup.reference, &at, "--read-timeout", "3"]);
        if mounted.code == 0 {
            let unreadable = setup.sample.unreadable(Path::new(&at));
            assert!(
                !unreadable.is_empty() && unreadable.iter().all(|(_, errno)| *errno == EIO),
                "{unreadable:?}"
            );
            setup.lazyimg.ok(&["umount", &at]);
        } else {
            assert_eq!(mounted.code, 6, "{flipped}: {mounted}");
        }
        setup.lazyimg.fails(6, &["verify", &setup.reference]);
        flipped.restore();
    }
    let mount = setup.mount();
    let shown = lazyimg_tests::tree::snapshot(mount.dir());
    lazyimg_tests::tree::assert_same(
        "after all",
        ("source", &truth),
        ("lazyimg", &shown),
        &|_, _| false,
    );
}

#[test]
fn flipped_bits_in_cached_segments_are_noticed_and_healed_from_the_registry() {
    let setup = Setup::new("flip-segments", 12);
    setup.fill_cache();
    let mut flipped = 0;
    for segment in setup.segments() {
        for offset in (0..len(&segment)).step_by(50_001) {
            flip::bit(&segment, offset, (offset % 8) as u8);
            flipped += 1;
        }
    }
    assert!(flipped > 100, "{flipped} bits flipped");
    let mount = setup.mount();
    setup.sample.assert_right(mount.dir());
    assert_eq!(mount.count("/stats/errors"), 0, "{:#}", mount.status());
    mount.umount();
    setup.lazyimg.stop();

    // Healed for good: the same reads now work without the registry.
    let mount = setup.mount();
    setup.registry.freeze();
    setup.sample.assert_right(mount.dir());
}

#[test]
fn bits_that_flip_under_a_running_mount_are_noticed_counted_and_healed() {
    let setup = Setup::new("flip-live", 8);
    let mount = setup.mount();
    setup.sample.assert_right(mount.dir());
    let mut random = fastrand::Rng::with_seed(9);
    for _ in 0..3 {
        for segment in setup.segments() {
            for _ in 0..10 {
                flip::bit(&segment, random.u64(..len(&segment)), random.u8(..8));
            }
        }
        setup
            .sample
            .files
            .iter()
            .for_each(|f| lazyimg_tests::sample::forget(&mount.join(f)));
        setup.sample.assert_right(mount.dir());
    }
    let status = mount.status();
    assert!(mount.count("/stats/bad_local_copies") > 0, "{status:#}");
    assert!(mount.count("/stats/healed") > 0, "{status:#}");
    assert_eq!(mount.count("/stats/errors"), 0, "{status:#}");
}

#[test]
fn verify_of_a_mount_finds_damaged_copies_and_replaces_them() {
    let setup = Setup::new("verify-mount", 6);
    let mount = setup.mount();
    setup.sample.assert_right(mount.dir());
    for segment in setup.segments() {
        for offset in (100_000..len(&segment)).step_by(400_000) {
            flip::bit(&segment, offset, 0);
        }
    }
    let dir = mount.dir().to_string_lossy().into_owned();
    let report = setup.lazyimg.json(&["verify", &dir]);
    assert!(report["healed"].as_u64().unwrap() > 0, "{report:#}");
    assert_eq!(report["damaged"], 0, "{report:#}");
    let report = setup.lazyimg.json(&["verify", &dir]);
    assert_eq!(
        (&report["healed"], &report["damaged"]),
        (&0.into(), &0.into()),
        "{report:#}"
    );
    // Damage that the registry can't heal is an error.
    let pack = setup.registry.blob_path(&setup.layers()[1]);
    let both: Vec<_> = (0..len(&pack))
        .step_by(100_000)
        .map(|at| flip::bit(&pack, at, 1))
        .collect();
    for segment in setup.segments() {
        (0..len(&segment))
            .step_by(100_000)
            .for_each(|at| drop(flip::bit(&segment, at, 1)));
    }
    let error = setup.lazyimg.fails(6, &["verify", &dir]);
    assert!(error.contains("damaged"), "{error}");
    both.into_iter().for_each(flip::Flipped::restore);
    setup.lazyimg.ok(&["verify", &dir]);
    setup.sample.assert_right(mount.dir());
}

#[test]
fn flipped_bits_in_the_index_cost_at_most_a_fetch() {
    let setup = Setup::new("flip-index", 4);
    setup.fill_cache();
    let mut random = fastrand::Rng::with_seed(11);
    let mut hit = 0;
    for round in 0..20 {
        let files = files_below(setup.lazyimg.cache());
        let is_log = |f: &Path| {
            f.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("daemon."))
        };
        let index = files
            .iter()
            .filter(|f| !f.starts_with(setup.lazyimg.cache().join("segments")));
        let index: Vec<_> = index.filter(|f| !is_log(f) && len(f) > 0).collect();
        assert!(
            index
                .iter()
                .any(|f| f.extension().is_some_and(|e| e == "log" || e == "sst")),
            "RocksDB: {index:?}"
        );
        // One file in each round, every file over the rounds.
        let file = index[round % index.len()];
        let flips: Vec<_> = (0..=round % 3)
            .map(|_| flip::bit(file, random.u64(..len(file)), random.u8(..8)))
            .collect();
        hit += flips.len();
        let mount = setup.mount();
        setup.sample.assert_right(mount.dir());
        assert_eq!(
            mount.count("/stats/errors"),
            0,
            "{}: {:#}",
            file.display(),
            mount.status()
        );
        mount.umount();
        setup.lazyimg.stop();
    }
    assert!(hit >= 30);
}
