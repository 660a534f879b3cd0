//! Writes the inputs that the fuzzers begin with: `seeds TARS CORPUS`. TARS is the folder that
//! `scripts/make-odd-image tars` wrote; CORPUS gets one folder for each target.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use lazyimg_chunkstore::wire::{FrameHead, FrameKind};
use lazyimg_convergent::salt::DomainSecret;
use lazyimg_convergent::{ChunkId, ChunkKey, Digest, Salt, TenantKey, chunk, payload, seal};
use lazyimg_fuse::protocol::{Envelope, ErrorCode, Reply, Request, VerifyReport, WirePath};
use lazyimg_fuzz::{Sizes, join, limits};
use lazyimg_image::artifact;
use lazyimg_image::erofs;
use lazyimg_image::flatten::{Counters, apply_layer};
use lazyimg_image::manifest::{Entry, Header, Manifest, Pack, Stored};
use lazyimg_image::tree::Tree;

// Private to the cache; compiled in rather than made public for this.
#[allow(dead_code)]
#[path = "../../chunkstore/src/cache/record.rs"]
mod record;

#[allow(dead_code)]
#[path = "../../chunkstore/service/src/engine/embedded/record.rs"]
mod store_record;

struct Corpus(PathBuf);

impl Corpus {
    /// Adds an input to a target's folder.
    fn add(&self, target: &str, name: &str, input: impl AsRef<[u8]>) -> Result<(), Box<dyn Error>> {
        let dir = self.0.join(target);
        fs::create_dir_all(&dir)?;
        Ok(fs::write(dir.join(format!("seed-{name}")), input)?)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [tars, corpus] = &args[..] else {
        return Err("usage: seeds TARS CORPUS".into());
    };
    let corpus = Corpus(corpus.clone());
    layers(&corpus, tars)?;
    chunks(&corpus)?;
    records(&corpus)?;
    store_records(&corpus)?;
    store_frames(&corpus)?;
    store_heads(&corpus)?;
    messages(&corpus)?;
    documents(&corpus)?;
    answers(&corpus)
}

/// Archives, compressed archives, two layers, metadata.
fn layers(corpus: &Corpus, tars: &Path) -> Result<(), Box<dyn Error>> {
    let victims = fs::read(tars.join("victims.tar"))?;
    for file in fs::read_dir(tars)? {
        let file = file?;
        let (name, tar) = (
            file.file_name().to_string_lossy().into_owned(),
            fs::read(file.path())?,
        );
        corpus.add("tar", &name, &tar)?;
        corpus.add("layer", &name, [&[0], &tar[..]].concat())?;
        corpus.add(
            "layer",
            &format!("{name}.zst"),
            [&[2], &zstd::encode_all(&tar[..], 3)?[..]].concat(),
        )?;
        corpus.add("flatten", &name, join(&victims, &tar))?;
        let mut tree = Tree::new();
        let (mut sizes, mut count) = (Sizes::default(), Counters::default());
        if apply_layer(
            &mut tree,
            0,
            &name,
            &tar[..],
            &mut sizes,
            &limits(),
            &mut count,
        )
        .is_err()
        {
            // It links into a lower layer.
            continue;
        }
        corpus.add(
            "erofs",
            &name,
            erofs::write(&tree, &|content| Some(content.0), 1 << 20)?,
        )?;
    }
    // An empty gzip member (RFC 1952); the fuzzer finds the rest.
    let gzip = [
        0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    corpus.add("layer", "empty.gz", [&[1], &gzip[..]].concat())
}

/// Payloads, sealed keys, an image manifest.
fn chunks(corpus: &Corpus) -> Result<(), Box<dyn Error>> {
    for (name, plain) in [
        ("text", b"All work and no play. ".repeat(50)),
        ("short", b"x".to_vec()),
    ] {
        let len = u32::try_from(plain.len())?.to_le_bytes();
        let payload = payload::encode(&plain, 3);
        corpus.add("chunk", name, [&len[..], &payload].concat())?;
        corpus.add(
            "chunk",
            &format!("{name}-sealed"),
            [&len[..], &join(&plain, &[0, 0, 1])].concat(),
        )?;
    }
    let tenant = TenantKey::from_bytes([7; 32]);
    corpus.add(
        "sealed_keys",
        "good",
        seal::seal(&tenant, &Digest::of(b"chunk table"), &[5; 64]),
    )?;
    corpus.add("sealed_keys", "changed", join(&[5; 96], &[0; 50]))?;

    let salt = Salt::derive(&DomainSecret::from_bytes([3; 32]), "fuzz", 1);
    let sealed = chunk::seal(&salt, payload::encode(&[9; 8192], 3));
    let len = u32::try_from(sealed.ciphertext.len())?;
    let stored = |offset| Entry {
        blocks: 2,
        stored: Some(Stored {
            id: sealed.id,
            len,
            pack: 0,
            offset,
        }),
    };
    let mut manifest = Manifest {
        header: Header {
            meta_len: 8192,
            data_len: 16384,
            image: Digest::of(b"image"),
            has_xattrs: true,
            files: 3,
            file_bytes: 12_000,
            salt_id: [4; 16],
            epoch: 1,
            domain: "fuzz".into(),
        },
        meta: vec![stored(0)],
        data: vec![
            stored(u64::from(len)),
            Entry {
                blocks: 2,
                stored: None,
            },
        ],
        packs: vec![Pack {
            digest: Digest::of(b"pack"),
            len: 2 * u64::from(len),
        }],
        sealed_keys: Vec::new(),
    };
    manifest.seal_keys(
        &tenant,
        [ChunkKey::from_bytes([1; 32]), ChunkKey::from_bytes([2; 32])].iter(),
    );
    corpus.add("manifest", "good", manifest.to_bytes())
}

/// Records and index entries of the host cache.
fn records(corpus: &Corpus) -> Result<(), Box<dyn Error>> {
    let (id, at) = (
        ChunkId::of(b"chunk"),
        record::Location {
            segment: 3,
            offset: 32,
            len: 1000,
        },
    );
    let place = [at.segment.to_le_bytes(), at.offset.to_le_bytes()].concat();
    let add = |name: &str, bytes: &[u8]| corpus.add("cache_record", name, [&place, bytes].concat());
    add("record", &record::record_header(at, &id))?;
    add("segment", &record::segment_header(at.segment))?;
    add("location", &record::location_value(at))?;
    add("record-key", &record::record_key(at.segment, at.offset))?;
    add("record-value", &record::record_value(&id))?;
    add("seal", &record::seal_value(4096, 3))?;
    add("name", record::segment_name(at.segment).as_bytes())
}

/// Records and index entries of the store.
fn store_records(corpus: &Corpus) -> Result<(), Box<dyn Error>> {
    let at = store_record::SegmentId { root: 2, number: 3 };
    let body = b"chunk";
    let record = store_record::Record {
        id: ChunkId::of(body),
        len: 5,
        body_crc: crc32c::crc32c(body),
    };
    let place = [
        &at.root.to_le_bytes()[..],
        &at.number.to_le_bytes(),
        &32u64.to_le_bytes(),
    ]
    .concat();
    let add =
        |name: &str, bytes: &[u8]| corpus.add("store_record", name, [&place[..], bytes].concat());
    let header = |offset| store_record::record_header(at, offset, &record);
    add("record", &[&header(32)[..], body].concat())?;
    add(
        "behind-garbage",
        &[&b"LZSR garbage"[..], &header(44), body].concat(),
    )?;
    add("segment", &store_record::segment_header(at))?;
    let place = store_record::Location {
        segment: 3,
        offset: 32,
        len: 5,
    };
    add("location", &store_record::location_value(place))?;
    add("chunk-key", &store_record::chunk_key(2, &record.id))?;
    add("tail-key", &store_record::tail_key(at))?;
    add("tail", &store_record::tail_value(89))?;
    add("name", store_record::segment_name(at.number).as_bytes())
}

/// Requests for one chunk.
fn store_heads(corpus: &Corpus) -> Result<(), Box<dyn Error>> {
    let id = ChunkId([7; 32]).hex();
    let head = format!("GET /v1/chunks/{id} HTTP/1.1\r\nhost: a\r\n");
    corpus.add("store_head", "bare", format!("{head}\r\n"))?;
    let token = "authorization: Bearer 0123456789abcdef\r\nconnection: keep-alive\r\n";
    let one = format!("{head}{token}\r\n");
    corpus.add("store_head", "two", one.repeat(2))?;
    let body = format!("{head}content-length: 3\r\n\r\nabc");
    corpus.add("store_head", "body", body)
}

/// Answers of a store to a request for chunks.
fn store_frames(corpus: &Corpus) -> Result<(), Box<dyn Error>> {
    let frame = |kind, bytes: &[u8]| {
        let len = bytes.len() as u32;
        [&FrameHead { kind, len }.to_bytes()[..], bytes].concat()
    };
    let end = frame(FrameKind::End, &[]);
    let all = [
        frame(FrameKind::Chunk, b"ciphertext"),
        frame(FrameKind::Missing, &[]),
        frame(FrameKind::Yours, &[]),
        frame(FrameKind::Coming, &[]),
        frame(FrameKind::Failed, &[]),
    ]
    .concat();
    corpus.add("store_frames", "none", [&[0, 0], &end[..]].concat())?;
    corpus.add("store_frames", "all", [&[5, 6], &all[..], &end].concat())?;
    corpus.add("store_frames", "cut-off", [&[5, 200], &all[..]].concat())
}

/// Lines of the control protocol.
fn messages(corpus: &Corpus) -> Result<(), Box<dyn Error>> {
    let dir = || WirePath("/mnt/app".into());
    let mount = r#"{"v":1,"op":"mount","image":"127.0.0.1:5000/x:v1","dir":{"hex":"2f6d6e742fff"},"namespace":"mnt:[1]",
        "key":{"file":"/k"},"source":{"platform":"linux/arm64","plain_http":true},"tree":{"read_timeout_ms":5}}"#;
    corpus.add("protocol", "mount", mount)?;
    for (name, request) in [
        ("ping", Request::Ping),
        ("status", Request::Status),
        ("stop", Request::Stop),
        (
            "verify",
            Request::Verify {
                dir: dir(),
                tiers: true,
            },
        ),
    ] {
        corpus.add(
            "protocol",
            name,
            serde_json::to_vec(&Envelope::new(request))?,
        )?;
    }
    for (name, reply) in [
        ("working", Reply::Working { done: 1, total: 2 }),
        (
            "mounted",
            Reply::Mounted {
                digest: Digest::of(b"x"),
                dir: dir(),
                note: Some("n".into()),
            },
        ),
        ("verified", Reply::Verified(VerifyReport::default())),
        (
            "error",
            Reply::Error {
                code: ErrorCode::NotMounted,
                message: "m".into(),
            },
        ),
    ] {
        corpus.add("protocol", name, serde_json::to_vec(&Envelope::new(reply))?)?;
    }
    Ok(())
}

/// OCI documents and names.
fn documents(corpus: &Corpus) -> Result<(), Box<dyn Error>> {
    let digest = Digest::of(b"");
    let descriptor = |kind: &str, more: &str| {
        format!(
            r#"{{"mediaType":"application/vnd.{kind}+json","digest":"{digest}","size":0{more}}}"#
        )
    };
    let platform = r#","platform":{"os":"linux","architecture":"amd64","variant":"v2"},"annotations":{"org.opencontainers.image.ref.name":"v1"}"#;
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{},{}]}}"#,
        descriptor("oci.image.manifest.v1", platform),
        descriptor(
            "docker.distribution.manifest.list.v2",
            r#","artifactType":"a/b""#
        ),
    );
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{},"layers":[{}],"subject":{}}}"#,
        descriptor("oci.image.config.v1", ""),
        r#"{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:00","size":1}"#,
        descriptor("oci.image.manifest.v1", ""),
    );
    let config = format!(
        r#"{{"os":"linux","architecture":"arm64","variant":"v8","rootfs":{{"type":"layers","diff_ids":["{digest}"]}},"history":[{{"empty_layer":true}}]}}"#
    );
    for (kind, name, text) in [
        (0u8, "layout", &index),
        (1, "index", &index),
        (2, "manifest", &manifest),
        (3, "config", &config),
    ] {
        corpus.add("oci", name, [&[kind], text.as_bytes()].concat())?;
    }
    let names = [
        "debian",
        "T0/y",
        "127.0.0.1:5000/a/b:v1",
        "[::1]:5000/x@sha256:",
        "oci:/dir:tag",
        "linux/arm64/v8",
        &digest.to_string(),
    ];
    for (number, name) in names.iter().enumerate() {
        corpus.add("reference", &number.to_string(), name)?;
    }
    Ok(())
}

/// What registries say beside documents, and what docker writes.
fn answers(corpus: &Corpus) -> Result<(), Box<dyn Error>> {
    let digest = Digest::of(b"");
    let descriptor = |kind: &str| {
        format!(r#"{{"mediaType":"application/vnd.{kind}","digest":"{digest}","size":0}}"#)
    };
    let artifact = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","artifactType":"{}","config":{},"layers":[{},{}],"subject":{},"annotations":{{"{}":"00"}}}}"#,
        "application/vnd.oci.image.manifest.v1+json",
        artifact::ARTIFACT_TYPE,
        descriptor("oci.empty.v1+json"),
        descriptor("lazyimg.manifest.v1"),
        descriptor("lazyimg.pack.v1"),
        descriptor("oci.image.manifest.v1+json"),
        artifact::KEY_ID_ANNOTATION,
    );
    corpus.add("artifact", "good", artifact)?;
    let challenge = "Basic realm=\"x\"\nBearer realm=\"https://auth.example/token\",service=\"s\",scope=\"repository:a/b:pull,push\"";
    let link = "</v2/a/tags/list?last=b&n=2>; rel=\"next\", </x>; rel=prev";
    let errors = r#"{"errors":[{"code":"DENIED","message":"not\u001b yours","detail":null},{"code":"UNKNOWN"}]}"#;
    let token = r#"{"token":"t","access_token":"u","expires_in":300}"#;
    for (kind, name, text) in [
        (0u8, "challenge", challenge),
        (1, "token", token),
        (2, "link", link),
        (3, "errors", errors),
    ] {
        let input = [&[kind], text.as_bytes()].concat();
        corpus.add("registry_answers", name, input)?;
    }
    // "user:hunter2" in base64.
    let config = r#"{"auths":{"https://registry.example/v1/":{"auth":"dXNlcjpodW50ZXIy"},"docker.io/library":{"username":"u","password":"hunter2"},
        "x":{"identitytoken":"hunter2"}},"credHelpers":{"gcr.example":"gcloud"},"credsStore":""}"#;
    corpus.add("docker_config", "good", config)
}
