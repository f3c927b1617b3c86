//! What a file system that is served to a guest implements, and the one that the host brings: a directory
//! ([`Passthrough`]).
//!
//! Structures are those of the protocol (`tunnelfs_fuse_abi`). All that comes from the guest has been copied and
//! checked for its form: names have no `/` and are neither `.` nor `..`, unless it says otherwise.

mod attributes;
mod by_number;
mod change_queue;
mod changes;
mod coherence;
#[cfg(test)]
mod coherence_tests;
mod cover;
mod create;
mod credentials;
mod dir;
mod fanotify;
mod file_system;
mod files;
mod forgotten;
mod handles;
mod inode;
mod inodes;
mod leases;
mod listener;
mod locks;
mod mount_changes;
mod mounts;
mod names;
mod numbers;
mod owners;
mod passthrough;
mod peers;
mod sys;
#[cfg(test)]
mod tests;
mod unopened;
#[cfg(test)]
mod unopened_tests;
mod watch;
mod xattr;
mod xattr_names;

pub use crate::zero_copy::ZeroCopyBuf;
pub use changes::{Change, ChangeSink};
pub use coherence::Budget;
pub use credentials::keep_capabilities;
pub(crate) use fanotify::GROUP_FLAGS as FANOTIFY_FLAGS;
pub use file_system::{Context, DirEntry, DirSink, Extensions, FileSystem, XattrReply};
pub(crate) use files::IOCTLS;
pub use owners::{Ids, Owners};
pub use passthrough::{Config, Passthrough};
pub use sys::has_exact_times;
pub use xattr_names::Xattrs;
