//! What the EROFS tests share: sample trees with their data, and one way to describe a tree
//! whatever it is read from.
#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests, outside of #[test] functions"
)]
#![allow(dead_code)] // each test binary uses its part

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;

use lazyimg_image::erofs::{self, BLOCK_BYTES, DataPlace, FileType, MetaSource, Reader};
use lazyimg_image::tree::{ContentId, Inode, InodeId, Kind, Meta, Mtime, Rdev, Tree};
use proptest::prelude::*;
use sha2::{Digest, Sha256};

/// A tree and the bytes of its files, by content id.
#[derive(Default)]
pub struct Sample {
    pub tree: Tree,
    pub contents: Vec<Content>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Content {
    Bytes(Vec<u8>),
    /// So many zeros: a hole.
    Zeros(u64),
}

impl Content {
    fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Zeros(len) => *len,
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Bytes(bytes) => describe_bytes(bytes),
            Self::Zeros(_) => "zeros".to_owned(),
        }
    }
}

fn describe_bytes(bytes: &[u8]) -> String {
    if bytes.iter().all(|&b| b == 0) {
        return "zeros".to_owned();
    }
    let digest = Sha256::digest(bytes);
    digest.iter().take(8).map(|b| format!("{b:02x}")).collect()
}

/// Where a sample's contents lie, and the bytes of its data space.
pub struct Data {
    pub starts: Vec<Option<u32>>,
    pub bytes: Vec<u8>,
}

impl Sample {
    pub fn add(&mut self, dir: InodeId, name: &[u8], meta: Meta, kind: Kind) -> InodeId {
        let inode = Inode {
            meta,
            kind,
            layer: 0,
        };
        self.tree.insert(dir, name.to_vec(), inode)
    }

    pub fn dir(&mut self, parent: InodeId, name: &[u8]) -> InodeId {
        self.add(parent, name, mode(0o755), Kind::Dir(BTreeMap::new()))
    }

    pub fn content(&mut self, content: Content) -> Kind {
        let size = content.len();
        if size == 0 {
            return Kind::File {
                size,
                content: None,
            };
        }
        let id = ContentId(u32::try_from(self.contents.len()).unwrap());
        self.contents.push(content);
        Kind::File {
            size,
            content: Some(id),
        }
    }

    pub fn file(&mut self, dir: InodeId, name: &[u8], bytes: &[u8]) -> InodeId {
        let kind = self.content(Content::Bytes(bytes.to_vec()));
        self.add(dir, name, mode(0o644), kind)
    }

    /// One block range for each different content, holes left out.
    pub fn data(&self) -> Data {
        let mut data = Data {
            starts: Vec::new(),
            bytes: Vec::new(),
        };
        let mut known = HashMap::new();
        for content in &self.contents {
            let start = match content {
                Content::Zeros(_) => None,
                Content::Bytes(bytes) if bytes.iter().all(|&b| b == 0) => None,
                Content::Bytes(bytes) => Some(*known.entry(bytes).or_insert_with(|| {
                    let start = data.bytes.len() / BLOCK_BYTES as usize;
                    data.bytes.extend_from_slice(bytes);
                    let end = data.bytes.len().next_multiple_of(BLOCK_BYTES as usize);
                    data.bytes.resize(end, 0);
                    u32::try_from(start).unwrap()
                })),
            };
            data.starts.push(start);
        }
        data
    }

    pub fn write(&self, data: &Data) -> Vec<u8> {
        let place = |id: ContentId| data.starts[id.0 as usize];
        erofs::write(&self.tree, &place, data.bytes.len() as u64 / BLOCK_BYTES)
            .expect("the sample can be written")
    }

    pub fn describe(&self) -> Vec<String> {
        self.tree
            .describe(&|id| self.contents[id.0 as usize].describe())
    }
}

pub fn mode(mode: u16) -> Meta {
    Meta {
        mode,
        ..Meta::default()
    }
}

/// One line of a description, as `Tree::describe` has it. `what` is type and content.
pub struct Line<'a> {
    pub path: &'a [u8],
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub sec: i64,
    pub nsec: u32,
    pub nlink: u64,
    pub what: String,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub inode: u64,
    pub is_dir: bool,
}

/// Collects lines; the same for every source of a tree.
#[derive(Default)]
pub struct Description {
    first: HashMap<u64, String>,
    pub lines: Vec<String>,
}

impl Description {
    pub fn add(&mut self, l: Line<'_>) {
        let path = l.path.escape_ascii().to_string();
        let mut line = format!(
            "/{path} {:04o} {}:{} {}.{:09} nlink={} {}",
            l.mode & 0o7777,
            l.uid,
            l.gid,
            l.sec,
            l.nsec,
            l.nlink,
            l.what
        );
        for (name, value) in &l.xattrs {
            line += &format!(" {}={}", name.escape_ascii(), value.escape_ascii());
        }
        if !l.is_dir && l.nlink > 1 {
            let known = self.first.entry(l.inode).or_insert(path);
            line += &format!(" same-as=/{known}");
        }
        self.lines.push(line);
    }
}

/// Describes what a reader sees; `data` is the data space.
pub fn describe_reader<M: MetaSource>(reader: &Reader<M>, data: &[u8]) -> Vec<String> {
    let mut description = Description::default();
    erofs::walk(reader, &mut |path, info| {
        let content = || match info.data {
            DataPlace::Data(at) => {
                let at = usize::try_from(at).unwrap();
                describe_bytes(&data[at..at + usize::try_from(info.size).unwrap()])
            }
            DataPlace::Hole => "zeros".to_owned(),
            DataPlace::Empty => String::new(),
            DataPlace::Meta => panic!("a file in the metadata"),
        };
        let what = match info.file_type {
            FileType::Directory => "dir".to_owned(),
            FileType::Regular => format!("file {} {}", info.size, content()),
            FileType::Symlink => {
                let target = reader.read_link(info.nid).unwrap();
                assert_eq!(target.len() as u64, info.size);
                format!("symlink {}", target.escape_ascii())
            }
            FileType::CharDevice => format!("char {}:{}", info.rdev.major, info.rdev.minor),
            FileType::BlockDevice => format!("block {}:{}", info.rdev.major, info.rdev.minor),
            FileType::Fifo => "fifo".to_owned(),
            FileType::Socket => "socket".to_owned(),
        };
        let xattrs = reader.xattrs(info.nid).unwrap();
        assert_eq!(info.has_xattrs, !xattrs.is_empty());
        assert!(reader.has_xattrs() || xattrs.is_empty());
        for (name, value) in &xattrs {
            assert_eq!(reader.xattr(info.nid, name).unwrap().as_ref(), Some(value));
        }
        description.add(Line {
            path,
            mode: u32::from(info.mode),
            uid: info.uid,
            gid: info.gid,
            sec: info.mtime.sec,
            nsec: info.mtime.nsec,
            nlink: u64::from(info.nlink),
            what,
            xattrs,
            inode: info.nid,
            is_dir: info.file_type == FileType::Directory,
        });
        ControlFlow::Continue(())
    })
    .expect("the image can be walked");
    description.lines
}

/// Describes what lies below a directory of this machine.
pub fn describe_fs(root: &std::path::Path, with_xattrs: bool) -> Vec<String> {
    let mut description = Description::default();
    let mut stack = vec![(Vec::new(), root.to_owned())];
    while let Some((path, at)) = stack.pop() {
        describe_one(&path, &at, with_xattrs, &mut description);
        if !at.symlink_metadata().unwrap().is_dir() {
            continue;
        }
        use std::os::unix::ffi::{OsStrExt, OsStringExt};
        let mut names: Vec<Vec<u8>> = std::fs::read_dir(&at)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_vec())
            .collect();
        names.sort();
        for name in names.into_iter().rev() {
            let mut child = path.clone();
            if !child.is_empty() {
                child.push(b'/');
            }
            child.extend_from_slice(&name);
            stack.push((child, at.join(std::ffi::OsStr::from_bytes(&name))));
        }
    }
    description.lines
}

fn describe_one(
    path: &[u8],
    at: &std::path::Path,
    with_xattrs: bool,
    description: &mut Description,
) {
    let stat = rustix::fs::lstat(at).unwrap();
    let device = || {
        let (major, minor) = (
            rustix::fs::major(stat.st_rdev),
            rustix::fs::minor(stat.st_rdev),
        );
        format!("{major}:{minor}")
    };
    let file_type = rustix::fs::FileType::from_raw_mode(stat.st_mode);
    let what = match file_type {
        rustix::fs::FileType::Directory => "dir".to_owned(),
        rustix::fs::FileType::RegularFile => format!("file {} {}", stat.st_size, read_file(at)),
        rustix::fs::FileType::Symlink => {
            let target = rustix::fs::readlink(at, Vec::new()).unwrap();
            format!("symlink {}", target.as_bytes().escape_ascii())
        }
        rustix::fs::FileType::CharacterDevice => format!("char {}", device()),
        rustix::fs::FileType::BlockDevice => format!("block {}", device()),
        rustix::fs::FileType::Fifo => "fifo".to_owned(),
        rustix::fs::FileType::Socket => "socket".to_owned(),
        rustix::fs::FileType::Unknown => panic!("unknown type of {}", at.display()),
    };
    description.add(Line {
        path,
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        sec: stat.st_mtime,
        nsec: u32::try_from(stat.st_mtime_nsec).unwrap(),
        nlink: stat.st_nlink,
        what,
        xattrs: if with_xattrs { xattrs(at) } else { Vec::new() },
        inode: stat.st_ino,
        is_dir: file_type.is_dir(),
    });
}

/// The content of a file, described; large holes are recognised without reading them.
fn read_file(at: &std::path::Path) -> String {
    let file = std::fs::File::open(at).unwrap();
    let size = file.metadata().unwrap().len();
    if size == 0 {
        return String::new();
    }
    match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0)) {
        Err(rustix::io::Errno::NXIO) => "zeros".to_owned(),
        Ok(_) => {
            drop(file);
            describe_bytes(&std::fs::read(at).unwrap())
        }
        Err(error) => panic!("{}: {error}", at.display()),
    }
}

fn xattrs(at: &std::path::Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut list = vec![0u8; 64 << 10];
    let len = rustix::fs::llistxattr(at, &mut list[..]).unwrap();
    let mut all: Vec<_> = list[..len]
        .split(|&b| b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0u8; 64 << 10];
            let len = rustix::fs::lgetxattr(at, name, &mut value[..]).unwrap();
            value.truncate(len);
            (name.to_vec(), value)
        })
        .collect();
    all.sort();
    all
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let odd = prop::sample::select(vec![b'.', b'-', b'!', b'a', b'b', 0xff, 0x80, b' ', 1]);
    prop_oneof![
        4 => prop::collection::vec(odd, 1..4),
        3 => prop::collection::vec(any::<u8>(), 1..20),
        1 => prop::collection::vec(any::<u8>(), 200..=255),
    ]
    .prop_map(|name| {
        let name: Vec<u8> = name
            .into_iter()
            .map(|b| if b == 0 || b == b'/' { b'_' } else { b })
            .collect();
        if name == b"." || name == b".." {
            b"dot".to_vec()
        } else {
            name
        }
    })
}

/// Access lists and capabilities, which the kernel reads, are well formed.
fn xattr(for_any_type: bool) -> BoxedStrategy<(Vec<u8>, Vec<u8>)> {
    let value = || {
        prop_oneof![
            8 => prop::collection::vec(any::<u8>(), 0..40),
            1 => prop::collection::vec(any::<u8>(), 3000..9000),
        ]
    };
    let acl = prop::array::uniform3(0u8..8).prop_map(|perms| {
        let mut acl = 2u32.to_le_bytes().to_vec();
        for (tag, perm) in [0x01u8, 0x04, 0x20].into_iter().zip(perms) {
            acl.extend([tag, 0, perm, 0, 0xff, 0xff, 0xff, 0xff]);
        }
        acl
    });
    let capability = any::<[u8; 16]>().prop_map(|caps| {
        let mut value = vec![1, 0, 0, 2];
        value.extend(caps);
        value
    });
    let suffix = "[a-z.]{1,12}";
    let named = |prefix: &'static str| {
        (suffix, value()).prop_map(move |(s, v)| (format!("{prefix}{s}").into_bytes(), v))
    };
    let for_all = prop_oneof![3 => named("trusted."), 1 => named("security.x")];
    if for_any_type {
        return for_all.boxed();
    }
    prop_oneof![
        4 => for_all,
        2 => named("user."),
        1 => capability.prop_map(|v| (b"security.capability".to_vec(), v)),
        1 => acl.prop_map(|v| (b"system.posix_acl_access".to_vec(), v)),
    ]
    .boxed()
}

fn meta(for_any_type: bool) -> impl Strategy<Value = Meta> {
    let xattrs = prop_oneof![
        3 => Just(Vec::new()),
        1 => prop::collection::vec(xattr(for_any_type), 1..5),
    ];
    let id = || prop_oneof![Just(0u32), 0..70_000u32, Just(u32::MAX - 1), any::<u32>()];
    let sec = prop_oneof![
        Just(0),
        any::<i32>().prop_map(i64::from),
        -(1i64 << 40)..1 << 40
    ];
    // The kernel has no user number 2^32 - 1.
    let id = move || id().prop_map(|id| id.min(u32::MAX - 1));
    (0u16..0o10000, id(), id(), sec, 0u32..1_000_000_000, xattrs).prop_map(
        |(mode, uid, gid, sec, nsec, xattrs)| Meta {
            mode,
            uid,
            gid,
            mtime: Mtime { sec, nsec },
            xattrs: xattrs
                .into_iter()
                .collect::<BTreeMap<_, _>>()
                .into_iter()
                .collect(),
        },
    )
}

#[derive(Debug, Clone)]
enum Op {
    Dir(Meta),
    File(Meta, Vec<u8>),
    Zeros(Meta, u64),
    Again(Meta, prop::sample::Index),
    Symlink(Meta, Vec<u8>),
    Node(Meta, Kind),
    Link(prop::sample::Index),
}

fn op() -> impl Strategy<Value = Op> {
    let bytes = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..100),
        1 => prop::collection::vec(any::<u8>(), 4095..=4097),
        1 => (any::<u8>(), 1usize..50_000).prop_map(|(b, n)| vec![b; n]),
    ];
    let target = prop_oneof![
        4 => prop::collection::vec(1u8..=255, 1..100),
        1 => prop::collection::vec(1u8..=255, 3900..=4095),
    ];
    let rdev = (0u32..4096, 0u32..1 << 20).prop_map(|(major, minor)| Rdev { major, minor });
    let node = prop_oneof![
        rdev.clone().prop_map(Kind::Char),
        rdev.prop_map(Kind::Block),
        Just(Kind::Fifo),
        Just(Kind::Socket),
    ];
    let zeros = prop_oneof![1..10_000u64, Just(9 << 30), Just((1 << 50) + 1)];
    prop_oneof![
        4 => meta(false).prop_map(Op::Dir),
        5 => (meta(false), bytes).prop_map(|(m, b)| Op::File(m, b)),
        1 => (meta(false), zeros).prop_map(|(m, n)| Op::Zeros(m, n)),
        1 => (meta(false), any::<prop::sample::Index>()).prop_map(|(m, i)| Op::Again(m, i)),
        2 => (meta(true), target).prop_map(|(m, t)| Op::Symlink(m, t)),
        1 => (meta(true), node).prop_map(|(m, k)| Op::Node(m, k)),
        2 => any::<prop::sample::Index>().prop_map(Op::Link),
    ]
}

/// Random trees with everything that an image can hold.
pub fn samples(max_ops: usize) -> BoxedStrategy<Sample> {
    let ops = prop::collection::vec((any::<prop::sample::Index>(), name(), op()), 0..max_ops);
    (meta(false), ops)
        .prop_map(|(root, ops)| {
            let mut sample = Sample::default();
            *sample.tree.meta_mut(InodeId(0)) = root;
            let mut dirs = vec![sample.tree.root()];
            let mut others = Vec::new();
            for (dir, name, op) in ops {
                let dir = *dir.get(&dirs);
                if sample.tree.child(dir, &name).is_some() {
                    continue;
                }
                let (meta, kind) = match op {
                    Op::Dir(meta) => (meta, Kind::Dir(BTreeMap::new())),
                    Op::File(meta, bytes) => (meta, sample.content(Content::Bytes(bytes))),
                    Op::Zeros(meta, len) => (meta, sample.content(Content::Zeros(len))),
                    Op::Again(meta, index) => {
                        if sample.contents.is_empty() {
                            continue;
                        }
                        let content = index.get(&sample.contents).clone();
                        (meta, sample.content(content))
                    }
                    Op::Symlink(meta, target) => (meta, Kind::Symlink(target)),
                    Op::Node(meta, kind) => (meta, kind),
                    Op::Link(index) => {
                        if !others.is_empty() {
                            sample.tree.link(dir, name, *index.get(&others));
                        }
                        continue;
                    }
                };
                let is_dir = matches!(kind, Kind::Dir(_));
                let id = sample.add(dir, &name, meta, kind);
                if is_dir {
                    dirs.push(id);
                } else {
                    others.push(id);
                }
            }
            sample
        })
        .boxed()
}

impl std::fmt::Debug for Sample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for line in self.describe() {
            writeln!(f, "{line}")?;
        }
        Ok(())
    }
}
