use super::*;
use crate::golden;
use lazyimg_convergent::TenantKey;
use proptest::prelude::*;

fn key() -> TenantKey {
    TenantKey::from_bytes([5; 32])
}

fn entry(n: u8, blocks: u32, offset: u64) -> Entry {
    Entry {
        blocks,
        stored: Some(Stored {
            id: ChunkId([n; 32]),
            len: 100,
            pack: 0,
            offset,
        }),
    }
}

fn sample() -> Manifest {
    let mut m = Manifest {
        header: Header {
            meta_len: 4096,
            data_len: 4096 * 1003,
            image: Digest([1; 32]),
            has_xattrs: true,
            files: 3,
            file_bytes: 9000,
            salt_id: [2; 16],
            epoch: 7,
            domain: "default".into(),
        },
        meta: vec![entry(3, 1, 0)],
        data: vec![
            entry(4, 2, 100),
            Entry {
                blocks: 1000,
                stored: None,
            },
            entry(5, 1, 200),
        ],
        packs: vec![Pack {
            digest: Digest([6; 32]),
            len: 300,
        }],
        sealed_keys: Vec::new(),
    };
    let keys: Vec<_> = (0..3).map(|n| ChunkKey::from_bytes([n; 32])).collect();
    m.seal_keys(&key(), keys.iter());
    m
}

#[test]
fn a_manifest_reads_back_what_was_written() {
    let m = sample();
    assert_eq!(Manifest::parse(&m.to_bytes()).unwrap(), m);
}

#[test]
fn the_format_is_pinned_by_a_golden_vector() {
    // docs/format.md has the numbers; computed with Python's cryptography, not with this crate.
    assert_eq!(sample().to_bytes(), golden::bytes("manifest.bytes"));
    assert_eq!(sample().root().0, golden::array("manifest.root"));
}

#[test]
fn an_image_that_nothing_could_mount_is_told_before_it_is_stored() {
    assert_eq!(codec::len_of(4, 3, 1), sample().to_bytes().len() as u64);
    assert_eq!(sample().check_len(), Ok(()));
    // A tebibyte in cuts of 512 KiB fits, the default limit of an image's bytes need not.
    let chunks = |bytes: u64| bytes / (512 << 10);
    let check = |bytes| Manifest::check_counts(chunks(bytes), chunks(bytes), bytes >> 27);
    assert_eq!(check(1 << 40), Ok(()));
    let error = check(crate::limits::IMAGE_BYTES).unwrap_err();
    assert!(error.to_string().contains("split the image"), "{error}");
}

#[test]
fn opening_gives_each_chunk_its_place_and_key() {
    let open = sample().open(&key()).unwrap();
    let data = open.data_chunks();
    assert_eq!(
        data.iter().map(|c| (c.start, c.len)).collect::<Vec<_>>(),
        [(0, 8192), (8192, 4096 * 1000), (8192 + 4096 * 1000, 4096)]
    );
    assert_eq!(data[0].body.as_ref().unwrap().key.as_bytes(), &[1; 32]);
    assert!(data[1].body.is_none());
    assert_eq!(data[2].body.as_ref().unwrap().key.as_bytes(), &[2; 32]);
    assert_eq!(OpenManifest::chunk_at(data, 8191).unwrap().start, 0);
    assert_eq!(OpenManifest::chunk_at(data, 8192).unwrap().start, 8192);
    assert!(OpenManifest::chunk_at(data, 4096 * 1003).is_none());
}

#[test]
fn another_tenant_cannot_open_it() {
    let error = sample().open(&TenantKey::from_bytes([9; 32])).unwrap_err();
    assert!(error.to_string().contains("use the key"), "{error}");
}

#[test]
fn resealing_changes_nothing_but_the_key_table() {
    let mut m = sample();
    let new = TenantKey::from_bytes([8; 32]);
    m.reseal(&key(), &new).unwrap();
    assert_eq!(m.root(), sample().root());
    assert!(m.clone().open(&key()).is_err());
    m.open(&new).unwrap();
}

proptest! {
    #[test]
    fn a_flipped_bit_is_never_used(at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut bytes = sample().to_bytes();
        let table = HEADER_LEN + 4 * 40;
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let opened = Manifest::parse(&bytes).and_then(|m| m.open(&key()));
        // Pack digests and locations are not bound to the key: a chunk that lies elsewhere is
        // caught by its id. Everything else must fail here.
        let packs = table..table + 4 + 40 + 3 * 12;
        prop_assert!(opened.is_err() || packs.contains(&at));
    }

    #[test]
    fn random_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..1000), head in any::<bool>()) {
        if head {
            let start = sample().to_bytes();
            let n = bytes.len().min(HEADER_LEN);
            bytes[..n].copy_from_slice(&start[..n]);
        }
        let _ = Manifest::parse(&bytes);
    }

    #[test]
    fn a_cut_manifest_is_refused(cut in any::<prop::sample::Index>()) {
        let bytes = sample().to_bytes();
        prop_assert!(Manifest::parse(&bytes[..cut.index(bytes.len())]).is_err());
    }
}

#[test]
fn a_count_that_promises_gigabytes_allocates_nothing() {
    let mut bytes = sample().to_bytes();
    bytes[36..40].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(
        Manifest::parse(&bytes),
        Err(ManifestError::Malformed { .. })
    ));
}
