//! Links: the ways to reach a host, and the trait by which the transports use them.

pub(crate) mod local;
pub mod memory;
pub(crate) mod pci;

use memory::QueueMemory;
use std::os::fd::BorrowedFd;

/// A connection to a host, which all its queues share. It stays open as long as this lives. Virtqueue 0 is the hiprio
/// queue; the request queues follow, and then the queue for changes, if there is one.
pub trait Link: Send + Sync {
    /// Returns the memory of a virtqueue.
    fn memory(&self, virtqueue: usize) -> &QueueMemory;

    /// Returns the device's address of memory of this link; `None` if the bytes are not contiguous for the device.
    fn address(&self, at: *const u8, bytes: usize) -> Option<u64>;

    /// Kicks the host: a virtqueue or its ring has a request.
    ///
    /// # Errors
    /// The system's.
    fn kick(&self, virtqueue: usize) -> std::io::Result<()>;

    /// Returns the eventfd that the host signals for a queue's completions.
    fn call_fd(&self, virtqueue: usize) -> BorrowedFd<'_>;

    /// Sets whether a thread sleeps on a queue's call eventfd. The thread must call this before its last check for
    /// completions, with a full fence between.
    fn set_waiting(&self, _virtqueue: usize, _asleep: bool) {}

    /// Returns the descriptor that hangs up when the host dies.
    fn hangup_fd(&self) -> BorrowedFd<'_>;

    /// Returns `true` if both sides use `VIRTIO_RING_F_EVENT_IDX`, `false` if they use the ring flags.
    fn event_idx(&self) -> bool;

    /// Returns `true` if the host runs on the same CPUs with the same numbers, `false` for a VM's vCPUs.
    fn shares_cpus(&self) -> bool;
}
