//! Of two flags that exclude each other the one from the higher place counts: command line,
//! environment, configuration file. Clap has no notion of that: it takes an environment variable for
//! something the user typed, and a default for nothing.

use std::path::Path;

use clap::ArgMatches;
use clap::parser::ValueSource;

use crate::args::{Cli, Command, Key, Salt};
use crate::config::{variable, with_dashes};
use crate::exit::Error;

/// A setting that can be taken back.
trait Setting {
    fn is_set(&self) -> bool;
    fn unset(&mut self);
}

impl<T> Setting for Option<T> {
    fn is_set(&self) -> bool {
        self.is_some()
    }

    fn unset(&mut self) {
        *self = None;
    }
}

impl Setting for bool {
    fn is_set(&self) -> bool {
        *self
    }

    fn unset(&mut self) {
        *self = false;
    }
}

/// Takes back the settings that a higher place overrules. `file` is the configuration file, for
/// messages.
///
/// # Errors
/// Two settings from one place that exclude each other.
pub fn settle(cli: &mut Cli, given: &ArgMatches, file: Option<&Path>) -> Result<(), Error> {
    let Some((_, given)) = given.subcommand() else {
        return Ok(());
    };
    let pairs = Pairs { given, file };
    match &mut cli.command {
        Command::Convert(c) => {
            pairs.key(&mut c.key)?;
            pairs.salt(&mut c.salt)
        }
        Command::Mount(c) => pairs.key(&mut c.key),
        Command::Verify(c) => pairs.key(&mut c.key),
        Command::Export(c) => pairs.key(&mut c.key),
        Command::Doctor(c) => pairs.key(&mut c.key),
        Command::RotateKey(c) => {
            pairs.key(&mut c.key)?;
            pairs.one_of(
                ("new_key_file", &mut c.new_key_file),
                ("new_key_command", &mut c.new_key_command),
            )
        }
        Command::Umount(c) => pairs.one_of(("lazy", &mut c.lazy), ("force", &mut c.force)),
        Command::Status(_)
        | Command::Inspect(_)
        | Command::Cache(_)
        | Command::Store(_)
        | Command::Daemon(_) => Ok(()),
    }
}

struct Pairs<'a> {
    given: &'a ArgMatches,
    file: Option<&'a Path>,
}

impl Pairs<'_> {
    fn key(&self, key: &mut Key) -> Result<(), Error> {
        self.one_of(
            ("key_file", &mut key.key_file),
            ("key_command", &mut key.key_command),
        )
    }

    fn salt(&self, salt: &mut Salt) -> Result<(), Error> {
        self.one_of(
            ("salt_file", &mut salt.salt_file),
            ("salt_command", &mut salt.salt_command),
        )
    }

    fn one_of(
        &self,
        first: (&str, &mut dyn Setting),
        second: (&str, &mut dyn Setting),
    ) -> Result<(), Error> {
        let place = |id: &str, setting: &dyn Setting| {
            let place = self.given.value_source(id);
            place.filter(|_| setting.is_set())
        };
        let places = (place(first.0, first.1), place(second.0, second.1));
        match places {
            (Some(a), Some(b)) if a > b => second.1.unset(),
            (Some(a), Some(b)) if a < b => first.1.unset(),
            (Some(place), Some(_)) => return Err(self.both(place, first.0, second.0)),
            _ => {}
        }
        Ok(())
    }

    fn both(&self, place: ValueSource, first: &str, second: &str) -> Error {
        let (first, second) = (with_dashes(first), with_dashes(second));
        Error::Usage(match place {
            ValueSource::CommandLine => {
                format!("--{first} and --{second} exclude each other: give one of them")
            }
            ValueSource::EnvVariable => format!(
                "the environment variables {} and {} exclude each other: set one of them, or give --{first} or --{second}",
                variable(&first),
                variable(&second)
            ),
            _ => format!(
                "configuration file {}: `{first}` and `{second}` exclude each other: keep one of them",
                self.file.unwrap_or(Path::new("")).display()
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::matches;
    use clap::FromArgMatches;

    fn key(settings: &str, args: &[&str]) -> Result<Key, String> {
        let args = [&["lazyimg", "export", "r/x:1", "d"], args].concat();
        let given = matches(settings, &args);
        let mut cli = Cli::from_arg_matches(&given).unwrap();
        settle(&mut cli, &given, Some(Path::new("c.toml"))).map_err(|e| e.to_string())?;
        match cli.command {
            Command::Export(export) => Ok(export.key),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_overrules_the_other_of_a_pair_in_the_file() {
        let found = key("key-command = \"kms\"", &["--key-file", "k"]).unwrap();
        assert_eq!(
            (found.key_file.as_deref(), found.key_command),
            (Some(Path::new("k")), None)
        );
        let found = key("key-file = \"k\"", &["--key-command", "kms"]).unwrap();
        assert_eq!(
            (found.key_file, found.key_command.as_deref()),
            (None, Some("kms"))
        );
    }

    #[test]
    fn both_of_a_pair_in_one_place_are_named() {
        let error = key("key-file = \"k\"\nkey-command = \"kms\"", &[]).unwrap_err();
        for word in ["c.toml", "`key-file`", "`key-command`"] {
            assert!(error.contains(word), "{error}");
        }
        let error = key("", &["--key-file", "k", "--key-command", "kms"]).unwrap_err();
        for word in ["--key-file", "--key-command"] {
            assert!(error.contains(word), "{error}");
        }
        // What a higher place overrules may contradict itself.
        let both = "key-file = \"k\"\nkey-command = \"kms\"";
        let found = key(both, &["--key-file", "o"]).unwrap();
        assert_eq!(found.key_file.as_deref(), Some(Path::new("o")));
    }
}
