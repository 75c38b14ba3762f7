//! The model of a profile: the JSON of the OCI runtime spec (config-linux.md#seccomp) with what Docker adds
//! to it (`archMap`, `includes`, `excludes`). Keys that are not known are ignored, as everywhere.

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use serde::{Deserialize, Deserializer};
use sha2::Digest as _;

use crate::runtime::seccomp::{Result, SeccompError};

/// Largest profile in bytes.
const MAX_SIZE: u64 = 1 << 20;

/// What happens to a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) enum Action {
    /// The thread is killed (`KILL` of old).
    #[serde(rename = "SCMP_ACT_KILL", alias = "SCMP_ACT_KILL_THREAD")]
    KillThread,
    /// The process is killed.
    #[serde(rename = "SCMP_ACT_KILL_PROCESS")]
    KillProcess,
    /// `SIGSYS`.
    #[serde(rename = "SCMP_ACT_TRAP")]
    Trap,
    /// It fails with an error number.
    #[serde(rename = "SCMP_ACT_ERRNO")]
    Errno,
    /// A listener decides.
    #[serde(rename = "SCMP_ACT_NOTIFY")]
    Notify,
    /// A tracer decides.
    #[serde(rename = "SCMP_ACT_TRACE")]
    Trace,
    /// It is logged and done.
    #[serde(rename = "SCMP_ACT_LOG")]
    Log,
    /// It is done.
    #[serde(rename = "SCMP_ACT_ALLOW")]
    Allow,
}

/// How an argument is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) enum Operator {
    /// `!=`
    #[serde(rename = "SCMP_CMP_NE")]
    Ne,
    /// `<`
    #[serde(rename = "SCMP_CMP_LT")]
    Lt,
    /// `<=`
    #[serde(rename = "SCMP_CMP_LE")]
    Le,
    /// `==`
    #[serde(rename = "SCMP_CMP_EQ")]
    Eq,
    /// `>=`
    #[serde(rename = "SCMP_CMP_GE")]
    Ge,
    /// `>`
    #[serde(rename = "SCMP_CMP_GT")]
    Gt,
    /// `argument & value == valueTwo & value`
    #[serde(rename = "SCMP_CMP_MASKED_EQ")]
    MaskedEq,
}

/// Condition on one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Condition {
    /// Which argument, 0..=5.
    pub(crate) index: u32,
    /// Compared with; the mask of [`Operator::MaskedEq`].
    pub(crate) value: u64,
    /// What [`Operator::MaskedEq`] compares with.
    #[serde(default)]
    pub(crate) value_two: u64,
    /// How.
    pub(crate) op: Operator,
}

/// When a rule counts (`includes`) or does not (`excludes`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Circumstances {
    /// Capabilities.
    #[serde(deserialize_with = "null_is_empty")]
    pub(crate) caps: Vec<String>,
    /// Architectures, as `amd64`.
    #[serde(deserialize_with = "null_is_empty")]
    pub(crate) arches: Vec<String>,
    /// Kernel, as `4.8`, at least; empty: any.
    #[serde(deserialize_with = "null_is_empty")]
    pub(crate) min_kernel: String,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Rule {
    /// System calls.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(crate) names: Vec<String>,
    /// One system call, as old profiles write it.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(crate) name: String,
    /// What happens.
    pub(crate) action: Action,
    /// Error number of [`Action::Errno`], data of [`Action::Trace`].
    #[serde(default)]
    pub(crate) errno_ret: Option<u32>,
    /// All must hold.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(crate) args: Vec<Condition>,
    /// The rule counts only here.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(crate) includes: Circumstances,
    /// The rule does not count here.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(crate) excludes: Circumstances,
}

/// Architectures that come with one.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ArchMap {
    /// `SCMP_ARCH_...` of the machine.
    pub(crate) architecture: String,
    /// Those that come with it.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(crate) sub_architectures: Vec<String>,
}

/// A profile.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Profile {
    /// For messages: its file, or `RuntimeDefault`.
    #[serde(skip)]
    pub(crate) name: String,
    /// SHA-256 of its text.
    #[serde(skip)]
    pub(crate) digest: [u8; 32],
    /// What happens where no rule matches.
    pub(crate) default_action: Action,
    /// Error number of the default action.
    #[serde(default)]
    pub(crate) default_errno_ret: Option<u32>,
    /// Architectures beside the machine's own.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(crate) architectures: Vec<String>,
    /// The same by machine; not beside `architectures`.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(crate) arch_map: Vec<ArchMap>,
    /// `SECCOMP_FILTER_FLAG_...`; absent: the default flags.
    #[serde(default)]
    pub(crate) flags: Option<Vec<String>>,
    /// Socket of a listener for [`Action::Notify`].
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(crate) listener_path: String,
    /// Rules.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(crate) syscalls: Vec<Rule>,
}

/// Profiles written by Go programs say `null` for what is empty.
fn null_is_empty<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> std::result::Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

impl Profile {
    /// The built-in default.
    pub(crate) fn runtime_default() -> Arc<Self> {
        static DEFAULT: LazyLock<Arc<Profile>> =
            LazyLock::new(|| Arc::new(crate::runtime::seccomp::default::profile()));
        Arc::clone(&DEFAULT)
    }

    /// Reads the text of a profile; `name` is for messages.
    ///
    /// # Errors
    /// [`SeccompError::Json`]: it is no JSON or not of the right shape.
    pub(crate) fn parse(name: &str, text: &[u8]) -> Result<Self> {
        let mut profile: Self =
            serde_json::from_slice(text).map_err(|error| SeccompError::Json {
                name: name.to_owned(),
                line: error.line(),
                column: error.column(),
                problem: plain(&error),
            })?;
        name.clone_into(&mut profile.name);
        profile.digest = sha2::Sha256::digest(text).into();
        Ok(profile)
    }

    /// Reads a profile's file: a regular file of at most 1 MiB. Blocks on the filesystem.
    ///
    /// # Errors
    /// [`SeccompError::Read`], [`SeccompError::File`]: there is no such file. [`SeccompError::Json`]: as in
    /// [`Self::parse`].
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let unreadable = |source| SeccompError::Read {
            path: path.to_owned(),
            source,
        };
        let unfit = |problem: &str| SeccompError::File {
            path: path.to_owned(),
            problem: problem.to_owned(),
        };
        let mut text = vec![];
        let file: File = OpenOptions::new()
            .read(true)
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
            .open(path)
            .map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        if !metadata.is_file() {
            return Err(unfit("is not a regular file"));
        }
        file.take(MAX_SIZE + 1)
            .read_to_end(&mut text)
            .map_err(unreadable)?;
        if text.len() as u64 > MAX_SIZE {
            return Err(unfit("is larger than 1 MiB"));
        }
        Self::parse(&path.to_string_lossy(), &text)
    }
}

/// The message without the position, which is said elsewhere.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" at line ") {
        Some((message, _)) => message.to_owned(),
        None => text,
    }
}
