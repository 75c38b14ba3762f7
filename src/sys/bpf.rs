//! bpf(2): the device program of a cgroup. Instructions as in Documentation/bpf/standardization.
#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// One eBPF instruction.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(crate) code: u8,
    /// Destination register in the low four bits, source in the high four.
    pub(crate) registers: u8,
    pub(crate) offset: i16,
    pub(crate) immediate: u32,
}

const JNE: u8 = 0x55;
const JEQ: u8 = 0x15;

impl Instruction {
    /// Makes a conditional jump at index `at` of a group of `total` instructions leave the group.
    pub(crate) fn skip_to(&mut self, at: usize, total: usize) {
        if matches!(self.code, JNE | JEQ) {
            self.offset = i16::try_from(total - at - 1).unwrap_or(i16::MAX);
        }
    }
}

const fn instruction(code: u8, dst: u8, src: u8, offset: i16, immediate: u32) -> Instruction {
    Instruction {
        code,
        registers: dst | src << 4,
        offset,
        immediate,
    }
}

/// `dst = *(u32 *)(context + offset)`.
pub(crate) const fn load_context(dst: u8, offset: i16) -> Instruction {
    instruction(0x61, dst, 1, offset, 0)
}

/// `dst = src` (32 bits).
pub(crate) const fn move_register(dst: u8, src: u8) -> Instruction {
    instruction(0xbc, dst, src, 0, 0)
}

/// `dst = value`.
pub(crate) const fn move_immediate(dst: u8, value: u32) -> Instruction {
    instruction(0xb7, dst, 0, 0, value)
}

/// `dst &= value` (32 bits).
pub(crate) const fn and(dst: u8, value: u32) -> Instruction {
    instruction(0x54, dst, 0, 0, value)
}

/// `dst >>= bits` (32 bits).
pub(crate) const fn shift_right(dst: u8, bits: u32) -> Instruction {
    instruction(0x74, dst, 0, 0, bits)
}

/// Jumps when `register != value`; the distance is filled in by [`Instruction::skip_to`].
pub(crate) const fn jump_if_not_equal(register: u8, value: u32) -> Instruction {
    instruction(JNE, register, 0, 0, value)
}

/// Jumps when `register == 0`; the distance is filled in by [`Instruction::skip_to`].
pub(crate) const fn jump_if_zero(register: u8) -> Instruction {
    instruction(JEQ, register, 0, 0, 0)
}

/// Returns register 0.
pub(crate) const fn exit() -> Instruction {
    instruction(0x95, 0, 0, 0, 0)
}

const PROG_LOAD: i64 = 5;
const PROG_ATTACH: i64 = 8;
const PROG_DETACH: i64 = 9;
const PROG_QUERY: i64 = 16;
const PROG_GET_FD_BY_ID: i64 = 13;
const TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTI: u32 = 2;

/// Attributes of bpf(2), as large as any command used here needs.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Attributes([u32; 32]);

impl Attributes {
    const fn new() -> Self {
        Self([0; 32])
    }

    fn address(&mut self, at: usize, address: usize) {
        let bytes = (address as u64).to_ne_bytes();
        let word =
            |i: usize| u32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        self.0[at] = word(0);
        self.0[at + 1] = word(4);
    }
}

fn bpf(command: i64, attributes: &mut Attributes) -> io::Result<i32> {
    // SAFETY: the attributes are large enough for each command used here, unused words are zero as the kernel
    // asks, and every address in them points to memory that the caller keeps alive.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<Attributes>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(i32::try_from(result).unwrap_or(-1))
    }
}

fn descriptor(number: i32) -> u32 {
    u32::from_ne_bytes(number.to_ne_bytes())
}

fn owned(number: i32) -> OwnedFd {
    // SAFETY: the number is a descriptor that bpf(2) has just opened for us.
    unsafe { OwnedFd::from_raw_fd(number) }
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let mut attributes = Attributes::new();
    attributes.0[0] = TYPE_CGROUP_DEVICE;
    attributes.0[1] = u32::try_from(program.len()).map_err(io::Error::other)?;
    attributes.address(2, program.as_ptr().addr());
    let license = c"Apache-2.0";
    attributes.address(4, license.as_ptr().addr());
    bpf(PROG_LOAD, &mut attributes).map(owned)
}

fn attached(cgroup: &File) -> io::Result<Vec<u32>> {
    let mut ids = [0u32; 64];
    let mut attributes = Attributes::new();
    attributes.0[0] = descriptor(cgroup.as_raw_fd());
    attributes.0[1] = ATTACH_CGROUP_DEVICE;
    attributes.address(4, ids.as_mut_ptr().addr());
    attributes.0[6] = 64;
    bpf(PROG_QUERY, &mut attributes)?;
    let count = usize::try_from(attributes.0[6]).unwrap_or(0).min(ids.len());
    Ok(ids[..count].to_vec())
}

/// Loads the program and attaches it to the cgroup v2 directory; programs that were attached there before are
/// detached after, so that access is never wider in between.
///
/// # Errors
/// The error of open(2) or bpf(2) (`EPERM`: no `CAP_BPF`/`CAP_SYS_ADMIN`; `EINVAL`: kernel before 4.15).
pub(crate) fn attach_device_program(cgroup: &Path, program: &[Instruction]) -> io::Result<()> {
    let directory = File::open(cgroup)?;
    let before = attached(&directory)?;
    let program = load(program)?;
    let mut attributes = Attributes::new();
    attributes.0[0] = descriptor(directory.as_raw_fd());
    attributes.0[1] = descriptor(program.as_raw_fd());
    attributes.0[2] = ATTACH_CGROUP_DEVICE;
    attributes.0[3] = ALLOW_MULTI;
    bpf(PROG_ATTACH, &mut attributes)?;
    for id in before {
        let mut attributes = Attributes::new();
        attributes.0[0] = id;
        let old = owned(bpf(PROG_GET_FD_BY_ID, &mut attributes)?);
        let mut attributes = Attributes::new();
        attributes.0[0] = descriptor(directory.as_raw_fd());
        attributes.0[1] = descriptor(old.as_raw_fd());
        attributes.0[2] = ATTACH_CGROUP_DEVICE;
        bpf(PROG_DETACH, &mut attributes)?;
    }
    Ok(())
}
