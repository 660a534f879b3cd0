//! `lazyimg mount`, and what other commands need to know of the daemon.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lazyimg_chunkstore::{CacheOptions, StoreOptions};
use lazyimg_convergent::provider::Provider;
use lazyimg_fuse::client::{Client, DaemonCommand};
use lazyimg_fuse::daemon::{self, DaemonOptions, Start};
use lazyimg_fuse::mount::MountFlags;
use lazyimg_fuse::opener::RegistryOpener;
use lazyimg_fuse::protocol::{
    KeySource, MountRequest, Reply, SourceSettings, TreeSettings, WirePath,
};
use lazyimg_fuse::tree::TreeOptions;

use crate::args::{Cache, Global, Mount};
use crate::exit::Error;
use crate::{config, output, secrets};

/// The daemon stays this long after its last mount is gone: long enough for a script that mounts
/// again, short enough not to be found idle.
const LINGER: Duration = Duration::from_secs(1);

/// The longest `--read-timeout`, in seconds: a day.
const MAX_READ_TIMEOUT: f64 = 86_400.0;

/// Runs the command.
pub fn run(global: &Global, args: &Mount) -> Result<(), Error> {
    let request = request(args)?;
    let image = args.image.to_string();
    let quiet = global.quiet;
    let told = move |dir: &std::path::Path, note: Option<&str>| {
        let words = format!("mounted {image} at {}", dir.display());
        let global = Global {
            config: None,
            quiet,
            verbose: 0,
        };
        if let Some(note) = note {
            output::say(&global, note);
        }
        output::say(&global, &words);
    };
    if args.foreground {
        let options = daemon_options(&args.cache)?;
        let ready = Box::new(move |reply: Reply| {
            if let Reply::Mounted { dir, note, .. } = reply {
                told(&dir.0, note.as_deref());
            }
        });
        let start = Start::Foreground {
            request: Box::new(request),
            ready,
        };
        return daemon::run(options, start).map_err(Error::from);
    }
    let mounted = client(&args.cache)?.mount(request)?;
    told(&mounted.dir, mounted.note.as_deref());
    Ok(())
}

/// The client of a cache's daemon, which it can start.
pub fn client(cache: &Cache) -> Result<Client, Error> {
    let dir = cache_dir(cache)?;
    let program = std::env::current_exe().map_err(Error::io("finding this program"))?;
    let mut args = vec![
        "daemon".into(),
        "--cache-dir".into(),
        std::path::absolute(&dir)
            .map_err(Error::io(dir.display().to_string()))?
            .into(),
    ];
    for (flag, value) in [
        ("--cache-bytes", cache.cache_bytes),
        ("--hot-bytes", cache.hot_bytes),
    ] {
        args.extend([flag.into(), value.to_string().into()]);
    }
    Ok(Client::new(&dir, Some(DaemonCommand { program, args }))?)
}

/// What a daemon of this cache is told.
pub fn daemon_options(cache: &Cache) -> Result<DaemonOptions, Error> {
    let store = StoreOptions {
        hot_bytes: usize::try_from(cache.hot_bytes).unwrap_or(usize::MAX),
        ..StoreOptions::default()
    };
    Ok(DaemonOptions {
        cache_dir: cache_dir(cache)?,
        cache: CacheOptions::new(cache.cache_bytes),
        store,
        linger: LINGER,
        opener: Arc::new(RegistryOpener::default()),
    })
}

/// The cache's directory.
pub fn cache_dir(cache: &Cache) -> Result<PathBuf, Error> {
    cache
        .cache_dir
        .clone()
        .or_else(config::cache_dir)
        .ok_or_else(|| {
            Error::Usage(
                "neither HOME nor XDG_CACHE_HOME is set: say where with --cache-dir".into(),
            )
        })
}

fn request(args: &Mount) -> Result<MountRequest, Error> {
    let absolute = |path: PathBuf| {
        std::path::absolute(&path)
            .map(WirePath)
            .map_err(Error::io(path.display().to_string()))
    };
    let key = match secrets::tenant(&args.key)? {
        Provider::File(path) => KeySource::File(absolute(path)?),
        Provider::Command(command) => KeySource::Command(command),
    };
    if !(args.read_timeout > 0.0 && args.read_timeout <= MAX_READ_TIMEOUT) {
        return Err(Error::Usage(format!(
            "--read-timeout {}: give seconds above 0 and up to {MAX_READ_TIMEOUT}",
            args.read_timeout
        )));
    }
    let options = TreeOptions {
        read_timeout: Duration::from_secs_f64(args.read_timeout),
        fill: !args.no_fill,
        ..TreeOptions::default()
    };
    Ok(MountRequest {
        image: args.image.to_string(),
        dir: absolute(args.dir.clone())?,
        namespace: lazyimg_fuse::mountpoint::namespace()
            .map_err(Error::io("reading the mount namespace"))?,
        key,
        source: SourceSettings {
            platform: args.source.platform.as_ref().map(ToString::to_string),
            plain_http: args.source.plain_http,
            docker_config: docker_config(args)?.map(absolute).transpose()?,
        },
        flags: MountFlags {
            suid: args.suid,
            dev: args.dev,
            allow_other: args.allow_other.then_some(true),
        },
        tree: TreeSettings::from(&options),
    })
}

/// The credentials of whoever mounts, not of whoever started the daemon.
fn docker_config(args: &Mount) -> Result<Option<PathBuf>, Error> {
    let dir = || {
        std::env::var_os("DOCKER_CONFIG")
            .filter(|d| !d.is_empty())
            .map(PathBuf::from)
    };
    Ok(args.source.docker_config.clone().or_else(dir))
}
