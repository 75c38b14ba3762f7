//! Everything that talks to the kernel. The only module that may contain `unsafe`.
//!
//! Thin functions over rustix where it has the call, over libc where it does not. They return
//! [`std::io::Error`] with the kernel's number; who calls adds what it was about.
#[cfg(feature = "daemon")]
pub(crate) mod bpf;
pub(crate) mod clone;
pub(crate) mod credentials;
pub(crate) mod descent;
pub(crate) mod exec;
pub(crate) mod fd;
pub(crate) mod file;
#[cfg(feature = "daemon")]
pub(crate) mod heap;
pub(crate) mod inherited;
pub(crate) mod launch;
pub(crate) mod memfd;
pub(crate) mod mount;
#[cfg(feature = "daemon")]
pub(crate) mod netlink;
#[cfg(feature = "daemon")]
pub(crate) mod netns;
pub(crate) mod ns;
pub(crate) mod poll;
pub(crate) mod process;
pub(crate) mod pty;
pub(crate) mod random;
pub(crate) mod remove;
pub(crate) mod scheduling;
pub(crate) mod seccomp;
pub(crate) mod signal;
pub(crate) mod socket;
#[cfg(feature = "daemon")]
pub(crate) mod spawn;
#[cfg(feature = "daemon")]
pub(crate) mod usage;
