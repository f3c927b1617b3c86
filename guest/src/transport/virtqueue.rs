//! The driver side of a plain split virtqueue. Its descriptors point to the same slots as a ring's entries; the headers
//! are in memory behind the queue.
//!
//! Slot n always uses the descriptors 4n to 4n+3, and its own headers.

use super::{Completion, Transport};
use crate::error::Error;
use crate::fuse::message::{parse_reply_header, OUT_HEADER};
use crate::link::memory::SETUP_BUFFER;
use crate::link::Link;
use crate::split_queue::{Descriptor, Headers, SplitQueue, NEXT, PER_SLOT, WRITE};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use tunnelfs_ring::{Counters, LiveWait, Parker, Policy, WaitConfig, CQE_INLINE_BYTES, SQE_INLINE_BYTES};

/// `fuse_out_header` of an empty reply: 16 bytes long, no error.
const NO_ANSWER: [u8; OUT_HEADER] = (OUT_HEADER as u128).to_le_bytes();

/// A request queue over a virtqueue.
pub struct VirtqueueTransport {
    queue: SplitQueue,
    headers: *mut Headers,
    /// By slot: most reply bytes for the request in flight; `None`: no request. Private, so that the host cannot change
    /// it.
    in_flight: Vec<Option<u32>>,
    parker: Parker,
    link: Arc<dyn Link>,
    index: usize,
    /// Whether payloads are in the queue's set-up buffer: the slots hold requests of an earlier host that are still to
    /// be sent.
    beside: bool,
}

// SAFETY: the headers are in the link's memory, and only this driver uses them on this side.
unsafe impl Send for VirtqueueTransport {}

impl VirtqueueTransport {
    /// Makes the driver of virtqueue `index` of a link.
    pub fn new(link: Arc<dyn Link>, index: usize, wait: impl Into<LiveWait>) -> Self {
        let memory = link.memory(index);
        // SAFETY: the link has zeroed memory there, page-aligned, and keeps it mapped.
        let queue = unsafe { SplitQueue::new(memory.virtqueue, memory.size, link.event_idx()) };
        let headers = memory.virtqueue.wrapping_add(SplitQueue::bytes(memory.size)).cast();
        let slots = memory.geometry.slots.min(u32::from(memory.size / PER_SLOT));
        VirtqueueTransport {
            queue,
            headers,
            in_flight: vec![None; slots as usize],
            parker: Parker::new(wait),
            link,
            index,
            beside: false,
        }
    }

    /// Makes each wait sleep at once, without spinning: this queue's completions are not urgent.
    pub(crate) fn parking(self) -> Self {
        let wait = WaitConfig { policy: Policy::Park, ..self.parker.config() };
        VirtqueueTransport { parker: Parker::new(wait), ..self }
    }

    /// Uses the set-up buffer instead of the slots, whose content must stay.
    pub(crate) fn beside_the_slots(self) -> Self {
        VirtqueueTransport { beside: true, ..self }
    }

    /// Uses the slots again, after the set-up.
    pub(crate) fn settled(self) -> Self {
        VirtqueueTransport { beside: false, ..self }
    }

    pub(super) fn link(&self) -> &Arc<dyn Link> {
        &self.link
    }

    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// Writes the slot's descriptor chain and returns its first descriptor. A buffer is an address, a length in bytes,
    /// and whether the device writes it; buffers of length 0 are left out.
    fn describe(&mut self, slot: u32, buffers: &[(*const u8, usize, bool)]) -> Result<u16, Error> {
        let first = slot as u16 * PER_SLOT;
        let used = buffers.iter().filter(|b| b.1 > 0).count() as u16;
        for (i, &(at, bytes, write)) in (first..).zip(buffers.iter().filter(|b| b.1 > 0)) {
            let address = self.link.address(at, bytes).ok_or(Error::Protocol("a buffer in two pieces"))?;
            let next = if i + 1 < first + used { NEXT } else { 0 };
            let flags = next | if write { WRITE } else { 0 };
            self.queue.set(i, Descriptor { address, bytes: bytes as u32, flags, next: i + 1 });
        }
        Ok(first)
    }
}

impl Transport for VirtqueueTransport {
    fn name(&self) -> &'static str {
        "virtqueue"
    }

    fn slots(&self) -> u32 {
        self.in_flight.len() as u32
    }

    fn slot(&self, slot: u32) -> (*mut u8, usize) {
        let memory = self.link.memory(self.index);
        if self.beside {
            return (memory.scratch, SETUP_BUFFER);
        }
        memory.slot(slot)
    }

    fn submit(&mut self, slot: u32, head: &[u8], payload_len: u32, reply_max: u32) -> Result<bool, Error> {
        let (payload, size) = self.slot(slot);
        if head.len() > SQE_INLINE_BYTES || payload_len.max(reply_max) as usize > size {
            return Err(Error::Protocol("request too long"));
        }
        match self.in_flight.get_mut(slot as usize) {
            Some(free @ None) => *free = Some(reply_max),
            _ => return Err(Error::Protocol("no such slot, or one under way")),
        }
        let mut ours = Headers { out_header: NO_ANSWER, head: [0; SQE_INLINE_BYTES] };
        ours.head[..head.len()].copy_from_slice(head);
        // `NO_ANSWER` stays in `out_header` if the host sends no reply (FORGET), and says success.
        // SAFETY: there is a place for each slot's headers.
        let at = unsafe { self.headers.add(slot as usize) };
        // SAFETY: as above.
        let parts = unsafe {
            at.write_volatile(ours);
            (&raw const (*at).head, &raw const (*at).out_header)
        };
        let chain = self.describe(
            slot,
            &[
                (parts.0.cast(), head.len(), false),
                (payload, payload_len as usize, false),
                (parts.1.cast(), OUT_HEADER, true),
                (payload, reply_max as usize, true),
            ],
        )?;
        if self.queue.push_avail(chain) {
            self.parker.counters.kicks += 1;
            self.link.kick(self.index)?;
        }
        Ok(true)
    }

    fn reap(&mut self) -> Result<Option<Completion>, Error> {
        let Some(chain) = self.queue.pop_used() else { return Ok(None) };
        let slot = chain / u32::from(PER_SLOT);
        let known = self.in_flight.get_mut(slot as usize).filter(|_| chain % u32::from(PER_SLOT) == 0);
        let room = known.and_then(Option::take);
        let room = room.ok_or(Error::Protocol("completion of a request that was not made"))?;
        let mut head = [0; CQE_INLINE_BYTES];
        // SAFETY: there is a place for each slot's headers; any bytes are valid ones.
        let answer = unsafe { (&raw const (*self.headers.add(slot as usize)).out_header).read_volatile() };
        head[..OUT_HEADER].copy_from_slice(&answer);
        let payload_len = parse_reply_header(&head).0.saturating_sub(OUT_HEADER);
        if payload_len > room as usize {
            return Err(Error::Protocol("reply longer than its room"));
        }
        Ok(Some(Completion { slot, head, head_len: OUT_HEADER, payload_len }))
    }

    fn spin(&mut self, other: &mut dyn FnMut() -> bool) -> bool {
        let queue = &self.queue;
        self.parker.spin(|| queue.ready() || other())
    }

    fn announce_sleep(&mut self) -> bool {
        self.link.set_waiting(self.index, true);
        self.queue.set_notifications(true);
        !self.queue.ready()
    }

    fn awake(&mut self) {
        self.queue.set_notifications(false);
        self.link.set_waiting(self.index, false);
        self.parker.unparked();
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.link.call_fd(self.index)
    }

    fn hangup_fd(&self) -> BorrowedFd<'_> {
        self.link.hangup_fd()
    }

    fn wait_counters(&self) -> Counters {
        self.parker.counters
    }

    fn copied(&self) -> u64 {
        0
    }
}
