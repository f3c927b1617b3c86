//! Ways to reach a host, and what every one of them gives the transports.

pub(crate) mod local;
pub mod memory;
pub(crate) mod pci;

use memory::QueueMemory;
use std::os::fd::BorrowedFd;

/// What all queues of one connection share; keeps it open. Virtqueue 0 is the
/// high-priority one, here called control queue; then come the request queues.
pub trait Link: Send + Sync {
    /// Where a virtqueue's parts lie.
    fn memory(&self, virtqueue: usize) -> &QueueMemory;

    /// The device's address of memory of this link; `None` where the bytes are not in one piece for it.
    fn address(&self, at: *const u8, bytes: usize) -> Option<u64>;

    /// Tells the host that a queue has something for it.
    ///
    /// # Errors
    /// The system's.
    fn kick(&self, virtqueue: usize) -> std::io::Result<()>;

    /// Becomes readable when the host has something for a queue.
    fn call_fd(&self, virtqueue: usize) -> BorrowedFd<'_>;

    /// Whether somebody waits for a queue's bell now. To be said before the
    /// last look for work, with a full fence between.
    fn set_waiting(&self, _virtqueue: usize, _asleep: bool) {}

    /// Hangs up when the host goes.
    fn hangup_fd(&self) -> BorrowedFd<'_>;

    /// Whether both sides name the events that they want (`VIRTIO_RING_F_EVENT_IDX`).
    fn event_idx(&self) -> bool;

    /// Whether the host can see on which CPU a thread of the guest runs.
    fn shares_cpus(&self) -> bool;
}
