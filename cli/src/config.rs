//! The configuration file and environment variables behind every flag.
//!
//! The file is one flat TOML table: keys are the long names of flags, for whichever command has
//! them. Precedence: command line, environment, file, built-in default.

use std::path::{Path, PathBuf};

use clap::builder::FalseyValueParser;
use clap::{Arg, ArgAction, Command, CommandFactory};

use crate::args::Cli;

/// Flags that make no sense as a standing setting.
const NOT_SETTABLE: &[&str] = &["config", "help", "version", "all", "with"];

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
    BadValue {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
}

/// The command with environment variables and the configuration file as defaults.
///
/// # Errors
/// A configuration file that exists and can't be used.
pub fn command_with_defaults() -> Result<Command, ConfigError> {
    let command = Cli::command();
    let settings = match find_file() {
        Some((path, wanted)) => read(&path, wanted)?,
        None => Vec::new(),
    };
    Ok(apply(command, &settings))
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

/// `$XDG_CACHE_HOME/lazyimg`, or `~/.cache/lazyimg`.
pub fn cache_dir() -> Option<PathBuf> {
    xdg("XDG_CACHE_HOME", ".cache")
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
    let io = |cause| ConfigError::Io {
        path: path.to_owned(),
        cause,
    };
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !wanted => return Ok(Vec::new()),
        Err(e) => return Err(io(e)),
        Ok(meta) if meta.len() > MAX_CONFIG_LEN => {
            return Err(io(std::io::Error::other("larger than 1 MiB")));
        }
        Ok(_) => {}
    }
    parse(path, &std::fs::read_to_string(path).map_err(io)?)
}

fn parse(path: &Path, text: &str) -> Result<Settings, ConfigError> {
    let table: toml::Table = text.parse().map_err(|e| ConfigError::Syntax {
        path: path.to_owned(),
        cause: Box::new(e),
    })?;
    let known = long_names(&Cli::command());
    let mut settings = Settings::new();
    for (key, value) in table {
        if !known.contains(&key) || NOT_SETTABLE.contains(&key.as_str()) {
            return Err(ConfigError::UnknownKey {
                path: path.to_owned(),
                key,
            });
        }
        let value = match value {
            toml::Value::String(s) => s,
            toml::Value::Integer(i) => i.to_string(),
            toml::Value::Float(f) => f.to_string(),
            toml::Value::Boolean(b) => b.to_string(),
            _ => {
                return Err(ConfigError::BadValue {
                    path: path.to_owned(),
                    key,
                });
            }
        };
        settings.push((key, value));
    }
    Ok(settings)
}

fn long_names(command: &Command) -> Vec<String> {
    let own = command
        .get_arguments()
        .filter_map(|a| a.get_long().map(str::to_owned));
    own.chain(command.get_subcommands().flat_map(long_names))
        .collect()
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
    let variable = format!("LAZYIMG_{}", long.to_ascii_uppercase().replace('-', "_"));
    let arg = match arg.get_action() {
        ArgAction::SetTrue => arg.value_parser(FalseyValueParser::new()),
        _ => arg,
    };
    let arg = arg.env(variable).hide_env(true);
    match settings.iter().find(|(key, _)| *key == long) {
        Some((_, value)) => arg.default_value(value.clone()),
        None => arg,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::FromArgMatches;

    fn cli(settings: &str, args: &[&str]) -> Cli {
        let settings = parse(Path::new("c.toml"), settings).unwrap();
        let matches = apply(Cli::command(), &settings).get_matches_from(args);
        Cli::from_arg_matches(&matches).unwrap()
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
        assert_eq!(m.cache.cache_dir.as_deref(), Some(Path::new("/c")));
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
}
