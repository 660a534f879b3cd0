//! Large blobs pass through little memory. Alone in its process: the peak is the process's.

#![allow(clippy::unwrap_used)] // Helpers outside of test functions.

mod common;

use bytes::Bytes;
use common::*;
use futures_util::TryStreamExt as _;
use lazyimg_convergent::Digest;
use sha2::Digest as _;

/// Length of the blob, in bytes.
const BLOB: u64 = 512 << 20;

/// How much the peak may grow, in bytes: buffers of the network, a few pieces in flight.
const ALLOWED: u64 = 24 << 20;

fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_gigabyte_is_pushed_and_pulled_through_a_few_megabytes() {
    let registry = RegistryServer::start();
    let repository = repository(&registry.reference("a:v1"), &options());
    let dir = tempfile::tempdir().unwrap();
    let layout = common::repository(&format!("oci:{}", dir.path().display()), &options());
    let piece = noise(1, 1 << 20);
    let pieces = (BLOB >> 20) as usize;
    let mut hash = sha2::Sha256::new();
    (0..pieces).for_each(|_| hash.update(&piece));
    let digest = Digest(hash.finalize().into());
    // Connections, runtime and allocator are warm.
    repository
        .push_blob_bytes(&Digest::of(&piece), piece.clone())
        .await
        .unwrap();
    let before = peak();
    let body = futures_util::stream::iter(std::iter::repeat_n(piece, pieces).map(Ok));
    let begun = std::time::Instant::now();
    repository.push_blob(&digest, BLOB, body).await.unwrap();
    let pushed = begun.elapsed();
    // From the registry into a layout, as a copy would go.
    let begun = std::time::Instant::now();
    let body = repository
        .blob_stream(&digest, BLOB)
        .await
        .unwrap()
        .map_err(std::io::Error::other);
    layout.push_blob(&digest, BLOB, body).await.unwrap();
    let pulled = begun.elapsed();
    let begun = std::time::Instant::now();
    let read = layout.blob_stream(&digest, BLOB).await.unwrap();
    let total = read
        .try_fold(
            0,
            async |total, piece: Bytes| Ok(total + piece.len() as u64),
        )
        .await
        .unwrap();
    assert_eq!(total, BLOB);
    let read = begun.elapsed();
    let grown = peak() - before;
    println!(
        "push {pushed:?}, pull into a layout {pulled:?}, read the layout {read:?}; peak grew by {} KiB",
        grown >> 10
    );
    assert!(grown < ALLOWED, "the peak grew by {grown} bytes");
}
