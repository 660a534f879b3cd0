//! A region of several store instances before one S3 and one Redis, as docs/operations.md has it.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use lazyimg_tests::process::{run, wait_for};
use lazyimg_tests::registry::free_port;
use lazyimg_tests::servers::{Garage, Redis};
use lazyimg_tests::{Lazyimg, Mounted, Registry, Sample, Store, WorkDir};
use serde_json::Value;

/// What a busy machine may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Chunks that an instance has given out.
const HITS: &str = "lazyimg_store_chunk_hits_total";
/// Chunks that were put through it.
const PUTS: &str = r#"lazyimg_store_requests_total{route="/v1/chunks/{id}",status="2xx"}"#;

struct Region {
    instances: Vec<Store>,
    redis: Redis,
    /// Who converts.
    lazyimg: Lazyimg,
    registry: Registry,
    sample: Sample,
    reference: String,
    work: WorkDir,
    _garage: Garage,
}

impl Region {
    /// A registry with an image of so many MB, and instances at these addresses that hold nothing yet.
    #[track_caller]
    fn new(name: &str, megabytes: usize, addresses: &[String]) -> Self {
        let work = WorkDir::new(name);
        let sample = Sample::new(&work.dir("sample"), 77, megabytes);
        let registry = Registry::start(work.join("registry"));
        let reference = registry.push(&sample.layout, "v1", "app:v1");
        let garage = Garage::start();
        let redis = Redis::start_with_port(64, "maxmemory-policy allkeys-lru");
        let settings = format!(
            "[engine.s3]\nendpoint = {:?}\nbucket = {:?}\nregion = {:?}\naccess-key-id-file = {:?}\n\
             secret-access-key-file = {:?}\n[engine.hot]\nendpoint = {:?}\n",
            garage.endpoint(),
            Garage::BUCKET,
            Garage::REGION,
            garage.access_key_id_file(),
            garage.secret_access_key_file(),
            redis.endpoint(),
        );
        let config = work.join("store.toml");
        std::fs::write(&config, settings).expect("a test may write to its own directory");
        let config = config.to_string_lossy().into_owned();
        let start = |(n, address): (usize, &String)| {
            let name = format!("store-{n}");
            let flags = ["--config", config.as_str(), "--instance", &name];
            Store::start_at(work.join(&name), address, &flags)
        };
        Self {
            instances: addresses.iter().enumerate().map(start).collect(),
            redis,
            lazyimg: Lazyimg::new(work.join("home")),
            registry,
            sample,
            reference,
            work,
            _garage: garage,
        }
    }

    /// One with so many instances on ports of their own. An image has some three chunks a MB, and each
    /// instance should get its share of them.
    #[track_caller]
    fn of(instances: usize, name: &str, megabytes: usize) -> Self {
        let addresses: Vec<_> = (0..instances)
            .map(|_| format!("127.0.0.1:{}", free_port()))
            .collect();
        Self::new(name, megabytes, &addresses)
    }

    /// The instances, as `--store` names them.
    fn urls(&self) -> String {
        let urls: Vec<_> = self.instances.iter().map(Store::url).collect();
        urls.join(",")
    }

    /// Converts the image into the registry and, through these instances, into the store.
    #[track_caller]
    fn convert(&self, urls: &str) -> Value {
        let convert = ["convert", &self.reference, "--store", urls];
        self.lazyimg.json(&convert)
    }

    /// A host that has never seen the image: keys, and nothing else.
    fn fresh_host(&self, name: &str) -> Lazyimg {
        let host = Lazyimg::new(self.work.join(name));
        host.copy_secrets_from(&self.lazyimg);
        host
    }

    #[track_caller]
    fn mount<'a>(&self, host: &'a Lazyimg, urls: &str) -> Mounted<'a> {
        let flags = ["--store", urls, "--hot-bytes", "0"];
        host.mount_with(&self.reference, host.home().join("mnt"), &flags)
    }

    /// A metric of each instance.
    fn each(&self, series: &str) -> Vec<u64> {
        self.instances.iter().map(|i| i.metric(series)).collect()
    }

    /// What the hot tiers of all instances were asked, by outcome.
    fn hot(&self, outcome: &str) -> u64 {
        let series = format!("lazyimg_store_hot_tier{{outcome={outcome:?}}}");
        self.each(&series).iter().sum()
    }

    /// Reads everything from the store once more: nothing of it is in the host's memory or cache.
    #[track_caller]
    fn read_anew(&self, host: &Lazyimg, root: &Path) {
        host.ok(&["cache", "trim", "--to", "0"]);
        for file in &self.sample.files {
            lazyimg_tests::sample::forget(&root.join(file));
        }
        self.sample.assert_right(root);
    }

    /// A command about the store, asked of instance `n`.
    #[track_caller]
    fn ask(&self, n: usize, words: &[&str]) -> Value {
        let url = self.instances[n].url();
        let words = [&["store"], words, &["--store", &url]].concat();
        self.lazyimg.json(&words)
    }
}

#[test]
fn a_host_reads_from_all_instances_what_was_put_through_all_of_them() {
    let mut region = Region::of(3, "shared-all", 12);
    let report = region.convert(&region.urls());
    assert_eq!(report["store"]["uploaded_chunks"], report["chunks"]);
    let put = region.each(PUTS);
    assert!(put.iter().all(|n| *n > 0), "{put:?}");
    assert!(
        Some(put.iter().sum()) >= report["chunks"].as_u64(),
        "{put:?}"
    );

    region.registry.stop();
    let mut before = vec![0; 3];
    // In any order they are the same instances.
    let mut names: Vec<_> = region.instances.iter().map(Store::url).collect();
    for name in ["one", "two"] {
        let host = region.fresh_host(name);
        let mount = region.mount(&host, &names.join(","));
        region.sample.assert_right(mount.dir());
        assert_eq!(mount.count("/errors"), 0, "{:#}", mount.status());
        assert_eq!(mount.count("/tiers/registry/chunks"), 0);
        let after = region.each(HITS);
        assert!(after.iter().zip(&before).all(|(a, b)| a > b), "{after:?}");
        before = after;
        names.reverse();
    }
    // What one instance alone was asked for is what all have.
    let host = region.fresh_host("three");
    let mount = region.mount(&host, &names[0]);
    region.sample.assert_right(mount.dir());
    assert_eq!(mount.count("/errors"), 0, "{:#}", mount.status());
}

#[test]
fn an_instance_killed_under_reads_costs_no_error_and_is_used_again_when_it_is_back() {
    let mut region = Region::of(2, "shared-kill", 6);
    region.convert(&region.urls());
    region.registry.stop();
    let host = region.fresh_host("host");
    let mount = region.mount(&host, &region.urls());
    let (done, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut instances = std::mem::take(&mut region.instances);
    let read = || {
        while !done.load(Relaxed) {
            region.read_anew(&host, mount.dir());
            rounds.fetch_add(1, Relaxed);
        }
    };
    std::thread::scope(|scope| {
        let reader = scope.spawn(read);
        // A reader that has found something wrong is not waited for.
        let reads = |n: usize| rounds.load(Relaxed) >= n || reader.is_finished();
        let drive = || {
            let asked = |instance: &Store, more: u64| {
                let before = instance.metric(HITS);
                wait_for("an instance is asked", PATIENCE, || {
                    instance.metric(HITS) > before + more || reader.is_finished()
                });
            };
            instances.iter().for_each(|instance| asked(instance, 10));
            instances[0].kill();
            asked(&instances[1], 10);
            let whole = rounds.load(Relaxed) + 2;
            wait_for("everything is read without it", PATIENCE, || reads(whole));
            instances[0].restart();
            asked(&instances[0], 10);
            asked(&instances[1], 0);
        };
        let driven = std::panic::catch_unwind(std::panic::AssertUnwindSafe(drive));
        done.store(true, Relaxed);
        if let Err(panic) = reader.join().and(driven) {
            std::panic::resume_unwind(panic);
        }
    });
    let status = mount.status();
    assert_eq!(mount.count("/errors"), 0, "{status:#}");
    assert_eq!(mount.count("/tiers/registry/chunks"), 0, "{status:#}");
}

#[test]
fn a_redis_that_is_killed_costs_hits_and_nothing_else_and_is_used_again_when_it_is_back() {
    let mut region = Region::of(2, "shared-redis", 6);
    region.convert(&region.urls());
    region.registry.stop();
    let host = region.fresh_host("host");
    let mount = region.mount(&host, &region.urls());
    let read_until = |what: &str, holds: &dyn Fn() -> bool| {
        wait_for(what, PATIENCE, || {
            region.read_anew(&host, mount.dir());
            holds()
        });
    };
    read_until("Redis has what is read", &|| region.hot("hit") > 0);
    region.redis.kill();
    let passed_over = || region.hot("failure") + region.hot("skipped");
    let (hits, before) = (region.hot("hit"), passed_over());
    region.read_anew(&host, mount.dir());
    assert!(passed_over() > before, "{}", region.instances[0].metrics());
    assert_eq!(region.hot("hit"), hits);
    region.redis.restart();
    wait_for("Redis has what is read again", PATIENCE, || {
        region.read_anew(&host, mount.dir());
        region.hot("hit") > hits
    });
    assert_eq!(region.hot("wrong"), 0);
    let status = mount.status();
    assert_eq!(mount.count("/errors"), 0, "{status:#}");
    assert_eq!(mount.count("/tiers/registry/chunks"), 0, "{status:#}");
}

/// The root with this name in what `stats` says.
fn root<'a>(stats: &'a Value, name: &str) -> &'a Value {
    let roots = stats["roots"].as_array().expect("a list");
    let found = roots.iter().find(|r| r["root"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {stats:#}"))
}

#[test]
fn a_root_that_one_instance_has_rotated_is_retired_to_all_and_what_is_put_lies_in_the_new_one() {
    let mut region = Region::of(3, "shared-roots", 4);
    region.convert(&region.instances[0].url());
    let first = root(&region.ask(1, &["stats"]), "r00000001").clone();
    assert_eq!(first["images"], 1, "{first:#}");

    assert_eq!(region.ask(0, &["rotate-root"])["root"], "r00000002");
    // Instances may not know of the rotation yet: until they must, collecting garbage moves nothing. What
    // it does then is tested with a clock that can be set (gc_model.rs): a minute is long for a test.
    let report = region.ask(2, &["gc", "--grace", "0s"]);
    let line = &report["roots"][0];
    assert_eq!(line["root"], "r00000001", "{report:#}");
    assert_eq!(line["after"], "retired", "{report:#}");
    assert_eq!(line["manifests_moved"], 0, "{report:#}");
    assert!(line["wait_seconds"].as_u64() > Some(0), "{report:#}");
    // Through an instance that was told nothing, at once: what is live lies in the new root.
    let other = Sample::new(&region.work.dir("other"), 78, 3);
    let newer = region.registry.push(&other.layout, "v1", "newer:v1");
    let convert = ["convert", &newer, "--store", &region.instances[1].url()];
    region.lazyimg.json(&convert);
    let stats = region.ask(2, &["stats"]);
    assert_eq!(root(&stats, "r00000001")["images"], 1, "{stats:#}");
    assert_eq!(root(&stats, "r00000002")["images"], 1, "{stats:#}");
    assert_eq!(root(&stats, "r00000001")["state"], "retired", "{stats:#}");

    region.registry.stop();
    let host = region.fresh_host("before");
    let mount = region.mount(&host, &region.urls());
    region.sample.assert_right(mount.dir());

    for n in 0..3 {
        let roots = region.ask(n, &["roots"]);
        let told: Vec<_> = roots.as_array().into_iter().flatten().collect();
        assert_eq!(told.len(), 2, "{roots:#}");
        assert_eq!(told[0]["state"], "retired", "{roots:#}");
        assert_eq!(told[1]["state"], "active", "{roots:#}");
        assert!(told.iter().all(|r| r["alarm"].is_null()), "{roots:#}");
    }
    region.read_anew(&host, mount.dir());
    assert_eq!(mount.count("/errors"), 0, "{:#}", mount.status());
}

/// Runs with a name of its own that has these addresses, for the command and what it starts: in a mount
/// namespace with another `/etc/hosts`.
#[track_caller]
fn with_name(
    host: &Lazyimg,
    name: &str,
    addresses: &[&str],
    script: &str,
    args: &[&str],
) -> String {
    let hosts: String = addresses.iter().map(|a| format!("{a} {name}\n")).collect();
    let file = host.home().join("hosts");
    std::fs::write(&file, hosts).expect("a test may write to its own directory");
    let usual = host.command(&[]);
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-euc"])
        .arg(format!("mount --bind \"$1\" /etc/hosts; shift; {script}"))
        .arg("sh")
        .arg(file)
        .arg(usual.get_program())
        .args(args)
        .env_clear()
        .envs(
            usual
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        )
        // Where a machine says otherwise: all lines with the name count.
        .env("RESOLV_MULTI", "on")
        .current_dir(host.home());
    run(&mut command).ok()
}

#[test]
fn a_dns_name_stands_for_all_instances_whose_addresses_it_has() {
    let (addresses, port) = (["127.0.0.1", "127.0.0.2"], free_port());
    let listen = addresses.map(|address| format!("{address}:{port}"));
    let mut region = Region::new("shared-dns", 6, &listen);
    let (name, script) = ("store.test", "exec \"$@\"");
    let url = format!("dns+http://{name}:{port}");
    let convert = ["convert", &region.reference, "--store", &url];
    with_name(&region.lazyimg, name, &addresses, script, &convert);
    let put = region.each(PUTS);
    assert!(put.iter().all(|n| *n > 0), "{put:?}");

    region.registry.stop();
    let host = region.fresh_host("host");
    let at = host.home().join("mnt").to_string_lossy().into_owned();
    std::fs::create_dir_all(&at).expect("a test may write to its own directory");
    let source = region.sample.source.to_string_lossy();
    // The mount can only be seen where it was made. The daemon ends with its last mount.
    let script = "\"$1\" mount \"$2\" \"$3\" --store \"$4\"; diff -r \"$3\" \"$5\"; \
                  \"$1\" status --json; \"$1\" umount \"$3\"";
    let args = [&region.reference, at.as_str(), &url, &source];
    let said = with_name(&host, name, &addresses, script, &args);
    let status: Value = serde_json::from_str(said.trim()).unwrap_or_else(|e| panic!("{e}: {said}"));
    let origins = &status["mounts"][0]["tiers"]["store"]["health"]["origins"];
    assert_eq!(origins.as_array().map(Vec::len), Some(2), "{status:#}");
    let hits = region.each(HITS);
    assert!(hits.iter().all(|n| *n > 0), "{hits:?}");
}
