//! Driver side of the ring.

use super::{call, Completion, Transport};
use crate::link::local::Link;
use crate::message::{reply_header, request, OUT_HEADER};
use crate::transport::virtqueue;
use crate::Error;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use tunnelfs_ring::{DriverQueue, RingSetup, Sqe, WaitConfig, WaitStats, Waiter, NO_CPU, OP_SETUP, SQE_HEAD_BYTES};

/// A request queue whose messages travel through a ring.
pub struct Driver {
    queue: DriverQueue,
    in_flight: Vec<Option<u32>>,
    waiter: Waiter,
    link: Arc<Link>,
    index: usize,
    call: Arc<virtio_driver::EventFd>,
    kick: Box<dyn virtio_driver::QueueNotifier>,
}

/// Asks the host for a ring on this virtqueue; the virtqueue itself when the host does not know rings.
///
/// # Errors
/// [`Error`] when the host cannot be asked.
pub fn upgrade(
    mut plain: virtqueue::Driver,
    wait: WaitConfig,
    cpu: Option<usize>,
) -> Result<Box<dyn Transport>, Error> {
    let (link, index) = (plain.link().clone(), plain.index());
    let (base, geometry) = (link.queue_base(index), link.geometry(index));
    let cpu = cpu.map_or(NO_CPU, |cpu| cpu as u32);
    let setup = RingSetup { features: 0, geometry, base: base as u64, cpu };
    let answer = call(&mut plain, &request(OP_SETUP, 0, 1, &setup.to_bytes(), 0), 0, 0)?;
    if answer.error() != 0 {
        return Ok(Box::new(plain));
    }
    // SAFETY: the link keeps the zeroed, page-aligned region mapped.
    let queue = unsafe { DriverQueue::new(base, geometry)? };
    let (call, kick) = (link.call_fd(index)?, link.notifier(index));
    let in_flight = vec![None; geometry.slots as usize];
    Ok(Box::new(Driver { queue, in_flight, waiter: Waiter::new(wait), link, index, call, kick }))
}

impl Transport for Driver {
    fn name(&self) -> &'static str {
        "ring"
    }

    fn slots(&self) -> u32 {
        self.link.geometry(self.index).slots
    }

    fn slot(&self, slot: u32) -> (*mut u8, usize) {
        slot_of(&self.link, self.index, slot)
    }

    fn submit(&mut self, slot: u32, head: &[u8], payload_len: u32, reply_max: u32) -> Result<bool, Error> {
        let mut sqe =
            Sqe { tag: slot, slot, payload_len, reply_max, head_len: head.len() as u32, head: [0; SQE_HEAD_BYTES] };
        sqe.head.get_mut(..head.len()).ok_or(Error::Protocol("header too long"))?.copy_from_slice(head);
        let free = self.in_flight.get_mut(slot as usize).ok_or(Error::Protocol("no such slot"))?;
        if !self.queue.sq.push(&sqe)? {
            return Ok(false);
        }
        *free = Some(reply_max);
        if self.queue.peer_sleeps.claim_wake() {
            self.kick.notify()?;
        }
        Ok(true)
    }

    fn reap(&mut self) -> Result<Option<Completion>, Error> {
        let Some(cqe) = self.queue.cq.pop() else { return Ok(None) };
        let room = self.in_flight.get_mut(cqe.tag as usize).and_then(Option::take);
        let room = room.ok_or(Error::Protocol("completion of a request that was not made"))? as usize;
        let (head_len, payload_len) = (cqe.head_len as usize, cqe.payload_len as usize);
        let told = reply_header(&cqe.head).0;
        // No bytes at all: the answer to a request without a reply.
        let empty = head_len == 0 && payload_len == 0;
        if head_len > cqe.head.len()
            || payload_len > room
            || !(empty || head_len >= OUT_HEADER && told == head_len + payload_len)
        {
            return Err(Error::Protocol("completion with impossible lengths"));
        }
        Ok(Some(Completion { slot: cqe.tag, head: cqe.head, head_len: head_len.max(OUT_HEADER), payload_len }))
    }

    fn spin(&mut self, other: &mut dyn FnMut() -> bool) -> bool {
        let cq = &self.queue.cq;
        self.waiter.advise(self.queue.peer_sleeps.hint());
        self.waiter.spin(|| cq.ready() || other())
    }

    fn announce_sleep(&mut self) -> bool {
        self.queue.own_sleep.announce();
        !self.queue.cq.ready()
    }

    fn awake(&mut self) {
        self.queue.own_sleep.clear();
        self.waiter.awake();
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    fn alive(&self) -> BorrowedFd<'_> {
        self.link.alive()
    }

    fn wait_stats(&self) -> WaitStats {
        self.waiter.stats
    }

    fn copied(&self) -> u64 {
        0
    }
}

pub(super) fn slot_of(link: &Link, queue: usize, slot: u32) -> (*mut u8, usize) {
    let g = link.geometry(queue);
    assert!(slot < g.slots, "slot {slot} of {}", g.slots);
    // SAFETY: the slot's number was just checked.
    let ptr = unsafe { link.queue_base(queue).add(g.slots_offset() + slot as usize * g.slot_size as usize) };
    (ptr, g.slot_size as usize)
}
