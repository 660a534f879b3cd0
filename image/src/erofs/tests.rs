//! Tests of the parts: encodings, packing, placing, and what the writer refuses.

use proptest::prelude::*;

use super::dirent::{self, Block, Entry};
use super::disk::*;
use super::layout::{Body, plan};
use super::write::{Problem, WriteError};
use super::xattr;
use super::{Reader, write};
use crate::tree::{ContentId, Inode, InodeId, Kind, Meta, Mtime, Rdev, Tree};

fn inode(kind: Kind) -> Inode {
    Inode {
        meta: Meta {
            mode: 0o644,
            ..Meta::default()
        },
        kind,
        layer: 0,
    }
}

fn dir() -> Inode {
    inode(Kind::Dir(Default::default()))
}

fn file(size: u64, content: u32) -> Inode {
    inode(Kind::File {
        size,
        content: Some(ContentId(content)),
    })
}

fn with_xattr(mut inode: Inode, name: &str, value: &[u8]) -> Inode {
    inode
        .meta
        .xattrs
        .push((name.as_bytes().to_vec(), value.to_vec()));
    inode
}

/// Writes a tree that holds `inode` at `a/b`, in a data space of 1,000 blocks.
fn write_one(inode: Inode) -> Result<Vec<u8>, WriteError> {
    let mut tree = Tree::new();
    let a = tree.insert(tree.root(), b"a".to_vec(), dir());
    tree.insert(a, b"b".to_vec(), inode);
    write(&tree, &|_| Some(10), 1000)
}

fn problem_of(inode: Inode) -> Problem {
    match write_one(inode).expect_err("must be refused") {
        WriteError::Entry { path, problem } => {
            assert_eq!(path, "a/b");
            problem
        }
        other => panic!("{other}"),
    }
}

#[test]
fn the_checksum_is_crc32c_without_the_last_inversion() {
    let mut block = [0; BLOCK_BYTES as usize];
    block[SUPER_OFFSET + 8..SUPER_OFFSET + 17].copy_from_slice(b"123456789");
    set_checksum(&mut block);
    assert!(checksum_is_right(&block));
    block[4095] ^= 1;
    assert!(!checksum_is_right(&block));
}

#[test]
fn device_numbers_use_twelve_and_twenty_bits() {
    let rdev = |major, minor| Rdev { major, minor };
    assert_eq!(encode_rdev(rdev(8, 1)), Some(0x801));
    assert_eq!(encode_rdev(rdev(259, 0x1_2345)), Some(0x1231_0345));
    assert_eq!(encode_rdev(rdev(4096, 0)), None);
    assert_eq!(encode_rdev(rdev(0, 1 << 20)), None);
    for one in [
        rdev(0, 0),
        rdev(4095, 0xf_ffff),
        rdev(1, 3),
        rdev(300, 70_000),
    ] {
        assert_eq!(decode_rdev(encode_rdev(one).unwrap()), one);
    }
}

#[test]
fn a_chunk_is_the_smallest_power_of_two_that_holds_the_file() {
    for (size, bits) in [
        (1, 12),
        (4096, 12),
        (4097, 13),
        (1 << 20, 20),
        ((1 << 20) + 1, 21),
        (1 << 30, 30),
        ((1 << 30) + 1, 30),
        (1 << 40, 30),
    ] {
        assert_eq!(chunk_bits(size, DATA_CHUNK_MAX_BITS), bits, "{size}");
    }
    assert_eq!(chunk_bits(1 << 62, HOLE_CHUNK_MAX_BITS), 43);
    for bits in 12..=43 {
        assert_eq!(decode_chunk_format(encode_chunk_format(bits)), Some(bits));
    }
    assert_eq!(decode_chunk_format(0x60), None);
    assert_eq!(decode_chunk_format(0x00), None);
}

#[test]
fn types_and_modes_agree() {
    for byte in 0..=u8::MAX {
        let file_type = FileType::from_dirent(byte);
        assert_eq!(file_type.is_some(), (1..=7).contains(&byte));
        if let Some(t) = file_type {
            assert_eq!(FileType::from_mode(t.mode_bits() | 0o7777), Some(t));
        }
    }
    assert_eq!(FileType::from_mode(0o777), None);
}

proptest! {
    #[test]
    fn directory_blocks_give_back_their_names(
        names in prop::collection::btree_set(prop::collection::vec(1u8..=46, 1..=255), 1..300)
    ) {
        let names: Vec<_> = names.into_iter().collect();
        let entries: Vec<_> = (0..)
            .zip(&names)
            .map(|(nid, name)| Entry { name, nid, file_type: FileType::Fifo })
            .collect();
        let bytes = dirent::encode(&entries);
        let packing = dirent::measure(names.iter().map(Vec::len));
        prop_assert_eq!(packing.size(), bytes.len() as u64);
        prop_assert_eq!(packing.blocks, (bytes.len() as u64).div_ceil(BLOCK_BYTES));
        let mut read = Vec::new();
        for block in bytes.chunks(BLOCK_BYTES as usize) {
            let block = Block::parse(block).unwrap();
            for i in 0..block.count() {
                prop_assert_eq!(block.nid(i), read.len() as u64);
                prop_assert_eq!(block.file_type(i), Ok(FileType::Fifo));
                read.push(block.name(i).unwrap().to_vec());
            }
        }
        prop_assert_eq!(read, names);
    }

    #[test]
    fn any_bytes_are_a_directory_block_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(block) = Block::parse(&bytes) {
            for i in 0..block.count() {
                let _ = (block.name(i), block.nid(i), block.file_type(i));
            }
        }
    }

    #[test]
    fn any_bytes_are_attributes_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        // An error is an item too, and the last one.
        prop_assert!(xattr::decode(&bytes).count() <= bytes.len() + 1);
    }

    #[test]
    fn any_bytes_are_an_inode_or_refused(bytes in prop::array::uniform32(any::<u8>())) {
        let mut head = [0; INODE_BYTES as usize];
        head[..32].copy_from_slice(&bytes);
        head[0] &= 0x0f;
        head[1] = 0;
        if let Ok(decoded) = InodeHead::decode(&head) {
            prop_assert_eq!(InodeHead::decode(&decoded.encode()), Ok(decoded));
        }
    }
}

#[test]
fn inodes_lie_breadth_first_and_never_across_a_block() {
    let mut tree = Tree::new();
    let root = tree.root();
    let mut dirs = Vec::new();
    for i in 0..40u32 {
        let name = format!("dir-{i:02}-{}", "x".repeat(i as usize * 5));
        dirs.push(tree.insert(root, name.into_bytes(), dir()));
    }
    for (i, &d) in dirs.iter().enumerate() {
        for j in 0..i * 4 {
            let child = inode(Kind::Symlink(vec![b'y'; 1 + j * 20]));
            let child = with_xattr(child, "trusted.t", &vec![7; j * 3]);
            tree.insert(d, format!("{j:04}").into_bytes(), child);
        }
    }
    let layout = plan(&tree, &|_| None, 0).unwrap();
    assert_eq!(layout.inodes.len(), tree.inode_count());

    let mut expected = vec![root];
    let mut next = 0;
    while next < expected.len() {
        let children = tree.entries(expected[next]).into_iter().flatten();
        expected.extend(children.map(|(_, &id)| id));
        next += 1;
    }
    let order: Vec<InodeId> = layout.inodes.iter().map(|p| p.id).collect();
    assert_eq!(order, expected);

    assert_eq!(layout.inodes[0].at, FIRST_INODE_OFFSET);
    let mut end = 0;
    for placed in &layout.inodes {
        assert!(placed.at >= end, "inodes overlap");
        assert_eq!(placed.at % SLOT_BYTES, 0);
        end = placed.body_at();
        if let Body::Meta { inline, .. } = placed.body {
            end += inline;
        }
        assert!(
            placed.at / BLOCK_BYTES == (end - 1) / BLOCK_BYTES || placed.at % BLOCK_BYTES == 0,
            "{placed:?} crosses a block"
        );
    }
}

#[test]
fn blocks_of_a_large_directory_lie_before_what_it_holds() {
    let mut tree = Tree::new();
    let big = tree.insert(tree.root(), b"big".to_vec(), dir());
    for i in 0..2000 {
        tree.insert(big, format!("{i:08}").into_bytes(), inode(Kind::Fifo));
    }
    let layout = plan(&tree, &|_| None, 0).unwrap();
    let Body::Meta { blocks, first, .. } = layout.placed(big).body else {
        panic!("a directory has its data in the metadata");
    };
    assert!(blocks >= 9);
    assert_eq!(
        layout.inodes[2].at,
        (u64::from(first) + blocks) * BLOCK_BYTES
    );
}

#[test]
fn the_last_inode_has_room_behind_it_for_what_fsck_reads() {
    for files in 30..110 {
        let mut tree = Tree::new();
        for i in 0..files {
            let name = format!("{i:03}").into_bytes();
            tree.insert(tree.root(), name, inode(Kind::Fifo));
        }
        let layout = plan(&tree, &|_| None, 0).unwrap();
        let last = layout.inodes.last().unwrap();
        assert!(last.body_at() + 12 <= layout.total_bytes);
    }
}

#[test]
fn what_erofs_cannot_say_is_an_error_that_names_the_entry() {
    let xattr = |name: &str, value: &[u8]| with_xattr(file(0, 0), name, value);
    assert_eq!(
        problem_of(inode(Kind::Symlink(vec![b'x'; 4096]))),
        Problem::SymlinkTarget { len: 4096 }
    );
    assert_eq!(
        problem_of(inode(Kind::Symlink(Vec::new()))),
        Problem::SymlinkTarget { len: 0 }
    );
    assert_eq!(
        problem_of(inode(Kind::Char(Rdev {
            major: 4096,
            minor: 1
        }))),
        Problem::DeviceNumber {
            major: 4096,
            minor: 1
        }
    );
    assert_eq!(
        problem_of(file(u64::MAX, 0)),
        Problem::FileSize { size: u64::MAX }
    );
    assert_eq!(
        problem_of(file(990 * 4096 + 1, 0)),
        Problem::OutsideDataSpace {
            end: 1001,
            data_blocks: 1000
        }
    );
    assert_eq!(
        problem_of(inode(Kind::File {
            size: 1,
            content: None
        })),
        Problem::NoContent { size: 1 }
    );
    let mut late = inode(Kind::Fifo);
    late.meta.mtime = Mtime {
        sec: 0,
        nsec: 1_000_000_000,
    };
    assert_eq!(
        problem_of(late),
        Problem::Nanoseconds {
            nsec: 1_000_000_000
        }
    );
    assert_eq!(
        problem_of(xattr("user.long", &[0; 65536])),
        Problem::XattrValue {
            name: "user.long".into(),
            len: 65536
        }
    );
    let name = format!("user.{}", "n".repeat(251));
    assert_eq!(problem_of(xattr(&name, b"")), Problem::XattrName { name });
    assert_eq!(
        problem_of(xattr("system.posix_acl_access", b"rubbish")),
        Problem::Acl {
            name: "system.posix_acl_access".into()
        }
    );
    let mut many = file(0, 0);
    for i in 0..5 {
        many = with_xattr(many, &format!("user.{i}"), &[1; 60_000]);
    }
    assert!(matches!(problem_of(many), Problem::XattrTotal { len } if len > 262_148));
}

#[test]
fn names_that_no_directory_can_have_are_refused_wherever_they_stand() {
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
        let mut tree = Tree::new();
        let first = tree.insert(tree.root(), b"0".to_vec(), inode(Kind::Fifo));
        tree.link(tree.root(), name.to_vec(), first);
        let error = write(&tree, &|_| None, 0).expect_err("must be refused");
        assert!(
            matches!(&error, WriteError::Entry { problem: Problem::Name { len }, .. } if *len == name.len()),
            "{error}"
        );
    }
}

#[test]
fn a_data_space_beyond_all_addresses_is_refused() {
    let tree = Tree::new();
    assert!(write(&tree, &|_| None, MAX_DATA_BLOCKS).is_ok());
    assert!(matches!(
        write(&tree, &|_| None, MAX_DATA_BLOCKS + 1),
        Err(WriteError::DataSpaceTooLarge { .. })
    ));
}

#[test]
fn the_last_block_of_the_largest_data_space_can_be_used() {
    let mut tree = Tree::new();
    tree.insert(tree.root(), b"f".to_vec(), file(4096, 0));
    let last = u32::MAX - 1;
    let image = write(&tree, &|_| Some(last), MAX_DATA_BLOCKS).unwrap();
    let reader = Reader::open(image).unwrap();
    let nid = reader.lookup(reader.root(), b"f").unwrap().unwrap();
    assert_eq!(
        reader.data_start(nid).unwrap(),
        Some(u64::from(last) * 4096)
    );
}

#[test]
fn attributes_that_linux_has_not_are_left_out() {
    for name in [
        "com.apple.quarantine",
        "user.",
        "system.nfs4_acl",
        "lustre.lov",
        "userx.y",
        "system.posix_acl_access.more",
    ] {
        assert!(!super::xattr_is_kept(name.as_bytes()), "{name}");
        let image = write_one(with_xattr(file(0, 0), name, b"value")).unwrap();
        assert!(!Reader::open(image).unwrap().has_xattrs(), "{name}");
    }
    for name in ["user.x", "trusted.overlay.opaque", "security.capability"] {
        assert!(super::xattr_is_kept(name.as_bytes()), "{name}");
    }
}

#[test]
fn access_lists_are_stored_as_the_kernel_gives_them_back() {
    let entry = |tag: u16, perm: u16, id: u32| {
        let mut e = tag.to_le_bytes().to_vec();
        e.extend(perm.to_le_bytes());
        e.extend(id.to_le_bytes());
        e
    };
    let acl = |entries: &[Vec<u8>]| [&2u32.to_le_bytes()[..], &entries.concat()].concat();
    let given = acl(&[
        entry(0x01, 7, 0),
        entry(0x02, 5, 1000),
        entry(0x04, 5, 17),
        entry(0x10, 5, u32::MAX),
        entry(0x20, 4, 0),
    ]);
    let normal = acl(&[
        entry(0x01, 7, u32::MAX),
        entry(0x02, 5, 1000),
        entry(0x04, 5, u32::MAX),
        entry(0x10, 5, u32::MAX),
        entry(0x20, 4, u32::MAX),
    ]);
    let name = "system.posix_acl_access";
    let stored = |value: &[u8]| {
        let reader = Reader::open(write_one(with_xattr(file(0, 0), name, value)).unwrap()).unwrap();
        let a = reader.lookup(reader.root(), b"a").unwrap().unwrap();
        let b = reader.lookup(a, b"b").unwrap().unwrap();
        reader.xattr(b, name.as_bytes()).unwrap()
    };
    assert_eq!(stored(&given), Some(normal));
    assert_eq!(stored(&2u32.to_le_bytes()), None);
    assert_eq!(stored(b""), None);
}
