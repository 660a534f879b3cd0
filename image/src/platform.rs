//! Which platform's image an index should yield.
//!
//! Names and normal forms follow containerd's `platforms` package: `x86_64` is `amd64`, `aarch64`
//! is `arm64`, `arm` without a variant is `v7`, `arm64/v8` and `amd64/v1` are the plain forms.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An operating system, an architecture and, for some architectures, a variant.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// As Go names it: `linux`.
    pub os: String,
    /// As Go names it: `amd64`, `arm64`, `arm`, `riscv64`, …
    pub architecture: String,
    /// `v7` for arm, `v9` for arm64, `v3` for amd64; absent for the plain form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// A text that names no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a platform: write os/architecture or os/architecture/variant, for example linux/arm64 or linux/arm/v7"
)]
pub struct ParsePlatformError(String);

impl Platform {
    /// The platform this program runs on.
    pub fn host() -> Self {
        Self::normal(std::env::consts::OS, std::env::consts::ARCH, None)
    }

    /// A platform in normal form.
    pub fn normal(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        let os = match os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".to_owned(),
            other => other.to_owned(),
        };
        let variant = variant
            .map(str::to_ascii_lowercase)
            .filter(|v| !v.is_empty());
        let variant = variant.map(|v| {
            if v.starts_with(|c: char| c.is_ascii_digit()) {
                format!("v{v}")
            } else {
                v
            }
        });
        let (architecture, variant) = match (
            architecture.to_ascii_lowercase().as_str(),
            variant.as_deref(),
        ) {
            ("x86_64" | "x86-64" | "amd64", None | Some("v1")) => ("amd64".to_owned(), None),
            ("x86_64" | "x86-64" | "amd64", _) => ("amd64".to_owned(), variant),
            ("aarch64" | "arm64", None | Some("v8")) => ("arm64".to_owned(), None),
            ("aarch64" | "arm64", _) => ("arm64".to_owned(), variant),
            ("i386" | "x86" | "386", _) => ("386".to_owned(), None),
            ("armhf", _) => ("arm".to_owned(), Some("v7".to_owned())),
            ("armel", _) => ("arm".to_owned(), Some("v6".to_owned())),
            ("arm", None) => ("arm".to_owned(), Some("v7".to_owned())),
            ("powerpc64" | "ppc64le", _) => ("ppc64le".to_owned(), variant),
            ("loongarch64" | "loong64", _) => ("loong64".to_owned(), variant),
            (other, _) => (other.to_owned(), variant),
        };
        Self {
            os,
            architecture,
            variant,
        }
    }

    /// How well an image for `candidate` serves this platform: `None` when it can't run, otherwise
    /// the smaller the better, 0 for the very platform. Same system and architecture are required;
    /// an older variant runs on a newer one.
    pub fn rank(&self, candidate: &Platform) -> Option<u32> {
        let wanted = Self::normal(&self.os, &self.architecture, self.variant.as_deref());
        let offered = Self::normal(
            &candidate.os,
            &candidate.architecture,
            candidate.variant.as_deref(),
        );
        if wanted.os != offered.os || wanted.architecture != offered.architecture {
            return None;
        }
        if wanted.variant == offered.variant {
            return Some(0);
        }
        let (wanted, offered) = (wanted.level()?, offered.level()?);
        (offered <= wanted).then(|| wanted - offered)
    }

    /// The variant as a number that grows with what the processor can do.
    fn level(&self) -> Option<u32> {
        let plain = match self.architecture.as_str() {
            "amd64" => 1,
            "arm64" => 8,
            _ => 0,
        };
        let Some(variant) = &self.variant else {
            return Some(plain * 100);
        };
        // `v9.2` of arm64 has a minor part.
        let (major, minor) = variant
            .strip_prefix('v')?
            .split_once('.')
            .unwrap_or((variant.strip_prefix('v')?, "0"));
        let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
        (major < 1000 && minor < 100).then_some(major * 100 + minor)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = ParsePlatformError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParsePlatformError(text.chars().take(80).collect());
        let parts: Vec<&str> = text.split('/').collect();
        let legal = |part: &&str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part.len() <= 32
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        if !parts.iter().all(legal) {
            return Err(bad());
        }
        match parts[..] {
            [os, architecture] => Ok(Self::normal(os, architecture, None)),
            [os, architecture, variant] => Ok(Self::normal(os, architecture, Some(variant))),
            _ => Err(bad()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    #[test]
    fn names_of_other_worlds_take_their_normal_form() {
        for (given, normal) in [
            ("linux/x86_64", "linux/amd64"),
            ("Linux/aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/armhf", "linux/arm/v7"),
            ("linux/arm/7", "linux/arm/v7"),
            ("linux/amd64/v1", "linux/amd64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("linux/i386", "linux/386"),
        ] {
            assert_eq!(platform(given).to_string(), normal);
        }
    }

    #[test]
    fn what_is_no_platform_is_refused() {
        for text in [
            "",
            "linux",
            "linux/",
            "/amd64",
            "a/b/c/d",
            "linux/am d64",
            "linux/../x",
        ] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_older_variant_serves_and_a_newer_one_does_not() {
        let v7 = platform("linux/arm/v7");
        assert_eq!(v7.rank(&platform("linux/arm/v7")), Some(0));
        assert!(v7.rank(&platform("linux/arm/v6")) < v7.rank(&platform("linux/arm/v5")));
        assert_eq!(platform("linux/arm/v6").rank(&v7), None);
        assert_eq!(
            platform("linux/amd64").rank(&platform("linux/amd64/v2")),
            None
        );
        assert!(
            platform("linux/amd64/v3")
                .rank(&platform("linux/amd64"))
                .is_some()
        );
        assert!(
            platform("linux/arm64/v9")
                .rank(&platform("linux/arm64/v8"))
                .is_some()
        );
        assert_eq!(platform("linux/arm64").rank(&platform("linux/amd64")), None);
        assert_eq!(
            platform("linux/amd64").rank(&platform("windows/amd64")),
            None
        );
    }

    #[test]
    fn an_attestation_entry_serves_nobody() {
        let unknown = Platform {
            os: "unknown".into(),
            architecture: "unknown".into(),
            variant: None,
        };
        assert_eq!(Platform::host().rank(&unknown), None);
    }
}
