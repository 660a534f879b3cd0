//! The form of the metadata: what is written is read back, the same bytes come out for the same
//! tree, and no bytes at all make the reader panic or run away. Needs no privileges.
#![allow(clippy::unwrap_used)] // Helpers outside of test functions.

mod erofs_support;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use erofs_support::{Content, Data, Sample, describe_reader, mode, samples};
use lazyimg_image::erofs::{self, BLOCK_BYTES, DataPlace, Nid, ReadError, Reader};
use lazyimg_image::tree::{ContentId, Kind, Meta, Mtime, Rdev};
use proptest::prelude::*;
use sha2::{Digest, Sha256};

fn open(sample: &Sample) -> (Reader<Vec<u8>>, Data) {
    let data = sample.data();
    (Reader::open(sample.write(&data)).unwrap(), data)
}

fn listing(reader: &Reader<Vec<u8>>, dir: Nid, mut cookie: u64, step: usize) -> Vec<Vec<u8>> {
    let mut names = Vec::new();
    loop {
        let mut left = step;
        let before = names.len();
        reader
            .read_dir(dir, cookie, &mut |entry| {
                if left == 0 {
                    return ControlFlow::Break(());
                }
                left -= 1;
                cookie = entry.cookie_after;
                names.push(entry.name.to_vec());
                ControlFlow::Continue(())
            })
            .unwrap();
        if names.len() == before {
            return names;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_is_written_is_read_back(sample in samples(60)) {
        let (reader, data) = open(&sample);
        prop_assert_eq!(describe_reader(&reader, &data.bytes), sample.describe());
        let totals = reader.totals();
        prop_assert_eq!(totals.inodes, sample.tree.inode_count() as u64);
        prop_assert_eq!(totals.data_blocks * BLOCK_BYTES, data.bytes.len() as u64);
        prop_assert_eq!(totals.meta_blocks * BLOCK_BYTES, reader.source().len() as u64);
        prop_assert_eq!(reader.has_xattrs(), sample.tree.has_xattrs());
    }

    #[test]
    fn every_name_and_no_other_is_found(sample in samples(60)) {
        let (reader, _) = open(&sample);
        let mut walk = sample.tree.walk();
        while let Some((path, id)) = walk.next_entry() {
            let mut nid = reader.root();
            for name in path.split(|&b| b == b'/').filter(|name| !name.is_empty()) {
                let dir = nid;
                nid = reader.lookup(dir, name).unwrap().expect("the name is there");
                for other in [&name[..name.len() - 1], &[name, b"\x01"].concat()] {
                    let found = reader.lookup(dir, other).unwrap().is_some();
                    let mut wanted = false;
                    reader.read_dir(dir, 0, &mut |e| {
                        wanted |= e.name == other;
                        ControlFlow::Continue(())
                    }).unwrap();
                    prop_assert_eq!(found, wanted);
                }
            }
            prop_assert_eq!(reader.inode(nid).unwrap().nlink, sample.tree.nlink(id));
        }
    }

    #[test]
    fn the_same_tree_gives_the_same_bytes_however_it_came_about(sample in samples(60)) {
        let data = sample.data();
        let once = sample.write(&data);
        prop_assert!(once == sample.write(&data));
        // A tree that had more names for a while has other inode ids, but is the same tree.
        let mut detour = Sample { contents: sample.contents.clone(), ..Sample::default() };
        *detour.tree.meta_mut(detour.tree.root()) = sample.tree.get(sample.tree.root()).meta.clone();
        let mut ids = BTreeMap::from([(sample.tree.root(), detour.tree.root())]);
        let mut names = Vec::new();
        let mut walk = sample.tree.walk();
        while let Some((path, id)) = walk.next_entry() {
            if !path.is_empty() {
                names.push((path.to_vec(), id));
            }
        }
        let junk = detour.dir(detour.tree.root(), b"junk of a lower layer");
        detour.dir(junk, b"more");
        for (path, id) in names {
            let cut = path.iter().rposition(|&b| b == b'/');
            let (parent, name) = match cut {
                Some(cut) => (&path[..cut], &path[cut + 1..]),
                None => (&b""[..], &path[..]),
            };
            let parent = detour.tree.lookup(parent).unwrap();
            if let Some(&known) = ids.get(&id) {
                detour.tree.link(parent, name.to_vec(), known);
                continue;
            }
            let inode = sample.tree.get(id);
            let kind = match &inode.kind {
                Kind::Dir(_) => Kind::Dir(BTreeMap::new()),
                other => other.clone(),
            };
            ids.insert(id, detour.add(parent, name, inode.meta.clone(), kind));
        }
        detour.tree.remove(detour.tree.root(), b"junk of a lower layer");
        prop_assert!(once == detour.write(&data));
    }
}

#[test]
fn a_listing_goes_on_where_it_stopped() {
    let mut sample = Sample::default();
    let dir = sample.dir(sample.tree.root(), b"d");
    for i in 0..1500 {
        let name = format!("{i:05}{}", "n".repeat(i % 90));
        sample.add(dir, name.as_bytes(), mode(0o600), Kind::Fifo);
    }
    let (reader, _) = open(&sample);
    let nid = reader.lookup(reader.root(), b"d").unwrap().unwrap();
    let all = listing(&reader, nid, 0, usize::MAX);
    assert_eq!(all.len(), 1502);
    assert!(all.is_sorted());
    for step in [1, 2, 7, 100, 1499] {
        assert_eq!(listing(&reader, nid, 0, step), all, "{step}");
    }
    for cookie in [u64::MAX, u64::MAX - 4095, 1 << 40] {
        assert!(listing(&reader, nid, cookie, 1).is_empty());
    }
}

#[test]
fn dot_dot_is_the_parent_and_roots_own_is_the_root() {
    let mut sample = Sample::default();
    let a = sample.dir(sample.tree.root(), b"a");
    sample.dir(a, b"b");
    let (reader, _) = open(&sample);
    let root = reader.root();
    let a = reader.lookup(root, b"a").unwrap().unwrap();
    let b = reader.lookup(a, b"b").unwrap().unwrap();
    assert_eq!(reader.lookup(b, b"..").unwrap(), Some(a));
    assert_eq!(reader.lookup(b, b".").unwrap(), Some(b));
    assert_eq!(reader.lookup(root, b"..").unwrap(), Some(root));
    assert_eq!(reader.inode(root).unwrap().nlink, 3);
}

#[test]
fn questions_of_the_wrong_type_are_refused() {
    let mut sample = Sample::default();
    sample.file(sample.tree.root(), b"f", b"x");
    let (reader, _) = open(&sample);
    let f = reader.lookup(reader.root(), b"f").unwrap().unwrap();
    let wrong = |r: Result<(), ReadError>| matches!(r, Err(ReadError::WrongType { .. }));
    assert!(wrong(reader.lookup(f, b"x").map(drop)));
    assert!(wrong(reader.read_link(f).map(drop)));
    assert!(wrong(reader.read_dir(
        f,
        0,
        &mut |_| ControlFlow::Continue(())
    )));
    assert!(reader.inode(u64::MAX).is_err());
    assert!(reader.inode(u64::MAX / 32).is_err());
}

#[test]
fn equal_contents_share_their_blocks_and_zeros_have_none() {
    let mut sample = Sample::default();
    let root = sample.tree.root();
    sample.file(root, b"a", b"same");
    sample.file(root, b"b", b"same");
    sample.file(root, b"c", b"other");
    sample.file(root, b"empty", b"");
    let zeros = sample.content(Content::Zeros((9 << 40) + 1));
    sample.add(root, b"zeros", mode(0o644), zeros);
    let (reader, data) = open(&sample);
    assert_eq!(data.bytes.len(), 2 * 4096);
    let info = |name: &[u8]| {
        let nid = reader.lookup(reader.root(), name).unwrap().unwrap();
        reader.inode(nid).unwrap()
    };
    assert_eq!(info(b"a").data, DataPlace::Data(0));
    assert_eq!(info(b"b").data, DataPlace::Data(0));
    assert_eq!(info(b"c").data, DataPlace::Data(4096));
    assert_eq!(info(b"empty").data, DataPlace::Empty);
    assert_eq!(info(b"zeros").data, DataPlace::Hole);
    assert_eq!(info(b"zeros").size, (9 << 40) + 1);
}

#[test]
fn a_file_of_many_chunks_starts_where_it_was_placed() {
    let mut sample = Sample::default();
    let kind = Kind::File {
        size: (11 << 30) + 5,
        content: Some(ContentId(0)),
    };
    sample.add(sample.tree.root(), b"f", mode(0o644), kind);
    let meta = erofs::write(&sample.tree, &|_| Some(77), 1 << 30).unwrap();
    let reader = Reader::open(meta).unwrap();
    let nid = reader.lookup(reader.root(), b"f").unwrap().unwrap();
    assert_eq!(reader.data_start(nid).unwrap(), Some(77 * 4096));
}

#[test]
fn the_front_of_the_metadata_serves_the_top_of_the_tree() {
    let mut sample = Sample::default();
    let root = sample.tree.root();
    for i in 0..20 {
        let dir = sample.dir(root, format!("dir{i:02}").as_bytes());
        for j in 0..1000 {
            sample.add(
                dir,
                format!("file{j:06}").as_bytes(),
                mode(0o600),
                Kind::Fifo,
            );
        }
    }
    let (reader, _) = open(&sample);
    let mut highest = 0;
    reader
        .read_dir(reader.root(), 0, &mut |entry| {
            highest = highest.max(entry.nid * 32 + 64);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert!(highest < 64 << 10, "{highest}");
    assert!(reader.source().len() > 1 << 20);
}

/// Asks everything that can be asked; only the absence of a panic and an end in time matter.
fn exercise(image: Vec<u8>) {
    let Ok(reader) = Reader::open(image) else {
        return;
    };
    let mut nids: Vec<Nid> = (0..reader.source().len() as u64 / 32).step_by(3).collect();
    let _ = erofs::walk(&reader, &mut |_, info| {
        nids.push(info.nid);
        ControlFlow::Continue(())
    });
    for nid in nids {
        let _ = reader.inode(nid);
        let _ = reader.data_start(nid);
        let _ = reader.read_link(nid);
        let _ = reader.xattrs(nid);
        let _ = reader.xattr(nid, b"user.x");
        for name in [&b"."[..], b"..", b"a", b"\xff\xff"] {
            let _ = reader.lookup(nid, name);
        }
        for cookie in [0, 12, 13, 4095, 4096, u64::MAX] {
            let mut entries = 0;
            let _ = reader.read_dir(nid, cookie, &mut |entry| {
                assert!(!entry.name.is_empty() && entry.name.len() <= 255);
                entries += 1;
                ControlFlow::Continue(())
            });
            assert!(entries <= reader.source().len());
        }
    }
}

/// Makes the first block's checksum right again, so that damage behind it is reached.
fn mend_checksum(image: &mut [u8]) {
    image[1028..1032].fill(0);
    let crc = image[1024..4096].iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg())
        })
    });
    image[1028..1032].copy_from_slice(&crc.to_le_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_metadata_never_makes_the_reader_panic(
        sample in samples(30),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40),
    ) {
        let mut image = sample.write(&sample.data());
        for (at, value) in damage {
            let at = 1280 + at.index(image.len() - 1280);
            image[at] = value;
        }
        mend_checksum(&mut image);
        exercise(image);
    }

    #[test]
    fn a_flipped_bit_in_the_first_block_is_noticed(
        sample in samples(10),
        bit in 8 * 1024usize..8 * 4096,
    ) {
        let mut image = sample.write(&sample.data());
        image[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Reader::open(image).is_err());
    }

    #[test]
    fn random_bytes_behind_a_good_superblock_never_make_the_reader_panic(
        noise in prop::collection::vec(any::<u8>(), 4096),
        sparse in any::<bool>(),
    ) {
        let mut sample = Sample::default();
        for i in 0..40u32 {
            sample.file(sample.tree.root(), format!("{i}").as_bytes(), b"x");
        }
        let mut image = sample.write(&sample.data());
        for (at, noise) in noise.into_iter().enumerate().skip(1280) {
            // Flipped here and there, or all of it.
            if !sparse || noise < 4 {
                image[at] = noise;
            }
        }
        mend_checksum(&mut image);
        exercise(image);
    }

    #[test]
    fn a_truncated_image_is_refused(sample in samples(20), keep in any::<prop::sample::Index>()) {
        let mut image = sample.write(&sample.data());
        image.truncate(keep.index(image.len()));
        prop_assert!(Reader::open(image).is_err());
    }
}

#[test]
fn a_directory_that_holds_itself_ends_the_walk() {
    let mut sample = Sample::default();
    sample.dir(sample.tree.root(), b"loop");
    let mut image = sample.write(&sample.data());
    let reader = Reader::open(image.clone()).unwrap();
    let inner = reader.lookup(reader.root(), b"loop").unwrap().unwrap();
    let root = reader.root();
    let needle = inner.to_le_bytes();
    let at = (1280..4096)
        .find(|&at| image[at..at + 8] == needle)
        .unwrap();
    image[at..at + 8].copy_from_slice(&root.to_le_bytes());
    mend_checksum(&mut image);
    let reader = Reader::open(image).unwrap();
    let walked = erofs::walk(&reader, &mut |_, _| ControlFlow::Continue(()));
    assert!(matches!(walked, Err(ReadError::Corrupt { .. })));
}

/// Small metadata could claim any number of names by using the same blocks for many directories.
#[test]
fn directories_that_share_their_blocks_end_the_walk_early() {
    let mut sample = Sample::default();
    let big = sample.dir(sample.tree.root(), b"big");
    for i in 0..3000 {
        sample.add(big, format!("{i:06}").as_bytes(), mode(0o600), Kind::Fifo);
    }
    for i in 0..100 {
        sample.dir(sample.tree.root(), format!("copy{i}").as_bytes());
    }
    let mut image = sample.write(&sample.data());
    let reader = Reader::open(image.clone()).unwrap();
    let at = |name: &str| {
        let nid = reader.lookup(reader.root(), name.as_bytes()).unwrap();
        usize::try_from(nid.unwrap() * 32).unwrap()
    };
    // Whole blocks only, data layout "plain".
    let size = reader.inode(at("big") as u64 / 32).unwrap().size / 4096 * 4096;
    let mut head = image[at("big")..at("big") + 64].to_vec();
    head[0] = 1;
    head[8..16].copy_from_slice(&size.to_le_bytes());
    for i in 0..100 {
        let at = at(&format!("copy{i}"));
        image[at..at + 64].copy_from_slice(&head);
    }
    mend_checksum(&mut image);
    let room = image.len() / 12;
    let mut visited = 0;
    let reader = Reader::open(image).unwrap();
    let walked = erofs::walk(&reader, &mut |_, _| {
        visited += 1;
        ControlFlow::Continue(())
    });
    assert!(matches!(walked, Err(ReadError::Corrupt { .. })));
    assert!(visited <= room, "{visited} names in {room}");
}

/// The tree of the golden vector: one of everything.
fn golden() -> Sample {
    let mut sample = Sample::default();
    let root = sample.tree.root();
    let at = |sec, nsec| Mtime { sec, nsec };
    let meta = |mode, uid, gid, mtime| Meta {
        mode,
        uid,
        gid,
        mtime,
        xattrs: Vec::new(),
    };
    *sample.tree.meta_mut(root) = meta(0o755, 0, 0, at(1_700_000_000, 0));
    let bin = sample.add(
        root,
        b"bin",
        meta(0o755, 0, 0, at(1_700_000_001, 1)),
        Kind::Dir(BTreeMap::new()),
    );
    let kind = sample.content(Content::Bytes(b"\x7fELF and so on".repeat(400)));
    let mut su = meta(0o4755, 0, 0, at(-1, 999_999_999));
    su.xattrs.push((
        b"security.capability".to_vec(),
        [&[1, 0, 0, 2][..], &[0; 16]].concat(),
    ));
    su.xattrs.push((b"user.note".to_vec(), b"hello".to_vec()));
    let su = sample.add(bin, b"su", su, kind);
    sample.tree.link(root, b"su.hardlink".to_vec(), su);
    let kind = sample.content(Content::Bytes(b"root:x:0:0\n".to_vec()));
    sample.add(
        root,
        b"passwd",
        meta(0o640, 1, 4_000_000_000, at(2, 3)),
        kind,
    );
    let zeros = sample.content(Content::Zeros(1 << 20));
    sample.add(root, b"zeros", meta(0o600, 5, 6, at(7, 8)), zeros);
    sample.add(
        root,
        b"link",
        mode(0o777),
        Kind::Symlink(b"bin/su".to_vec()),
    );
    let null = Rdev { major: 1, minor: 3 };
    sample.add(root, b"null", mode(0o666), Kind::Char(null));
    sample.add(root, b"!first \xff", mode(0o644), Kind::Fifo);
    sample.file(root, b"empty", b"");
    sample
}

fn dump(image: &[u8]) -> String {
    let mut text = String::new();
    for (at, row) in (0..).step_by(16).zip(image.chunks(16)) {
        if row.iter().any(|&b| b != 0) {
            let hex: Vec<String> = row.iter().map(|b| format!("{b:02x}")).collect();
            text += &format!("{at:06x}  {}\n", hex.join(" "));
        }
    }
    text + &format!("{:06x}\n", image.len())
}

/// The bytes are a promise: whoever changes them changes the form of every image.
/// `LAZYIMG_BLESS=1` writes the file anew; the digest below is changed by hand.
#[test]
fn the_golden_tree_has_the_golden_bytes() {
    let sample = golden();
    let image = sample.write(&sample.data());
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/erofs-small.hex");
    if std::env::var_os("LAZYIMG_BLESS").is_some() {
        std::fs::write(path, dump(&image)).unwrap();
    }
    assert_eq!(dump(&image), std::fs::read_to_string(path).unwrap());
    let digest = Sha256::digest(&image);
    let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(
        hex,
        "203a798fee1af21c70351f09689bcf0190ed86f016e4cd2c3481804088a43c5e"
    );
}
