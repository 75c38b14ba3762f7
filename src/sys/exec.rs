//! Executing programs in place of this process.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::sys::seccomp::Arguments;

/// Arguments and environment in the kernel's form. Nothing is allocated any more when they are executed.
#[derive(Debug)]
pub(crate) struct Image {
    /// The strings that the lists point to, wherever these vectors move.
    strings: [Vec<CString>; 2],
    arguments: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
}

impl Image {
    /// From prepared strings.
    pub(crate) fn new(arguments: Vec<CString>, environment: Vec<CString>) -> Self {
        let list = |strings: &[CString]| {
            let pointers = strings.iter().map(|text| text.as_ptr());
            pointers.chain([std::ptr::null()]).collect()
        };
        Self {
            arguments: list(&arguments),
            environment: list(&environment),
            strings: [arguments, environment],
        }
    }

    /// What the kernel is given to execute the program at `path`.
    pub(crate) fn call(&self, path: &CStr) -> Arguments {
        [
            address(path.as_ptr()),
            address(self.arguments.as_ptr()),
            address(self.environment.as_ptr()),
            Some(0),
            Some(0),
            Some(0),
        ]
    }

    /// What the kernel is given to execute the program that `program` is.
    pub(crate) fn call_of_descriptor(&self, program: BorrowedFd<'_>) -> Arguments {
        [
            u64::try_from(program.as_raw_fd()).ok(),
            address(EMPTY.as_ptr()),
            address(self.arguments.as_ptr()),
            address(self.environment.as_ptr()),
            u64::try_from(libc::AT_EMPTY_PATH).ok(),
            Some(0),
        ]
    }

    /// Its arguments.
    pub(crate) fn arguments(&self) -> &[CString] {
        &self.strings[0]
    }

    /// Its environment.
    pub(crate) fn environment(&self) -> &[CString] {
        &self.strings[1]
    }

    /// Executes the program at `path`. Returns only on failure.
    pub(crate) fn execute(&self, path: &CStr) -> io::Error {
        // SAFETY: NUL-terminated strings in null-terminated lists, alive for the call.
        let _failed = unsafe {
            libc::syscall(
                libc::SYS_execve,
                path.as_ptr(),
                self.arguments.as_ptr(),
                self.environment.as_ptr(),
                0_u64,
                0_u64,
                0_u64,
            )
        };
        io::Error::last_os_error()
    }

    /// Executes the program that `program` is. Returns only on failure.
    pub(crate) fn execute_descriptor(&self, program: BorrowedFd<'_>) -> io::Error {
        // SAFETY: as above; an empty path with AT_EMPTY_PATH means the descriptor.
        let _failed = unsafe {
            libc::syscall(
                libc::SYS_execveat,
                program.as_raw_fd(),
                EMPTY.as_ptr(),
                self.arguments.as_ptr(),
                self.environment.as_ptr(),
                libc::AT_EMPTY_PATH,
                0_u64,
            )
        };
        io::Error::last_os_error()
    }
}

static EMPTY: &CStr = c"";

fn address<T>(pointer: *const T) -> Option<u64> {
    u64::try_from(pointer.expose_provenance()).ok()
}
