//! `rotate-key`: the new key first, then, if wanted, the end of the old one.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::path::Path;

use lazyimg_tests::{Lazyimg, Registry, Sample, WorkDir};
use serde_json::Value;

struct World {
    lazyimg: Lazyimg,
    work: WorkDir,
    sample: Sample,
}

impl World {
    fn new(name: &str) -> Self {
        let work = WorkDir::new(name);
        let sample = Sample::new(&work.dir("sample"), 64, 1);
        Self {
            lazyimg: Lazyimg::new(work.join("home")),
            sample,
            work,
        }
    }

    fn new_key(&self) -> String {
        self.work.join("new.key").to_string_lossy().into_owned()
    }

    /// Only the new key opens the image now.
    fn assert_only_new_key(&self, reference: &str) {
        let new = self.new_key();
        self.lazyimg.ok(&["verify", reference, "--key-file", &new]);
        let error = self.lazyimg.fails(4, &["verify", reference]);
        assert!(error.contains("tenant key"), "{error}");
    }
}

fn digest(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// The manifests of an index, by digest.
fn listed(index: &[u8]) -> Vec<String> {
    let index: Value = serde_json::from_slice(index).unwrap();
    let manifests = index["manifests"].as_array().unwrap();
    manifests.iter().map(|m| digest(&m["digest"])).collect()
}

/// What docker-registry's storage has under a path of the repository.
fn stored(registry_dir: &Path, path: &str) -> Option<String> {
    let repository = "storage/docker/registry/v2/repositories/app/_manifests";
    fs::read_to_string(registry_dir.join(repository).join(path)).ok()
}

/// The manifests on the list of referrers of an image.
fn referrers(registry: &Registry, registry_dir: &Path, image: &str) -> Vec<String> {
    let tag = format!("tags/{}/current/link", image.replace(':', "-"));
    listed(&registry.blob(&stored(registry_dir, &tag).unwrap()))
}

fn is_there(registry_dir: &Path, manifest: &str) -> bool {
    let link = format!("revisions/{}/link", manifest.replace(':', "/"));
    stored(registry_dir, &link).is_some()
}

#[test]
fn a_new_key_is_made_only_for_an_image_that_is_there_under_the_old_one() {
    let w = World::new("rotate-missing");
    let registry = Registry::start(w.work.join("registry"));
    let reference = registry.push(&w.sample.layout, "v1", "app:v1");
    let (new, missing) = (w.new_key(), registry.reference("app:v2"));
    w.lazyimg
        .convert(&registry.push(&w.sample.layout, "v1", "other:v1"));
    for reference in [&missing, &reference] {
        w.lazyimg
            .fails(3, &["rotate-key", reference, "--new-key-file", &new]);
        assert!(!Path::new(&new).exists(), "{reference}");
    }
    w.lazyimg.convert(&reference);
    let old = w.lazyimg.key_file().to_string_lossy().into_owned();
    let same = w.lazyimg.run(&[
        "rotate-key",
        &reference,
        "--new-key-file",
        &old,
        "--delete-old",
    ]);
    assert_eq!(same.code, 2, "{same}");
    w.lazyimg.ok(&["verify", &reference]);
}

#[test]
fn the_old_artifacts_are_named_and_delete_old_deletes_and_unlists_them() {
    let w = World::new("rotate-delete");
    let dir = w.work.join("registry");
    let registry = Registry::start(&dir);
    let reference = registry.push(&w.sample.layout, "v1", "app:v1");
    let mut old = vec![digest(&w.lazyimg.convert(&reference)["artifact"])];
    let report = w.lazyimg.json(&["convert", &reference, "--epoch", "2"]);
    old.push(digest(&report["artifact"]));
    let image = digest(&report["image"]);
    let new = w.new_key();
    let rotate = ["rotate-key", &reference, "--new-key-file", &new];

    let said = w.lazyimg.run(&rotate);
    assert_eq!(said.code, 0, "{said}");
    for digest in &old {
        assert!(said.stderr.contains(digest), "{said}");
        assert!(is_there(&dir, digest));
    }
    assert!(said.stderr.contains("--delete-old"), "{said}");
    w.lazyimg.ok(&["verify", &reference]);

    let report = w.lazyimg.json(&[&rotate[..], &["--delete-old"]].concat());
    let artifact = digest(&report["artifact"]);
    let told: Vec<_> = report["old_artifacts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|o| (digest(&o["digest"]), o["deleted"].as_bool().unwrap()))
        .collect();
    assert_eq!(
        told,
        [(old[0].clone(), true), (old[1].clone(), true)],
        "{report:#}"
    );
    assert!(old.iter().all(|digest| !is_there(&dir, digest)));
    assert_eq!(referrers(&registry, &dir, &image), [artifact]);
    w.assert_only_new_key(&reference);
    let mount = w
        .lazyimg
        .mount_with(&reference, w.work.join("mnt"), &["--key-file", &new]);
    w.sample.assert_right(mount.dir());
    mount.umount();
    // There is nothing under the old key any more.
    w.lazyimg.fails(4, &rotate);
}

#[test]
fn a_registry_that_deletes_nothing_is_told_of_and_keeps_what_it_lists() {
    let w = World::new("rotate-keep");
    let dir = w.work.join("registry");
    let registry = Registry::start_without_deletion(&dir);
    let reference = registry.push(&w.sample.layout, "v1", "app:v1");
    let report = w.lazyimg.convert(&reference);
    let (old, image) = (digest(&report["artifact"]), digest(&report["image"]));
    let new = w.new_key();
    let rotate = [
        "rotate-key",
        &reference,
        "--new-key-file",
        &new,
        "--delete-old",
    ];
    let said = w.lazyimg.run(&rotate);
    assert_eq!(said.code, 0, "{said}");
    for word in ["does not delete", &old] {
        assert!(said.stderr.contains(word), "{said}");
    }
    let report = w.lazyimg.json(&rotate);
    assert_eq!(report["old_artifacts"][0]["deleted"], false, "{report:#}");
    let mut found = referrers(&registry, &dir, &image);
    let mut wanted = vec![old, digest(&report["artifact"])];
    found.sort();
    wanted.sort();
    assert_eq!(found, wanted);
    w.lazyimg.ok(&["verify", &reference]);
}

#[test]
fn in_a_layout_the_old_artifact_leaves_the_index() {
    let w = World::new("rotate-layout");
    let layout = w.sample.layout.duplicate(w.work.join("layout"));
    let reference = layout.reference("v1");
    let old = digest(&w.lazyimg.convert(&reference)["artifact"]);
    let index = || listed(&fs::read(layout.dir().join("index.json")).unwrap());
    assert!(index().contains(&old));
    let new = w.new_key();
    let report = w.lazyimg.json(&[
        "rotate-key",
        &reference,
        "--new-key-file",
        &new,
        "--delete-old",
    ]);
    assert_eq!(report["old_artifacts"][0]["digest"], old.as_str());
    assert_eq!(report["old_artifacts"][0]["deleted"], true, "{report:#}");
    assert!(!index().contains(&old));
    assert!(index().contains(&digest(&report["artifact"])));
    w.assert_only_new_key(&reference);
}
