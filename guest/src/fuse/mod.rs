//! The part of the FUSE protocol that a mount needs, and the FUSE device.
//!
//! Source of every number: the kernel's `include/uapi/linux/fuse.h`, 7.42 and later.

pub mod device;
pub mod init;
pub mod message;
pub mod mountinfo;
