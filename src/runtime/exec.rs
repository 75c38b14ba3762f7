//! One more process in a running container: the parent's half. The child's is that of `create` but for the
//! namespaces, which are those of the container's first process. It is always born last.

use std::os::fd::BorrowedFd;

use crate::runtime::create::{Place, Spawned, clone_child, preamble, shared};
use crate::runtime::init;
use crate::runtime::plan::Fault;

/// What makes one more process.
#[derive(Debug)]
pub(crate) struct ExecRequest<'a> {
    /// Memory file with an encoded `ExecPlan`.
    pub(crate) plan: BorrowedFd<'a>,
    /// Pidfd of the container's first process.
    pub(crate) container: BorrowedFd<'a>,
    /// stdin, stdout, stderr; unused with a terminal.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
}

/// Clones a process into the container. It reports `Ready` and waits for its start like a container's first.
///
/// # Errors
/// As `create::spawn`.
pub(crate) fn spawn(request: ExecRequest<'_>) -> Result<Spawned, Fault> {
    let preamble = preamble(request.plan)?;
    let mut descriptors = vec![request.plan, request.container];
    descriptors.extend(request.stdio);
    let place = Place::Others(shared()?);
    clone_child(place, &preamble, &descriptors, |control, joined, launch| {
        init::execute(&request, control, joined, launch)
    })
}
