//! `lazyimg rotate-key`.

use lazyimg_convergent::provider::Provider;
use lazyimg_image::artifact;
use lazyimg_image::reference::ManifestRef;

use crate::args::{Global, RotateKey};
use crate::exit::Error;
use crate::{output, secrets};

/// Runs the command.
pub fn run(global: &Global, args: &RotateKey) -> Result<(), Error> {
    let old = secrets::tenant(&args.key)?.existing_tenant_key()?;
    let new = match (&args.new_key_command, &args.new_key_file) {
        (Some(command), _) => Provider::Command(command.clone()),
        (None, Some(file)) => Provider::File(file.clone()),
        (None, None) => return Err(Error::Usage("say which key with --new-key-file".into())),
    }
    .tenant_key()?;
    let repo = super::repository(&args.image, &args.source)?;
    let digest = super::block_on(async {
        let image = repo.resolve_digest(args.image.target()).await?;
        let tag = match args.image.target() {
            ManifestRef::Tag(tag) => Some(tag),
            _ => None,
        };
        Ok(artifact::reseal(&repo, &image.digest, tag.as_deref(), &old, &new).await?)
    })?;
    output::say(
        global,
        &format!(
            "sealed {} under key {} as well as {}; no chunk was touched. To shut the old key out, delete the \
             artifact under it in the registry",
            args.image,
            new.id(),
            old.id()
        ),
    );
    output::data(&digest.to_string())
}
