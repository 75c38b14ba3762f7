//! Executing programs in place of this process.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Arguments and environment in the kernel's form.
#[derive(Debug)]
pub(crate) struct Image {
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Image {
    /// From prepared strings.
    pub(crate) const fn new(arguments: Vec<CString>, environment: Vec<CString>) -> Self {
        Self {
            arguments,
            environment,
        }
    }

    /// Executes the program at `path`. Returns only on failure.
    pub(crate) fn execute(&self, path: &CStr) -> io::Error {
        let arguments = pointers(&self.arguments);
        let environment = pointers(&self.environment);
        // SAFETY: NUL-terminated strings in null-terminated lists, alive for the call.
        let _failed =
            unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
        io::Error::last_os_error()
    }

    /// Executes the program that `program` is. Returns only on failure.
    pub(crate) fn execute_descriptor(&self, program: BorrowedFd<'_>) -> io::Error {
        let arguments = pointers(&self.arguments);
        let environment = pointers(&self.environment);
        // SAFETY: as above; an empty path with AT_EMPTY_PATH means the descriptor.
        let _failed = unsafe {
            libc::syscall(
                libc::SYS_execveat,
                program.as_raw_fd(),
                c"".as_ptr(),
                arguments.as_ptr(),
                environment.as_ptr(),
                libc::AT_EMPTY_PATH,
            )
        };
        io::Error::last_os_error()
    }
}

fn pointers(list: &[CString]) -> Vec<*const libc::c_char> {
    list.iter()
        .map(|text| text.as_ptr())
        .chain([std::ptr::null()])
        .collect()
}
