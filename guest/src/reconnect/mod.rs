//! Lets a mount outlive its host: another host on the same socket takes over.
//!
//! The guest keeps all state, so any host can take over. The kernel has the first host's nodeids and handles as long as
//! the mount lives. The guest finds the numbers of a later host on first use, by names and inode numbers.
//!
//! ```text
//! channel/pending.rs -- requests, replies --> translate.rs (inodes.rs): numbers, and the LOOKUPs and OPENs for them
//!       |
//!       +-- after the host's death: absent.rs takes its place; replay.rs: which requests may be sent again
//! monitor.rs (a thread): sees the host die, waits until every queue has detached from the shared memory (handover.rs),
//!                      connects to the next host and hands each queue its new transport
//! ```
//!
//! Cost for a READ or WRITE: a private copy of its header while the first host lives, and later a lookup in the queue's
//! handle_cache.rs.

pub mod absent;
pub mod handle_cache;
mod handover;
#[cfg(test)]
mod handover_model;
pub mod inodes;
mod missing_options;
pub mod monitor;
pub mod replay;
mod sync;
pub mod translate;

use crate::transport::Transport;
use handover::Handover;
use parking_lot::RwLock;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use translate::Translator;
use tunnelfs_ring::Eventfd;

/// Result of polling for a new host, for a detached queue.
pub type HostPoll = handover::HostPoll<Box<dyn Transport>>;

/// Reconnect state that all queues of a mount share.
pub struct Reconnect {
    /// The kernel's inodes and handles.
    pub tables: RwLock<Translator>,
    /// Which queue has detached from which host.
    pub handover: Handover<Box<dyn Transport>>,
    /// An eventfd that is readable while there is a host, or once no host will come. Only [`Self::host_lost`] resets
    /// it.
    host_event: OwnedFd,
}

impl Reconnect {
    /// Makes the state for `queues` queues.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn new(queues: usize) -> Result<Self, tunnelfs_ring::Error> {
        Ok(Reconnect { tables: RwLock::default(), handover: Handover::new(queues), host_event: Eventfd::new()? })
    }

    /// Returns the eventfd that becomes readable when a queue without a host should poll `handover`.
    pub fn host_event(&self) -> BorrowedFd<'_> {
        self.host_event.as_fd()
    }

    /// Records that the host has died.
    pub fn host_lost(&self) {
        Eventfd::drain(&self.host_event);
        self.handover.host_lost();
        // Another thread may have called `close` just before the drain.
        if self.handover.is_closed() {
            Eventfd::signal(&self.host_event);
        }
    }

    /// Records that no host will come.
    pub fn close(&self) {
        self.handover.close();
        Eventfd::signal(&self.host_event);
    }

    /// Hands the next host's transports to the queues.
    fn host_ready(&self, transports: Vec<Box<dyn Transport>>, same_root: bool) {
        let mut tables = self.tables.write();
        tables.nodes.next_host(same_root);
        self.handover.host_ready(tables.nodes.host_id(), transports);
        Eventfd::signal(&self.host_event);
    }
}
