//! `linux/fuse.h` of protocol 7.45, for both sides of a mount.
//!
//! Source: `include/uapi/linux/fuse.h` of Linux 6.18. Each structure is `repr(C)`, without implicit padding
//! (zerocopy's derives check it), and its size is asserted. Numbers are in the byte order of the machine.

pub mod changes;
pub mod control;
pub mod flags;
pub mod opcode;
mod structs;

pub use opcode::Opcode;
pub use structs::*;
pub use zerocopy;

/// `FUSE_KERNEL_VERSION`.
pub const MAJOR: u32 = 7;
/// `FUSE_KERNEL_MINOR_VERSION`.
pub const MINOR: u32 = 45;
/// `FUSE_ROOT_ID`: the nodeid of a mount's root.
pub const ROOT_ID: u64 = 1;
/// Handle that our host gives in CREATE's reply to a guest whose kernel does not ask to open files: the host finds the
/// file by its nodeid, as with handle 0, which the kernel has for what it has not opened.
pub const NO_HANDLE: u64 = u64::MAX;
/// `FUSE_REC_ALIGN`: entries of a listing and extensions of a request are padded to this many bytes.
pub const REC_ALIGN: usize = 8;
/// `FUSE_UNKNOWN_INO`: a listing's entry whose inode number is not known.
pub const UNKNOWN_INO: u64 = 0xffff_ffff;
