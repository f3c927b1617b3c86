//! The device's end: takes requests and completes each of them once.

use super::handoff::Handoff;
use super::payload::Payload;
use super::sleep::{next_id, Notification, Sleep};
use crate::error::Error;
use crate::layout::{Cqe, Sqe, CQE_INLINE_BYTES};
use crate::notify::Eventfd;
use crate::policy::WaitConfig;
use crate::queue::DeviceQueue;
use crate::region::Region;
use crate::wait::{Counters, Parker};
use std::time::Duration;

/// The device's end of one queue.
#[derive(Debug)]
pub struct Device {
    id: u64,
    queue: DeviceQueue,
    fds: Notification,
    parker: Parker,
    /// Kept mapped for `queue`; dropped after it.
    _region: Region,
}

/// A request that this end must complete: a private copy of its entry, with all lengths checked.
#[derive(Debug)]
pub struct Request {
    device: u64,
    sqe: Sqe,
    start: *mut u8,
}

// SAFETY: the pointer leads into the region of the device with this number, and is only used together with it.
unsafe impl Send for Request {}

impl Request {
    /// Returns the message that came inside the entry.
    #[inline]
    pub fn msg(&self) -> &[u8] {
        &self.sqe.inline[..self.sqe.inline_len as usize]
    }

    /// Returns the request's bytes in the slot, from its start.
    #[inline]
    pub fn payload_len(&self) -> usize {
        self.sqe.payload_len as usize
    }

    /// Returns how many bytes a reply may have in the slot.
    #[inline]
    pub fn reply_max(&self) -> usize {
        self.sqe.reply_max as usize
    }
}

impl Device {
    /// Most bytes of a reply's message.
    pub const MAX_MSG: usize = CQE_INLINE_BYTES;

    /// Takes over the device's end. It checks that the memory can neither shrink nor grow, and is large enough.
    ///
    /// # Errors
    /// [`Error::Geometry`] for sizes out of range, [`Error::Corrupt`] for memory or descriptors of another kind, and
    /// [`Error::Os`] when the memory cannot be mapped.
    pub fn attach(handoff: Handoff, wait: WaitConfig) -> Result<Device, Error> {
        let Handoff { memory, kick, call, alive, geometry } = handoff;
        geometry.check()?;
        Eventfd::check(&kick)?;
        Eventfd::check(&call)?;
        let region = Region::from_fd(memory, geometry.bytes())?;
        let slot = |n: u32| geometry.control_bytes() + n as usize * geometry.slot_size as usize;
        let slots = (0..geometry.slots).map(|n| region.as_ptr().wrapping_add(slot(n))).collect();
        // SAFETY: the region has the geometry's bytes, page-aligned, and the device keeps it mapped.
        let queue = unsafe { DeviceQueue::new(region.as_ptr(), slots, geometry)? };
        let fds = Notification { own: kick, peer: call, alive };
        Ok(Device { id: next_id(), queue, fds, parker: Parker::new(wait), _region: region })
    }

    /// Takes one request; `None` when none is there.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the driver broke the protocol: the queue must not be used any more.
    #[inline]
    #[allow(clippy::should_implement_trait)] // Not an iterator: `None` is not the end.
    pub fn next(&mut self) -> Result<Option<Request>, Error> {
        let Some(sqe) = self.queue.sq.pop() else { return Ok(None) };
        let start = self.queue.slots.get(&sqe)?;
        Ok(Some(Request { device: self.id, sqe, start }))
    }

    /// Returns the slot's buffer, as much of it as the request has or a reply may have.
    ///
    /// # Panics
    /// On another device's request.
    pub fn payload<'a>(&'a self, request: &'a mut Request) -> Payload<'a> {
        self.check(request);
        let len = request.payload_len().max(request.reply_max());
        // SAFETY: the table of slots has checked slot and lengths; the region outlives the borrow of `self`.
        unsafe { Payload::new(request.start, len) }
    }

    /// Completes a request: `msg` travels in the entry, `payload_len` bytes lie in the slot.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when the message or the length is too long: the request is then completed without either.
    /// [`Error::Corrupt`] when the driver broke the protocol.
    ///
    /// # Panics
    /// On another device's request.
    #[inline]
    pub fn complete(&mut self, request: Request, msg: &[u8], payload_len: u32) -> Result<(), Error> {
        self.check(&request);
        let fits = msg.len() <= CQE_INLINE_BYTES && payload_len <= request.sqe.reply_max;
        let (msg, payload_len) = if fits { (msg, payload_len) } else { (&[][..], 0) };
        let mut cqe = Cqe {
            user_data: request.sqe.user_data,
            payload_len,
            inline_len: msg.len() as u32,
            inline: [0; CQE_INLINE_BYTES],
        };
        cqe.inline[..msg.len()].copy_from_slice(msg);
        if !self.queue.cq.push(&cqe)? {
            // An honest driver has no more requests in flight than entries.
            return Err(Error::Corrupt("completion ring full"));
        }
        if self.queue.peer_wakeup.take() {
            self.parker.counters.kicks += 1;
            Eventfd::signal(&self.fds.peer);
        }
        if fits {
            Ok(())
        } else {
            Err(Error::OutOfRange)
        }
    }

    /// Waits until a request may be there.
    ///
    /// # Errors
    /// [`Error::TimedOut`] after `timeout`, [`Error::PeerGone`] as soon as the driver has gone.
    #[inline]
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<(), Error> {
        let sq = &self.queue.sq;
        self.parker.wait(&mut Sleep::new(|| sq.ready(), &self.queue.own_wakeup, &self.fds, timeout))
    }

    /// Returns how the waits ended so far.
    pub fn counters(&self) -> Counters {
        self.parker.counters
    }

    #[inline]
    fn check(&self, request: &Request) {
        assert!(request.device == self.id, "a request of another device");
    }
}
