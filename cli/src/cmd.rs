//! One module a command.

mod cache;
mod convert;
mod daemon;
mod doctor;
mod export;
mod inspect;
mod mount;
mod opened;
mod rotate_key;
mod status;
mod store;
mod umount;
mod verify;

use std::future::Future;
use std::io::IsTerminal;

use lazyimg_image::source::{Repository, SourceOptions};

use crate::args::{Cli, Command, Source, StoreCommand};
use crate::exit::Error;

/// Runs the command.
///
/// # Errors
/// Whatever ends it; [`crate::exit`] tells it.
pub fn run(cli: Cli) -> Result<(), Error> {
    let global = cli.global;
    let own_log = match &cli.command {
        Command::Daemon(_) => true,
        Command::Store(args) => matches!(args.command, StoreCommand::Serve(_)),
        _ => false,
    };
    if !own_log {
        log_to_stderr(&global);
    }
    match cli.command {
        Command::Convert(args) => convert::run(&global, &args),
        Command::Mount(args) => mount::run(&global, &args),
        Command::Umount(args) => umount::run(&global, &args),
        Command::Status(args) => status::run(&args),
        Command::Cache(args) => cache::run(&global, &args),
        Command::Inspect(args) => inspect::run(&global, &args),
        Command::Verify(args) => verify::run(&global, &args),
        Command::Export(args) => export::run(&global, &args),
        Command::RotateKey(args) => rotate_key::run(&global, &args),
        Command::Store(args) => store::run(&global, &args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Daemon(args) => daemon::run(&args),
    }
}

/// Logs each certificate that it refuses; the error of the request says it, and what to do.
const TOLD: &str = "rustls_platform_verifier=off";

fn log_to_stderr(global: &crate::args::Global) {
    let level = match (global.quiet, global.verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "lazyimg=info,lazyimg_image=info,lazyimg_fuse=info,lazyimg_chunkstore=info,warn",
        _ => "debug",
    };
    let filter = tracing_subscriber::EnvFilter::new(format!("{level},{TOLD}"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // Only fails when a subscriber is set already, which a test may have done.
    let _ = subscriber.without_time().with_target(false).try_init();
}

/// How the sources of a command are opened.
fn source_options(source: &Source) -> SourceOptions {
    SourceOptions {
        platform: source.platform.clone(),
        plain_http: source.plain_http,
        docker_config: source.docker_config.clone(),
        ..SourceOptions::default()
    }
}

/// Runs a future on a runtime of its own.
fn block_on<T>(future: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Error::io("starting threads"))?;
    let result = runtime.block_on(future);
    // Blocking tasks that nobody waits for any more must not hold up the exit.
    runtime.shutdown_background();
    result
}

/// The repository that `image` lies in.
fn repository(
    image: &lazyimg_image::reference::ImageRef,
    source: &Source,
) -> Result<Repository, Error> {
    Ok(Repository::open(image, &source_options(source))?)
}
