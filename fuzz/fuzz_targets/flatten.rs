//! Two layers → tree → EROFS → reader: what flattening accepts is written and read back the same.
#![no_main]

use std::ops::ControlFlow;

use lazyimg_fuzz::{Sizes, halves, limits};
use lazyimg_image::erofs::{self, BLOCK_BYTES, FileType};
use lazyimg_image::flatten::{Counters, apply_layer};
use lazyimg_image::tree::{Kind, Tree};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (lower, upper) = halves(data);
    let (mut tree, mut sizes, mut count) = (Tree::new(), Sizes::default(), Counters::default());
    for (number, layer) in [lower, upper].into_iter().enumerate() {
        if apply_layer(
            &mut tree,
            number as u32,
            "fuzz",
            layer,
            &mut sizes,
            &limits(),
            &mut count,
        )
        .is_err()
        {
            return;
        }
    }
    // Contents one after the other, as far as the data space goes; the rest are holes.
    let blocks = |size: u64| size.div_ceil(BLOCK_BYTES);
    let (mut places, mut end) = (std::collections::HashMap::new(), 0);
    for (id, inode) in tree.inodes() {
        if let Kind::File {
            size,
            content: Some(content),
        } = inode.kind
        {
            assert_eq!(sizes.of[&content], size, "inode {id:?}");
            if end + blocks(size) < 1 << 20 {
                places.insert(content, end as u32);
                end += blocks(size);
            }
        }
    }
    // Some trees EROFS can't hold (a date before 1970 is fine, an xattr of 64 KiB is not).
    let Ok(image) = erofs::write(&tree, &|content| places.get(&content).copied(), end) else {
        return;
    };
    let reader = erofs::Reader::open(image).expect("our own image");
    assert_eq!(reader.totals().inodes, tree.inode_count() as u64);
    let mut walk = tree.walk();
    erofs::walk(&reader, &mut |path, info| {
        let (wanted, id) = walk.next_entry().expect("no name too many");
        assert_eq!(path, wanted);
        let inode = tree.get(id);
        assert_eq!(info.nlink, tree.nlink(id));
        assert_eq!((info.uid, info.gid), (inode.meta.uid, inode.meta.gid));
        match &inode.kind {
            Kind::Dir(_) => assert_eq!(info.file_type, FileType::Directory),
            Kind::File { size, .. } => assert_eq!(info.size, *size),
            Kind::Symlink(target) => {
                assert_eq!(&reader.read_link(info.nid).expect("a link"), target)
            }
            _ => {}
        }
        ControlFlow::Continue(())
    })
    .expect("our own image");
    assert!(walk.next_entry().is_none(), "no name too few");
});
