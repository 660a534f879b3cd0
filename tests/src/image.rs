//! Images as OCI layouts: the prepared ones, and small ones that a test makes up.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lazyimg_convergent::Digest;
use serde_json::{Value, json};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// An OCI layout on disk.
#[derive(Debug, Clone)]
pub struct Layout {
    dir: PathBuf,
}

/// A layer in a layout.
#[derive(Debug, Clone)]
pub struct Layer {
    descriptor: Value,
    diff_id: String,
}

impl Layer {
    /// Its digest, `sha256:…`.
    pub fn digest(&self) -> &str {
        self.descriptor["digest"]
            .as_str()
            .expect("a descriptor has a digest")
    }
}

/// How a made-up layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

/// The folder of the images that `scripts/test-images` makes: the rules of `scripts/lib.sh`.
fn images_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("LAZYIMG_TEST_IMAGES") {
        return dir.into();
    }
    let var = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let home = || var("HOME").unwrap_or_else(|| "/root".into()).join(".cache");
    let work = var("LAZYIMG_DEV_DIR")
        .unwrap_or_else(|| var("XDG_CACHE_HOME").unwrap_or_else(home).join("lazyimg"));
    work.join("images-v1")
}

impl Layout {
    /// A prepared image; panics with advice if it is not there.
    #[track_caller]
    pub fn prepared(name: &str) -> Self {
        let dir = images_dir().join(name);
        assert!(
            dir.join("index.json").is_file(),
            "no test image {}: run scripts/test-images first (LAZYIMG_TEST_IMAGES names another folder)",
            dir.display()
        );
        Self { dir }
    }

    /// A new, empty layout in `dir`.
    pub fn create(dir: impl Into<PathBuf>) -> Self {
        let layout = Self { dir: dir.into() };
        fs::create_dir_all(layout.dir.join("blobs/sha256"))
            .expect("a test may write to its own directory");
        layout.write("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
        layout.write(
            "index.json",
            json!({"schemaVersion": 2, "manifests": []})
                .to_string()
                .as_bytes(),
        );
        layout
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `oci:DIR:TAG`, as lazyimg and skopeo name it.
    pub fn reference(&self, tag: &str) -> String {
        format!("oci:{}:{tag}", self.dir.display())
    }

    /// The path of a blob.
    pub fn blob_path(&self, digest: &str) -> PathBuf {
        self.dir
            .join("blobs/sha256")
            .join(digest.trim_start_matches("sha256:"))
    }

    /// The layers of the image that is tagged `tag`, base first.
    pub fn layers(&self, tag: &str) -> Vec<Layer> {
        let manifest = self.read_json(&self.blob_path(&self.digest(tag)));
        let config = self.read_json(&self.blob_path(text(&manifest["config"]["digest"])));
        let diff_ids = config["rootfs"]["diff_ids"]
            .as_array()
            .expect("a config has diff ids");
        let layers = manifest["layers"]
            .as_array()
            .expect("a manifest has layers");
        let pair = |(descriptor, diff_id): (&Value, &Value)| Layer {
            descriptor: descriptor.clone(),
            diff_id: text(diff_id).to_owned(),
        };
        layers.iter().zip(diff_ids).map(pair).collect()
    }

    /// The digest of the manifest that is tagged `tag`.
    #[track_caller]
    pub fn digest(&self, tag: &str) -> String {
        let index = self.read_json(&self.dir.join("index.json"));
        let manifests = index["manifests"]
            .as_array()
            .expect("an index has manifests");
        let found = manifests
            .iter()
            .find(|m| m["annotations"]["org.opencontainers.image.ref.name"] == tag);
        text(&found.unwrap_or_else(|| panic!("no tag {tag} in {}", self.dir.display()))["digest"])
            .to_owned()
    }

    /// Adds a layer: what lies in `dir`, as GNU tar writes it.
    pub fn add_layer(&self, dir: &Path, compression: Compression) -> Layer {
        let tar = Command::new("tar")
            .args([
                "--format=pax",
                "--sort=name",
                "--numeric-owner",
                "--xattrs",
                "--xattrs-include=*",
            ])
            .args(["--pax-option=delete=atime,delete=ctime", "-C"])
            .arg(dir)
            .args(["-cf", "-", "."])
            .output()
            .expect("tar is there");
        assert!(
            tar.status.success(),
            "tar of {}: {}",
            dir.display(),
            String::from_utf8_lossy(&tar.stderr)
        );
        self.add_tar(&tar.stdout, compression)
    }

    /// Adds a layer: a tar file's bytes.
    pub fn add_tar(&self, tar: &[u8], compression: Compression) -> Layer {
        let diff_id = Digest::of(tar).to_string();
        let (blob, suffix) = match compression {
            Compression::None => (tar.to_vec(), ""),
            Compression::Gzip => (filter("gzip", &["-nc"], tar), "+gzip"),
            Compression::Zstd => (filter("zstd", &["-q3c"], tar), "+zstd"),
        };
        let digest = self.add_blob(&blob);
        let descriptor =
            json!({"mediaType": format!("{TAR}{suffix}"), "digest": digest, "size": blob.len()});
        Layer {
            descriptor,
            diff_id,
        }
    }

    /// Copies layers of another layout into this one.
    pub fn borrow(&self, other: &Self, layers: &[Layer]) {
        for layer in layers {
            let to = self.blob_path(layer.digest());
            if !to.exists() {
                fs::copy(other.blob_path(layer.digest()), to).expect("blobs can be copied");
            }
        }
    }

    /// Makes an image of layers and tags it.
    pub fn add_image(&self, tag: &str, layers: &[Layer]) -> String {
        let descriptor = self.manifest("amd64", layers);
        let digest = text(&descriptor["digest"]).to_owned();
        self.tag(tag, descriptor);
        digest
    }

    /// Makes a multi-platform image, `(architecture, layers)` each, and tags it.
    pub fn add_index(&self, tag: &str, platforms: &[(&str, &[Layer])]) {
        let manifest = |(architecture, layers): &(&str, &[Layer])| {
            let mut descriptor = self.manifest(architecture, layers);
            descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
            descriptor
        };
        let manifests: Vec<Value> = platforms.iter().map(manifest).collect();
        let index =
            json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}).to_string();
        let digest = self.add_blob(index.as_bytes());
        self.tag(
            tag,
            json!({"mediaType": INDEX, "digest": digest, "size": index.len()}),
        );
    }

    /// Copies the layout; blobs are shared until they are replaced.
    pub fn duplicate(&self, dir: impl Into<PathBuf>) -> Self {
        let copy = Self::create(dir);
        for blob in crate::flip::files_below(&self.dir.join("blobs/sha256")) {
            let to = copy
                .dir
                .join("blobs/sha256")
                .join(blob.file_name().expect("a blob has a name"));
            fs::hard_link(&blob, to).expect("both are in the test's directory");
        }
        fs::copy(self.dir.join("index.json"), copy.dir.join("index.json"))
            .expect("a layout has an index");
        copy
    }

    /// Puts other bytes, of the same length, in the place of a blob, and lets every document that names it name
    /// them instead: what somebody does who can write to the store.
    pub fn replace_blob(&self, digest: &str, bytes: &[u8]) {
        let new = self.add_blob(bytes);
        fs::remove_file(self.blob_path(digest)).expect("the blob is there");
        let names = |text: &str| text.contains(digest);
        for blob in crate::flip::files_below(&self.dir.join("blobs/sha256")) {
            let small = fs::metadata(&blob).is_ok_and(|m| m.len() < 1 << 20);
            let Some(text) = small.then(|| fs::read_to_string(&blob).ok()).flatten() else {
                continue;
            };
            if text.starts_with('{') && names(&text) {
                let name = blob
                    .file_name()
                    .expect("a blob has a name")
                    .to_string_lossy()
                    .into_owned();
                self.replace_blob(
                    &format!("sha256:{name}"),
                    text.replace(digest, &new).as_bytes(),
                );
            }
        }
        let index = fs::read_to_string(self.dir.join("index.json")).expect("a layout has an index");
        self.write("index.json", index.replace(digest, &new).as_bytes());
    }

    fn manifest(&self, architecture: &str, layers: &[Layer]) -> Value {
        let diff_ids: Vec<&str> = layers.iter().map(|l| l.diff_id.as_str()).collect();
        let config = json!({
            "architecture": architecture, "os": "linux",
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        })
        .to_string();
        let config_digest = self.add_blob(config.as_bytes());
        let descriptors: Vec<&Value> = layers.iter().map(|l| &l.descriptor).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": config_digest, "size": config.len()},
            "layers": descriptors,
        })
        .to_string();
        let digest = self.add_blob(manifest.as_bytes());
        json!({"mediaType": MANIFEST, "digest": digest, "size": manifest.len()})
    }

    fn tag(&self, tag: &str, mut descriptor: Value) {
        descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        let mut index = self.read_json(&self.dir.join("index.json"));
        let manifests = index["manifests"]
            .as_array_mut()
            .expect("an index has manifests");
        manifests.retain(|m| m["annotations"]["org.opencontainers.image.ref.name"] != tag);
        manifests.push(descriptor);
        self.write("index.json", index.to_string().as_bytes());
    }

    fn add_blob(&self, bytes: &[u8]) -> String {
        let digest = Digest::of(bytes);
        self.write(&format!("blobs/sha256/{}", digest.hex()), bytes);
        digest.to_string()
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.dir.join(name), bytes).expect("a test may write to its own directory");
    }

    fn read_json(&self, path: &Path) -> Value {
        let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    /// Unpacks an image with umoci, as root, and gives the root of the tree.
    pub fn umoci_unpack(&self, tag: &str, bundle: &Path) -> PathBuf {
        let image = format!("{}:{tag}", self.dir.display());
        let mut umoci = Command::new("umoci");
        crate::process::run(umoci.args(["unpack", "--image", &image]).arg(bundle)).ok();
        bundle.join("rootfs")
    }
}

fn text(value: &Value) -> &str {
    value
        .as_str()
        .unwrap_or_else(|| panic!("not a string: {value}"))
}

fn filter(program: &str, args: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let mut stdin = child.stdin.take().expect("it is piped");
    std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).expect("the filter reads all"));
        let output = child.wait_with_output().expect("the filter ends");
        assert!(output.status.success(), "{program} failed");
        output.stdout
    })
}
