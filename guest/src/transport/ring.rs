//! The driver side of the ring.

use super::{call, Completion, Transport};
use crate::error::Error;
use crate::fuse::message::{parse_reply_header, request, OUT_HEADER};
use crate::link::Link;
use crate::transport::virtqueue;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use tunnelfs_ring::{
    Counters, DriverQueue, LiveWait, Parker, PeerCpu, RingSetup, SlotRun, SpinMode, Sqe, CPU_UNKNOWN, SQE_INLINE_BYTES,
};

/// A request queue over a ring in shared memory.
pub struct RingTransport {
    queue: DriverQueue,
    /// By slot: most reply bytes for the request in flight; `None`: no request.
    in_flight: Vec<Option<u32>>,
    parker: Parker,
    link: Arc<dyn Link>,
    index: usize,
}

/// Asks the host for a ring on this virtqueue. Returns the virtqueue itself if the host does not support rings, or if
/// the device cannot reach all the memory or the memory has too many runs for one message. `cpu` is the CPU of the
/// queue's thread, if it is pinned.
///
/// # Errors
/// If the host does not answer, or breaks the protocol.
pub fn upgrade(
    mut plain: virtqueue::VirtqueueTransport,
    wait: impl Into<LiveWait>,
    cpu: Option<usize>,
) -> Result<Box<dyn Transport>, Error> {
    let (link, index) = (plain.link().clone(), plain.index());
    let memory = link.memory(index);
    let cpu = cpu.filter(|_| link.shares_cpus()).map_or(CPU_UNKNOWN, |cpu| cpu as u32);
    let Some(setup) = set_up(&*link, index, cpu) else { return Ok(Box::new(plain.settled())) };
    let message = setup.to_bytes();
    let (fixed, runs) = message.split_at(RingSetup::FIXED_BYTES);
    let (slot, size) = plain.slot(0);
    if runs.len() > size {
        tracing::warn!("slots in {} pieces do not fit one message: staying on the virtqueue", setup.runs.len());
        return Ok(Box::new(plain.settled()));
    }
    // SAFETY: the slot is ours, and large enough.
    unsafe { std::ptr::copy_nonoverlapping(runs.as_ptr(), slot, runs.len()) };
    let answer = call(&mut plain, &request(RingSetup::OPCODE, 0, 1, fixed, runs.len()), runs.len() as u32, 0)?;
    if answer.error() != 0 {
        return Ok(Box::new(plain.settled()));
    }
    // SAFETY: the link keeps the zeroed, page-aligned memory mapped.
    let queue = unsafe { DriverQueue::new(memory.control, memory.geometry)? };
    let in_flight = vec![None; memory.geometry.slots as usize];
    Ok(Box::new(RingTransport { queue, in_flight, parker: Parker::new(wait), link, index }))
}

/// Returns the set-up message of a queue; `None` if the device cannot reach all of its memory.
fn set_up(link: &dyn Link, index: usize, cpu: u32) -> Option<RingSetup> {
    let memory = link.memory(index);
    let geometry = memory.geometry;
    let control = link.address(memory.control, geometry.control_bytes())?;
    let slots = (0..geometry.slots).map(|slot| {
        let (at, bytes) = memory.slot(slot);
        link.address(at, bytes)
    });
    let runs = SlotRun::coalesce(slots.collect::<Option<Vec<_>>>()?, geometry.slot_size);
    Some(RingSetup { features: 0, geometry, control, cpu, runs })
}

impl Transport for RingTransport {
    fn name(&self) -> &'static str {
        "ring"
    }

    fn slots(&self) -> u32 {
        self.in_flight.len() as u32
    }

    fn slot(&self, slot: u32) -> (*mut u8, usize) {
        self.link.memory(self.index).slot(slot)
    }

    fn submit(&mut self, slot: u32, head: &[u8], payload_len: u32, reply_max: u32) -> Result<bool, Error> {
        let mut sqe = Sqe {
            user_data: slot,
            slot,
            payload_len,
            reply_max,
            inline_len: head.len() as u32,
            inline: [0; SQE_INLINE_BYTES],
        };
        sqe.inline.get_mut(..head.len()).ok_or(Error::Protocol("header too long"))?.copy_from_slice(head);
        let free = self.in_flight.get_mut(slot as usize).ok_or(Error::Protocol("no such slot"))?;
        if !self.queue.sq.push(&sqe)? {
            return Ok(false);
        }
        *free = Some(reply_max);
        if self.queue.peer_wakeup.take() {
            self.parker.counters.kicks += 1;
            self.link.kick(self.index)?;
        }
        Ok(true)
    }

    fn reap(&mut self) -> Result<Option<Completion>, Error> {
        let Some(cqe) = self.queue.cq.pop() else { return Ok(None) };
        let room = self.in_flight.get_mut(cqe.user_data as usize).and_then(Option::take);
        let room = room.ok_or(Error::Protocol("completion of a request that was not made"))? as usize;
        let (head_len, payload_len) = (cqe.inline_len as usize, cqe.payload_len as usize);
        let told = parse_reply_header(&cqe.inline).0;
        // No bytes at all: the completion of a request without a reply.
        let empty = head_len == 0 && payload_len == 0;
        if head_len > cqe.inline.len()
            || payload_len > room
            || !(empty || head_len >= OUT_HEADER && told == head_len + payload_len)
        {
            return Err(Error::Protocol("completion with impossible lengths"));
        }
        Ok(Some(Completion { slot: cqe.user_data, head: cqe.inline, head_len: head_len.max(OUT_HEADER), payload_len }))
    }

    fn spin(&mut self, other: &mut dyn FnMut() -> bool) -> bool {
        let cq = &self.queue.cq;
        self.parker.set_mode(match self.queue.peer_wakeup.peer_cpu() {
            PeerCpu::Same => SpinMode::Handoff,
            PeerCpu::Other | PeerCpu::Unknown => SpinMode::Busy,
        });
        self.parker.spin(|| cq.ready() || other())
    }

    fn announce_sleep(&mut self) -> bool {
        self.link.set_waiting(self.index, true);
        self.queue.own_wakeup.set();
        !self.queue.cq.ready()
    }

    fn awake(&mut self) {
        self.queue.own_wakeup.clear();
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

    fn on_peer_core(&self) -> bool {
        self.queue.peer_wakeup.peer_cpu() == PeerCpu::Same
    }
}
