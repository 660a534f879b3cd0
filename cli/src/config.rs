//! The configuration file and environment variables behind every flag.
//!
//! The file is one flat TOML table: keys are the long names of flags, for whichever command has
//! them. Precedence: command line, environment, file, built-in default; [`crate::precedence`] has it
//! for flags that exclude each other.

use std::error::Error as _;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::builder::FalseyValueParser;
use clap::{Arg, ArgAction, Command, CommandFactory};
use lazyimg_store::engine::config::EngineSettings;

use crate::args::Cli;

/// Flags that make no sense as a standing setting.
const NOT_SETTABLE: &[&str] = &[
    "config", "help", "version", "all", "with", "to", "out", "dry-run",
];

/// The table of settings of a store's engine, which are no flags.
const ENGINE: &str = "engine";

/// The largest configuration file that is read, in bytes.
const MAX_CONFIG_LEN: u64 = 1 << 20;

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("configuration file {path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// Not TOML.
    #[error("configuration file {path}: {cause}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        cause: Box<toml::de::Error>,
    },
    /// No such flag.
    #[error(
        "configuration file {path}: no flag is named `{key}`; keys are flags without dashes in front, such as `cache-dir`"
    )]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// Tables, arrays and dates are no values of a flag.
    #[error("configuration file {path}: `{key}` must be a string, a number or true/false")]
    NoValue {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// Not a value of this flag.
    #[error("configuration file {path}: `{key}` can't be {value:?}: {reason}")]
    BadValue {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it was set to.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The command with environment variables and the configuration file as defaults, and the place of
/// that file.
///
/// # Errors
/// A configuration file that exists and can't be used.
pub fn command_with_defaults() -> Result<(Command, Option<PathBuf>), ConfigError> {
    let command = Cli::command();
    let Some((path, wanted)) = find_file() else {
        return Ok((apply(command, &Vec::new()), None));
    };
    let settings = read(&path, wanted)?;
    Ok((apply(command, &settings), Some(path)))
}

/// The settings of a store's engine, where the configuration file has them.
///
/// # Errors
/// A configuration file that exists and can't be used.
pub fn engine() -> Result<Option<EngineSettings>, ConfigError> {
    let Some((path, wanted)) = find_file() else {
        return Ok(None);
    };
    engine_in(&path, &read_text(&path, wanted)?)
}

fn engine_in(path: &Path, text: &str) -> Result<Option<EngineSettings>, ConfigError> {
    #[derive(serde::Deserialize)]
    struct Document {
        engine: Option<EngineSettings>,
    }
    let document: Result<Document, _> = toml::from_str(text);
    let document = document.map_err(|e| ConfigError::Syntax {
        path: path.to_owned(),
        cause: Box::new(e),
    })?;
    Ok(document.engine)
}

/// The file, and whether the user asked for it by name.
fn find_file() -> Option<(PathBuf, bool)> {
    let mut args = std::env::args_os().skip(1);
    while let Some(arg) = args.next() {
        if arg == "--config" {
            return args.next().map(|p| (p.into(), true));
        }
        if let Some(path) = arg.to_str().and_then(|a| a.strip_prefix("--config=")) {
            return Some((path.into(), true));
        }
    }
    if let Some(path) = std::env::var_os("LAZYIMG_CONFIG") {
        return Some((path.into(), true));
    }
    Some((config_dir()?.join("config.toml"), false))
}

/// `$XDG_CONFIG_HOME/lazyimg`, or `~/.config/lazyimg`.
pub fn config_dir() -> Option<PathBuf> {
    xdg("XDG_CONFIG_HOME", ".config")
}

/// Where the host cache is when nobody says it: what systemd made for this service
/// (`CacheDirectory=`), `$XDG_CACHE_HOME/lazyimg`, or `~/.cache/lazyimg`.
pub fn cache_dir() -> Option<PathBuf> {
    let of_service = std::env::var_os("CACHE_DIRECTORY").and_then(|v| first_path(&v));
    of_service.or_else(|| xdg("XDG_CACHE_HOME", ".cache"))
}

/// The first of the paths that systemd lists, separated by colons.
fn first_path(list: &OsStr) -> Option<PathBuf> {
    let first = list.as_bytes().split(|&b| b == b':').next()?;
    Some(PathBuf::from(OsStr::from_bytes(first))).filter(|p| p.is_absolute())
}

fn xdg(variable: &str, under_home: &str) -> Option<PathBuf> {
    // The specification has relative paths ignored.
    let base = std::env::var_os(variable)
        .map(PathBuf::from)
        .filter(|p| p.is_absolute());
    let home = || std::env::var_os("HOME").map(|h| PathBuf::from(h).join(under_home));
    base.or_else(home).map(|b| b.join("lazyimg"))
}

type Settings = Vec<(String, String)>;

fn read(path: &Path, wanted: bool) -> Result<Settings, ConfigError> {
    parse(path, &read_text(path, wanted)?)
}

/// The file's text; of one that need not be there, nothing.
fn read_text(path: &Path, wanted: bool) -> Result<String, ConfigError> {
    let io = |cause| ConfigError::Io {
        path: path.to_owned(),
        cause,
    };
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !wanted => return Ok(String::new()),
        Err(e) => return Err(io(e)),
        Ok(meta) if meta.len() > MAX_CONFIG_LEN => {
            return Err(io(std::io::Error::other("larger than 1 MiB")));
        }
        Ok(_) => {}
    }
    std::fs::read_to_string(path).map_err(io)
}

fn parse(path: &Path, text: &str) -> Result<Settings, ConfigError> {
    let table: toml::Table = text.parse().map_err(|e| ConfigError::Syntax {
        path: path.to_owned(),
        cause: Box::new(e),
    })?;
    let command = Cli::command();
    let mut settings = Settings::new();
    for (key, value) in table {
        // Only `lazyimg store serve` asks what is in it: see `engine`.
        if key == ENGINE && value.is_table() {
            continue;
        }
        let arg = find(&command, &key).filter(|_| !NOT_SETTABLE.contains(&key.as_str()));
        let Some(arg) = arg else {
            return Err(ConfigError::UnknownKey {
                path: path.to_owned(),
                key,
            });
        };
        let value = match value {
            toml::Value::String(s) => s,
            toml::Value::Integer(i) => i.to_string(),
            toml::Value::Float(f) => f.to_string(),
            toml::Value::Boolean(b) => b.to_string(),
            _ => {
                return Err(ConfigError::NoValue {
                    path: path.to_owned(),
                    key,
                });
            }
        };
        if let Err(reason) = check(arg, &value) {
            return Err(ConfigError::BadValue {
                path: path.to_owned(),
                key,
                value,
                reason,
            });
        }
        settings.push((key, value));
    }
    Ok(settings)
}

/// The flag with this long name, of whichever command has it.
fn find<'a>(command: &'a Command, long: &str) -> Option<&'a Arg> {
    let own = command.get_arguments().find(|a| a.get_long() == Some(long));
    own.or_else(|| command.get_subcommands().find_map(|sub| find(sub, long)))
}

/// Whether a flag takes this value. Clap itself would name the flag, and not the file.
fn check(arg: &Arg, value: &str) -> Result<(), String> {
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        return match value {
            "true" | "false" => Ok(()),
            _ => Err("true or false is needed".into()),
        };
    }
    let alone = Arg::new("value")
        .long("value")
        .action(arg.get_action().clone())
        .value_parser(arg.get_value_parser().clone())
        .default_value(value.to_owned());
    let parsed = Command::new("lazyimg")
        .arg(alone)
        .try_get_matches_from(["lazyimg"]);
    parsed.map(|_| ()).map_err(|e| match e.source() {
        Some(cause) => cause.to_string(),
        None => "it is not one of the possible values".into(),
    })
}

/// A flag's environment variable.
pub fn variable(long: &str) -> String {
    format!("LAZYIMG_{}", long.to_ascii_uppercase().replace('-', "_"))
}

/// An argument's name as the flag that it is.
pub fn with_dashes(id: &str) -> String {
    id.replace('_', "-")
}

fn apply(command: Command, settings: &Settings) -> Command {
    let command = command.mut_args(|arg| with_defaults(arg, settings));
    command.mut_subcommands(|sub| apply(sub, settings))
}

fn with_defaults(arg: Arg, settings: &Settings) -> Arg {
    let Some(long) = arg.get_long().map(str::to_owned) else {
        return arg;
    };
    if NOT_SETTABLE.contains(&long.as_str()) {
        return arg;
    }
    let arg = match arg.get_action() {
        ArgAction::SetTrue => arg.value_parser(FalseyValueParser::new()),
        _ => arg,
    };
    let arg = arg.env(variable(&long)).hide_env(true);
    match settings.iter().find(|(key, _)| *key == long) {
        Some((_, value)) => arg.default_value(value.clone()),
        None => arg,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use clap::FromArgMatches;

    /// What clap makes of these arguments with this configuration file.
    pub fn matches(settings: &str, args: &[&str]) -> clap::ArgMatches {
        let settings = parse(Path::new("c.toml"), settings).unwrap();
        apply(Cli::command(), &settings).get_matches_from(args)
    }

    fn cli(settings: &str, args: &[&str]) -> Cli {
        Cli::from_arg_matches(&matches(settings, args)).unwrap()
    }

    fn mount(cli: Cli) -> crate::args::Mount {
        match cli.command {
            crate::args::Command::Mount(m) => m,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_well_formed() {
        apply(Cli::command(), &Vec::new()).debug_assert();
    }

    #[test]
    fn the_file_sets_what_the_command_line_does_not() {
        let file = "cache-dir = \"/c\"\nread-timeout = 5\nplain-http = true\n";
        let m = mount(cli(
            file,
            &["lazyimg", "mount", "r/x:1", "d", "--read-timeout", "7"],
        ));
        assert_eq!(m.cache.place.cache_dir.as_deref(), Some(Path::new("/c")));
        assert_eq!(m.read_timeout, 7.0);
        assert!(m.source.plain_http);
    }

    #[test]
    fn a_key_that_is_no_flag_is_named() {
        let error = parse(Path::new("c.toml"), "cachedir = 1").unwrap_err();
        assert!(error.to_string().contains("`cachedir`"), "{error}");
        assert!(parse(Path::new("c.toml"), "cache-dir = [1]").is_err());
        assert!(parse(Path::new("c.toml"), "= 1").is_err());
    }

    #[test]
    fn a_value_that_its_flag_does_not_take_is_named_with_file_and_key() {
        for (text, key, value) in [
            ("read-timeout = \"x\"", "`read-timeout`", "\"x\""),
            ("read-timeout = 0", "`read-timeout`", "\"0\""),
            ("level = 99", "`level`", "99"),
            ("cache-bytes = -1", "`cache-bytes`", "-1"),
            ("plain-http = \"perhaps\"", "`plain-http`", "perhaps"),
            ("domain = \"a/b\"", "`domain`", "a/b"),
            ("platform = \"linux\"", "`platform`", "linux"),
            ("verbose = \"much\"", "`verbose`", "much"),
        ] {
            let error = parse(Path::new("c.toml"), text).unwrap_err().to_string();
            for word in ["c.toml", key, value] {
                assert!(error.contains(word), "{word} is not in: {error}");
            }
            assert!(!error.contains("--"), "no flag was given: {error}");
        }
        assert!(parse(Path::new("c.toml"), "verbose = 2\nlevel = 3\nquiet = false").is_ok());
    }

    #[test]
    fn a_stores_engine_has_a_table_of_its_own() {
        let path = Path::new("c.toml");
        let text = "listen = \"127.0.0.1:0\"\n[engine.s3]\nbucket = \"b\"\nregion = \"r\"\n";
        assert_eq!(parse(path, text).unwrap().len(), 1);
        let engine = engine_in(path, text).unwrap().unwrap();
        assert_eq!(engine.s3.unwrap().bucket, "b");
        assert!(engine_in(path, "").unwrap().is_none());
        let error = engine_in(path, "[engine.s4]\nbucket = \"b\"").unwrap_err();
        assert!(error.to_string().contains("s4"), "{error}");
    }

    #[test]
    fn the_first_of_systemds_directories_is_taken() {
        let first = |list: &str| first_path(OsStr::new(list));
        assert_eq!(first("/var/cache/a"), Some("/var/cache/a".into()));
        assert_eq!(
            first("/var/cache/a:/var/cache/b"),
            Some("/var/cache/a".into())
        );
        assert_eq!(first(""), None);
        assert_eq!(first("relative"), None);
    }
}
