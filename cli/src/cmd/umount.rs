//! `lazyimg umount`.

use lazyimg_fuse::mountpoint::Unmount;

use crate::args::{Global, Umount};
use crate::exit::Error;
use crate::output;

/// Runs the command.
pub fn run(global: &Global, args: &Umount) -> Result<(), Error> {
    let client = super::mount::client(&args.cache)?;
    let how = match (args.lazy, args.force) {
        (_, true) => Unmount::Force,
        (true, false) => Unmount::Lazy,
        (false, false) => Unmount::Clean,
    };
    let dirs = match &args.dir {
        Some(dir) => vec![dir.clone()],
        None => {
            let status = client.status()?;
            status.map_or_else(Vec::new, |s| {
                s.mounts.into_iter().map(|m| m.dir.0).collect()
            })
        }
    };
    let mut errors = Vec::new();
    for dir in dirs {
        match client.umount(&dir, how) {
            Ok(true) => {
                let words = format!(
                    "{}: detached; open files keep it alive until they are closed",
                    dir.display()
                );
                output::say(global, &words);
            }
            Ok(false) => {}
            // A busy one must not keep the others.
            Err(error) => errors.push(Error::from(error)),
        }
    }
    match errors.pop() {
        None => Ok(()),
        Some(only) if errors.is_empty() => Err(only),
        Some(last) => {
            errors.push(last);
            Err(Error::Several(errors))
        }
    }
}
