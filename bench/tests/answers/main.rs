//! A mount answers as the directory below it would, in the places where that is hard: identities, credentials,
//! data that is not written back yet, locks, owners without root, mounts on and below it. About a minute.
//!
//! Each test makes the same calls in the mount and in a native directory of the same file system. Needs root and
//! `/dev/fuse`; is skipped without them.

#[allow(dead_code)] // Shared: not every test program has a use for all of it.
#[path = "../common/mod.rs"]
mod common;
mod credentials;
mod data;
#[allow(dead_code)]
#[path = "../faults/disk.rs"]
mod disk;
mod identity;
mod locks;
mod mounting;
mod overlay;
mod owners;
#[allow(dead_code)]
#[path = "../mount/rig.rs"]
mod rig;
mod sizes;
#[path = "../common/skip.rs"]
mod skip;
mod sync_errors;
