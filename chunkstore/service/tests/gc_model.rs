//! A chunk that any live manifest names is never deleted: two instances of the catalog over one
//! engine, against a model that says which images must be live.
//!
//! Steps run alone, or two at once with their engine calls interleaved as the case says, or one is held
//! up at an engine call, for longer than instances wait for each other, while the other instance does
//! several. A step may be cut off at any engine call as by the death of its process; the call in flight
//! is then done or not.

#![allow(clippy::unwrap_used)]

mod gc_model_support;

use std::time::Duration;

use proptest::prelude::*;

use gc_model_support::turns::{Op, SETTLE, TTL, Turn, turns};
use gc_model_support::world::World;

fn play(turns: &[Turn]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut world = World::new().await;
        for turn in turns {
            // Nobody waits for time to pass: it jumps to the end of this only if all wait for each other.
            let day = Duration::from_secs(24 * 3600);
            let done = tokio::time::timeout(day, world.turn(turn)).await;
            assert!(done.is_ok(), "a turn hangs: {turn:?}");
        }
        world.settle().await;
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_chunk_that_a_live_manifest_names_is_never_deleted(
        turns in prop::collection::vec(turns(), 1..30)
    ) {
        play(&turns);
    }

    #[test]
    fn a_read_from_an_expired_root_stops_its_deletion_or_finds_nothing(
        ends in prop::collection::vec(reads_of_what_expired(), 1..4)
    ) {
        let (tenant, image, chunk) = (0, 0, 0);
        let chunks = [chunk].into();
        let mut turns = vec![
            Turn::One(0, Op::Convert { tenant, image, chunks, partial: false }, None),
            Turn::One(0, Op::Delete { tenant, image }, None),
            Turn::One(0, Op::Rotate, None),
            Turn::Pass(SETTLE + TTL),
            Turn::One(0, Op::Gc, None),
            Turn::Pass(SETTLE + TTL),
        ];
        turns.extend(ends);
        play(&turns);
    }
}

/// A read beside passes of GC, or held up during some.
fn reads_of_what_expired() -> impl Strategy<Value = Turn> {
    let read = Op::Read {
        tenant: 0,
        chunk: 0,
    };
    let beside = Turn::Both;
    let of = (read.clone(), read);
    let pause = prop_oneof![Just(Duration::ZERO), Just(SETTLE + TTL)];
    let passes = prop::collection::vec(pause.prop_map(|pause| (pause, Op::Gc)), 1..4);
    prop_oneof![
        any::<u64>().prop_map(move |dice| beside([(of.0.clone(), None), (Op::Gc, None)], dice)),
        (0..12i64, passes).prop_map(move |(calls, gc)| Turn::Stall(of.1.clone(), calls, gc)),
        Just(Turn::Acknowledge),
        Just(Turn::Pass(SETTLE + TTL)),
    ]
}
