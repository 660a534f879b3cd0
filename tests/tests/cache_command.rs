//! `lazyimg cache` on a host where nothing is mounted: no daemon has the cache.

use lazyimg_tests::flip::{self, files_below};
use lazyimg_tests::{Lazyimg, Registry, Sample, WorkDir};
use serde_json::Value;

struct Setup {
    lazyimg: Lazyimg,
    sample: Sample,
    reference: String,
    work: WorkDir,
    _registry: Registry,
}

impl Setup {
    /// A host that has read a whole image, and whose daemon has ended.
    #[track_caller]
    fn new(name: &str) -> Self {
        let work = WorkDir::new(name);
        let sample = Sample::new(&work.dir("sample"), 11, 6);
        let registry = Registry::start(work.join("registry"));
        let setup = Self {
            lazyimg: Lazyimg::new(work.join("home")),
            reference: registry.push(&sample.layout, "v1", "app:v1"),
            sample,
            work,
            _registry: registry,
        };
        setup.lazyimg.convert(&setup.reference);
        let (asked, resident) = setup.read_all();
        assert!(asked > 3 && asked == resident, "{asked} of {resident}");
        setup
    }

    /// Mounts, reads everything right, and ends the daemon; gives chunks that came from the registry, and
    /// chunks that the cache has then.
    #[track_caller]
    fn read_all(&self) -> (u64, u64) {
        let mount = self.lazyimg.mount(&self.reference, self.work.join("mnt"));
        self.sample.assert_right(mount.dir());
        assert_eq!(mount.count("/errors"), 0, "{:#}", mount.status());
        let asked = mount.count("/tiers/registry/chunks");
        let resident = self.lazyimg.status()["resident"]["chunks"].as_u64();
        mount.umount();
        self.lazyimg.stop();
        (asked, resident.unwrap_or_default())
    }

    #[track_caller]
    fn stat(&self) -> Value {
        self.lazyimg.json(&["cache", "stat"])
    }

    /// Good and bad chunks that `cache verify` finds; it must end with this code.
    #[track_caller]
    fn verify(&self, code: i32) -> (Value, Value) {
        let done = self.lazyimg.run(&["cache", "verify", "--json"]);
        assert_eq!(done.code, code, "{done}");
        let found: Value =
            serde_json::from_str(&done.text()).unwrap_or_else(|e| panic!("{e}: {done}"));
        (found["good"].clone(), found["bad"].clone())
    }
}

#[test]
fn without_a_cache_the_error_says_so_and_makes_none() {
    let work = WorkDir::new("cache-none");
    let lazyimg = Lazyimg::new(work.join("home"));
    for words in [
        &["cache", "stat"][..],
        &["cache", "verify"],
        &["cache", "trim", "--to", "0"],
    ] {
        let said = lazyimg.fails(1, words);
        assert!(said.contains("--cache-dir"), "{said}");
    }
    assert!(!lazyimg.cache().exists());
}

#[test]
fn stat_tells_what_is_there_and_trim_gives_it_up() {
    let setup = Setup::new("cache-stat");
    let stat = setup.stat();
    let segments = files_below(&setup.lazyimg.cache().join("segments"));
    let bytes: u64 = segments
        .iter()
        .map(|f| f.metadata().map_or(0, |m| m.len()))
        .sum();
    assert_eq!(stat["in_use"], false, "{stat:#}");
    assert_eq!(stat["segments"], segments.len(), "{stat:#}");
    assert!(stat["used_bytes"].as_u64() >= Some(bytes), "{stat:#}");
    assert!(bytes > 1 << 20, "{stat:#}");
    let text = setup.lazyimg.ok(&["cache", "stat"]);
    assert!(text.contains("no daemon has it"), "{text}");
    assert_eq!(setup.stat(), stat, "looking changes nothing");

    let trimmed = setup.lazyimg.json(&["cache", "trim", "--to", "0"]);
    assert_eq!(trimmed["segments"], 0, "{trimmed:#}");
    let used = |stat: &Value| stat["used_bytes"].as_u64().expect("a number");
    assert!(used(&trimmed) + bytes <= used(&stat), "{trimmed:#}");
    assert_eq!(setup.verify(0).0, 0);
    let (asked, resident) = setup.read_all();
    assert_eq!(asked, resident, "all of it came again");
}

#[test]
fn verify_finds_a_flipped_bit_and_the_next_mount_reads_right_bytes() {
    let setup = Setup::new("cache-verify");
    let (good, bad) = setup.verify(0);
    assert_eq!(bad, 0);
    let good = good.as_u64().expect("a number");
    // In the midst of a record: the first chunk begins behind two headers, and has more than this.
    let segments = files_below(&setup.lazyimg.cache().join("segments"));
    let flipped = flip::bit(&segments[0], 32 + 48 + 100, 3);
    let said = setup.lazyimg.fails(6, &["cache", "verify"]);
    assert!(said.contains("1 chunks"), "{flipped}: {said}");
    assert!(said.contains("fetched again"), "{said}");
    assert_eq!(
        setup.verify(0),
        ((good - 1).into(), 0.into()),
        "it is forgotten"
    );
    let (asked, resident) = setup.read_all();
    assert_eq!((asked, resident), (1, good), "only that one came again");
    assert_eq!(setup.verify(0), (good.into(), 0.into()));
}
