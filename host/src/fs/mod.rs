//! What a file system that is served to a guest implements, and the one that the host brings: a directory
//! ([`Passthrough`]).
//!
//! Structures are those of the protocol (`tunnelfs_fuse_abi`). All that comes from the guest has been copied and
//! checked for its form: names have no `/` and are neither `.` nor `..`, unless it says otherwise.

mod attributes;
mod changes;
mod create;
mod credentials;
mod dir;
mod file_system;
mod files;
mod forgotten;
mod handles;
mod inode;
mod inodes;
mod locks;
mod mounts;
mod names;
mod numbers;
mod owners;
mod passthrough;
mod sys;
#[cfg(test)]
mod tests;
mod xattr;
mod xattr_names;

pub use crate::zero_copy::ZeroCopyBuf;
pub use changes::{Change, ChangeSink};
pub use credentials::keep_capabilities;
pub use file_system::{Context, DirEntry, DirSink, Extensions, FileSystem, XattrReply};
pub(crate) use files::IOCTLS;
pub use owners::{Ids, Owners};
pub use passthrough::{Config, Passthrough};
pub use xattr_names::Xattrs;
