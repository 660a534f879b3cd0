//! `lazyimg store`: a regional store, and the commands of those who run one.

mod admin;
mod client;
mod serve;
mod token;

use crate::args::{Global, StoreCommand, StoreUpkeep};
use crate::exit::Error;

/// Runs the command.
pub fn run(global: &Global, args: &StoreUpkeep) -> Result<(), Error> {
    match &args.command {
        StoreCommand::Serve(args) => serve::run(global, args),
        StoreCommand::Token(args) => token::run(global, args),
        StoreCommand::Roots(args) => admin::roots(args),
        StoreCommand::RotateRoot(args) => admin::rotate(global, args),
        StoreCommand::Acknowledge(args) => admin::acknowledge(global, args),
        StoreCommand::Gc(args) => admin::gc(global, args),
        StoreCommand::Stats(args) => admin::stats(args),
    }
}
