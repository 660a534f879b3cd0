//! Random stacks of layers, flattened and compared with a simple model of what they mean.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests.

mod layers_support;

use layers_support::model::Model;
use layers_support::stack::{Op, layer, stack};
use layers_support::{Digests, Image, assert_same};
use lazyimg_image::flatten::{Counters, apply_layer};
use lazyimg_image::limits::Limits;
use lazyimg_image::tree::Tree;
use proptest::prelude::*;

/// Leaves out the entries that can't be applied, so that every layer can be read to its end.
fn valid(model: &mut Model, ops: Vec<Op>) -> (Vec<Op>, Vec<Op>) {
    model.begin_layer();
    ops.into_iter().partition(|op| {
        let before = model.clone();
        let ok = model.apply(op).is_ok();
        if !ok {
            *model = before;
        }
        ok
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn a_stack_of_layers_means_what_the_model_says(stack in stack()) {
        let (mut image, mut model) = (Image::default(), Model::default());
        for ops in stack {
            let (ops, refused) = valid(&mut model, ops);
            image.apply(&layer(&ops)[..]).unwrap();
            assert_same(&image.describe(), &model.describe(), "the model");
            drop(refused);
        }
    }

    #[test]
    fn what_the_model_refuses_is_refused(stack in stack()) {
        let (mut image, mut model) = (Image::default(), Model::default());
        for ops in stack {
            model.begin_layer();
            let bad = ops.iter().position(|op| model.apply(op).is_err());
            match (bad, image.apply(&layer(&ops)[..])) {
                (None, result) => prop_assert!(result.is_ok()),
                (Some(n), result) => {
                    let message = result.unwrap_err().to_string();
                    let name = format!("entry \"{}\"", ops[n].name());
                    prop_assert!(message.contains(&name), "{name}: {message}");
                    break;
                }
            }
        }
    }
}

/// Puts the checksums of damaged headers right, so that the damage is looked at.
fn mend(tar: &mut [u8]) {
    for block in tar.chunks_exact_mut(512) {
        if &block[257..262] == b"ustar" {
            block[148..156].copy_from_slice(b"        ");
            let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn damaged_layers_end_in_a_tree_or_an_error_within_the_limits(
        stack in stack(),
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
    ) {
        let limits = Limits {
            entries_per_image: 40,
            metadata_bytes: 400,
            image_bytes: 10_000,
            file_bytes: 5_000,
            path_depth: 4,
            ..Limits::default()
        };
        let (mut tree, mut sink, mut count) =
            (Tree::new(), Digests::default(), Counters::default());
        for (n, ops) in stack.iter().enumerate() {
            let mut tar = layer(ops);
            for (at, value) in &flips {
                let at = at.index(tar.len());
                tar[at] = *value;
            }
            mend(&mut tar);
            let result = apply_layer(
                &mut tree, n as u32, "damaged", &tar[..], &mut sink, &limits, &mut count,
            );
            // The tree holds together, error or not: every name leads to an inode, every inode has
            // the names that its link count says.
            let lines = tree.describe(&|id| sink.all[id.0 as usize].clone());
            prop_assert!(tree.inode_count() <= lines.len());
            prop_assert!(lines.len() <= 41);
            prop_assert!(lines.iter().all(|line| line.split(' ').next().unwrap().matches('/').count() <= 6));
            let names: u32 = tree.inodes()
                .map(|(id, _)| if tree.is_dir(id) { 1 } else { tree.nlink(id) })
                .sum();
            prop_assert_eq!(names as usize, lines.len());
            if let Err(e) = result {
                let message = e.to_string();
                prop_assert!(message.starts_with(&format!("layer {n} (damaged)")), "{}", message);
                break;
            }
            prop_assert!(count.entries <= 40 && count.metadata_bytes <= 400);
            prop_assert!(count.file_bytes <= 10_000);
        }
    }
}
