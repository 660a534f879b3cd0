//! `lazyimg`: any container image, mounted in the time its first bytes need.

mod args;
mod cmd;
mod config;
mod exit;
mod output;
mod secrets;

use std::process::ExitCode;

use clap::FromArgMatches;

fn main() -> ExitCode {
    let command = match config::command_with_defaults() {
        Ok(command) => command,
        Err(error) => return exit::report(&error.into()),
    };
    let matches = command.get_matches();
    let cli = match args::Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    match cmd::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error),
    }
}
