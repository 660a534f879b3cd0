//! A writer of tar bytes for tests: as literal as possible, so that a test decides every field.
//! Also included by the tests in `image/tests`.

const BLOCK: usize = 512;

/// A header block with a right checksum.
#[derive(Clone)]
pub(crate) struct Raw(pub [u8; BLOCK]);

impl Raw {
    /// A ustar header: 0644, 0:0, mtime 0.
    pub(crate) fn new(name: &[u8], flag: u8) -> Self {
        let mut raw = Self([0; BLOCK]);
        raw.field(0, &name[..name.len().min(100)]);
        raw.field(100, b"0000644\0");
        raw.field(108, b"0000000\0");
        raw.field(116, b"0000000\0");
        raw.field(124, b"00000000000\0");
        raw.field(136, b"00000000000\0");
        raw.field(257, b"ustar\x0000");
        raw.0[156] = flag;
        raw.sum()
    }

    /// The same in GNU's format.
    pub(crate) fn gnu(name: &[u8], flag: u8) -> Self {
        Self::new(name, flag).with(257, b"ustar  \0")
    }

    pub(crate) fn with(mut self, at: usize, value: &[u8]) -> Self {
        self.field(at, value);
        self.sum()
    }

    pub(crate) fn size(self, size: u64) -> Self {
        self.with(124, format!("{size:011o}\0").as_bytes())
    }

    pub(crate) fn link(self, target: &[u8]) -> Self {
        self.with(157, target)
    }

    fn field(&mut self, at: usize, value: &[u8]) {
        self.0[at..at + value.len()].copy_from_slice(value);
    }

    fn sum(mut self) -> Self {
        self.field(148, b"        ");
        let sum: u32 = self.0.iter().map(|&b| u32::from(b)).sum();
        self.field(148, format!("{sum:06o}\0 ").as_bytes());
        self
    }

    /// The header alone.
    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0.to_vec()
    }

    /// The header with its size set, and the body, padded.
    pub(crate) fn body(self, body: &[u8]) -> Vec<u8> {
        let mut out = self.size(body.len() as u64).bytes();
        out.extend_from_slice(body);
        out.resize(out.len().next_multiple_of(BLOCK), 0);
        out
    }
}

/// A PAX record.
pub(crate) fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// An extended header with these records.
pub(crate) fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    pax_flag(b'x', records)
}

/// An extended header of type `x` or `g`.
pub(crate) fn pax_flag(flag: u8, records: &[(&str, &[u8])]) -> Vec<u8> {
    let body: Vec<u8> = records
        .iter()
        .flat_map(|(key, value)| pax_record(key.as_bytes(), value))
        .collect();
    Raw::new(b"PaxHeaders/x", flag).body(&body)
}

/// The end mark.
pub(crate) fn end() -> Vec<u8> {
    vec![0; 2 * BLOCK]
}
