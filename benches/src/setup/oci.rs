//! Writes OCI layouts: layers, plain and compressed, configuration, manifest, index.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::error::{BenchError, at};

/// The tag of every image that the benches make.
pub const TAG: &str = "v1";

/// gzip's level in docker and buildah.
const GZIP_LEVEL: u32 = 6;

/// zstd's level in buildah and nerdctl.
const ZSTD_LEVEL: i32 = 3;

/// How layers are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    Plain,
    /// gzip, level 6.
    Gzip,
    /// zstd, level 3.
    Zstd,
}

impl Compression {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Gzip, Self::Zstd, Self::Plain];

    /// For names of folders and rows.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    fn media_type(self) -> String {
        let suffix = match self {
            Self::Plain => "",
            Self::Gzip => "+gzip",
            Self::Zstd => "+zstd",
        };
        format!("application/vnd.oci.image.layer.v1.tar{suffix}")
    }
}

/// A blob in a layout.
#[derive(Debug, Clone)]
pub struct Blob {
    /// SHA-256 in hex.
    pub hex: String,
    /// Length in bytes.
    pub len: u64,
    /// Where it lies.
    pub path: PathBuf,
}

/// Writes one blob into `layout`; it is named when it is complete.
pub fn write_blob(
    layout: &Path,
    fill: impl FnOnce(&mut dyn Write) -> Result<(), BenchError>,
) -> Result<Blob, BenchError> {
    let dir = layout.join("blobs/sha256");
    fs::create_dir_all(&dir).map_err(at(&dir))?;
    let temp = tempfile::NamedTempFile::new_in(&dir).map_err(at(&dir))?;
    let mut out = Hashing {
        inner: BufWriter::with_capacity(1 << 20, temp),
        hash: Sha256::new(),
        len: 0,
    };
    fill(&mut out)?;
    let temp = out
        .inner
        .into_inner()
        .map_err(|e| at(&dir)(e.into_error()))?;
    let hex: String = out
        .hash
        .finalize()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let path = dir.join(&hex);
    temp.persist(&path).map_err(|e| at(&path)(e.error))?;
    Ok(Blob {
        hex,
        len: out.len,
        path,
    })
}

struct Hashing<W> {
    inner: W,
    hash: Sha256,
    len: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.hash.update(&buf[..n]);
        self.len += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Writes a layout whose layers are `tars`, compressed; uncompressed tars are linked, not copied.
pub fn write_image(layout: &Path, tars: &[Blob], with: Compression) -> Result<u64, BenchError> {
    let layers = std::thread::scope(|scope| {
        let jobs: Vec<_> = tars
            .iter()
            .map(|tar| scope.spawn(move || compress(layout, tar, with)))
            .collect();
        let join = |j: std::thread::ScopedJoinHandle<'_, Result<Blob, BenchError>>| {
            j.join()
                .map_err(|_| BenchError::Setup("a compressing thread panicked".into()))?
        };
        jobs.into_iter().map(join).collect::<Result<Vec<_>, _>>()
    })?;
    let diff_ids: Vec<_> = tars.iter().map(|t| format!("sha256:{}", t.hex)).collect();
    let config = document(
        layout,
        &json!({
            "architecture": architecture(), "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }),
    )?;
    let descriptor = |media: &str, b: &Blob| {
        json!({
            "mediaType": media, "digest": format!("sha256:{}", b.hex), "size": b.len,
        })
    };
    let media = "application/vnd.oci.image.manifest.v1+json";
    let manifest = document(
        layout,
        &json!({
            "schemaVersion": 2, "mediaType": media,
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": layers.iter().map(|l| descriptor(&with.media_type(), l)).collect::<Vec<_>>(),
        }),
    )?;
    let mut entry = descriptor(media, &manifest);
    entry["annotations"] = json!({"org.opencontainers.image.ref.name": TAG});
    let put = |name: &str, value: serde_json::Value| {
        let path = layout.join(name);
        fs::write(&path, value.to_string()).map_err(at(&path))
    };
    put("oci-layout", json!({"imageLayoutVersion": "1.0.0"}))?;
    put(
        "index.json",
        json!({"schemaVersion": 2, "manifests": [entry]}),
    )?;
    Ok(layers.iter().map(|l| l.len).sum())
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn document(layout: &Path, value: &serde_json::Value) -> Result<Blob, BenchError> {
    write_blob(layout, |out| {
        out.write_all(value.to_string().as_bytes())
            .map_err(at(layout))
    })
}

fn compress(layout: &Path, tar: &Blob, with: Compression) -> Result<Blob, BenchError> {
    if with == Compression::Plain {
        let dir = layout.join("blobs/sha256");
        fs::create_dir_all(&dir).map_err(at(&dir))?;
        let path = dir.join(&tar.hex);
        if path != tar.path {
            fs::hard_link(&tar.path, &path).map_err(at(&path))?;
        }
        return Ok(Blob {
            path,
            ..tar.clone()
        });
    }
    let mut input = File::open(&tar.path).map_err(at(&tar.path))?;
    write_blob(layout, |out| {
        let fail = at(layout);
        if with == Compression::Gzip {
            let level = flate2::Compression::new(GZIP_LEVEL);
            let mut gzip = flate2::write::GzEncoder::new(out, level);
            copy(&mut input, &mut gzip)
                .and_then(|()| gzip.finish().map(drop))
                .map_err(fail)
        } else {
            let encode = |input: &mut File| {
                let mut zstd = zstd::Encoder::new(out, ZSTD_LEVEL)?;
                copy(input, &mut zstd)?;
                zstd.finish().map(drop)
            };
            encode(&mut input).map_err(fail)
        }
    })
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buf = vec![0; 1 << 20];
    loop {
        match from.read(&mut buf)? {
            0 => return Ok(()),
            n => to.write_all(&buf[..n])?,
        }
    }
}

/// A copy of a layout that can be converted without changing the first: blobs are linked.
pub fn clone_layout(from: &Path, to: &Path) -> Result<(), BenchError> {
    let (old, new) = (from.join("blobs/sha256"), to.join("blobs/sha256"));
    fs::create_dir_all(&new).map_err(at(&new))?;
    for entry in fs::read_dir(&old).map_err(at(&old))? {
        let entry = entry.map_err(at(&old))?;
        let target = new.join(entry.file_name());
        fs::hard_link(entry.path(), &target).map_err(at(&target))?;
    }
    for name in ["oci-layout", "index.json"] {
        fs::copy(from.join(name), to.join(name)).map_err(at(&from.join(name)))?;
    }
    Ok(())
}
