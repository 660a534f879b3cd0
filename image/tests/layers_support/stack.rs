//! Random stacks of layers: few names, so that everything collides with everything.

use proptest::prelude::*;

use super::raw::{Raw, end, pax};

/// One entry of a layer.
#[derive(Debug, Clone)]
pub struct Op {
    /// The name as it stands in the archive.
    pub path: String,
    /// What it is.
    pub what: What,
    /// Its metadata.
    pub meta: OpMeta,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A directory.
    Dir,
    /// A file with this text.
    File(String),
    /// A symbolic link to this.
    Symlink(String),
    /// A hard link to this.
    Hard(String),
    /// A fifo.
    Fifo,
    /// A character device 1:n.
    Char(u8),
    /// Hides what `path` names: `.wh.` goes in front of its last name.
    Whiteout,
    /// Hides what is in directory `path`.
    Opaque,
}

/// Metadata of an entry.
#[derive(Debug, Clone)]
pub struct OpMeta {
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Modification time in seconds (never 0, which means that nobody said).
    pub mtime: i64,
    /// Nanoseconds.
    pub nsec: u32,
    /// Value of `user.t`, for files and directories.
    pub xattr: Option<String>,
}

impl Op {
    /// The name that stands in the archive.
    pub fn name(&self) -> String {
        match self.what {
            What::Whiteout => match self.path.rsplit_once('/') {
                Some((dir, name)) => format!("{dir}/.wh.{name}"),
                None => format!(".wh.{}", self.path),
            },
            What::Opaque if self.path.is_empty() => ".wh..wh..opq".into(),
            What::Opaque => format!("{}/.wh..wh..opq", self.path),
            _ => self.path.clone(),
        }
    }

    /// The entry in tar.
    pub fn bytes(&self) -> Vec<u8> {
        let m = &self.meta;
        let name = self.name();
        let (flag, link, body) = match &self.what {
            What::Dir => (b'5', "", ""),
            What::File(text) => (b'0', "", &text[..]),
            What::Symlink(target) => (b'2', &target[..], ""),
            What::Hard(target) => (b'1', &target[..], ""),
            What::Fifo => (b'6', "", ""),
            What::Char(_) => (b'3', "", ""),
            What::Whiteout | What::Opaque => (b'0', "", ""),
        };
        let mut raw = Raw::new(name.as_bytes(), flag)
            .with(100, format!("{:07o}\0", m.mode).as_bytes())
            .link(link.as_bytes());
        if let What::Char(minor) = self.what {
            raw = raw
                .with(329, b"0000001\0")
                .with(337, format!("{minor:07o}\0").as_bytes());
        }
        let (uid, mtime) = (m.uid.to_string(), format!("{}.{:09}", m.mtime, m.nsec));
        let mut records = vec![("uid", uid.as_bytes()), ("mtime", mtime.as_bytes())];
        if let (Some(value), What::Dir | What::File(_)) = (&m.xattr, &self.what) {
            records.push(("SCHILY.xattr.user.t", value.as_bytes()));
        }
        [pax(&records), raw.body(body.as_bytes())].concat()
    }
}

/// A layer in tar.
pub fn layer(ops: &[Op]) -> Vec<u8> {
    let mut out: Vec<u8> = ops.iter().flat_map(Op::bytes).collect();
    out.extend(end());
    out
}

fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
        .prop_map(|names| names.join("/"))
}

fn target() -> impl Strategy<Value = String> {
    prop_oneof![
        path(),
        path().prop_map(|p| format!("/{p}")),
        path().prop_map(|p| format!("../{p}")),
        prop::sample::select(vec![".", "..", "/", "a/../b", "../../../c", "b/"])
            .prop_map(str::to_owned),
    ]
}

fn meta() -> impl Strategy<Value = OpMeta> {
    (
        // No setgid: a directory made inside such a one inherits the bit from the host's kernel.
        prop::sample::select(vec![0o644, 0o755, 0o4755, 0o1777, 0o711, 0o400]),
        prop::sample::select(vec![0, 1000, 3_000_000, 4_000_000_000]),
        1i64..2_000_000_000,
        0u32..1_000_000_000,
        proptest::option::weighted(0.2, "[a-z]{1,5}"),
    )
        .prop_map(|(mode, uid, mtime, nsec, xattr)| OpMeta {
            mode,
            uid,
            mtime,
            nsec,
            xattr,
        })
}

/// Any entry.
pub fn op() -> impl Strategy<Value = Op> {
    let what = prop_oneof![
        4 => Just(What::Dir),
        4 => "[a-z]{0,6}".prop_map(What::File),
        2 => target().prop_map(What::Symlink),
        2 => path().prop_map(What::Hard),
        1 => Just(What::Fifo),
        1 => (0u8..9).prop_map(What::Char),
        2 => Just(What::Whiteout),
        1 => Just(What::Opaque),
    ];
    let path = prop_oneof![
        30 => path(),
        1 => path().prop_map(|p| format!("./{p}")),
        1 => path().prop_map(|p| format!("/{p}/")),
    ];
    (path, what, meta()).prop_map(|(path, what, meta)| {
        // A slash behind the name goes with directories only; whiteouts put their mark in front.
        let path = match what {
            What::Dir => path,
            _ => path.trim_end_matches('/').to_owned(),
        };
        Op { path, what, meta }
    })
}

/// A stack of layers.
pub fn stack() -> impl Strategy<Value = Vec<Vec<Op>>> {
    proptest::collection::vec(proptest::collection::vec(op(), 0..14), 1..5)
}

/// A stack for GNU tar, which knows no whiteouts, follows links out of the root, and does not
/// replace a directory that is not empty: directories, and what is none, have names of their own.
pub fn plain_stack() -> impl Strategy<Value = Vec<Vec<Op>>> {
    let dirs = || {
        proptest::collection::vec(prop::sample::select(vec!["d", "e"]), 0..3)
            .prop_map(|names| names.join("/"))
    };
    let leaf = move || {
        (dirs(), prop::sample::select(vec!["f", "g", "h"])).prop_map(|(dir, name)| {
            if dir.is_empty() {
                name.into()
            } else {
                format!("{dir}/{name}")
            }
        })
    };
    let what = prop_oneof![
        4 => "[a-z]{0,6}".prop_map(What::File),
        1 => target().prop_map(What::Symlink),
        3 => leaf().prop_map(What::Hard),
        1 => Just(What::Fifo),
        1 => (0u8..9).prop_map(What::Char),
    ];
    let op = prop_oneof![
        1 => dirs().prop_map(|d| (if d.is_empty() { "./".into() } else { d }, What::Dir)),
        3 => (leaf(), what),
    ];
    let op = (op, meta()).prop_map(|((path, what), mut meta)| {
        // GNU tar adds attributes to a directory that is there; the specification replaces them.
        meta.xattr = meta.xattr.filter(|_| what != What::Dir);
        Op { path, what, meta }
    });
    proptest::collection::vec(proptest::collection::vec(op, 0..12), 1..4)
}
