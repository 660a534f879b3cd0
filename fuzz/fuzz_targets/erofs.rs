//! The EROFS reader on metadata that nobody honest wrote: it ends, without a panic, in linear time.
//!
//! Length and checksum are repaired first, or the fuzzer would never get past the first block.
#![no_main]

use std::ops::ControlFlow;

use lazyimg_image::erofs::{self, FileType, Reader};
use libfuzzer_sys::fuzz_target;

const BLOCK: usize = 4096;
const SUPER: usize = 1024;

/// CRC-32C as EROFS uses it: begun with ones, not inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg())
        })
    })
}

fuzz_target!(|data: &[u8]| {
    let mut image = data.to_vec();
    image.resize(image.len().next_multiple_of(BLOCK).max(BLOCK), 0);
    let blocks = (image.len() / BLOCK) as u32;
    image[SUPER + 36..SUPER + 40].copy_from_slice(&blocks.to_le_bytes());
    image[SUPER + 4..SUPER + 8].fill(0);
    let sum = crc32c(&image[SUPER..BLOCK]);
    image[SUPER + 4..SUPER + 8].copy_from_slice(&sum.to_le_bytes());

    let Ok(reader) = Reader::open(image) else {
        return;
    };
    let _ = erofs::walk(&reader, &mut |path, info| {
        let _ = reader.xattrs(info.nid);
        let _ = reader.xattr(info.nid, b"security.capability");
        let _ = reader.data_start(info.nid);
        match info.file_type {
            FileType::Symlink => drop(reader.read_link(info.nid)),
            FileType::Directory => {
                let _ = reader.lookup(
                    info.nid,
                    path.rsplit(|b| *b == b'/').next().unwrap_or(b".."),
                );
            }
            _ => {}
        }
        ControlFlow::Continue(())
    });
    // Numbers that no directory holds.
    for nid in [0, 1, u64::MAX, u64::MAX / 32, u64::from(blocks) * 128 - 1] {
        let _ = reader.inode(nid);
        let _ = reader.read_dir(nid, 0, &mut |_| ControlFlow::Continue(()));
        let _ = reader.read_dir(reader.root(), nid, &mut |_| ControlFlow::Continue(()));
    }
});
