//! Hooks of the OCI spec, as plain values.

use serde::{Deserialize, Serialize};

/// When a hook runs, by the OCI spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum HookPoint {
    /// `prestart` (deprecated there).
    Prestart,
    /// `createRuntime`.
    CreateRuntime,
    /// `createContainer`.
    CreateContainer,
    /// `startContainer`.
    StartContainer,
    /// `poststart`.
    Poststart,
    /// `poststop`.
    Poststop,
}

impl HookPoint {
    /// The point of a name as the OCI spec writes it.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "prestart" => Self::Prestart,
            "createRuntime" => Self::CreateRuntime,
            "createContainer" => Self::CreateContainer,
            "startContainer" => Self::StartContainer,
            "poststart" => Self::Poststart,
            "poststop" => Self::Poststop,
            _ => return None,
        })
    }

    /// As the OCI spec writes it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::StartContainer => "startContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }
}

/// A program that runs at some point of a container's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hook {
    /// When.
    pub(crate) point: HookPoint,
    /// Absolute path.
    pub(crate) path: String,
    /// With `argv[0]`.
    pub(crate) args: Vec<String>,
    /// `NAME=value`.
    pub(crate) env: Vec<String>,
    /// Seconds, from 1. Where berth runs it, 100 at most, and 100 when absent; with an OCI runtime absent is no limit.
    pub(crate) timeout: Option<u64>,
}
