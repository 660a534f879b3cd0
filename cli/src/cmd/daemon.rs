//! `lazyimg daemon`: the process behind the mounts of one cache.

use std::io::IsTerminal;

use lazyimg_fuse::daemon::{self, DaemonOptions, Start};
use lazyimg_fuse::log::BoundedLog;
use lazyimg_fuse::rendezvous::LOG;

use crate::args::Daemon;
use crate::exit::Error;

/// Runs the command.
pub fn run(args: &Daemon) -> Result<(), Error> {
    if std::io::stdin().is_terminal() {
        return Err(Error::Usage(
            "`lazyimg daemon` is started by `lazyimg mount`; to see a mount's messages use `mount --foreground`".into(),
        ));
    }
    let options = super::mount::daemon_options(&args.cache)?;
    log_to_file(&options)?;
    daemon::run(options, Start::Inherited).map_err(Error::from)
}

/// Nobody reads a daemon's standard error: what it has to say goes to a bounded file in its cache.
fn log_to_file(options: &DaemonOptions) -> Result<(), Error> {
    let path = options.cache_dir.join(LOG);
    let log = BoundedLog::new(&path).map_err(Error::io(path.display().to_string()))?;
    let filter = tracing_subscriber::EnvFilter::new(format!(
        "warn,lazyimg=info,lazyimg_image=info,lazyimg_fuse=info,lazyimg_chunkstore=info,{}",
        super::TOLD
    ));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(log);
    // Only fails when a subscriber is set already, which a test may have done.
    // On a full disk a line is lost: telling so on standard error, which is the same file, would panic.
    let subscriber = subscriber.log_internal_errors(false);
    let _ = subscriber.with_ansi(false).with_target(false).try_init();
    Ok(())
}
