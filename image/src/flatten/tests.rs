use super::*;
use crate::tar::tests_support::{Raw, end, pax};
use crate::tree::Mtime;

/// Keeps the bytes, as text.
#[derive(Default)]
struct Memory {
    files: Vec<Vec<u8>>,
    size: u64,
    current: Vec<u8>,
}

impl ContentSink for Memory {
    type Error = std::convert::Infallible;

    fn begin(&mut self, size: u64) -> Result<(), Self::Error> {
        assert!(size > 0);
        self.size = size;
        Ok(())
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Self::Error> {
        assert!(offset >= self.current.len() as u64 && !bytes.is_empty());
        self.current.resize(offset as usize, 0);
        self.current.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(&mut self) -> Result<ContentId, Self::Error> {
        self.current.resize(self.size as usize, 0);
        self.files.push(std::mem::take(&mut self.current));
        Ok(ContentId(self.files.len() as u32 - 1))
    }
}

struct Image {
    tree: Tree,
    sink: Memory,
    count: Counters,
    limits: Limits,
    layers: u32,
}

impl Image {
    fn new() -> Self {
        Self {
            tree: Tree::new(),
            sink: Memory::default(),
            count: Counters::default(),
            limits: Limits::default(),
            layers: 0,
        }
    }

    fn try_layer(&mut self, parts: &[Vec<u8>]) -> Result<LayerSummary, FlattenError> {
        let tar = [parts.concat(), end()].concat();
        let number = self.layers;
        self.layers += 1;
        apply_layer(
            &mut self.tree,
            number,
            "sha256:test",
            &tar[..],
            &mut self.sink,
            &self.limits,
            &mut self.count,
        )
    }

    fn layer(mut self, parts: &[Vec<u8>]) -> Self {
        self.try_layer(parts).unwrap();
        self
    }

    /// Path, and a short form of what it is; the root is left out.
    fn list(&self) -> Vec<String> {
        let mut walk = self.tree.walk();
        let mut out = Vec::new();
        while let Some((path, id)) = walk.next_entry() {
            let path = String::from_utf8_lossy(path).into_owned();
            out.push(match &self.tree.get(id).kind {
                Kind::Dir(_) => format!("{path}/"),
                Kind::File { content: None, .. } => path,
                Kind::File {
                    content: Some(c), ..
                } => {
                    let text = String::from_utf8_lossy(&self.sink.files[c.0 as usize]);
                    format!("{path}={text}")
                }
                Kind::Symlink(t) => format!("{path}->{}", String::from_utf8_lossy(t)),
                other => format!("{path} {other:?}"),
            });
        }
        out.remove(0);
        out
    }

    fn at(&self, path: &str) -> &Inode {
        self.tree.get(self.tree.lookup(path.as_bytes()).unwrap())
    }
}

fn dir(name: &str) -> Vec<u8> {
    Raw::new(name.as_bytes(), b'5').bytes()
}

fn file(name: &str, text: &str) -> Vec<u8> {
    Raw::new(name.as_bytes(), b'0').body(text.as_bytes())
}

fn link(name: &str, target: &str) -> Vec<u8> {
    Raw::new(name.as_bytes(), b'1')
        .link(target.as_bytes())
        .bytes()
}

fn symlink(name: &str, target: &str) -> Vec<u8> {
    Raw::new(name.as_bytes(), b'2')
        .link(target.as_bytes())
        .bytes()
}

fn refused(parts: &[Vec<u8>]) -> String {
    Image::new().try_layer(parts).unwrap_err().to_string()
}

#[test]
fn whiteouts_hit_lower_layers_only_wherever_they_stand() {
    let base =
        || Image::new().layer(&[dir("d"), file("d/old", "1"), file("f", "1"), file("g", "1")]);
    for order in [[0, 1], [1, 0]] {
        let parts = [file("f", "2"), file(".wh.f", "")];
        let image = base().layer(&[parts[order[0]].clone(), parts[order[1]].clone()]);
        assert_eq!(image.list(), ["d/", "d/old=1", "f=2", "g=1"]);
        let parts = [file("d/new", "2"), file("d/.wh..wh..opq", "")];
        let image = base().layer(&[parts[order[0]].clone(), parts[order[1]].clone()]);
        assert_eq!(image.list(), ["d/", "d/new=2", "f=1", "g=1"]);
        let parts = [file("d/new", "2"), file(".wh.d", "")];
        let image = base().layer(&[parts[order[0]].clone(), parts[order[1]].clone()]);
        assert_eq!(image.list(), ["d/", "d/new=2", "f=1", "g=1"]);
        let parts = [link("h", "f"), file(".wh.h", "")];
        let image = base().layer(&[parts[order[0]].clone(), parts[order[1]].clone()]);
        assert_eq!(image.list(), ["d/", "d/old=1", "f=1", "g=1", "h=1"]);
    }
    let gone = base().layer(&[
        file(".wh.d", ""),
        file(".wh.nothing", ""),
        file("no/.wh.thing", ""),
    ]);
    assert_eq!(gone.list(), ["f=1", "g=1"]);
    let emptied = base().layer(&[file(".wh..wh..opq", ""), file("new", "")]);
    assert_eq!(emptied.list(), ["new"]);
    let renamed = base().layer(&[link("h", "f"), file(".wh.f", ""), file(".wh.g", "")]);
    assert_eq!(renamed.list(), ["d/", "d/old=1", "h=1"]);
}

#[test]
fn an_opaque_directory_loses_what_is_below_its_subdirectories_too() {
    let image = Image::new()
        .layer(&[
            file("d/sub/old", "1"),
            file("d/sub/kept", "1"),
            file("d/other/x", "1"),
        ])
        .layer(&[
            file("d/sub/kept", "2"),
            file("d/.wh..wh..opq", ""),
            file("d/.wh..wh..opq", ""),
        ]);
    assert_eq!(image.list(), ["d/", "d/sub/", "d/sub/kept=2"]);
}

#[test]
fn a_directory_over_a_directory_keeps_children_and_takes_all_metadata() {
    let image = Image::new()
        .layer(&[
            pax(&[("SCHILY.xattr.user.old", b"1"), ("mtime", b"5.5")]),
            dir("d"),
            file("d/f", "1"),
        ])
        .layer(&[
            pax(&[("SCHILY.xattr.user.new", b"2"), ("mtime", b"7")]),
            Raw::new(b"d", b'5')
                .with(100, b"0001770\0")
                .with(108, b"0000012\0")
                .bytes(),
        ]);
    assert_eq!(image.list(), ["d/", "d/f=1"]);
    let meta = &image.at("d").meta;
    assert_eq!((meta.mode, meta.uid, meta.mtime.sec), (0o1770, 10, 7));
    assert_eq!(meta.xattrs, [(b"user.new".to_vec(), b"2".to_vec())]);
}

#[test]
fn a_file_may_become_a_directory_and_back() {
    let image = Image::new().layer(&[file("x", "1"), symlink("l", "x")]);
    let image = image.layer(&[dir("x"), file("x/y", "2"), file("l", "2")]);
    assert_eq!(image.list(), ["l=2", "x/", "x/y=2"]);
    let image = image.layer(&[file("x", "3"), dir("l"), dir("l")]);
    assert_eq!(image.list(), ["l/", "x=3"]);
    // A parent that is a file in a lower layer, and never mentioned as a directory.
    let image = image.layer(&[file("x/z", "4")]);
    assert_eq!(image.list(), ["l/", "x/", "x/z=4"]);
    assert_eq!(image.at("x").meta, Meta::implied_dir());
}

#[test]
fn replacing_one_hard_link_leaves_the_others_alone() {
    let image = Image::new().layer(&[file("a", "old"), link("b", "a"), link("c", "./a")]);
    let image = image.layer(&[file("b", "new"), link("d/e", "/c")]);
    assert_eq!(image.list(), ["a=old", "b=new", "c=old", "d/", "d/e=old"]);
    let id = image.tree.lookup(b"a").unwrap();
    assert_eq!(image.tree.nlink(id), 3);
    assert_eq!(image.tree.lookup(b"d/e"), Some(id));
    assert_eq!(image.at("a").layer, 0);
}

#[test]
fn a_repeated_entry_replaces_the_earlier_one() {
    let image = Image::new().layer(&[
        file("a", "1"),
        link("b", "a"),
        file("a", "2"),
        link("a", "a"),
    ]);
    assert_eq!(image.list(), ["a=2", "b=1"]);
}

#[test]
fn links_to_what_is_not_a_file_are_refused_with_layer_and_entry() {
    let message = refused(&[link("new\nÿ", "gone")]);
    assert!(
        message.starts_with(
            "layer 0 (sha256:test), entry \"new\\n\\xc3\\xbf\": hard link to \"gone\""
        ),
        "{message}"
    );
    assert!(refused(&[dir("d"), link("l", "d")]).contains("is a directory"));
    assert!(refused(&[link("l", "/")]).contains("is a directory"));
    assert!(refused(&[file("a", ""), link("a/b", "a")]).contains("is a directory"));
    assert!(refused(&[file("d/a", ""), link("d", "d/a")]).contains("neither"));
    assert!(refused(&[link("self", "self")]).contains("neither"));
    let image = Image::new().layer(&[symlink("s", "nowhere"), link("t", "s")]);
    assert_eq!(
        image.list(),
        ["s->nowhere", "t->nowhere"],
        "the link itself, not its target"
    );
}

#[test]
fn names_that_lead_upwards_are_refused_and_absolute_ones_stay_inside() {
    for name in ["../etc/passwd", "a/../../b", "a/..", "/..", ".."] {
        assert!(refused(&[file(name, "")]).contains("\"..\""), "{name}");
        assert!(
            refused(&[file("f", ""), link("l", name)]).contains("\"..\""),
            "{name}"
        );
    }
    let image = Image::new().layer(&[file("//etc/./passwd", "1"), dir("..."), dir("/srv/")]);
    assert_eq!(image.list(), [".../", "etc/", "etc/passwd=1", "srv/"]);
}

#[test]
fn links_in_parents_are_followed_inside_the_root() {
    let image = Image::new().layer(&[
        dir("usr/bin"),
        symlink("bin", "usr/bin"),
        symlink("abs", "/usr"),
        symlink("up", "../../../usr"),
        symlink("usr/here", "."),
        symlink("dangling", "made/up/../later"),
        file("bin/a", "1"),
        file("abs/bin/b", "1"),
        file("up/here/here/bin/c", "1"),
        file("dangling/d", "1"),
        file("abs/.wh.bin", ""),
    ]);
    assert_eq!(
        image.list(),
        [
            "abs->/usr",
            "bin->usr/bin",
            "dangling->made/up/../later",
            "made/",
            "made/later/",
            "made/later/d=1",
            "up->../../../usr",
            "usr/",
            "usr/bin/",
            "usr/bin/a=1",
            "usr/bin/b=1",
            "usr/bin/c=1",
            "usr/here->.",
        ]
    );
    // The last name is not followed: the link is replaced.
    let image = image.layer(&[file("bin", "2"), link("e", "abs/bin/a")]);
    assert_eq!(image.at("e").layer, 0);
    assert!(matches!(image.at("bin").kind, Kind::File { .. }));
}

#[test]
fn links_in_circles_are_refused() {
    let circle = [symlink("a", "b/x"), symlink("b", "a"), file("a/f", "")];
    assert!(refused(&circle).contains("circle"));
    let mut chain: Vec<_> = (0..40)
        .map(|n| symlink(&format!("l{n}"), &format!("l{}", n + 1)))
        .collect();
    chain.push(dir("l40"));
    let reachable = Image::new().layer(&[chain.concat(), file("l0/f", "1")]);
    assert!(reachable.tree.lookup(b"l40/f").is_some());
    chain[0] = symlink("l0", "lx/../lx");
    chain.push(symlink("lx", "l1"));
    assert!(refused(&[chain.concat(), file("l0/f", "1")]).contains("circle"));
    // Few hops, but each through a target of thousands of names.
    let long = "d/../".repeat(800);
    let costly = [
        dir("d"),
        pax(&[("linkpath", long.as_bytes())]),
        symlink("a", ""),
        pax(&[("linkpath", format!("a/{long}").as_bytes())]),
        symlink("b", ""),
        pax(&[("linkpath", format!("b/{long}").as_bytes())]),
        symlink("c", ""),
        file("c/f", ""),
    ];
    assert!(refused(&costly).contains("--max-resolve-steps"));
}

#[test]
fn the_root_takes_metadata_but_stays_a_directory() {
    let image = Image::new().layer(&[
        file("f", ""),
        pax(&[("mtime", b"3.000000004"), ("SCHILY.xattr.user.r", b"1")]),
        Raw::new(b"./", b'5').with(100, b"0000700\0").bytes(),
    ]);
    let root = image.tree.get(image.tree.root());
    assert_eq!(
        (root.meta.mode, root.meta.mtime),
        (0o700, Mtime { sec: 3, nsec: 4 })
    );
    assert_eq!(image.list(), ["f"]);
    for flag in [b'0', b'1', b'2', b'3', b'6'] {
        assert!(refused(&[Raw::new(b"/", flag).link(b"x").bytes()]).contains("root of an image"));
    }
}

#[test]
fn parents_that_nobody_mentions_are_plain_directories_until_somebody_does() {
    let image = Image::new().layer(&[file("a/b/c", "1")]);
    assert_eq!(image.at("a/b").meta, Meta::implied_dir());
    let image = image.layer(&[Raw::new(b"a/b", b'5').with(100, b"0000700\0").bytes()]);
    assert_eq!(image.at("a/b").meta.mode, 0o700);
    assert_eq!(image.list(), ["a/", "a/b/", "a/b/c=1"]);
}

#[test]
fn whiteouts_of_nothing_and_of_the_parent_are_refused() {
    for name in [".wh.", "d/.wh..", "d/.wh..."] {
        assert!(
            refused(&[dir("d"), file(name, "")]).contains("whiteout"),
            "{name}"
        );
    }
}

#[test]
fn aufs_names_serve_as_link_targets_and_vanish() {
    let image = Image::new().layer(&[
        file(".wh..wh.aufs", ""),
        dir(".wh..wh.plnk"),
        file(".wh..wh.plnk/12.34", "1"),
        link("a", "/.wh..wh.plnk/12.34"),
        link("b", "/.wh..wh.plnk/12.34"),
        file(".wh.normal", ""),
    ]);
    assert_eq!(image.list(), ["a=1", "b=1"]);
    assert_eq!(image.tree.nlink(image.tree.lookup(b"a").unwrap()), 2);
}

#[test]
fn attributes_without_a_place_in_linux_are_counted_and_left_out() {
    let mut image = Image::new();
    let summary = image
        .try_layer(&[
            pax(&[
                ("SCHILY.xattr.com.apple.quarantine", b"x"),
                (
                    "SCHILY.acl.access",
                    b"user::rwx,user:lisa:r-x,group::r-x,mask::r-x,other::---",
                ),
                ("SCHILY.xattr.security.capability", b"\x01\0\0\x02"),
            ]),
            file("f", ""),
        ])
        .unwrap();
    assert_eq!(summary.dropped_xattrs, 2);
    assert_eq!(image.at("f").meta.xattrs.len(), 1);
    assert!(image.tree.has_xattrs());
}

#[test]
fn every_limit_stops_its_excess_and_names_its_flag() {
    let check = |limits: Limits, parts: &[Vec<u8>], expected: &str| {
        let mut image = Image::new();
        image.limits = limits;
        let message = image.try_layer(parts).unwrap_err().to_string();
        assert!(
            message.contains("entry \"") && message.contains(expected),
            "{expected}: {message}"
        );
    };
    let limits = Limits::default;
    let many: Vec<_> = (0..11).map(|n| file(&n.to_string(), "")).collect();
    check(
        Limits {
            entries_per_image: 10,
            ..limits()
        },
        &many,
        "--max-entries",
    );
    check(
        Limits {
            entries_per_image: 2,
            ..limits()
        },
        &[file("a/b/c", "")],
        "--max-entries",
    );
    check(
        Limits {
            image_bytes: 5,
            ..limits()
        },
        &[file("a", "abc"), file("b", "abc")],
        "--max-image-bytes",
    );
    check(
        Limits {
            file_bytes: 2,
            ..limits()
        },
        &[file("a", "abc")],
        "--max-file-bytes",
    );
    check(
        Limits {
            metadata_bytes: 9,
            ..limits()
        },
        &many,
        "--max-metadata-bytes",
    );
    check(
        Limits {
            path_depth: 2,
            ..limits()
        },
        &[file("a/b/c/d", "")],
        "--max-path-depth",
    );
    let xattr = [pax(&[("SCHILY.xattr.user.x", &[b'v'; 99])]), file("f", "")];
    check(
        Limits {
            metadata_bytes: 50,
            ..limits()
        },
        &xattr,
        "--max-metadata-bytes",
    );
    let long = |path: String| [pax(&[("path", path.as_bytes())]), file("", "")];
    check(limits(), &long("n".repeat(256)), "255 bytes in a name");
    check(limits(), &long("n/".repeat(2048)), "4095 bytes in a path");
    let target = [
        pax(&[("linkpath", "t".repeat(4096).as_bytes())]),
        symlink("s", ""),
    ];
    check(limits(), &target, "4095 bytes in a link's target");
    // Short names, but links on the way make the real path long.
    let deep = [
        dir(&["n"; 40].join("/")),
        symlink("s", &["n"; 40].join("/")),
        file("s/a/b", ""),
    ];
    check(
        Limits {
            path_depth: 40,
            ..limits()
        },
        &deep,
        "--max-path-depth",
    );
    let mut image = Image::new();
    image.limits.layers = 1;
    image.try_layer(&[]).unwrap();
    let message = image.try_layer(&[]).unwrap_err().to_string();
    assert!(message.contains("--max-layers"), "{message}");
}

#[test]
fn the_default_limits_let_a_million_entries_through_and_stop_the_endless() {
    // An endless archive: the same header again and again, as a stream.
    struct Endless(Vec<u8>, usize);
    impl Read for Endless {
        fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
            let n = self.0.len().min(out.len());
            out[..n].copy_from_slice(&self.0[..n]);
            self.1 += n;
            Ok(n)
        }
    }
    let header = file("same", "");
    let stream = Endless(header, 0);
    let (mut tree, mut sink, mut count) = (Tree::new(), Memory::default(), Counters::default());
    let limits = Limits {
        entries_per_image: 100_000,
        ..Limits::default()
    };
    let e = apply_layer(&mut tree, 0, "x", stream, &mut sink, &limits, &mut count).unwrap_err();
    assert!(e.to_string().contains("more than 100000 entries"), "{e}");
    assert_eq!(tree.inode_count(), 2);
}

#[test]
fn heaped_whiteouts_stay_cheap() {
    let many: Vec<u8> = (0..20_000)
        .flat_map(|n| file(&format!("d/{n}"), ""))
        .collect();
    let opaque = file("d/.wh..wh..opq", "").repeat(20_000);
    let image = Image::new()
        .layer(std::slice::from_ref(&many))
        .layer(&[many, opaque]);
    assert_eq!(image.tree.inode_count(), 20_002);
}

#[test]
fn an_error_of_the_sink_names_the_file_and_keeps_its_cause() {
    #[derive(Debug, thiserror::Error)]
    #[error("disk full")]
    struct Full;
    struct Sink;
    impl ContentSink for Sink {
        type Error = Full;
        fn begin(&mut self, _: u64) -> Result<(), Full> {
            Ok(())
        }
        fn data(&mut self, _: u64, _: &[u8]) -> Result<(), Full> {
            Err(Full)
        }
        fn finish(&mut self) -> Result<ContentId, Full> {
            unreachable!()
        }
    }
    let tar = [file("a/b", "x"), end()].concat();
    let (mut tree, mut count) = (Tree::new(), Counters::default());
    let e = apply_layer(
        &mut tree,
        4,
        "sha256:x",
        &tar[..],
        &mut Sink,
        &Limits::default(),
        &mut count,
    )
    .unwrap_err();
    assert_eq!(
        e.to_string(),
        "layer 4 (sha256:x), entry \"a/b\": the file's content can't be kept: disk full"
    );
    assert!(std::error::Error::source(&e).unwrap().is::<Full>());
}

#[test]
fn a_damaged_archive_names_layer_and_entry() {
    let mut cut = [file("a", "1"), file("b", &"x".repeat(1000))].concat();
    cut.truncate(1024 + 600);
    let (mut tree, mut sink, mut count) = (Tree::new(), Memory::default(), Counters::default());
    let e = apply_layer(
        &mut tree,
        1,
        "sha256:x",
        &cut[..],
        &mut sink,
        &Limits::default(),
        &mut count,
    )
    .unwrap_err();
    assert!(
        e.to_string()
            .starts_with("layer 1 (sha256:x), entry \"b\": byte "),
        "{e}"
    );
    assert!(e.to_string().contains("truncated"), "{e}");
}
