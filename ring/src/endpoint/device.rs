//! The device's end: takes requests and completes each of them once.

use super::handoff::Handoff;
use super::payload::Payload;
use super::sleep::{deadline, next_id, take_until, Notification, Sleep};
use crate::error::Error;
use crate::layout::{Cqe, Sqe, CQE_INLINE_BYTES};
use crate::notify::Eventfd;
use crate::policy::WaitConfig;
use crate::queue::DeviceQueue;
use crate::region::Region;
use crate::wait::{Counters, Parker};
use nix::sys::socket::{getsockopt, sockopt::SockType};
use std::time::{Duration, Instant};

/// The device's end of one queue. One thread at a time uses it (`Send`, not `Sync`).
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
#[must_use = "a request that is dropped is never answered: complete it"]
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

    /// Returns how many bytes of payload the request has, from the slot's start on.
    #[inline]
    pub fn payload_len(&self) -> usize {
        self.sqe.payload_len as usize
    }

    /// Returns how many bytes a reply may have in the slot; it may be fewer than the request has.
    #[inline]
    pub fn reply_max(&self) -> usize {
        self.sqe.reply_max as usize
    }
}

impl Device {
    /// Most bytes of a reply's message, fewer than a request's: a longer one goes into the slot.
    pub const MAX_MSG: usize = CQE_INLINE_BYTES;

    /// Takes over the device's end, once. It checks that the memory can neither shrink nor grow, has the geometry's size,
    /// and that the descriptors are of their kinds.
    ///
    /// # Errors
    /// [`Error::Geometry`] for sizes out of range, [`Error::Handoff`] or [`Error::Corrupt`] for memory or descriptors of
    /// another kind, and [`Error::Os`] when the memory cannot be mapped.
    pub fn attach(handoff: Handoff, wait: WaitConfig) -> Result<Device, Error> {
        let Handoff { memory, kick, call, alive, geometry } = handoff;
        geometry.check()?;
        Eventfd::check(&kick)?;
        Eventfd::check(&call)?;
        if getsockopt(&alive, SockType).is_err() {
            return Err(Error::Handoff("`alive` is not a socket"));
        }
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
    #[track_caller]
    pub fn payload<'a>(&'a self, request: &'a mut Request) -> Payload<'a> {
        self.check(request);
        let len = request.payload_len().max(request.reply_max());
        // SAFETY: the table of slots has checked slot and lengths; the region outlives the borrow of `self`.
        unsafe { Payload::new(request.start, len) }
    }

    /// Completes a request: `msg` travels in the entry, `payload_len` bytes lie in the slot.
    ///
    /// # Errors
    /// [`Error::TooLong`] when the message or the length is too long: the request is then completed without either.
    /// [`Error::Corrupt`] when the driver broke the protocol.
    ///
    /// # Panics
    /// On another device's request.
    #[inline]
    #[track_caller]
    pub fn complete(&mut self, request: Request, msg: &[u8], payload_len: u32) -> Result<(), Error> {
        self.check(&request);
        let too_long = too_long(msg.len(), payload_len, request.sqe.reply_max);
        let (msg, payload_len) = if too_long.is_none() { (msg, payload_len) } else { (&[][..], 0) };
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
        too_long.map_or(Ok(()), Err)
    }

    /// Waits for one request. A driver that signals without submitting anything cannot make it last longer than
    /// `timeout`.
    ///
    /// # Errors
    /// Those of [`Self::wait`] and [`Self::next`].
    #[inline]
    pub fn next_within(&mut self, timeout: Option<Duration>) -> Result<Request, Error> {
        take_until(self, deadline(timeout), Self::next, Self::wait_until)
    }

    /// Waits until a request may be there: there may be none, as often as the driver likes. `None`: without a limit.
    ///
    /// # Errors
    /// [`Error::TimedOut`] after `timeout`; [`Error::PeerGone`] soon after the driver has gone, and after what it
    /// submitted before.
    #[inline]
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<(), Error> {
        self.wait_until(deadline(timeout))
    }

    #[inline]
    fn wait_until(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        let sq = &self.queue.sq;
        Sleep::new(|| sq.ready(), &self.queue.own_wakeup, &self.fds, deadline).wait(&mut self.parker)
    }

    /// Returns how the waits ended so far.
    pub fn counters(&self) -> Counters {
        self.parker.counters
    }

    #[inline]
    #[track_caller]
    fn check(&self, request: &Request) {
        assert!(request.device == self.id, "a request of another device");
    }
}

/// What of a reply is too long, if anything is.
fn too_long(msg: usize, payload: u32, reply_max: u32) -> Option<Error> {
    if msg > CQE_INLINE_BYTES {
        return Some(Error::TooLong { what: "message", len: msg, most: CQE_INLINE_BYTES });
    }
    let (len, most) = (payload as usize, reply_max as usize);
    (len > most).then_some(Error::TooLong { what: "reply", len, most })
}
