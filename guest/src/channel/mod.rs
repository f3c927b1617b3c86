//! The two ways in which the kernel hands its FUSE requests over, behind one
//! interface: a [`Worker`] serves one request queue over one of them until the
//! file system is unmounted.

mod classic;
mod give_back;
mod queue;
mod session;
mod uring;

use crate::fuse::device::clone_device;
use crate::link::Kept;
use crate::resume::Resume;
use crate::stats::QueueStats;
use crate::transport::Transport;
use crate::Error;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_ring::{set_affinity, WaitConfig};

/// How long requests that nobody waits for are left to gather: the kernel hands over many FORGETs as one.
const REST: Duration = Duration::from_millis(5);

/// What carries the kernel's requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `read` and `write` on `/dev/fuse`.
    Classic,
    /// What FUSE-over-io_uring leaves to `/dev/fuse`: FORGET and INTERRUPT, which have no reply.
    Leftovers,
    /// FUSE-over-io_uring: these kernel queues (one per possible CPU, all workers' together), and how to wait for a
    /// request before sleeping, if at all.
    Uring(Vec<u16>, Option<WaitConfig>),
}

/// One thread's work: a request queue to the host, and its share of the kernel's requests.
pub struct Worker {
    /// The host's queue.
    pub transport: Box<dyn Transport>,
    /// The mounted connection.
    pub device: Arc<OwnedFd>,
    /// How requests come.
    pub kind: Kind,
    /// The CPU to stay on.
    pub cpu: Option<usize>,
    /// Where to count.
    pub stats: Arc<QueueStats>,
    /// Where another host may take over: the queue's place there, and what holds its slots.
    pub(crate) resume: Option<(Arc<Resume>, usize, Kept)>,
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
        let session = self.resume.map(|(resume, seat, kept)| session::Session::new(resume, seat, slots, kept));
        let queue = queue::Queue::new(self.transport, self.stats, session);
        match self.kind {
            Kind::Classic | Kind::Leftovers => {
                let devices = [clone_device(&self.device, false)?, clone_device(&self.device, true)?];
                let rest = (self.kind == Kind::Leftovers).then_some(REST);
                classic::Channel::new(devices, queue, rest).run()
            }
            Kind::Uring(queues, wait) => uring::Channel::new(self.device, queues, wait, queue)?.run(),
        }
    }
}
