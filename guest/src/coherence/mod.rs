//! Keeps the kernel's caches coherent although names, attributes and data have no timeout there: the host reports each
//! change, and the guest notifies the kernel.
//!
//! ```text
//! changes.rs (thread "changes"): keeps one OP_CHANGES in flight, notes each record in the counters (counters.rs),
//!      |                         and makes notifications of it (actions.rs)
//!      v
//! dispatch.rs (threads "notify"): write the notifications to /dev/fuse (notify.rs), in order for each directory
//!
//! channel/guard.rs -- a reply that a change has overtaken --> replies.rs clears its timeouts (counters.rs)
//! ```
//!
//! **The race.** A reply may leave the host before a change, and reach the kernel after the notification of the change.
//! So each request gets the time of the counters when it is submitted, and its reply is compared with the counters of
//! its names and inodes. If a reply was compared before the change was noted, and has not reached the kernel yet, the
//! notification is sent a second time after it. From there on the kernel keeps its cache right, with one exception: it
//! drops the notification of an inode that it is about to learn of. The guest sends such a notification again.
//!
//! **Blocking.** INVAL_ENTRY blocks while a thread holds the directory's lock; INVAL_INODE with data blocks while a
//! READ is in flight. So no thread that answers requests writes notifications. A host waits for a notification only if
//! it drops the data of a leased file, and for a bounded time.

mod actions;
pub mod changes;
pub mod counters;
mod dispatch;
mod notify;
pub mod replies;
