//! A mount outlives its host: another one on the same socket takes over.
//!
//! The guest keeps all state, so that any host will do. To the kernel, nodes
//! and handles have the first host's numbers for good; what later hosts call
//! them is found out on first use, by names and inode numbers.
//!
//! ```text
//! channel/pending.rs -- a request, a reply --> translate.rs (inodes.rs)
//!       |                                       what is needed before a request can go out
//!       +-- the host has gone: absent.rs takes its place; replay.rs: what may be asked again
//! monitor.rs (a thread): sees the host go, waits until every queue has let go of the shared memory (handover.rs),
//!                      connects anew and hands each queue its new transport
//! ```
//!
//! Nothing of this costs a READ or WRITE anything before the first host has gone but a private copy of its header, and
//! later a look into the queue's handle_cache.rs.

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

/// What a parked queue finds.
pub type HostPoll = handover::HostPoll<Box<dyn Transport>>;

/// What all queues of a mount share.
pub struct Reconnect {
    /// What the kernel knows.
    pub tables: RwLock<Translator>,
    /// Who has let go of which host.
    pub handover: Handover<Box<dyn Transport>>,
    /// An eventfd that is readable as long as there is a host, or will be none; nobody but this resets it.
    news: OwnedFd,
}

impl Reconnect {
    /// For so many queues.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new(queues: usize) -> Result<Self, tunnelfs_ring::Error> {
        Ok(Reconnect { tables: RwLock::default(), handover: Handover::new(queues), news: Eventfd::new()? })
    }

    /// What becomes readable when a queue that waits for a host should look.
    pub fn news(&self) -> BorrowedFd<'_> {
        self.news.as_fd()
    }

    /// The host has gone.
    pub fn host_lost(&self) {
        Eventfd::drain(&self.news);
        self.handover.host_lost();
        // Another thread may just have said it.
        if self.handover.is_closed() {
            Eventfd::signal(&self.news);
        }
    }

    /// No host will come.
    pub fn close(&self) {
        self.handover.close();
        Eventfd::signal(&self.news);
    }

    /// Another host is here.
    fn host_ready(&self, transports: Vec<Box<dyn Transport>>, same_root: bool) {
        let mut tables = self.tables.write();
        tables.nodes.next_host(same_root);
        self.handover.host_ready(tables.nodes.host_id(), transports);
        Eventfd::signal(&self.news);
    }
}
