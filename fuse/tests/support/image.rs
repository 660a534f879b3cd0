//! An image made by hand: a tree, its bytes, its chunks and its manifest, all in the real format.

use std::collections::BTreeMap;

use lazyimg_convergent::{ChunkKey, Digest, DomainSecret, Salt, TenantKey, chunk, payload};
use lazyimg_fuse::view::ImageView;
use lazyimg_image::erofs;
use lazyimg_image::manifest::{BLOCK, Entry, Header, Manifest, Pack, Stored};
use lazyimg_image::tree::{ContentId, Inode, InodeId, Kind, Meta, Mtime, Rdev, Tree};

/// Plaintext of one chunk, in bytes.
pub const CHUNK: usize = 512 << 10;

pub struct ImageBuilder {
    pub tree: Tree,
    contents: Vec<Vec<u8>>,
    chunk: usize,
}

/// An image, as a registry has it and as its owner opens it.
#[derive(Clone)]
pub struct BuiltImage {
    pub manifest: Vec<u8>,
    pub tenant: TenantKey,
    pub packs: BTreeMap<Digest, Vec<u8>>,
    pub view: ImageView,
    /// What the mount should show, by path (without a leading slash; the root is empty).
    pub expected: BTreeMap<Vec<u8>, Expected>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    pub inode: Inode,
    pub nlink: u32,
    /// Equal for names of one inode.
    pub id: u32,
    /// The bytes of a file.
    pub bytes: Vec<u8>,
}

pub fn meta(mode: u16) -> Meta {
    Meta {
        mode,
        uid: 0,
        gid: 0,
        mtime: Mtime {
            sec: 1_600_000_000,
            nsec: 123_456_789,
        },
        xattrs: Vec::new(),
    }
}

impl Default for ImageBuilder {
    fn default() -> Self {
        Self {
            tree: Tree::new(),
            contents: Vec::new(),
            chunk: CHUNK,
        }
    }
}

impl ImageBuilder {
    /// The directory of a path, made where it is missing, and the last name.
    fn parent<'p>(&mut self, path: &'p [u8]) -> (InodeId, &'p [u8]) {
        let mut dir = self.tree.root();
        let mut parts: Vec<&[u8]> = path.split(|&b| b == b'/').collect();
        let name = parts.pop().unwrap();
        for part in parts {
            dir = match self.tree.child(dir, part) {
                Some(child) => child,
                None => self.tree.insert(
                    dir,
                    part.to_vec(),
                    inode(meta(0o755), Kind::Dir(BTreeMap::new())),
                ),
            };
        }
        (dir, name)
    }

    pub fn add(&mut self, path: impl AsRef<[u8]>, meta: Meta, kind: Kind) -> InodeId {
        let (dir, name) = self.parent(path.as_ref());
        self.tree.insert(dir, name.to_vec(), inode(meta, kind))
    }

    pub fn dir(&mut self, path: impl AsRef<[u8]>) -> InodeId {
        self.add(path, meta(0o755), Kind::Dir(BTreeMap::new()))
    }

    pub fn file(&mut self, path: impl AsRef<[u8]>, bytes: impl Into<Vec<u8>>) -> InodeId {
        self.file_with(path, meta(0o644), bytes)
    }

    pub fn file_with(
        &mut self,
        path: impl AsRef<[u8]>,
        meta: Meta,
        bytes: impl Into<Vec<u8>>,
    ) -> InodeId {
        let bytes = bytes.into();
        let size = bytes.len() as u64;
        let content = (size > 0).then(|| {
            self.contents.push(bytes);
            ContentId(self.contents.len() as u32 - 1)
        });
        self.add(path, meta, Kind::File { size, content })
    }

    pub fn symlink(&mut self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) {
        self.add(path, meta(0o777), Kind::Symlink(target.as_ref().to_vec()));
    }

    pub fn link(&mut self, path: impl AsRef<[u8]>, to: InodeId) {
        let (dir, name) = self.parent(path.as_ref());
        self.tree.link(dir, name.to_vec(), to);
    }

    /// One of each kind of oddity, and files of all sizes that matter.
    pub fn oddities() -> Self {
        let mut b = Self::default();
        b.tree.meta_mut(InodeId(0)).mtime = Mtime {
            sec: -1,
            nsec: 999_999_999,
        };
        b.file("etc/hello", "hello\n");
        b.file("empty", "");
        b.file_with(
            "bin/setuid",
            Meta {
                uid: 4_000_000_000,
                gid: 3_000_000_000,
                ..meta(0o6755)
            },
            "#!\n",
        );
        b.file_with("secret", meta(0o600), "for root\n");
        for (i, size) in [
            1,
            4095,
            4096,
            4097,
            CHUNK - 1,
            CHUNK,
            CHUNK + 1,
            3 * CHUNK + 17,
        ]
        .into_iter()
        .enumerate()
        {
            b.file(format!("sizes/{size}"), super::noise(i as u64 + 1, size));
        }
        b.file("zeros", vec![0; 2 * CHUNK]);
        let mut sparse = vec![0; 4 * CHUNK];
        sparse[2 * CHUNK..2 * CHUNK + 5].copy_from_slice(b"islet");
        b.file("sparse", sparse);
        let twin = b.file("links/a", "linked");
        b.link("links/b", twin);
        b.link("elsewhere/c", twin);
        b.symlink("abs", "/etc/hello");
        b.symlink("rel", "etc/hello");
        b.symlink("long", "x".repeat(4095));
        b.symlink("dangling", "no/such/thing");
        b.add(
            "dev/null",
            meta(0o666),
            Kind::Char(Rdev { major: 1, minor: 3 }),
        );
        b.add(
            "dev/big",
            meta(0o600),
            Kind::Block(Rdev {
                major: 0xabc,
                minor: 0xdef12,
            }),
        );
        b.add("fifo", meta(0o644), Kind::Fifo);
        b.add("sock", meta(0o755), Kind::Socket);
        b.file(&b"names/\xff\xfe not utf-8\n"[..], "bytes");
        b.file([&b"names/"[..], &[b'n'; 255]].concat(), "longest");
        b.dir("sticky");
        let sticky = b.tree.lookup(b"sticky").unwrap();
        b.tree.meta_mut(sticky).mode = 0o1777;
        b.dir("a/b/c/d/e/f/g");
        b
    }

    pub fn build(self) -> BuiltImage {
        let salt = Salt::derive(&DomainSecret::from_bytes([9; 32]), "test", 1);
        let tenant = TenantKey::from_bytes([7; 32]);
        let (space, places) = self.place();
        let meta = erofs::write(
            &self.tree,
            &|c: ContentId| places[c.0 as usize],
            space.len() as u64 / BLOCK,
        )
        .unwrap();
        let mut sealer = Sealer {
            salt,
            chunk: self.chunk,
            pack: Vec::new(),
            keys: Vec::new(),
        };
        let meta_entries = sealer.cut(&meta, false);
        let data_entries = sealer.cut(&space, true);
        let pack = Digest::of(&sealer.pack);
        let mut manifest = Manifest {
            header: Header {
                meta_len: meta.len() as u64,
                data_len: space.len() as u64,
                image: Digest::of(&meta),
                has_xattrs: self.tree.has_xattrs(),
                files: self.contents.len() as u64,
                file_bytes: self.contents.iter().map(|c| c.len() as u64).sum(),
                salt_id: [0; 16],
                epoch: 1,
                domain: "test".into(),
            },
            meta: meta_entries,
            data: data_entries,
            packs: vec![Pack {
                digest: pack,
                len: sealer.pack.len() as u64,
            }],
            sealed_keys: Vec::new(),
        };
        manifest.seal_keys(&tenant, sealer.keys.iter());
        let view = ImageView::of_manifest(&manifest.clone().open(&tenant).unwrap()).unwrap();
        BuiltImage {
            manifest: manifest.to_bytes(),
            tenant,
            packs: BTreeMap::from([(pack, sealer.pack)]),
            view,
            expected: self.expected(),
        }
    }

    /// The data space, and where each content begins in it.
    fn place(&self) -> (Vec<u8>, Vec<Option<u32>>) {
        let mut space = Vec::new();
        let places = self.contents.iter().map(|bytes| {
            if bytes.iter().all(|&b| b == 0) {
                return None;
            }
            let block = space.len() as u64 / BLOCK;
            space.extend_from_slice(bytes);
            space.resize(space.len().next_multiple_of(BLOCK as usize), 0);
            Some(block as u32)
        });
        let places = places.collect();
        (space, places)
    }

    fn expected(&self) -> BTreeMap<Vec<u8>, Expected> {
        let mut all = BTreeMap::new();
        let mut walk = self.tree.walk();
        while let Some((path, id)) = walk.next_entry() {
            let inode = self.tree.get(id).clone();
            let bytes = match inode.kind {
                Kind::File {
                    content: Some(content),
                    ..
                } => self.contents[content.0 as usize].clone(),
                _ => Vec::new(),
            };
            all.insert(
                path.to_vec(),
                Expected {
                    inode,
                    nlink: self.tree.nlink(id),
                    id: id.0,
                    bytes,
                },
            );
        }
        all
    }
}

impl BuiltImage {
    /// As `tests/support/mini.rs` reads it.
    pub fn write_to(&self, dir: &std::path::Path) {
        std::fs::create_dir(dir).unwrap();
        std::fs::write(dir.join("manifest"), &self.manifest).unwrap();
        std::fs::write(dir.join("tenant"), self.tenant.as_bytes()).unwrap();
        for (digest, bytes) in &self.packs {
            std::fs::write(dir.join(digest.hex()), bytes).unwrap();
        }
    }
}

struct Sealer {
    salt: Salt,
    chunk: usize,
    pack: Vec<u8>,
    keys: Vec<ChunkKey>,
}

impl Sealer {
    fn cut(&mut self, space: &[u8], holes: bool) -> Vec<Entry> {
        let cut = |plain: &[u8]| {
            let blocks = (plain.len() as u64 / BLOCK) as u32;
            if holes && plain.iter().all(|&b| b == 0) {
                return Entry {
                    blocks,
                    stored: None,
                };
            }
            let sealed = chunk::seal(&self.salt, payload::encode(plain, 3));
            let stored = Stored {
                id: sealed.id,
                len: sealed.ciphertext.len() as u32,
                pack: 0,
                offset: self.pack.len() as u64,
            };
            self.pack.extend_from_slice(&sealed.ciphertext);
            self.keys.push(sealed.key);
            Entry {
                blocks,
                stored: Some(stored),
            }
        };
        space.chunks(self.chunk).map(cut).collect()
    }
}

fn inode(meta: Meta, kind: Kind) -> Inode {
    Inode {
        meta,
        kind,
        layer: 0,
    }
}
