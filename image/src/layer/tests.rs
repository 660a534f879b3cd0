use std::io::{Cursor, Write};

use proptest::prelude::*;

use super::*;

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

fn describe(media_type: &str, blob: &[u8], plain: &[u8]) -> LayerDescriptor {
    LayerDescriptor {
        digest: Digest::of(blob),
        size: blob.len() as u64,
        media_type: media_type.into(),
        diff_id: Digest::of(plain),
    }
}

/// Reads `take` bytes (all, when there are fewer) in pieces of `piece`; the rest is drained.
fn read_some(
    layer: &LayerDescriptor,
    blob: impl Read + Send,
    limits: &Limits,
    take: usize,
    piece: usize,
) -> Result<Vec<u8>, LayerError> {
    LayerReader::read(3, layer, blob, limits, |reader| {
        let mut out = Vec::new();
        let mut buffer = vec![0; piece];
        while out.len() < take {
            match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => out.extend_from_slice(&buffer[..n]),
                Err(e) => return Err(e.downcast::<LayerError>().unwrap()),
            }
        }
        Ok(out)
    })
}

fn read(layer: &LayerDescriptor, blob: &[u8]) -> Result<Vec<u8>, LayerError> {
    read_some(
        layer,
        Cursor::new(blob.to_vec()),
        &Limits::default(),
        usize::MAX,
        100_000,
    )
}

/// Bytes that do not compress, so that the thread has more than one buffer to hand over.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// A source that gives a few bytes at a time and is interrupted in between.
struct Trickle<'a>(&'a [u8], usize);

impl Read for Trickle<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.1 += 1;
        if self.1.is_multiple_of(5) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let len = self.0.len().min(out.len()).min(1 + self.1 % 977);
        out[..len].copy_from_slice(&self.0[..len]);
        self.0 = &self.0[len..];
        Ok(len)
    }
}

#[test]
fn every_compression_gives_the_same_bytes_inline_and_piped() {
    for len in [0, 1, 1000, BUFFER_BYTES, 3_000_000] {
        let plain = noise(len);
        for (media_type, blob) in [
            (PLAIN, plain.clone()),
            (GZIP, gzip(&plain)),
            (ZSTD, zstd(&plain)),
        ] {
            let layer = describe(media_type, &blob, &plain);
            assert!(read(&layer, &blob).unwrap() == plain, "{media_type} {len}");
            // A body that reads only a part does not keep the digests from being checked.
            let part = read_some(&layer, Trickle(&blob, 0), &Limits::default(), 10, 7).unwrap();
            assert!(plain.starts_with(&part));
        }
    }
}

#[test]
fn gzip_members_and_zstd_frames_are_joined_and_skippable_frames_skipped() {
    let (a, b) = (noise(400_000), noise(70));
    let plain = [&a[..], &b, &[]].concat();
    let members = [gzip(&a), gzip(&b), gzip(b"")].concat();
    assert!(read(&describe(GZIP, &members, &plain), &members).unwrap() == plain);
    let skippable = [&[0x52, 0x2a, 0x4d, 0x18, 5, 0, 0, 0][..], b"hello"].concat();
    let frames = [
        skippable.clone(),
        zstd(&a),
        skippable.clone(),
        zstd(&b),
        skippable,
    ]
    .concat();
    assert!(read(&describe(ZSTD, &frames, &plain), &frames).unwrap() == plain);
}

#[test]
fn what_follows_the_compressed_data_is_refused() {
    let plain = noise(400_000);
    for (media_type, mut blob) in [(GZIP, gzip(&plain)), (ZSTD, zstd(&plain))] {
        blob.extend_from_slice(b"garbage");
        let e = read(&describe(media_type, &blob, &plain), &blob).unwrap_err();
        assert!(matches!(e.problem, LayerProblem::Decompress { .. }), "{e}");
        assert!(e.to_string().starts_with("layer 3 (sha256:"), "{e}");
    }
}

#[test]
fn a_truncated_blob_is_told_as_such_and_so_is_a_longer_one() {
    let plain = noise(400_000);
    for (media_type, blob) in [
        (PLAIN, plain.clone()),
        (GZIP, gzip(&plain)),
        (ZSTD, zstd(&plain)),
    ] {
        let layer = describe(media_type, &blob, &plain);
        for cut in [0, 1, 3, 1000, blob.len() - 1] {
            let e = read(&layer, &blob[..cut]).unwrap_err();
            let told = matches!(
                e.problem,
                LayerProblem::Truncated { .. } | LayerProblem::Magic { .. }
            );
            assert!(told, "{media_type} {cut}: {e}");
        }
        let e = read(&layer, &[&blob[..], b"x"].concat()).unwrap_err();
        assert!(
            matches!(e.problem, LayerProblem::TooLong { .. }),
            "{media_type}: {e}"
        );
    }
    // A blob that was cut before it was pushed: length and digest agree, the content ends early.
    for (media_type, blob) in [(GZIP, gzip(&plain)), (ZSTD, zstd(&plain))] {
        let cut = &blob[..blob.len() - 5];
        let e = read(&describe(media_type, cut, &plain), cut).unwrap_err();
        assert!(matches!(e.problem, LayerProblem::Decompress { .. }), "{e}");
    }
}

#[test]
fn a_wrong_digest_or_diff_id_is_found_even_when_nobody_reads_the_bytes() {
    for len in [1000, 1_000_000] {
        let plain = noise(len);
        let other = Digest::of(b"other");
        for (media_type, blob) in [
            (PLAIN, plain.clone()),
            (GZIP, gzip(&plain)),
            (ZSTD, zstd(&plain)),
        ] {
            let right = describe(media_type, &blob, &plain);
            let read = |layer: &LayerDescriptor| {
                read_some(layer, &blob[..], &Limits::default(), 0, 1)
                    .unwrap_err()
                    .problem
            };
            let digest = LayerDescriptor {
                digest: other,
                ..right.clone()
            };
            assert!(
                matches!(read(&digest), LayerProblem::Digest { actual } if actual == right.digest)
            );
            let diff_id = LayerDescriptor {
                diff_id: other,
                ..right.clone()
            };
            assert!(
                matches!(read(&diff_id), LayerProblem::DiffId { expected, .. } if expected == other)
            );
        }
    }
}

#[test]
fn a_media_type_that_lies_is_refused() {
    let plain = noise(1000);
    for (declared, blob) in [
        (GZIP, plain.clone()),
        (ZSTD, gzip(&plain)),
        (PLAIN, zstd(&plain)),
        (PLAIN, gzip(&plain)),
    ] {
        let e = read(&describe(declared, &blob, &plain), &blob).unwrap_err();
        assert!(matches!(e.problem, LayerProblem::Magic { .. }), "{e}");
    }
    let e = read(
        &describe("application/vnd.oci.image.layer.v1.tar+xz", &plain, &plain),
        &plain,
    );
    assert!(matches!(e.unwrap_err().problem, LayerProblem::MediaType(_)));
}

#[test]
fn every_layer_media_type_is_known() {
    use Compression::{Gzip, None, Zstd};
    for (media_type, compression) in [
        (PLAIN, Some(None)),
        (GZIP, Some(Gzip)),
        (ZSTD, Some(Zstd)),
        (
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            Some(Gzip),
        ),
        ("application/vnd.docker.image.rootfs.diff.tar", Some(None)),
        (
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            Some(Gzip),
        ),
        (
            "application/vnd.docker.image.rootfs.diff.tar.zstd",
            Some(Zstd),
        ),
        (
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            Some(Gzip),
        ),
        ("application/vnd.oci.image.config.v1+json", Option::None),
        ("", Option::None),
    ] {
        assert_eq!(
            Compression::of_media_type(media_type),
            compression,
            "{media_type}"
        );
    }
}

#[test]
fn bombs_are_stopped_early_with_the_flag_that_allows_them() {
    let zeros = vec![0; 40 << 20];
    for (media_type, blob) in [(GZIP, gzip(&zeros)), (ZSTD, zstd(&zeros))] {
        let layer = describe(media_type, &blob, &zeros);
        let refused = |limits: &Limits| {
            let mut produced = 0;
            let result: Result<(), LayerError> =
                LayerReader::read(0, &layer, &blob[..], limits, |reader| {
                    let mut buffer = vec![0; 1 << 20];
                    loop {
                        match reader.read(&mut buffer) {
                            Ok(0) => return Ok(()),
                            Ok(n) => produced += n,
                            Err(e) => return Err(e.downcast().unwrap()),
                        }
                    }
                });
            (result.unwrap_err().to_string(), produced)
        };
        let (message, produced) = refused(&Limits {
            compression_slack_bytes: 1 << 20,
            compression_ratio: 20,
            ..Limits::default()
        });
        assert!(message.contains("--max-compression-ratio"), "{message}");
        assert!(produced < 20 << 20, "{produced}");
        let (message, produced) = refused(&Limits {
            layer_bytes: 4 << 20,
            ..Limits::default()
        });
        assert!(message.contains("--max-layer-bytes"), "{message}");
        assert!(produced <= 4 << 20, "{produced}");
        assert!(
            read(&layer, &blob).is_ok(),
            "within the slack, zeros are honest"
        );
    }
}

#[test]
fn a_zstd_window_beyond_the_limit_is_refused() {
    let plain = noise(3 << 20);
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(24).unwrap();
    encoder.write_all(&plain).unwrap();
    let blob = encoder.finish().unwrap();
    let layer = describe(ZSTD, &blob, &plain);
    assert!(read(&layer, &blob).is_ok());
    let limits = Limits {
        zstd_window_log: 20,
        ..Limits::default()
    };
    let e = read_some(&layer, &blob[..], &limits, usize::MAX, 1000).unwrap_err();
    assert!(e.to_string().contains("--max-zstd-window-log"), "{e}");
}

#[test]
fn an_error_of_the_source_keeps_its_cause() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::new(
                io::ErrorKind::ConnectionReset,
                "the registry hung up",
            ))
        }
    }
    let plain = noise(2_000_000);
    for (media_type, blob) in [
        (PLAIN, plain.clone()),
        (GZIP, gzip(&plain)),
        (ZSTD, zstd(&plain)),
    ] {
        let layer = describe(media_type, &blob, &plain);
        let source = Cursor::new(blob[..1_000_000.min(blob.len() / 2)].to_vec()).chain(Broken);
        let e = read_some(&layer, source, &Limits::default(), usize::MAX, 4096).unwrap_err();
        assert!(e.to_string().contains("the registry hung up"), "{e}");
        let cause = std::error::Error::source(&e).unwrap();
        assert_eq!(
            cause.downcast_ref::<io::Error>().unwrap().kind(),
            io::ErrorKind::ConnectionReset
        );
    }
}

#[test]
fn the_bodys_own_error_comes_back_and_the_thread_ends() {
    #[derive(Debug)]
    struct Mine;
    impl From<LayerError> for Mine {
        fn from(_: LayerError) -> Self {
            unreachable!("the layer is fine")
        }
    }
    let plain = noise(8 << 20);
    let blob = zstd(&plain);
    let layer = describe(ZSTD, &blob, &plain);
    let result: Result<(), Mine> =
        LayerReader::read(0, &layer, &blob[..], &Limits::default(), |_| Err(Mine));
    assert!(result.is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damaged_blobs_never_panic_and_never_pass(
        kind in 0usize..3,
        flips in proptest::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..6),
    ) {
        let plain = noise(300_000);
        let (media_type, mut blob) =
            [(PLAIN, plain.clone()), (GZIP, gzip(&plain)), (ZSTD, zstd(&plain))][kind].clone();
        let layer = describe(media_type, &blob, &plain);
        for (at, bits) in flips {
            let at = at.index(blob.len());
            blob[at] ^= bits;
        }
        if Digest::of(&blob) != layer.digest {
            prop_assert!(read(&layer, &blob).is_err());
        }
    }

    #[test]
    fn random_bytes_behind_a_magic_never_panic(
        gz in any::<bool>(),
        tail in proptest::collection::vec(any::<u8>(), 0..2000),
    ) {
        let magic: &[u8] = if gz { &[0x1f, 0x8b, 8, 0] } else { &[0x28, 0xb5, 0x2f, 0xfd] };
        let blob = [magic, &tail].concat();
        let _ = read(&describe(if gz { GZIP } else { ZSTD }, &blob, b""), &blob);
    }
}
