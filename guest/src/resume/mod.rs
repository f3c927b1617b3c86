//! A mount outlives its host: another one on the same socket takes over.
//!
//! The guest keeps all state, so that any host will do. To the kernel, nodes
//! and handles have the first host's numbers for good; what later hosts call
//! them is found out on first use, by names and inode numbers.
//!
//! ```text
//! channel/queue.rs -- a request, a reply --> tables.rs (nodes.rs; wire.rs: where messages have numbers)
//!       |                                       what is needed before a request can go out
//!       +-- the host has gone: absent.rs takes its place; repeat.rs: what may be asked again
//! watch.rs (a thread): sees the host go, waits until every queue has let go of the shared memory (handover.rs),
//!                      connects anew and hands each queue its new transport
//! ```
//!
//! Nothing of this costs a READ or WRITE anything before the first host has gone but a private copy of its header, and
//! later a look into the queue's cache.rs.

pub mod absent;
pub mod cache;
mod handover;
#[cfg(test)]
mod handover_model;
mod lacking;
pub mod nodes;
pub mod repeat;
mod sync;
pub mod tables;
pub mod watch;
pub mod wire;

use crate::transport::Transport;
use handover::Handover;
use parking_lot::RwLock;
use tables::Tables;

/// What a parked queue finds.
pub type News = handover::News<Box<dyn Transport>>;

/// What all queues of a mount share.
pub struct Resume {
    /// What the kernel knows.
    pub tables: RwLock<Tables>,
    /// Who has let go of which host.
    pub handover: Handover<Box<dyn Transport>>,
}

impl Resume {
    /// For so many queues.
    pub fn new(queues: usize) -> Self {
        Resume { tables: RwLock::default(), handover: Handover::new(queues) }
    }

    /// Another host is here.
    fn arrive(&self, transports: Vec<Box<dyn Transport>>, same_root: bool) {
        let mut tables = self.tables.write();
        tables.nodes.advance(same_root);
        self.handover.arrive(tables.nodes.time(), transports);
    }
}
