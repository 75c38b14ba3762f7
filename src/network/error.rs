//! Why the network could not do something.

use std::io;
use std::net::IpAddr;

use crate::base::edits::NetDevice;
use crate::base::error::{HasKind, Kind};
use crate::base::id::PodId;
use crate::network::addresses::UnfitPool;
use crate::network::cidr::{Cidr, IpFamily, ParseCidrError};
use crate::store::StoreError;
use crate::sys::netlink::Refusal;

/// Why the network could not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum NetworkError {
    /// The kernel refused a step.
    #[error("cannot {step} {operand}")]
    Kernel {
        /// What was tried.
        step: &'static str,
        /// On what.
        operand: String,
        /// Why.
        source: Refusal,
    },
    /// A system call or a file failed.
    #[error("cannot {step} {operand}")]
    System {
        /// What was tried.
        step: &'static str,
        /// On what.
        operand: String,
        /// Why.
        source: io::Error,
    },
    /// The leases could not be read or written.
    #[error("cannot keep the address leases")]
    Leases(#[from] StoreError),
    /// A pool and a route of the host share addresses.
    #[error(
        "the pod network {pool} overlaps the host's route {route} ({through}): set `{key}` to a range \
         that nothing else on this host uses"
    )]
    Overlap {
        /// The pool.
        pool: Cidr,
        /// The route.
        route: Cidr,
        /// `through eth0`, or that it refuses.
        through: String,
        /// The key of the configuration.
        key: &'static str,
    },
    /// A link with the bridge's name is something else.
    #[error("the link {name} is no bridge but {kind:?}: set `bridge` to a name that is free")]
    NotABridge {
        /// The link.
        name: String,
        /// Its kind.
        kind: String,
    },
    /// No address is left.
    #[error("all addresses of the pod network {pool} are taken: set `{key}` to a larger range")]
    Exhausted {
        /// The pool.
        pool: Cidr,
        /// The key of the configuration.
        key: &'static str,
    },
    /// Neither family has a pool.
    #[error("no pod network: set `ipv4_pool` or `ipv6_pool`{why}")]
    NoPool {
        /// What else to know; may be empty.
        why: &'static str,
    },
    /// A range is no pool.
    #[error("{cidr} cannot be the pod network: {why}")]
    UnfitPool {
        /// The range.
        cidr: Cidr,
        /// Why.
        why: UnfitPool,
    },
    /// Not a list of ranges.
    #[error("pod CIDR: {0}")]
    BadCidr(ParseCidrError),
    /// Two ranges of one family.
    #[error("pod CIDR {text:?}: two {family} ranges; give at most one a family")]
    TwoOfAFamily {
        /// As given.
        text: String,
        /// Which.
        family: IpFamily,
    },
    /// Somebody has the port.
    #[error(
        "host port {port}/{protocol} is taken by pod {holder}: stop that pod or choose another port"
    )]
    PortTaken {
        /// The port.
        port: u16,
        /// `TCP`, ...
        protocol: &'static str,
        /// Who has it.
        holder: PodId,
    },
    /// The request itself names a port twice.
    #[error("host port {port}/{protocol} is mapped twice in one pod: name each port once")]
    PortTwice {
        /// The port.
        port: u16,
        /// `TCP`, ...
        protocol: &'static str,
    },
    /// A port cannot be mapped at that address.
    #[error("host port {port} at {address}: {why}")]
    BadHostIp {
        /// The port.
        port: u16,
        /// The address.
        address: IpAddr,
        /// Why.
        why: &'static str,
    },
    /// A network device cannot be moved into the pod.
    #[error("netDevices[{:?}] cannot become {:?} in the pod: {problem}", device.host, device.name)]
    NetDevice {
        /// Which.
        device: NetDevice,
        /// Why not.
        problem: &'static str,
    },
    /// The thread is gone: the daemon is ending, or it panicked.
    #[error("the network thread has ended: restart the daemon")]
    Ended,
}

impl NetworkError {
    /// Says which step on what the kernel refused; for `map_err`.
    pub(crate) fn kernel(
        step: &'static str,
        operand: impl Into<String>,
    ) -> impl FnOnce(Refusal) -> Self {
        let operand = operand.into();
        move |source| Self::Kernel {
            step,
            operand,
            source,
        }
    }

    /// Says which step on what failed; for `map_err`.
    pub(crate) fn system(
        step: &'static str,
        operand: impl Into<String>,
    ) -> impl FnOnce(io::Error) -> Self {
        let operand = operand.into();
        move |source| Self::System {
            step,
            operand,
            source,
        }
    }
}

impl HasKind for NetworkError {
    fn kind(&self) -> Kind {
        match self {
            Self::Kernel { .. } | Self::System { .. } => Kind::Internal,
            Self::Leases(error) => error.kind(),
            Self::Overlap { .. }
            | Self::NotABridge { .. }
            | Self::NoPool { .. }
            | Self::NetDevice { .. } => Kind::FailedPrecondition,
            Self::Exhausted { .. } => Kind::ResourceExhausted,
            Self::PortTaken { .. } => Kind::AlreadyExists,
            Self::UnfitPool { .. }
            | Self::BadCidr(_)
            | Self::TwoOfAFamily { .. }
            | Self::PortTwice { .. }
            | Self::BadHostIp { .. } => Kind::InvalidArgument,
            Self::Ended => Kind::Unavailable,
        }
    }
}

/// Result of a network operation.
pub(crate) type Result<T> = std::result::Result<T, NetworkError>;
