//! What can be wrong with a layer's entries.

use std::error::Error;
use std::fmt;

use crate::layer::LayerError;
use crate::limits::Exceeded;
use crate::tar::{TarError, TarProblem};

/// Why a layer could not be applied: which layer, which entry, what.
#[derive(Debug)]
pub struct FlattenError {
    /// Which layer, counted from 0 at the base.
    pub layer: u32,
    /// What the layer is called: its digest.
    pub name: String,
    /// The entry's name as it stands in the layer, as far as known.
    pub entry: Option<Vec<u8>>,
    /// Where `entry` is not known, the last one before it.
    pub after: Option<Vec<u8>>,
    /// What.
    pub problem: EntryProblem,
}

/// The kinds of trouble an entry can make.
#[derive(Debug, thiserror::Error)]
pub enum EntryProblem {
    /// The archive itself.
    #[error(transparent)]
    Tar(Box<TarError>),
    /// The blob around the archive.
    #[error(transparent)]
    Blob(Box<LayerError>),
    /// The content sink.
    #[error("the file's content can't be kept: {0}")]
    Sink(#[source] Box<dyn Error + Send + Sync>),
    /// A name that leads upwards.
    #[error("\"{}\" contains \"..\": it could lead out of the image", .0.escape_ascii())]
    DotDot(Vec<u8>),
    /// A NUL byte in a name.
    #[error("\"{}\" contains a NUL byte", .0.escape_ascii())]
    Nul(Vec<u8>),
    /// The root as anything but a directory.
    #[error("the root of an image must be a directory")]
    RootNotDirectory,
    /// A whiteout that hides nothing that could exist.
    #[error("a whiteout must name what it hides: after \".wh.\" stands nothing, \".\" or \"..\"")]
    Whiteout,
    /// Symbolic links that lead in circles, or nearly.
    #[error(
        "more than {0} symbolic links on the way to the entry, and Linux follows no more: they lead \
         in a circle, or each to the next"
    )]
    SymlinkLoop(usize),
    /// A hard link to a directory.
    #[error("hard link to \"{}\", which is a directory", .0.escape_ascii())]
    LinkToDirectory(Vec<u8>),
    /// A hard link to nothing.
    #[error(
        "hard link to \"{}\", which is in neither this layer up to here nor a lower one",
        .0.escape_ascii()
    )]
    LinkToNothing(Vec<u8>),
    /// A symbolic link without a target.
    #[error("symbolic link without a target, or with a NUL byte in it")]
    EmptyTarget,
    /// More than a limit allows.
    #[error(transparent)]
    Limit(#[from] Exceeded),
}

impl FlattenError {
    pub(super) fn new(layer: u32, name: &str, entry: Option<&[u8]>, problem: EntryProblem) -> Self {
        Self {
            layer,
            name: name.to_owned(),
            entry: entry.map(<[u8]>::to_vec),
            after: None,
            problem,
        }
    }

    /// Unwraps what came through the tar reader from the blob below.
    /// `last` is the entry that was read before.
    pub(super) fn tar(layer: u32, name: &str, mut e: TarError, last: Option<Vec<u8>>) -> Self {
        let entry = e.entry.take();
        let after = last.filter(|_| entry.is_none());
        let problem = match e.problem {
            TarProblem::Read(cause) => match cause.downcast::<LayerError>() {
                Ok(blob) => EntryProblem::Blob(Box::new(blob)),
                Err(cause) => EntryProblem::Tar(Box::new(TarError {
                    problem: TarProblem::Read(cause),
                    ..e
                })),
            },
            problem => EntryProblem::Tar(Box::new(TarError { problem, ..e })),
        };
        Self {
            layer,
            name: name.to_owned(),
            entry,
            after,
            problem,
        }
    }
}

impl From<LayerError> for FlattenError {
    fn from(e: LayerError) -> Self {
        Self {
            layer: e.number,
            name: e.digest.to_string(),
            entry: None,
            after: None,
            problem: EntryProblem::Blob(Box::new(e)),
        }
    }
}

impl fmt::Display for FlattenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {} ({})", self.layer, self.name)?;
        let place = match (&self.entry, &self.after) {
            (Some(entry), _) => Some(("entry", entry)),
            (None, Some(last)) => Some(("after entry", last)),
            (None, None) => None,
        };
        if let Some((word, entry)) = place {
            // A name may be as long as a limit allows; the message need not be.
            const SHOWN: usize = 300;
            let shown = &entry[..entry.len().min(SHOWN)];
            let dots = if entry.len() > SHOWN { "…" } else { "" };
            write!(f, ", {word} \"{}{dots}\"", shown.escape_ascii())?;
        }
        match &self.problem {
            // It names the layer too: once is enough.
            EntryProblem::Blob(e) => write!(f, ": {}", e.problem),
            problem => write!(f, ": {problem}"),
        }
    }
}

impl Error for FlattenError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.problem.source()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::io::Write;

    use lazyimg_convergent::Digest;

    use crate::flatten::{ContentSink, Counters, apply_layer};
    use crate::layer::LayerReader;
    use crate::limits::Limits;
    use crate::source::LayerDescriptor;
    use crate::tar::tests_support::{Raw, end};
    use crate::tree::{ContentId, Tree};

    /// Takes bodies and forgets them.
    struct Nowhere;

    impl ContentSink for Nowhere {
        type Error = Infallible;

        fn begin(&mut self, _: u64) -> Result<(), Infallible> {
            Ok(())
        }

        fn data(&mut self, _: u64, _: &[u8]) -> Result<(), Infallible> {
            Ok(())
        }

        fn finish(&mut self) -> Result<ContentId, Infallible> {
            Ok(ContentId(0))
        }
    }

    /// What is said of a layer whose blob ends after `keep` of its bytes.
    fn refused(entries: &[Vec<u8>], limits: &Limits, keep: impl Fn(usize) -> usize) -> String {
        let plain = [entries.concat(), end()].concat();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        let blob = gzip.finish().unwrap();
        let layer = LayerDescriptor {
            digest: Digest::of(&blob),
            size: blob.len() as u64,
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
            diff_id: Digest::of(&plain),
        };
        let (mut tree, mut count) = (Tree::new(), Counters::default());
        let blob = &blob[..keep(blob.len())];
        LayerReader::read(3, &layer, blob, limits, |tar| {
            let name = layer.digest.to_string();
            apply_layer(&mut tree, 3, &name, tar, &mut Nowhere, limits, &mut count)
        })
        .unwrap_err()
        .to_string()
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut out);
        out
    }

    #[test]
    fn a_bomb_is_refused_with_the_name_of_layer_and_entry() {
        let bomb = Raw::new(b"usr/bomb", b'0').body(&vec![0; 40 << 20]);
        let limits = Limits {
            compression_slack_bytes: 1 << 20,
            compression_ratio: 20,
            ..Limits::default()
        };
        let said = refused(&[Raw::new(b"etc/", b'5').bytes(), bomb], &limits, |n| n);
        assert!(said.starts_with("layer 3 (sha256:"), "{said}");
        assert_eq!(said.matches("sha256:").count(), 1, "{said}");
        assert!(
            said.contains("), entry \"usr/bomb\": more than 20 "),
            "{said}"
        );
    }

    #[test]
    fn a_truncated_blob_is_refused_with_the_name_of_layer_and_entry() {
        let body = Raw::new(b"large", b'0').body(&noise(3 << 20));
        let said = refused(std::slice::from_ref(&body), &Limits::default(), |n| n / 2);
        assert!(
            said.contains("), entry \"large\": the blob is truncated"),
            "{said}"
        );
        // Between two entries, the next one has no name yet.
        let more = (0..5000).map(|n| Raw::new(format!("d{n:05}/").as_bytes(), b'5').bytes());
        let entries: Vec<_> = std::iter::once(body).chain(more).collect();
        let said = refused(&entries, &Limits::default(), |n| n - 100);
        assert!(said.contains("), after entry \""), "{said}");
    }

    #[test]
    fn a_long_way_and_a_circle_are_told_apart() {
        let limits = Limits {
            resolve_steps: 9,
            ..Limits::default()
        };
        let link = |name: &[u8], to: &[u8]| Raw::new(name, b'2').link(to).bytes();
        let file = Raw::new(b"s/f", b'0').bytes();
        let far = link(b"s", b"a/a/a/a/a/a/a/a/a/a");
        let said = refused(&[far, file], &limits, |n| n);
        assert!(said.contains("entry \"s/f\": more than 9 names"), "{said}");
        assert!(said.contains("--max-resolve-steps"), "{said}");
        let circle = [link(b"s", b"s"), Raw::new(b"s/f", b'0').bytes()];
        let said = refused(&circle, &Limits::default(), |n| n);
        assert!(said.contains("40 symbolic links"), "{said}");
    }
}
