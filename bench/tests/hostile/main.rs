//! Attacks on a host process, by a guest that keeps no rule. After each the
//! host lives, serves the next guest, holds no more than before, and has
//! touched nothing outside of the shared directory. About a minute.

mod front;
mod fuse;
mod guest;
mod inodes;
mod pauses;
mod queues;
mod rig;
#[path = "../common/skip.rs"]
mod skip;
mod starts;
mod stream;
mod stuck;
#[path = "../common/stuck_fs.rs"]
mod stuck_fs;
