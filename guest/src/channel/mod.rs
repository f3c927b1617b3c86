//! The two kernel interfaces for FUSE requests, `/dev/fuse` and FUSE-over-io_uring. A [`Worker`] serves one request
//! queue over one of them until the file system is unmounted.

mod dev;
mod forget;
mod guard;
mod pending;
#[cfg(test)]
mod pending_tests;
mod prepare;
mod request;
mod session;
mod uring;
mod write_order;

pub use write_order::WriteOrder;

use crate::coherence::counters::{ChangeCounters, Deliveries};
use crate::connect::RetainedMemory;
use crate::error::Error;
use crate::fuse::device::clone_device;
use crate::reconnect::Reconnect;
use crate::stats::QueueStats;
use crate::transport::Transport;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_ring::{set_affinity, LiveWait};

/// How long the thread sleeps after each request from `/dev/fuse` without a reply. The kernel hands over the FORGETs of
/// that time as one BATCH_FORGET.
const FORGET_BATCH_DELAY: Duration = Duration::from_millis(5);

/// The kernel interface of a worker.
#[derive(Clone, Debug)]
pub enum ChannelKind {
    /// `read` and `write` on `/dev/fuse`.
    Dev,
    /// `/dev/fuse` beside FUSE-over-io_uring: only FORGET and INTERRUPT, which get no reply.
    DevForget,
    /// FUSE-over-io_uring. The kernel queues that this worker serves (all workers together serve one per possible CPU),
    /// and the spin policy before a sleep; `None`: sleep at once.
    Uring(Vec<u16>, Option<LiveWait>),
}

/// One thread's work: serves its share of the kernel's requests with one request queue to the host.
pub struct Worker {
    /// The host's queue.
    pub transport: Box<dyn Transport>,
    /// The mounted connection.
    pub device: Arc<OwnedFd>,
    /// The kernel interface.
    pub kind: ChannelKind,
    /// CPU to pin the thread to; `None`: not pinned.
    pub cpu: Option<usize>,
    /// This queue's statistics.
    pub stats: Arc<QueueStats>,
    /// For reconnecting: the shared state, this queue's index there, and the memory that keeps the slots mapped. `None`
    /// for a mount that neither reconnects nor gets change reports.
    pub(crate) reconnect: Option<(Arc<Reconnect>, usize, Option<RetainedMemory>)>,
    /// Change counters; `None` if the host has no queue for change reports.
    pub(crate) counters: Option<Arc<ChangeCounters>>,
    /// READs and WRITEs in flight, of all queues of the mount.
    pub(crate) write_order: Arc<WriteOrder>,
}

impl Worker {
    /// Serves until the file system is unmounted.
    ///
    /// # Errors
    /// [`Error::HostGone`], or the error that ended the service early.
    pub fn run(self) -> Result<(), Error> {
        if let Some(cpu) = self.cpu {
            // Not an error: without the CPU the worker is only slower.
            set_affinity(&[cpu]).unwrap_or_else(|e| tracing::warn!("{e}"));
        }
        let slots = self.transport.slots();
        let queue_index = self.reconnect.as_ref().map(|(_, queue_index, _)| *queue_index);
        let session = self
            .reconnect
            .map(|(reconnect, queue_index, kept)| session::Session::new(reconnect, queue_index, slots, kept));
        let mut queue = pending::PendingQueue::new(self.transport, self.stats, session, self.write_order);
        queue.deliveries = self.counters.zip(queue_index).map(|(counters, index)| Deliveries::new(counters, index));
        match self.kind {
            ChannelKind::Dev | ChannelKind::DevForget => {
                let devices = [clone_device(&self.device, false)?, clone_device(&self.device, true)?];
                let batch_delay = matches!(self.kind, ChannelKind::DevForget).then_some(FORGET_BATCH_DELAY);
                dev::Channel::new(devices, queue, batch_delay).run()
            }
            ChannelKind::Uring(queues, wait) => uring::Channel::new(self.device, queues, wait, queue)?.run(),
        }
    }
}
