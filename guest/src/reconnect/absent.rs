//! The transport of a queue that has no host.

use crate::error::Error;
use crate::transport::{Completion, Transport};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use tunnelfs_ring::Counters;

/// A transport that accepts no request and returns no completion. Its descriptors are readable when there is a new
/// host, or when no host will come.
pub struct Absent {
    name: &'static str,
    slots: Vec<(*mut u8, usize)>,
    waits: Counters,
    copied: u64,
    host_event: OwnedFd,
}

// SAFETY: the pointers are only passed on, never dereferenced here.
unsafe impl Send for Absent {}

impl Absent {
    /// Replaces the transport to a dead host. Its slots must stay mapped as long as this lives. `host_event` is the eventfd
    /// of `Reconnect`.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn of(gone: &dyn Transport, host_event: BorrowedFd<'_>) -> std::io::Result<Self> {
        let slots = (0..gone.slots()).map(|slot| gone.slot(slot)).collect();
        let host_event = host_event.try_clone_to_owned()?;
        Ok(Absent { name: gone.name(), slots, waits: gone.wait_counters(), copied: gone.copied(), host_event })
    }
}

impl Transport for Absent {
    fn name(&self) -> &'static str {
        self.name
    }

    fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    fn slot(&self, slot: u32) -> (*mut u8, usize) {
        self.slots[slot as usize]
    }

    fn submit(&mut self, _slot: u32, _head: &[u8], _payload_len: u32, _reply_max: u32) -> Result<bool, Error> {
        Ok(false)
    }

    fn reap(&mut self) -> Result<Option<Completion>, Error> {
        Ok(None)
    }

    fn spin(&mut self, other: &mut dyn FnMut() -> bool) -> bool {
        other()
    }

    fn announce_sleep(&mut self) -> bool {
        true
    }

    fn awake(&mut self) {}

    fn drain_call(&self) {
        // All queues share this eventfd; only `Reconnect` resets it.
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.host_event.as_fd()
    }

    fn hangup_fd(&self) -> BorrowedFd<'_> {
        self.host_event.as_fd()
    }

    fn wait_counters(&self) -> Counters {
        self.waits
    }

    fn copied(&self) -> u64 {
        self.copied
    }
}
