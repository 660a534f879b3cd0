//! End-to-end tests: the real `lazyimg` binary as a black box, between a real registry and the kernel.
//!
//! This crate is the harness; the tests are in `tests/tests/`, each file one promise of the issue's
//! section "What must hold". They need root, `/dev/fuse`, Debian's `docker-registry`, `skopeo`, `umoci`,
//! `erofs-utils` and the images of `scripts/test-images`; what is missing is a failure with advice,
//! never a skip. The tests of a shared store need redis-server and Garage too. Everything lies below one
//! directory for each test, in `$LAZYIMG_TEST_DIR` or `/var/tmp`, and goes away with it.

pub mod binary;
pub mod flip;
pub mod host;
pub mod image;
pub mod lazyimg;
pub mod process;
pub mod proxy;
pub mod registry;
pub mod runs;
pub mod sample;
pub mod servers;
pub mod store;
pub mod tree;
pub mod workdir;

pub use image::Layout;
pub use lazyimg::{Lazyimg, Mounted};
pub use proxy::{Fault, Proxy};
pub use registry::Registry;
pub use sample::Sample;
pub use store::Store;
pub use workdir::WorkDir;

/// Says a line of numbers whether or not the test passes: `cargo test` keeps back what `println!` says.
#[macro_export]
macro_rules! say {
    ($($words:tt)*) => {
        $crate::say_line(format_args!($($words)*))
    };
}

/// See [`say!`].
#[doc(hidden)]
pub fn say_line(words: std::fmt::Arguments<'_>) {
    use std::io::Write as _;
    // There is nobody to tell if that fails.
    let _ = writeln!(std::io::stderr().lock(), "    {words}");
}
