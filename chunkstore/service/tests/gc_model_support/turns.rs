//! What happens: operations, alone or together, deaths, and time.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;

use super::images::{CHUNKS, IMAGES, TENANTS};

/// How long an instance trusts what it knows of the roots.
pub const TTL: Duration = Duration::from_secs(5);
/// How long GC leaves a root alone.
pub const SETTLE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone)]
pub enum Op {
    /// Puts the chunks and the manifest; `partial` leaves the last chunk out.
    Convert {
        tenant: usize,
        image: usize,
        chunks: BTreeSet<usize>,
        partial: bool,
    },
    Delete {
        tenant: usize,
        image: usize,
    },
    Mount {
        tenant: usize,
        image: usize,
    },
    /// Reads what the tenant may once have put, whether or not something names it.
    Read {
        tenant: usize,
        chunk: usize,
    },
    Rotate,
    Gc,
}

/// Where the death of a process comes in.
#[derive(Debug, Clone, Copy)]
pub struct Death {
    pub calls: i64,
    pub last_is_done: bool,
}

#[derive(Debug, Clone)]
pub enum Turn {
    One(usize, Op, Option<Death>),
    Both([(Op, Option<Death>); 2], u64),
    /// The first operation is held up at its n-th call while the other instance does the others; time
    /// passes before each.
    Stall(Op, i64, Vec<(Duration, Op)>),
    /// As [`Op::Read`], with what must come of it.
    ReadStale {
        who: usize,
        tenant: usize,
        chunk: usize,
    },
    Acknowledge,
    Pass(Duration),
}

pub fn ops() -> impl Strategy<Value = Op> {
    let who = (0..TENANTS, 0..IMAGES);
    let chunks = prop::collection::btree_set(0..CHUNKS, 1..4);
    prop_oneof![
        3 => (who.clone(), chunks, prop::bool::weighted(0.15)).prop_map(
            |((tenant, image), chunks, partial)| Op::Convert { tenant, image, chunks, partial }
        ),
        1 => who.clone().prop_map(|(tenant, image)| Op::Delete { tenant, image }),
        1 => who.prop_map(|(tenant, image)| Op::Mount { tenant, image }),
        1 => (0..TENANTS, 0..CHUNKS).prop_map(|(tenant, chunk)| Op::Read { tenant, chunk }),
        2 => Just(Op::Rotate),
        4 => Just(Op::Gc),
    ]
}

/// What changes no image.
pub fn quiet_ops() -> impl Strategy<Value = Op> {
    prop_oneof![1 => Just(Op::Rotate), 3 => Just(Op::Gc)]
}

pub fn pauses() -> impl Strategy<Value = Duration> {
    prop_oneof![1 => Just(TTL / 2), 2 => Just(SETTLE + TTL)]
}

pub fn deaths() -> impl Strategy<Value = Option<Death>> {
    let death = (1..40i64, any::<bool>()).prop_map(|(calls, last_is_done)| Death {
        calls,
        last_is_done,
    });
    prop::option::weighted(0.25, death)
}

pub fn turns() -> impl Strategy<Value = Turn> {
    prop_oneof![
        4 => (0..2usize, ops(), deaths()).prop_map(|(who, op, death)| Turn::One(who, op, death)),
        4 => ([(ops(), deaths()), (ops(), deaths())], any::<u64>())
            .prop_map(|(ops, dice)| Turn::Both(ops, dice)),
        4 => (ops(), 0..30i64, prop::collection::vec((pauses(), quiet_ops()), 1..6))
            .prop_map(|(op, calls, meanwhile)| Turn::Stall(op, calls, meanwhile)),
        2 => (0..2usize, 0..TENANTS, 0..CHUNKS)
            .prop_map(|(who, tenant, chunk)| Turn::ReadStale { who, tenant, chunk }),
        1 => Just(Turn::Acknowledge),
        3 => pauses().prop_map(Turn::Pass),
    ]
}

impl Turn {
    /// The operations in it that may change images.
    pub fn ops(&self) -> Vec<&Op> {
        match self {
            Self::One(_, op, _) | Self::Stall(op, ..) => vec![op],
            Self::Both(ops, _) => ops.iter().map(|(op, _)| op).collect(),
            Self::ReadStale { .. } | Self::Acknowledge | Self::Pass(_) => Vec::new(),
        }
    }
}
