//! Trimming and scrubbing: what people do to a cache by hand.

use super::*;

#[test]
fn a_trimmed_cache_uses_what_it_was_told_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let options = CacheOptions {
        max_bytes: 64 << 20,
        ..small()
    };
    let cache = HostCache::open(dir.path(), options).unwrap();
    let all: Vec<_> = (0..60).map(|seed| stored(seed, 500_000)).collect();
    for (id, bytes) in &all {
        put(&cache, id, bytes);
    }
    cache.flush();
    assert!(cache.stats().used_bytes > 30 << 20);
    let half = cache.trim(20 << 20);
    assert!(half.used_bytes <= 20 << 20, "{half:?}");
    let kept = all.iter().filter(|(id, _)| cache.contains(id)).count();
    assert!((10..60).contains(&kept), "{kept}");
    let empty = cache.trim(0);
    assert_eq!(empty.segments, 0);
    assert!(segment_files(dir.path()).is_empty());
    assert!(all.iter().all(|(id, _)| cache.get(id).is_none()));
    put(&cache, &all[0].0, &all[0].1);
    cache.flush();
    assert_eq!(get_checked(&cache, &all[0].0).unwrap(), all[0].1);
}

#[test]
fn a_scrub_forgets_what_went_bad_and_nothing_else() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let cache = HostCache::open(dir.path(), small()).unwrap();
    let all: Vec<_> = (0..6).map(|seed| stored(seed, 300_000)).collect();
    for (id, bytes) in &all {
        put(&cache, id, bytes);
    }
    cache.flush();
    let good = cache.scrub(&mut |_, _| true);
    assert_eq!((good.good, good.bad), (6, 0));
    assert_eq!(good.good_bytes, 6 * 300_000);
    // The first segment's third record.
    let file = &segment_files(dir.path())[0];
    let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    file.write_all_at(b"damage", 700_000).unwrap();
    let mut steps = Vec::new();
    let found = cache.scrub(&mut |done, total| {
        steps.push((done, total));
        true
    });
    assert_eq!((found.good, found.bad), (5, 1));
    assert_eq!(all.iter().filter(|(id, _)| cache.contains(id)).count(), 5);
    assert!(steps.is_sorted() && steps.last().unwrap().0 == steps[0].1);
    // And it can be ended.
    let mut once = 0;
    cache.scrub(&mut |_, _| {
        once += 1;
        false
    });
    assert_eq!(once, 1);
    // What was forgotten does not come back.
    cache.close();
    let cache = HostCache::open(dir.path(), small()).unwrap();
    cache.flush();
    assert_eq!(all.iter().filter(|(id, _)| cache.contains(id)).count(), 5);
    let again = cache.scrub(&mut |_, _| true);
    assert_eq!((again.good, again.bad), (5, 0));
}
