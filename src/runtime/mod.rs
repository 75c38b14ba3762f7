//! The OCI runtime: CRI, image and host facts become a spec and a plan (pure); a plan becomes processes.
#[cfg(feature = "daemon")]
pub(crate) mod apparmor;
#[cfg(feature = "daemon")]
pub(crate) mod capabilities;
pub(crate) mod cgroups;
pub(crate) mod create;
pub(crate) mod exec;
pub(crate) mod external;
pub(crate) mod hooks;
mod init;
pub(crate) mod plan;
#[cfg(feature = "daemon")]
pub(crate) mod resctrl;
#[cfg(feature = "daemon")]
pub(crate) mod seccomp;
#[cfg(feature = "daemon")]
pub(crate) mod selinux;
#[cfg(feature = "daemon")]
pub(crate) mod signals;
#[cfg(feature = "daemon")]
pub(crate) mod spec;
pub(crate) mod tree;
#[cfg(feature = "daemon")]
pub(crate) mod unmapped;
pub(crate) mod userns;
