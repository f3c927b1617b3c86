//! Keeps the kernel's caches right where names, attributes and data live in them without a time limit: the host tells
//! what has changed, and the guest tells the kernel.
//!
//! ```text
//! changes.rs (thread "changes"): keeps one OP_CHANGES with the host, notes each record in the counters,
//!      |                         and makes notifications of it (actions.rs)
//!      v
//! dispatch.rs (threads "notify"): write them to /dev/fuse (notify.rs), in order for each directory
//!
//! channel/guard.rs -- a reply that a change has overtaken --> replies.rs takes its time limits off (counters.rs)
//! ```
//!
//! **The race.** A reply may leave the host before a change and reach the kernel after the change's notification. So a
//! request is stamped when it is sent, and a reply is compared with the counters of its names and inodes. A reply that
//! was compared, but is not with the kernel yet, makes the notification come a second time. The kernel itself protects
//! what happens after that, with one exception: it drops the notification of an inode that it is about to learn of.
//! Such a notification is tried again.
//!
//! **Who may wait.** INVAL_ENTRY waits for whoever holds the directory's lock, INVAL_INODE with data for a READ under
//! way. So no thread that answers requests writes notifications, and a host never waits for one, but for a bounded time
//! for the data of a leased file.

mod actions;
pub mod changes;
pub mod counters;
mod dispatch;
mod notify;
pub mod replies;
