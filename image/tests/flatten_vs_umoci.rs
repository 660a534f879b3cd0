//! The same OCI layouts, unpacked by umoci (as root) and flattened here, must give the same tree.
//!
//! Where the two differ on purpose:
//! - Parents that nobody mentions: umoci dates them, and the directory in which the first of them
//!   was made, "now"; here they are of 1970, and the directory keeps its time. So does a directory
//!   of the same layer that loses names to a whiteout of a directory above it. (Determinism.)
//! - A parent that is a file in the layers so far: umoci 0.4.7 fails with ENOTDIR, newer umoci and
//!   overlayfs replace it; so does lazyimg. Such stacks are left out here.
//! - A hard link to itself: umoci removes the file and then fails; GNU tar, which writes such
//!   entries when it is given a name twice, leaves the file alone, and so does lazyimg. Left out.
//! - `..` in names: umoci cuts it off, lazyimg refuses the layer. Not generated.
//! - `security.selinux`, `system.nfs4_acl` and some `trusted.overlay.*` attributes: umoci never
//!   writes them, because they would mean something on the host it unpacks to. Here they are kept
//!   (where Linux has a place for them): the image is served, not installed. Not generated.
//! - Attributes with an empty value: Go's reader drops them, here they are kept. Not generated.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests.

mod layers_support;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use layers_support::host::{describe, require_root, run, without_time};
use layers_support::model::Model;
use layers_support::raw::{Raw, end, pax};
use layers_support::stack::{Op, layer, stack};
use layers_support::{Image, assert_same};
use lazyimg_convergent::Digest;
use proptest::prelude::*;

/// Writes an OCI layout with these layers (every other one gzipped) under the tag `t`.
fn write_layout(dir: &Path, layers: &[Vec<u8>]) {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        (digest, bytes.len())
    };
    let mut descriptors = Vec::new();
    let mut diff_ids = Vec::new();
    for (n, tar) in layers.iter().enumerate() {
        diff_ids.push(Digest::of(tar).to_string());
        let (suffix, blob) = if n % 2 == 0 {
            ("", tar.clone())
        } else {
            let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gz.write_all(tar).unwrap();
            ("+gzip", gz.finish().unwrap())
        };
        let (digest, size) = put(&blob);
        descriptors.push(serde_json::json!({
            "mediaType": format!("application/vnd.oci.image.layer.v1.tar{suffix}"),
            "digest": digest.to_string(),
            "size": size,
        }));
    }
    let config = serde_json::json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let (config, config_size) = put(config.to_string().as_bytes());
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config.to_string(),
            "size": config_size,
        },
        "layers": descriptors,
    });
    let (manifest, manifest_size) = put(manifest.to_string().as_bytes());
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": manifest.to_string(),
            "size": manifest_size,
            "annotations": {"org.opencontainers.image.ref.name": "t"},
        }],
    });
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// What umoci makes of the layers.
fn unpack(layers: &[Vec<u8>]) -> Vec<String> {
    require_root();
    let dir = tempfile::tempdir().unwrap();
    write_layout(&dir.path().join("image"), layers);
    run(Command::new("umoci")
        .current_dir(dir.path())
        .args(["unpack", "--image", "image:t", "bundle"]));
    describe(&dir.path().join("bundle/rootfs"))
}

/// What lazyimg makes of them.
fn flatten(layers: &[Vec<u8>]) -> Vec<String> {
    let mut image = Image::default();
    for tar in layers {
        image.apply(&tar[..]).unwrap();
    }
    image.describe()
}

/// `disturbed`: directories that umoci dates "now", see the head of this file.
fn compare(layers: &[Vec<u8>], disturbed: &[String]) {
    let (ours, theirs) = (flatten(layers), unpack(layers));
    // Where ours is dated 1970 nobody gave a time; see the head of this file.
    let undated: Vec<_> = ours
        .iter()
        .filter(|line| line.split(' ').nth(3) == Some("0.000000000"))
        .map(|line| line.split(' ').next().unwrap().to_owned())
        .collect();
    let dateless = |lines: &[String]| {
        without_time(lines, |path, _| {
            undated.iter().chain(disturbed).any(|p| p == path)
        })
    };
    assert_same(&dateless(&ours), &dateless(&theirs), "umoci");
}

#[test]
fn one_layer_with_every_oddity_equals_umoci() {
    let name = |bytes: &[u8]| bytes.to_vec();
    let long = format!("long/{}/{}", "n".repeat(255), "m".repeat(200));
    let base = [
        Raw::new(b"setuid", b'0').with(100, b"0006755\0").body(b"#!"),
        pax(&[("SCHILY.xattr.security.capability", b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0")]),
        Raw::new(b"ping", b'0').with(100, b"0000755\0").body(b"elf"),
        pax(&[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.trusted.b", b"\0\xff\n=")]),
        Raw::new(b"attributes", b'5').bytes(),
        pax(&[("SCHILY.xattr.system.posix_acl_access",
            b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x02\0\x05\0\xe8\x03\0\0\x04\0\x05\0\xff\xff\xff\xff\x10\0\x07\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff")]),
        Raw::new(b"acl", b'0').with(100, b"0000770\0").body(b"x"),
        pax(&[("uid", b"4294967294"), ("gid", b"2097152"), ("mtime", b"-86400.25")]),
        Raw::new(b"owned", b'0').body(b"x"),
        pax(&[("path", long.as_bytes())]),
        Raw::new(b"short", b'0').body(b"x"),
        Raw::gnu(b"././@LongLink", b'L').body(&[b"gnu/".to_vec(), vec![b'g'; 200], name(b"\0")].concat()),
        Raw::gnu(b"short", b'0').body(b"x"),
        Raw::new(b"not utf8 \xff\xfe\x80", b'0').body(b"x"),
        Raw::new(b"new\nline", b'2').link(b"\xffto").with(136, b"00000001234\0").bytes(),
        Raw::new(b"null", b'3').with(329, b"0000001\0").with(337, b"0000003\0").bytes(),
        Raw::new(b"disk", b'4').with(329, b"0000010\0").with(337, b"3777777\0").bytes(),
        Raw::new(b"overlay-whiteout", b'3').bytes(),
        Raw::new(b"pipe", b'6').with(108, b"0000005\0").bytes(),
        Raw::new(b"a", b'0').body(b"one"),
        Raw::new(b"b", b'1').link(b"a").bytes(),
        Raw::new(b"c", b'1').link(b"/b").bytes(),
        Raw::new(b"a", b'0').body(b"two"),
        Raw::new(b"usr/bin/", b'5').bytes(),
        Raw::new(b"bin", b'2').link(b"usr/bin").bytes(),
        Raw::new(b"bin/sh", b'0').body(b"sh"),
        Raw::new(b"up", b'2').link(b"../../../usr").bytes(),
        Raw::new(b"up/x", b'0').body(b"x"),
        Raw::new(b"/absolute", b'0').body(b"x"),
        Raw::new(b"unmentioned/parents/f", b'0').body(b"x"),
        Raw::new(b"old-dir/", 0).with(257, &[0; 8]).bytes(),
        pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"),
              ("GNU.sparse.name", b"sparse"), ("GNU.sparse.realsize", b"100000000")]),
        Raw::new(b"GNUSparseFile.1/sparse", b'0')
            .body(&[&b"2\n0\n3\n99999990\n4\n"[..], &[0; 495], b"abcdefg"].concat()),
        Raw::new(b"./", b'5').with(100, b"0000711\0").with(136, b"00000000777\0").bytes(),
        end(),
    ]
    .concat();
    let upper = [
        Raw::new(b"linked-from-above", b'1').link(b"ping").bytes(),
        Raw::new(b"setuid", b'5').bytes(),
        Raw::new(b".wh.a", b'0').bytes(),
        Raw::new(b"attributes", b'5').bytes(),
        Raw::new(b"usr/.wh..wh..opq", b'0').bytes(),
        Raw::new(b"bin", b'5').bytes(),
        Raw::new(b"bin/sh", b'0').body(b"new"),
        end(),
    ]
    .concat();
    compare(std::slice::from_ref(&base), &[]);
    compare(&[base, upper], &[]);
}

/// Entries that both can apply, and the directories that umoci dates "now".
fn agreeable(stack: Vec<Vec<Op>>) -> (Vec<Vec<u8>>, Vec<String>) {
    let mut model = Model::default();
    let layers = stack
        .into_iter()
        .map(|ops| {
            model.begin_layer();
            let ops: Vec<Op> = ops
                .into_iter()
                .filter(|op| {
                    let before = model.clone();
                    let ok = model.apply(op).is_ok();
                    if !ok || model.replaced_parent || model.linked_itself {
                        model = before;
                        return false;
                    }
                    true
                })
                .collect();
            layer(&ops)
        })
        .collect();
    let disturbed = model
        .disturbed
        .iter()
        .map(|path| format!("/{}", path.join("/")))
        .collect();
    (layers, disturbed)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn random_stacks_equal_umoci(stack in stack()) {
        let (layers, disturbed) = agreeable(stack);
        compare(&layers, &disturbed);
    }
}
