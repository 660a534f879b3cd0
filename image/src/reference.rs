//! What a user writes to name an image: `registry/repository:tag`, `…@sha256:…`, `oci:DIR:TAG`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use lazyimg_convergent::Digest;

/// The longest text taken as a reference, in bytes: a path, a repository of 255 and a digest fit.
pub const MAX_REFERENCE_LEN: usize = 4096 + 512;

/// The longest tag a registry accepts, in bytes (distribution specification).
pub const MAX_TAG_LEN: usize = 128;

/// Where an image lies, and which one it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ImageRef {
    /// A repository of a registry.
    Registry(RegistryRef),
    /// An OCI image layout in a directory.
    Layout {
        /// The directory that holds `oci-layout`.
        dir: PathBuf,
        /// Which manifest of `index.json`.
        target: ManifestRef,
    },
}

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RegistryRef {
    /// Host and, if given, port: `docker.io`, `127.0.0.1:5000`, `[::1]:5000`.
    pub registry: String,
    /// The repository: `library/debian`.
    pub repository: String,
    /// The tag the user gave. With a digest beside it, only the digest counts.
    pub tag: Option<String>,
    /// The digest the user gave.
    pub digest: Option<Digest>,
}

/// One manifest of a repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ManifestRef {
    /// What a tag points to now.
    Tag(String),
    /// Exactly these bytes.
    Digest(Digest),
    /// The only manifest of an OCI layout; an error where there are several.
    Sole,
}

/// A text that names no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` does not name an image: {reason}")]
pub struct ParseReferenceError {
    text: String,
    reason: String,
}

impl ImageRef {
    /// Which manifest of its repository this is.
    pub fn target(&self) -> ManifestRef {
        match self {
            Self::Registry(reference) => reference.target(),
            Self::Layout { target, .. } => target.clone(),
        }
    }
}

impl RegistryRef {
    /// Which manifest of its repository this is; `latest` when the user gave neither.
    pub fn target(&self) -> ManifestRef {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => ManifestRef::Digest(*digest),
            (None, Some(tag)) => ManifestRef::Tag(tag.clone()),
            (None, None) => ManifestRef::Tag("latest".into()),
        }
    }

    /// `registry/repository`, without tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }
}

impl From<Digest> for ManifestRef {
    fn from(digest: Digest) -> Self {
        Self::Digest(digest)
    }
}

impl From<&ManifestRef> for ManifestRef {
    fn from(target: &ManifestRef) -> Self {
        target.clone()
    }
}

impl RegistryRef {
    /// What a regional store knows the image by: the full reference and the platform, since a tag may
    /// stand for an image of each. `platform` is `os/architecture[/variant]`.
    pub fn store_name(&self, platform: &str) -> String {
        let (registry, repository) = (&self.registry, &self.repository);
        match self.target() {
            ManifestRef::Digest(digest) => format!("{registry}/{repository}@{digest}#{platform}"),
            target => format!("{registry}/{repository}:{target}#{platform}"),
        }
    }
}

impl fmt::Display for ManifestRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
            Self::Sole => f.write_str("(the only manifest)"),
        }
    }
}

impl fmt::Display for RegistryRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => reference.fmt(f),
            Self::Layout {
                dir,
                target: ManifestRef::Tag(tag),
            } => write!(f, "oci:{}:{tag}", dir.display()),
            Self::Layout {
                dir,
                target: ManifestRef::Digest(digest),
            } => write!(f, "oci:{}@{digest}", dir.display()),
            Self::Layout {
                dir,
                target: ManifestRef::Sole,
            } => write!(f, "oci:{}", dir.display()),
        }
    }
}

impl FromStr for ImageRef {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = |reason: String| ParseReferenceError {
            text: text.chars().take(200).collect(),
            reason,
        };
        if text.len() > MAX_REFERENCE_LEN {
            return Err(bad(format!("it is longer than {MAX_REFERENCE_LEN} bytes")));
        }
        match text.strip_prefix("oci:") {
            Some(layout) => parse_layout(layout).map_err(bad),
            None => parse_registry(text.strip_prefix("docker://").unwrap_or(text))
                .map(Self::Registry)
                .map_err(bad),
        }
    }
}

impl FromStr for RegistryRef {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse()? {
            ImageRef::Registry(reference) => Ok(reference),
            ImageRef::Layout { .. } => Err(ParseReferenceError {
                text: text.chars().take(200).collect(),
                reason: "an OCI layout is not a registry".into(),
            }),
        }
    }
}

/// `DIR`, `DIR:TAG` or `DIR@sha256:…`. The tag starts at the last colon that no slash follows, so
/// that a directory may hold colons in all but its last component.
fn parse_layout(text: &str) -> Result<ImageRef, String> {
    let (dir, target) = if let Some((dir, digest)) = text
        .rsplit_once('@')
        .filter(|(_, d)| d.contains(':') && !d.contains('/'))
    {
        (
            dir,
            ManifestRef::Digest(
                digest
                    .parse()
                    .map_err(|e: lazyimg_convergent::ParseDigestError| e.to_string())?,
            ),
        )
    } else {
        match text.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')) {
            Some((_, "")) => return Err("the tag after the last colon is empty".into()),
            Some((_, tag)) if tag.len() > MAX_TAG_LEN => {
                return Err(format!("a tag has at most {MAX_TAG_LEN} characters"));
            }
            Some((dir, tag)) => (dir, ManifestRef::Tag(tag.to_owned())),
            None => (text, ManifestRef::Sole),
        }
    };
    if dir.is_empty() {
        return Err("the directory is missing; write oci:DIR:TAG".into());
    }
    Ok(ImageRef::Layout {
        dir: PathBuf::from(dir),
        target,
    })
}

/// The grammar is docker's, by oci-client; only an IPv6 literal, which it lacks, is taken off first.
fn parse_registry(text: &str) -> Result<RegistryRef, String> {
    if text.contains("://") {
        return Err("a reference has no scheme; for plain HTTP to a host that is not loopback there is a flag".into());
    }
    if let Some((registry, rest)) = ipv6_registry(text) {
        let inner = parse_registry(&format!("ipv6.invalid/{rest}"))?;
        return Ok(RegistryRef {
            registry: registry.to_owned(),
            ..inner
        });
    }
    if let Some(plain) = parse_plain(text) {
        return Ok(plain);
    }
    let parsed: oci_client::Reference = text.parse().map_err(|e: oci_client::ParseError| {
        if text
            .split_once('/')
            .map_or(text, |(_, path)| path)
            .chars()
            .any(|c| c.is_ascii_uppercase())
            && !text.contains('@')
        {
            format!("{e} (a repository is in lower case)")
        } else {
            e.to_string()
        }
    })?;
    // oci-client checks the grammar before it decides that `Name/app` has no host.
    if parsed.repository().bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(
            "a repository is in lower case, and a registry's name has a dot or a port, or is localhost"
                .into(),
        );
    }
    let digest = match parsed.digest() {
        None => None,
        Some(text) if text.starts_with("sha256:") => Some(
            text.to_ascii_lowercase()
                .parse()
                .map_err(|e: lazyimg_convergent::ParseDigestError| e.to_string())?,
        ),
        Some(text) => {
            let algorithm = text.split(':').next().unwrap_or_default();
            return Err(format!(
                "its digest algorithm {algorithm} is not supported; only sha256 is"
            ));
        }
    };
    Ok(RegistryRef {
        registry: parsed.registry().to_owned(),
        repository: parsed.repository().to_owned(),
        tag: parsed.tag().map(str::to_owned),
        digest,
    })
}

/// References that say everything (host, repository, tag or digest) in the plainest characters:
/// nearly all. oci-client says the same of them, after 30 ms of compiling a regular expression, a
/// quarter of what a mount takes. `None` is not a refusal: the full grammar decides.
fn parse_plain(text: &str) -> Option<RegistryRef> {
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => (name, Some(digest.parse().ok()?)),
        None => (text, None),
    };
    let (registry, rest) = name.split_once('/')?;
    let (host, port) = match registry.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (registry, None),
    };
    let word = |w: &str, extra: &[u8]| {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let (first, last) = (w.bytes().next(), w.bytes().next_back());
        first.is_some_and(plain)
            && last.is_some_and(plain)
            && w.bytes().all(|b| plain(b) || extra.contains(&b))
    };
    let registry_named = host == "localhost" || host.contains('.') || port.is_some();
    let short_for_another = matches!(host, "docker.io" | "index.docker.io");
    let port_plain =
        port.is_none_or(|p| (1..=5).contains(&p.len()) && p.bytes().all(|b| b.is_ascii_digit()));
    if !registry_named
        || short_for_another
        || !port_plain
        || !host.split('.').all(|label| word(label, b"-"))
    {
        return None;
    }
    let (repository, tag) = match rest.split_once(':') {
        Some((repository, tag)) => (repository, Some(tag)),
        None => (rest, None),
    };
    let component = |c: &str| {
        word(c, b"._-")
            && !["..", "._", "_.", "-.", ".-", "_-", "-_", "__", "--"]
                .iter()
                .any(|two| c.contains(two))
    };
    let tag_plain = |t: &str| {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        t.len() <= MAX_TAG_LEN
            && t.bytes().next().is_some_and(plain)
            && t.bytes().all(|b| plain(b) || matches!(b, b'.' | b'-'))
    };
    let complete = (tag.is_some() || digest.is_some()) && tag.is_none_or(tag_plain);
    (complete && repository.len() <= 128 && repository.split('/').all(component)).then(|| {
        RegistryRef {
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            tag: tag.map(str::to_owned),
            digest,
        }
    })
}

/// Splits `[::1]:5000/repository:tag` after the host when the host is an IPv6 literal.
fn ipv6_registry(text: &str) -> Option<(&str, &str)> {
    let close = text.strip_prefix('[')?.find(']')? + 1;
    text[1..close].parse::<std::net::Ipv6Addr>().ok()?;
    let slash = close + text[close..].find('/')?;
    let port = &text[close + 1..slash];
    let legal = port.is_empty()
        || port
            .strip_prefix(':')
            .is_some_and(|p| p.parse::<u16>().is_ok());
    legal.then(|| (&text[..slash], &text[slash + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEX: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn registry(text: &str) -> RegistryRef {
        text.parse().unwrap()
    }

    proptest::proptest! {
        #[test]
        fn the_short_way_says_what_the_full_grammar_says(
            text in "([a-c0-1.-]{1,6}|localhost|docker\\.io)(:[0-9]{1,5})?/[a-b0-1./_-]{1,9}(:[A-Ba-b_.-]{1,5})?(@sha256:(0123456789abcdef){4})?"
        ) {
            if let Some(plain) = parse_plain(&text) {
                let full: oci_client::Reference = text.parse().unwrap();
                proptest::prop_assert_eq!(full.registry(), plain.registry);
                proptest::prop_assert_eq!(full.repository(), plain.repository);
                proptest::prop_assert_eq!(full.tag(), plain.tag.as_deref());
                proptest::prop_assert_eq!(full.digest().map(str::to_owned), plain.digest.map(|d| d.to_string()));
            }
        }
    }

    #[test]
    fn usual_references_take_the_short_way() {
        let digest = lazyimg_convergent::Digest::of(b"x");
        for text in [
            "127.0.0.1:5000/app:v1",
            "registry.example/a/b_c:1.0-x",
            &format!("localhost/a@{digest}"),
        ] {
            assert!(parse_plain(text).is_some(), "{text}");
        }
        assert!(parse_plain("debian:12").is_none() && parse_plain("docker.io/debian:12").is_none());
    }

    #[test]
    fn docker_names_take_their_full_form() {
        assert_eq!(
            registry("debian").to_string(),
            "docker.io/library/debian:latest"
        );
        assert_eq!(registry("a/b:1").to_string(), "docker.io/a/b:1");
        assert_eq!(registry("127.0.0.1:5000/x/y:v1").registry, "127.0.0.1:5000");
        assert_eq!(registry("localhost/x").registry, "localhost");
        assert_eq!(
            registry("docker://quay.io/x/y").to_string(),
            "quay.io/x/y:latest"
        );
        assert_eq!(
            registry("[::1]:5000/x/y:v1").to_string(),
            "[::1]:5000/x/y:v1"
        );
    }

    #[test]
    fn a_digest_beside_a_tag_is_what_counts() {
        let both = registry(&format!("h:1/x:v1@sha256:{HEX}"));
        assert_eq!(both.tag.as_deref(), Some("v1"));
        assert_eq!(both.target(), ManifestRef::Digest(HEX_DIGEST()));
        assert_eq!(
            registry("h:1/x").target(),
            ManifestRef::Tag("latest".into())
        );
    }

    #[allow(non_snake_case)]
    fn HEX_DIGEST() -> Digest {
        format!("sha256:{HEX}").parse().unwrap()
    }

    #[test]
    fn a_layout_splits_at_the_last_colon_without_a_slash_behind_it() {
        let layout = |dir: &str, target| ImageRef::Layout {
            dir: dir.into(),
            target,
        };
        assert_eq!(
            "oci:/a/b:v1".parse(),
            Ok(layout("/a/b", ManifestRef::Tag("v1".into())))
        );
        assert_eq!("oci:rel".parse(), Ok(layout("rel", ManifestRef::Sole)));
        assert_eq!(
            "oci:/a:b/c".parse(),
            Ok(layout("/a:b/c", ManifestRef::Sole))
        );
        assert_eq!(
            format!("oci:/a@sha256:{HEX}").parse(),
            Ok(layout("/a", ManifestRef::Digest(HEX_DIGEST())))
        );
    }

    #[test]
    fn what_names_no_image_is_refused_with_a_reason() {
        for (text, reason) in [
            ("", "at least one component"),
            ("oci:", "directory"),
            ("oci::x", "directory"),
            ("oci:/a:", "tag"),
            ("https://x/y", "scheme"),
            ("h/X", "lower case"),
            ("T0/y", "lower case"),
            (&format!("h/x@sha512:{}", "a".repeat(128)), "sha512"),
            ("h/x@sha256:abc", "format"),
            ("h/../x", "format"),
            ("[::1/x", "format"),
        ] {
            let error = text.parse::<ImageRef>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_parses_prints_and_parses_again(text in "\\PC{0,60}|[a-z0-9:/@.\\[\\]-]{0,60}") {
            if let Ok(reference) = text.parse::<ImageRef>() {
                prop_assert_eq!(reference.to_string().parse::<ImageRef>(), Ok(reference));
            }
        }
    }

    #[test]
    fn a_store_knows_an_image_by_one_name_however_it_is_written() {
        let name = |text: &str| match text.parse().unwrap() {
            ImageRef::Registry(reference) => reference.store_name("linux/amd64"),
            other => panic!("{other:?}"),
        };
        assert_eq!(name("r:5000/a/b"), "r:5000/a/b:latest#linux/amd64");
        assert_eq!(name("r:5000/a/b:latest"), name("r:5000/a/b"));
        let digest = Digest::of(b"x");
        let exact = format!("r:5000/a/b@{digest}#linux/amd64");
        assert_eq!(name(&format!("r:5000/a/b:v1@{digest}")), exact);
        assert_eq!(name(&format!("r:5000/a/b@{digest}")), exact);
    }
}
