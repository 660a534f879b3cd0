use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::flatten::ContentSink;
use crate::golden::array;
use crate::tree::{ContentId, Inode, Kind, Meta, Tree};

/// Keeps plaintext chunks as they come.
#[derive(Default)]
struct Plain(Vec<Vec<u8>>);

impl ChunkEncoder for Plain {
    fn encode(&mut self, plain: Vec<u8>) -> std::io::Result<Ticket> {
        assert!(!plain.is_empty() && plain.len().is_multiple_of(4096));
        assert!(plain.len() <= lazyimg_convergent::MAX_CHUNK_LEN);
        self.0.push(plain);
        Ok(Ticket(self.0.len() as u32 - 1))
    }

    fn decode(&mut self, ticket: Ticket) -> std::io::Result<Vec<u8>> {
        Ok(self.0[ticket.0 as usize].clone())
    }
}

/// A file: apparent size and the stretches that hold data.
#[derive(Debug, Clone, PartialEq)]
struct Sparse {
    size: u64,
    data: Vec<(u64, Vec<u8>)>,
}

impl Sparse {
    fn dense(bytes: Vec<u8>) -> Self {
        Self {
            size: bytes.len() as u64,
            data: vec![(0, bytes)],
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = vec![0; self.size as usize];
        for (at, bytes) in &self.data {
            out[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
        }
        out
    }
}

/// One layer: path → file; `None` removes it.
type Layer = BTreeMap<String, Option<Sparse>>;

/// A layer's entries in the order in which the archive has them.
type Entries<'a> = Vec<(&'a String, &'a Option<Sparse>)>;

struct Image {
    tree: Tree,
    contents: Contents,
    plan: Plan,
    encoder: Plain,
}

fn build(layers: &[Layer]) -> Image {
    build_in_order(layers, &|_| {})
}

/// Builds an image of layers whose entries come in the order that `arrange` makes of path order.
fn build_in_order(layers: &[Layer], arrange: &dyn Fn(&mut Entries<'_>)) -> Image {
    let mut image = Image {
        tree: Tree::new(),
        contents: Contents::default(),
        plan: Plan::default(),
        encoder: Plain::default(),
    };
    for (n, layer) in layers.iter().enumerate() {
        let n = n as u32;
        let spool = tempfile::tempfile().unwrap();
        let mut sink = LayerSink::new(
            &mut image.encoder,
            &mut image.contents,
            &image.plan,
            n,
            spool,
        );
        let mut entries: Vec<_> = layer.iter().collect();
        arrange(&mut entries);
        for (path, file) in entries {
            sink.entry(path.as_bytes());
            let root = image.tree.root();
            image.tree.remove(root, path.as_bytes());
            let Some(file) = file else { continue };
            let content = (file.size > 0).then(|| take(&mut sink, file));
            let kind = Kind::File {
                size: file.size,
                content,
            };
            let inode = Inode {
                meta: Meta::default(),
                kind,
                layer: n,
            };
            image.tree.insert(root, path.clone().into_bytes(), inode);
        }
        let small = sink.into_spool().unwrap();
        image
            .plan
            .add_layer(n, &image.tree, &image.contents, &small, &mut image.encoder)
            .unwrap();
    }
    image
}

fn take(sink: &mut LayerSink<'_, Plain>, file: &Sparse) -> ContentId {
    sink.begin(file.size).unwrap();
    for (at, bytes) in &file.data {
        // As a tar reader would: in pieces that know nothing of windows.
        for (i, piece) in bytes.chunks(100_000).enumerate() {
            sink.data(at + i as u64 * 100_000, piece).unwrap();
        }
    }
    sink.finish().unwrap()
}

impl Image {
    /// The data space as bytes.
    fn assemble(&self, region: &Region) -> Vec<u8> {
        let mut out = Vec::new();
        for cut in &region.cuts {
            match cut.ticket {
                Some(t) => {
                    assert_eq!(self.encoder.0[t.0 as usize].len() as u64, cut.blocks * 4096);
                    out.extend_from_slice(&self.encoder.0[t.0 as usize]);
                }
                None => out.resize(out.len() + cut.blocks as usize * 4096, 0),
            }
        }
        out
    }

    /// The stored chunks of the data space, in order.
    fn chunks(&self) -> Vec<&[u8]> {
        let region = self.plan.finish(&self.tree, &self.contents).unwrap();
        let tickets: Vec<_> = region.cuts.iter().filter_map(|c| c.ticket).collect();
        tickets
            .into_iter()
            .map(|t| self.encoder.0[t.0 as usize].as_slice())
            .collect()
    }

    fn start(&self, path: &str) -> Option<u32> {
        let region = self.plan.finish(&self.tree, &self.contents).unwrap();
        let id = self.tree.lookup(path.as_bytes()).unwrap();
        match self.tree.get(id).kind {
            Kind::File {
                content: Some(c), ..
            } => self.plan.start_block(&region, &self.contents, c),
            _ => None,
        }
    }
}

/// Bytes that do not repeat, of a seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut out);
    out
}

/// The bytes that docs/format.md calls noise: BLAKE3's long output for a word.
fn noise_of(word: &str, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new()
        .update(word.as_bytes())
        .finalize_xof()
        .fill(&mut out);
    out
}

fn layer(files: &[(&str, Sparse)]) -> Layer {
    files
        .iter()
        .map(|(p, f)| ((*p).to_owned(), Some(f.clone())))
        .collect()
}

fn many(prefix: &str, n: u64, len: usize) -> Layer {
    (0..n)
        .map(|i| {
            (
                format!("{prefix}{i:05}"),
                Some(Sparse::dense(noise(i, len + i as usize))),
            )
        })
        .collect()
}

#[test]
fn what_upper_layers_add_replace_or_delete_moves_no_chunk_of_the_base() {
    let base = many("f", 600, 9000);
    let alone = build(std::slice::from_ref(&base));
    let mut upper = layer(&[
        ("a-first", Sparse::dense(noise(77, 5000))),
        ("f00010", Sparse::dense(noise(78, 5000))),
        ("zz", Sparse::dense(noise(79, 2_000_000))),
    ]);
    upper.insert("f00300".into(), None);
    let both = build(&[base, upper]);
    let base_chunks = alone.chunks();
    assert!(base_chunks.len() > 5);
    assert_eq!(both.chunks()[..base_chunks.len()], base_chunks[..]);
}

#[test]
fn a_large_file_that_is_deleted_leaves_the_data_space_and_moves_no_chunk() {
    let mut base = many("f", 100, 9000);
    base.insert(
        "f00050-large".into(),
        Some(Sparse::dense(noise(1000, 1_500_000))),
    );
    let alone = build(std::slice::from_ref(&base));
    let gone = build(&[base, [("f00050-large".to_owned(), None)].into()]);
    let left: Vec<_> = gone.chunks();
    assert_eq!(alone.chunks().len(), left.len() + 3);
    assert!(left.iter().all(|c| alone.chunks().contains(c)));
}

#[test]
fn equal_files_share_one_range_within_and_across_layers() {
    let small = Sparse::dense(noise(1, 10_000));
    let large = Sparse::dense(noise(2, 1_000_000));
    let image = build(&[
        layer(&[
            ("a", small.clone()),
            ("b", small.clone()),
            ("c", large.clone()),
        ]),
        layer(&[("d", large), ("e", small)]),
    ]);
    assert_eq!(image.start("a"), image.start("b"));
    assert_eq!(image.start("a"), image.start("e"));
    assert_eq!(image.start("c"), image.start("d"));
    assert_eq!(image.chunks().len(), 3);
}

#[test]
fn zeros_are_never_stored_however_the_layer_wrote_them() {
    let zeros = Sparse::dense(vec![0; 700_000]);
    let sparse_zeros = Sparse {
        size: 9 << 30,
        data: vec![],
    };
    let island = Sparse {
        size: 3 << 30,
        data: vec![((2 << 30) + 5, b"island".to_vec())],
    };
    let image = build(&[layer(&[
        ("a", zeros),
        ("b", sparse_zeros),
        ("c", island),
        ("d", Sparse::dense(vec![0; 9])),
    ])]);
    assert_eq!(
        (image.start("a"), image.start("b"), image.start("d")),
        (None, None, None)
    );
    assert_eq!(image.chunks().len(), 1);
    let region = image.plan.finish(&image.tree, &image.contents).unwrap();
    assert_eq!(region.blocks, (3 << 30) / 4096);
    assert_eq!(region.cuts.len(), 3, "hole, chunk, hole");
}

#[test]
fn a_sparse_file_and_its_dense_copy_are_the_same_content() {
    let sparse = Sparse {
        size: 1_200_000,
        data: vec![(600_000, noise(1, 1000))],
    };
    let dense = Sparse::dense(sparse.bytes());
    let image = build(&[layer(&[("a", sparse), ("b", dense)])]);
    assert_eq!(image.start("a"), image.start("b"));
}

#[test]
fn one_small_file_in_a_new_layer_adds_one_small_chunk() {
    let base = many("f", 600, 9000);
    let before = build(std::slice::from_ref(&base)).chunks().len();
    let after = build(&[
        base,
        layer(&[("f00005x", Sparse::dense(b"hello".to_vec()))]),
    ]);
    assert_eq!(after.chunks().len(), before + 1);
    assert_eq!(after.chunks().last().unwrap().len(), 4096);
}

#[test]
fn the_order_of_entries_changes_no_chunk_and_path_order_encodes_none_twice() {
    let layers = [many("f", 600, 9000), many("g", 300, 7000)];
    let sorted = build(&layers);
    assert_eq!(sorted.encoder.0.len(), sorted.chunks().len());
    let backwards = build_in_order(&layers, &|entries| entries.reverse());
    assert_eq!(backwards.chunks(), sorted.chunks());
    // A few in the wrong place cost a few packs.
    let nearly = build_in_order(&layers, &|entries| {
        entries.swap(10, 200);
    });
    assert_eq!(nearly.chunks(), sorted.chunks());
    assert!(nearly.encoder.0.len() <= sorted.encoder.0.len() + 8);
}

#[test]
fn content_hash_and_pack_ends_are_pinned_by_golden_vectors() {
    // docs/format.md has the numbers; computed with Python's blake3, not with this crate.
    let mut sparse = noise_of("sparse", 1_601_000);
    sparse[512 << 10..1 << 20].fill(0);
    let files = [
        ("a", Sparse::dense(noise_of("a", 5000))),
        ("b", Sparse::dense(sparse)),
        ("c", Sparse::dense(vec![0; 9])),
    ];
    let image = build(&[layer(&files)]);
    for ((path, _), name) in files.iter().zip(["small", "holes", "zeros"]) {
        let Kind::File {
            content: Some(content),
            ..
        } = image
            .tree
            .get(image.tree.lookup(path.as_bytes()).unwrap())
            .kind
        else {
            panic!("{path} has content");
        };
        let name = format!("content.{name}");
        assert_eq!(image.contents.get(content).hash, array(&name), "{name}");
    }
    for (name, ends) in [("cut.ends", true), ("cut.goes-on", false)] {
        // 124 KiB that end nowhere, then a block with this hash.
        let mut cutter = PackCutter::default();
        assert!(!cutter.add(124 << 10, &[0; 32]));
        assert_eq!(cutter.add(4096, &array(name)), ends, "{name}");
    }
}

fn file() -> impl Strategy<Value = Sparse> {
    let size = prop_oneof![0u64..20_000, 400_000u64..700_000, 900_000u64..1_700_000];
    (
        size,
        prop::collection::vec((0.0..1.0f64, 1usize..200_000, 0u64..4), 0..4),
    )
        .prop_map(|(size, parts)| {
            let mut data: Vec<(u64, Vec<u8>)> = Vec::new();
            let mut at = 0;
            for (gap, len, seed) in parts {
                let start = at + ((size - at) as f64 * gap) as u64;
                let end = (start + len as u64).min(size);
                if start < end {
                    let bytes = if seed == 0 {
                        vec![0; (end - start) as usize]
                    } else {
                        noise(seed, (end - start) as usize)
                    };
                    data.push((start, bytes));
                    at = end;
                }
            }
            Sparse { size, data }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_file_lies_where_the_layout_says(layers in prop::collection::vec(prop::collection::btree_map("[a-f]", prop::option::weighted(0.85, file()), 0..6), 1..4)) {
        let image = build(&layers);
        let region = image.plan.finish(&image.tree, &image.contents).unwrap();
        let space = image.assemble(&region);
        prop_assert_eq!(space.len() as u64, region.blocks * 4096);
        let mut expected: BTreeMap<&str, &Sparse> = BTreeMap::new();
        for layer in &layers {
            for (path, file) in layer {
                match file {
                    Some(f) => expected.insert(path, f),
                    None => expected.remove(path.as_str()),
                };
            }
        }
        for (path, file) in expected {
            let want = file.bytes();
            match image.start(path) {
                Some(block) => {
                    let at = block as usize * 4096;
                    prop_assert!(space[at..at + want.len()] == want, "{} differs", path);
                }
                None => prop_assert!(want.iter().all(|b| *b == 0), "{} is not a hole", path),
            }
        }
    }
}
