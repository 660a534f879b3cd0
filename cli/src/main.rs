//! `lazyimg`: any container image, mounted in the time its first bytes need.

mod args;
mod cmd;
mod config;
mod exit;
mod output;
mod precedence;
mod secrets;

use std::process::ExitCode;

use clap::FromArgMatches;

fn main() -> ExitCode {
    let (command, file) = match config::command_with_defaults() {
        Ok(found) => found,
        Err(error) => return exit::report(&error.into()),
    };
    let matches = command.get_matches();
    let mut cli = match args::Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let settled = precedence::settle(&mut cli, &matches, file.as_deref());
    match settled.and_then(|()| cmd::run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error),
    }
}
