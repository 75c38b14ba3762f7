//! Which image of an index runs on this machine.

use std::fmt;

use serde::Deserialize;

use crate::images::manifest::Descriptor;

/// OCI: image-index.md, `platform`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    /// Operating system.
    #[serde(default)]
    pub(crate) os: String,
    /// Processor family as Go names it.
    #[serde(default)]
    pub(crate) architecture: String,
    /// Level within the family; empty: the family's default.
    #[serde(default)]
    pub(crate) variant: String,
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match self.variant.is_empty() {
            true => Ok(()),
            false => write!(f, "/{}", self.variant),
        }
    }
}

/// What this machine runs, best first.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    architecture: &'static str,
    /// Variants, best first; the one named empty is what stands without a variant.
    variants: Vec<&'static str>,
}

impl Wanted {
    /// What the machine that we run on can run.
    pub(crate) fn here() -> Self {
        match std::env::consts::ARCH {
            "x86_64" => Self::amd64(amd64_level()),
            "aarch64" => Self {
                architecture: "arm64",
                variants: vec!["v8", ""],
            },
            "riscv64" => Self::plain("riscv64"),
            "powerpc64" => Self::plain("ppc64le"),
            "s390x" => Self::plain("s390x"),
            "loongarch64" => Self::plain("loong64"),
            other => Self::plain(other),
        }
    }

    fn plain(architecture: &'static str) -> Self {
        Self {
            architecture,
            variants: vec![""],
        }
    }

    fn amd64(level: usize) -> Self {
        let variants = ["v4", "v3", "v2", "v1"];
        let skipped = variants.len() - level.clamp(1, variants.len());
        let mut variants = variants[skipped..].to_vec();
        variants.push("");
        Self {
            architecture: "amd64",
            variants,
        }
    }

    /// Does an image for `platform` run here? What an old image does not say is taken to fit.
    pub(crate) fn runs(&self, platform: &Platform) -> bool {
        let fits = |said: &str, here: &str| said.is_empty() || said == here;
        fits(&platform.os, "linux") && fits(&platform.architecture, self.architecture)
    }

    /// The best entry of an index; `None`: none runs here. Without any platform in the index the first
    /// entry counts.
    pub(crate) fn choose<'d>(&self, entries: &'d [Descriptor]) -> Option<&'d Descriptor> {
        if entries.iter().all(|entry| entry.platform.is_none()) {
            return entries.first();
        }
        let rank = |entry: &Descriptor| {
            let platform = entry.platform.as_ref()?;
            if platform.os != "linux" || platform.architecture != self.architecture {
                return None;
            }
            let variant = match platform.variant.as_str() {
                "8" => "v8",
                variant => variant,
            };
            self.variants.iter().position(|wanted| *wanted == variant)
        };
        let ranked = entries
            .iter()
            .filter_map(|entry| Some((rank(entry)?, entry)));
        ranked.min_by_key(|(rank, _)| *rank).map(|(_, entry)| entry)
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "linux/{}", self.architecture)
    }
}

/// x86-64 psABI, micro-architecture levels.
#[cfg(target_arch = "x86_64")]
fn amd64_level() -> usize {
    use std::is_x86_feature_detected as has;
    let v2 = has!("sse3") && has!("ssse3") && has!("sse4.1") && has!("sse4.2") && has!("popcnt");
    let v3 = v2
        && has!("avx2")
        && has!("bmi1")
        && has!("bmi2")
        && has!("fma")
        && has!("movbe")
        && has!("f16c")
        && has!("lzcnt");
    let v4 = v3
        && has!("avx512f")
        && has!("avx512bw")
        && has!("avx512cd")
        && has!("avx512dq")
        && has!("avx512vl");
    1 + usize::from(v2) + usize::from(v3) + usize::from(v4)
}

#[cfg(not(target_arch = "x86_64"))]
fn amd64_level() -> usize {
    1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::digest::Digest;

    fn index(platforms: &[&str]) -> Vec<Descriptor> {
        let entry = |text: &&str| {
            let mut parts = text.split('/').map(str::to_owned);
            Descriptor {
                media_type: String::new(),
                digest: Digest::of(text.as_bytes()),
                size: 1,
                platform: (!text.is_empty()).then(|| Platform {
                    os: parts.next().unwrap_or_default(),
                    architecture: parts.next().unwrap_or_default(),
                    variant: parts.next().unwrap_or_default(),
                }),
                annotations: None,
            }
        };
        platforms.iter().map(entry).collect()
    }

    fn check(wanted: &Wanted, offered: &[&str], chosen: Option<&str>) {
        let entries = index(offered);
        let found = wanted.choose(&entries).map(|entry| entry.digest);
        assert_eq!(
            found,
            chosen.map(|text| Digest::of(text.as_bytes())),
            "{offered:?}"
        );
    }

    #[test]
    fn the_best_that_runs() {
        let v3 = Wanted::amd64(3);
        check(&v3, &["linux/arm64", "linux/amd64"], Some("linux/amd64"));
        check(
            &v3,
            &["linux/amd64", "linux/amd64/v3", "linux/amd64/v4"],
            Some("linux/amd64/v3"),
        );
        check(
            &v3,
            &["linux/amd64/v4", "linux/amd64/v2"],
            Some("linux/amd64/v2"),
        );
        check(&v3, &["linux/amd64/v4"], None);
        check(&v3, &["windows/amd64", "unknown/unknown"], None);
        check(&v3, &["", "linux/arm64"], None);
        check(&v3, &[""], Some(""));
        check(&v3, &[], None);
        let arm = Wanted {
            architecture: "arm64",
            variants: vec!["v8", ""],
        };
        check(
            &arm,
            &["linux/amd64/v3", "linux/arm64/v8"],
            Some("linux/arm64/v8"),
        );
        check(&arm, &["linux/arm/v7", "linux/arm64"], Some("linux/arm64"));
    }
}
