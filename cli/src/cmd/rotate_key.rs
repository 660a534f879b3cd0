//! `lazyimg rotate-key`.

use lazyimg_convergent::TenantKey;
use lazyimg_convergent::provider::Provider;
use lazyimg_image::artifact;
use lazyimg_image::reference::{ImageRef, ManifestRef};
use lazyimg_image::source::{Deletion, Descriptor, Repository, ResolvedDigest};
use serde::Serialize;

use crate::args::{Global, RotateKey};
use crate::exit::Error;
use crate::{output, secrets};

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// Digest of the image manifest.
    image: String,
    /// Digest of the artifact under the new key.
    artifact: String,
    key_id: String,
    old_key_id: String,
    /// The artifacts under the old key, the newest last.
    old_artifacts: Vec<OldArtifact>,
}

#[derive(Debug, Serialize)]
struct OldArtifact {
    digest: String,
    /// Whether it is gone.
    deleted: bool,
}

/// Runs the command.
pub fn run(global: &Global, args: &RotateKey) -> Result<(), Error> {
    let provider = match (&args.new_key_file, &args.new_key_command) {
        (Some(file), None) => Provider::File(file.clone()),
        (None, Some(command)) => Provider::Command(command.clone()),
        _ => {
            return Err(Error::Usage(
                "say which key with --new-key-file or --new-key-command".into(),
            ));
        }
    };
    let old = secrets::tenant(&args.key)?.existing_tenant_key()?;
    let repo = super::repository(&args.image, &args.source)?;
    let waiting = output::spinner(global, "sealing");
    let (report, failed) = super::block_on(async {
        // First what may fail: a new key is made for an image that is there under the old one.
        let image = repo.resolve_digest(args.image.target()).await?;
        let found = artifact::find_all(&repo, &image.digest, Some(&old)).await?;
        let new = provider.tenant_key()?;
        if new.id() == old.id() {
            return Err(Error::Usage(format!(
                "the new key is the one that {} is sealed under already ({})",
                args.image,
                old.id()
            )));
        }
        let sealed = seal(&repo, &args.image, &image, &old, &new).await?;
        let mut old_artifacts = Vec::new();
        let mut failed = None;
        for artifact in &found {
            let deleted = match args.delete_old && failed.is_none() {
                true => delete(&repo, &image, artifact).await,
                false => Ok(false),
            };
            old_artifacts.push(OldArtifact {
                digest: artifact.digest.to_string(),
                deleted: deleted.unwrap_or_else(|cause| {
                    failed = Some(cause);
                    false
                }),
            });
        }
        let report = Report {
            image: image.digest.to_string(),
            artifact: sealed,
            key_id: new.id().to_string(),
            old_key_id: old.id().to_string(),
            old_artifacts,
        };
        Ok((report, failed))
    })?;
    waiting.finish_and_clear();
    if args.json {
        output::json(&report)?;
    } else {
        output::say(global, &words(args, &report, failed.is_some()));
        output::data(&report.artifact)?;
    }
    failed.map_or(Ok(()), Err)
}

/// Puts the artifact under the new key in place, and opens it as a mount does.
async fn seal(
    repo: &Repository,
    reference: &ImageRef,
    image: &ResolvedDigest,
    old: &TenantKey,
    new: &TenantKey,
) -> Result<String, Error> {
    let tag = match reference.target() {
        ManifestRef::Tag(tag) => Some(tag),
        _ => None,
    };
    let sealed = artifact::reseal(repo, &image.digest, tag.as_deref(), old, new).await?;
    let opened = artifact::open(repo, &ManifestRef::Digest(image.digest), new).await?;
    if opened.artifact != sealed {
        return Err(Error::Other(format!(
            "{reference}: artifact {sealed} was written, and {} is found: somebody else rotates the key at \
             the same time; run the command again",
            opened.artifact
        )));
    }
    Ok(sealed.to_string())
}

/// Deletes an artifact; false where the registry deletes nothing.
async fn delete(
    repo: &Repository,
    image: &ResolvedDigest,
    artifact: &Descriptor,
) -> Result<bool, Error> {
    match artifact::delete(repo, &image.digest, artifact).await {
        Ok(Deletion::Deleted | Deletion::WasGone) => Ok(true),
        Ok(Deletion::Unsupported) => Ok(false),
        Err(cause) => Err(cause.into()),
    }
}

fn words(args: &RotateKey, report: &Report, failed: bool) -> String {
    let mut words = format!(
        "sealed {} under key {}; no chunk was touched",
        args.image, report.key_id
    );
    for old in &report.old_artifacts {
        words += &match old.deleted {
            true => format!(
                "\ndeleted artifact {} under key {}",
                old.digest, report.old_key_id
            ),
            false => format!(
                "\nartifact {} under key {} is still there",
                old.digest, report.old_key_id
            ),
        };
    }
    if report.old_artifacts.iter().any(|old| !old.deleted) {
        words += match args.delete_old {
            true if failed => "\nrun the command again to delete what is still there",
            true => {
                "\nthe registry does not delete manifests: allow it there and run the command again, or have \
                 its administrator delete what is still there"
            }
            false => {
                "\nto shut the old key out, run the command again with --delete-old, or delete in the \
                 registry what is still there"
            }
        };
    }
    words
}
