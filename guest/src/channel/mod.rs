//! The two ways in which the kernel hands its FUSE requests over, behind one
//! interface: a [`Worker`] serves one request queue over one of them until the
//! file system is unmounted.

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

/// How long requests that nobody waits for are left to gather: the kernel hands over many FORGETs as one.
const FORGET_BATCH_DELAY: Duration = Duration::from_millis(5);

/// What carries the kernel's requests.
#[derive(Clone, Debug)]
pub enum ChannelKind {
    /// `read` and `write` on `/dev/fuse`.
    Dev,
    /// What FUSE-over-io_uring leaves to `/dev/fuse`: FORGET and INTERRUPT, which have no reply.
    DevForget,
    /// FUSE-over-io_uring: these kernel queues (one per possible CPU, all workers' together), and how to wait for a
    /// request before sleeping, if at all.
    Uring(Vec<u16>, Option<LiveWait>),
}

/// One thread's work: a request queue to the host, and its share of the kernel's requests.
pub struct Worker {
    /// The host's queue.
    pub transport: Box<dyn Transport>,
    /// The mounted connection.
    pub device: Arc<OwnedFd>,
    /// How requests come.
    pub kind: ChannelKind,
    /// The CPU to stay on.
    pub cpu: Option<usize>,
    /// Where to count.
    pub stats: Arc<QueueStats>,
    /// Where another host may take over: the queue's place there, and what holds its slots.
    pub(crate) reconnect: Option<(Arc<Reconnect>, usize, Option<RetainedMemory>)>,
    /// What has changed when, where the host tells.
    pub(crate) counters: Option<Arc<ChangeCounters>>,
    /// The mount's WRITEs that are under way.
    pub(crate) write_order: Arc<WriteOrder>,
}

impl Worker {
    /// Serves until the file system is unmounted.
    ///
    /// # Errors
    /// [`Error::HostGone`] or what else ended the service early.
    pub fn run(self) -> Result<(), Error> {
        if let Some(cpu) = self.cpu {
            // A CPU that cannot be had costs speed, not correctness.
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
