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
    CacheSettings, KeySource, MountRequest, Reply, SourceSettings, StoreSettings, TreeSettings,
    WirePath,
};
use lazyimg_fuse::tree::TreeOptions;
use lazyimg_image::credentials::CredentialPlaces;

use crate::args::{Cache, CacheDir, Global, Mount};
use crate::exit::Error;
use crate::{config, output, secrets};

/// The daemon stays this long after its last mount is gone: long enough for a script that mounts
/// again, short enough not to be found idle.
const LINGER: Duration = Duration::from_secs(1);

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
        let waiting = output::spinner(global, "mounting");
        let ready = Box::new(move |reply: Reply| {
            waiting.finish_and_clear();
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
    let waiting = output::spinner(global, "mounting");
    let mounted = starting_client(&args.cache)?.mount(request)?;
    waiting.finish_and_clear();
    told(&mounted.dir, mounted.note.as_deref());
    Ok(())
}

/// The client of a cache's daemon, where there is one.
pub fn client(place: &CacheDir) -> Result<Client, Error> {
    Ok(Client::new(&cache_dir(place)?, None)?)
}

/// The client of a cache's daemon, which it can start.
fn starting_client(cache: &Cache) -> Result<Client, Error> {
    let dir = cache_dir(&cache.place)?;
    let program = std::env::current_exe().map_err(Error::io("finding this program"))?;
    let mut args = vec![
        "daemon".into(),
        "--cache-dir".into(),
        std::path::absolute(&dir)
            .map_err(Error::io(dir.display().to_string()))?
            .into(),
    ];
    for (flag, value) in [
        ("--cache-bytes", cache.cache_bytes()),
        ("--hot-bytes", cache.hot_bytes()),
    ] {
        args.extend([flag.into(), value.to_string().into()]);
    }
    Ok(Client::new(&dir, Some(DaemonCommand { program, args }))?)
}

/// What a daemon of this cache is told.
pub fn daemon_options(cache: &Cache) -> Result<DaemonOptions, Error> {
    let store = StoreOptions {
        hot_bytes: usize::try_from(cache.hot_bytes()).unwrap_or(usize::MAX),
        ..StoreOptions::default()
    };
    Ok(DaemonOptions {
        cache_dir: cache_dir(&cache.place)?,
        cache: CacheOptions::new(cache.cache_bytes()),
        store,
        linger: LINGER,
        opener: Arc::new(RegistryOpener::default()),
    })
}

/// The cache's directory.
pub fn cache_dir(place: &CacheDir) -> Result<PathBuf, Error> {
    place
        .cache_dir
        .clone()
        .or_else(config::cache_dir)
        .ok_or_else(|| {
            Error::Usage(
                "neither HOME nor XDG_CACHE_HOME is set: say where with --cache-dir".into(),
            )
        })
}

fn absolute(path: PathBuf) -> Result<WirePath, Error> {
    std::path::absolute(&path)
        .map(WirePath)
        .map_err(Error::io(path.display().to_string()))
}

/// The regional store that the daemon is to read through.
fn store_settings(args: &Mount) -> Result<Option<StoreSettings>, Error> {
    let region = &args.region;
    if region.store.is_empty() {
        return match region.store_only {
            true => Err(Error::Usage(
                "--store-only needs --store URL: without a store there would be nothing to read from".into(),
            )),
            false => Ok(None),
        };
    }
    Ok(Some(StoreSettings {
        urls: region.store.clone(),
        token_file: region.store_token_file.clone().map(absolute).transpose()?,
        ca_file: region.store_ca.clone().map(absolute).transpose()?,
        only: region.store_only,
        no_write_back: args.no_write_back,
    }))
}

fn request(args: &Mount) -> Result<MountRequest, Error> {
    let key = match secrets::tenant(&args.key)? {
        Provider::File(path) => KeySource::File(absolute(path)?),
        Provider::Command(command) => KeySource::Command(command),
    };
    let places = CredentialPlaces::for_another_process(args.source.docker_config.as_deref())
        .map_err(Error::io("finding the working directory"))?;
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
            docker_config: None,
            // Those of whoever mounts, not of whoever started the daemon.
            credentials: Some(places.into()),
            store: store_settings(args)?,
        },
        // What was not asked for may be what it is.
        cache: CacheSettings {
            cache_bytes: args.cache.cache_bytes,
            hot_bytes: args.cache.hot_bytes,
        },
        flags: MountFlags {
            suid: args.suid,
            dev: args.dev,
            allow_other: args.allow_other.then_some(true),
        },
        tree: TreeSettings::from(&options),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn asked(more: &[&str]) -> MountRequest {
        let words = ["lazyimg", "mount", "r/x:1", "/m", "--key-command", "true"];
        let cli = Cli::parse_from(words.iter().chain(more));
        match cli.command {
            Command::Mount(args) => request(&args).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_mount_without_flags_has_the_documented_defaults_and_asks_for_no_other_cache() {
        let plain = asked(&[]);
        assert_eq!(plain.tree, TreeSettings::default());
        assert_eq!(plain.tree.read_timeout_ms, 30_000);
        assert_eq!(plain.cache, CacheSettings::default());
        let cache = asked(&["--cache-bytes", "5", "--hot-bytes", "6"]).cache;
        assert_eq!((cache.cache_bytes, cache.hot_bytes), (Some(5), Some(6)));
    }

    #[test]
    fn the_places_of_credentials_are_this_process_and_none_of_their_secrets() {
        let given = asked(&["--docker-config", "some/config.json"]);
        let credentials = given.source.credentials.unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(credentials.files, [WirePath(here.join("some/config.json"))]);
        let path = std::env::var_os("PATH");
        assert_eq!(credentials.helper_env.contains_key("PATH"), path.is_some());
        let usual = asked(&[]).source.credentials.unwrap();
        let places = CredentialPlaces::here(None);
        assert_eq!(usual.files.len(), places.files.len());
    }
}
