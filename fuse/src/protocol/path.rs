//! Paths in JSON.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A path in JSON: a string, or `{"hex": "…"}` when it is not UTF-8.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WirePath(pub PathBuf);

impl From<&Path> for WirePath {
    fn from(path: &Path) -> Self {
        Self(path.to_owned())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum PathForm {
    Text(String),
    Hex { hex: String },
}

impl Serialize for WirePath {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let form = match self.0.to_str() {
            Some(text) => PathForm::Text(text.to_owned()),
            None => {
                let bytes = self.0.as_os_str().as_bytes();
                PathForm::Hex {
                    hex: bytes.iter().map(|b| format!("{b:02x}")).collect(),
                }
            }
        };
        form.serialize(s)
    }
}

impl<'de> Deserialize<'de> for WirePath {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let bytes = match PathForm::deserialize(d)? {
            PathForm::Text(text) => text.into_bytes(),
            PathForm::Hex { hex } => {
                let pair =
                    |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
                // `from_str_radix` would take a sign.
                if hex.len() % 2 != 0 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(D::Error::custom(
                        "a path in hex is made of pairs of hex digits",
                    ));
                }
                hex.as_bytes()
                    .chunks(2)
                    .map(pair)
                    .collect::<Option<Vec<u8>>>()
                    .ok_or_else(|| D::Error::custom("a path in hex has a digit that is none"))?
            }
        };
        if bytes.contains(&0) {
            return Err(D::Error::custom("a path has a zero byte"));
        }
        Ok(Self(PathBuf::from(OsString::from_vec(bytes))))
    }
}
