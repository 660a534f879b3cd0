//! `lazyimg store token`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;

use zeroize::Zeroizing;

use crate::args::{Global, StoreToken};
use crate::exit::Error;
use crate::output;

/// Random bytes of a token.
const LEN: usize = 32;

/// Runs the command.
pub fn run(global: &Global, args: &StoreToken) -> Result<(), Error> {
    let path = args.out.display().to_string();
    let token = make().map_err(Error::io("/dev/urandom"))?;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&args.out)
        .map_err(|cause| match cause.kind() {
            io::ErrorKind::AlreadyExists => Error::Other(format!(
                "{path} exists already: name another file, or delete that one if nobody uses its token"
            )),
            _ => Error::io(path.clone())(cause),
        })?;
    file.write_all(token.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(Error::io(path.clone()))?;
    output::say(
        global,
        &format!(
            "wrote a new token to {path}; name it in the tenants file, and give a copy to the hosts"
        ),
    );
    Ok(())
}

/// 64 hex digits and the end of the line.
fn make() -> io::Result<Zeroizing<String>> {
    let mut random = Zeroizing::new([0_u8; LEN]);
    File::open("/dev/urandom")?.read_exact(&mut *random)?;
    // With room for all: a buffer that grows leaves copies behind.
    let mut text = Zeroizing::new(String::with_capacity(2 * LEN + 1));
    for byte in random.iter() {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from(b"0123456789abcdef"[usize::from(digit)]));
        }
    }
    text.push('\n');
    Ok(text)
}
