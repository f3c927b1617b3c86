//! The driver's end: submits requests and reaps their replies.

use super::handoff::Handoff;
use super::payload::Payload;
use super::sleep::{deadline, next_id, take_until, Notification, Sleep};
use crate::error::Error;
use crate::geometry::Geometry;
use crate::layout::{Cqe, Sqe, CQE_INLINE_BYTES, SQE_INLINE_BYTES};
use crate::notify::{Eventfd, PeerCpu};
use crate::policy::WaitConfig;
use crate::queue::DriverQueue;
use crate::region::Region;
use crate::slots::SlotPool;
use crate::wait::{Counters, Parker, SpinMode};
use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// The driver's end of one queue. It brings the memory. One thread at a time uses it (`Send`, not `Sync`).
#[derive(Debug)]
pub struct Driver {
    id: u64,
    geometry: Geometry,
    queue: DriverQueue,
    pool: SlotPool,
    /// What may come back in each submitted slot, bytes.
    in_flight: Vec<Option<u32>>,
    fds: Notification,
    parker: Parker,
    /// Kept mapped for `queue`; dropped after it.
    region: Region,
}

/// A payload buffer that this end owns. A slot that is dropped, not freed, is lost to its driver. It is not cleared: a
/// device can read what an earlier request has left in it.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a slot that is dropped is lost: free it or submit it"]
pub struct Slot {
    driver: u64,
    index: u32,
}

impl Slot {
    /// Returns its number, from 0 to the geometry's `slots`: the slot of a request comes back with its reply.
    pub fn index(&self) -> u32 {
        self.index
    }
}

/// A checked reply. Its slot is the driver's again.
#[derive(Debug)]
#[must_use = "a reply that is dropped takes its slot along: free it"]
pub struct Reply {
    /// The request's slot, with the reply's payload.
    pub slot: Slot,
    cqe: Cqe,
}

/// Why a request was not submitted. A slot in it is lost where the error is passed on with `?`.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The ring is full, though there are no more slots than entries: the device says that it has not taken what it has
    /// answered.
    #[error("the submission ring is full")]
    Full(Slot),
    /// The message does not fit an entry, or a length does not fit the slot.
    #[error("{error}")]
    TooLong {
        /// The slot comes back.
        slot: Slot,
        /// What was too long: [`Error::TooLong`].
        error: Error,
    },
    /// The queue cannot be used any more.
    #[error(transparent)]
    Queue(#[from] Error),
}

impl From<SubmitError> for std::io::Error {
    fn from(e: SubmitError) -> Self {
        match e {
            SubmitError::Full(_) => std::io::Error::new(std::io::ErrorKind::WouldBlock, e.to_string()),
            SubmitError::TooLong { error, .. } | SubmitError::Queue(error) => error.into(),
        }
    }
}

impl Reply {
    /// Returns the message that came inside the entry.
    #[inline]
    pub fn msg(&self) -> &[u8] {
        &self.cqe.inline[..self.cqe.inline_len as usize]
    }

    /// Returns how many bytes of payload the reply has, from the slot's start on.
    #[inline]
    pub fn payload_len(&self) -> usize {
        self.cqe.payload_len as usize
    }
}

impl Driver {
    /// Most bytes of a request's message.
    pub const MAX_MSG: usize = SQE_INLINE_BYTES;

    /// Creates a queue in memory of its own; the hand-off is for its device.
    ///
    /// # Errors
    /// [`Error::Geometry`] for sizes out of range, [`Error::Os`] when memory or descriptors cannot be had.
    pub fn create(geometry: Geometry, wait: WaitConfig) -> Result<(Driver, Handoff), Error> {
        geometry.check()?;
        let region = Region::new(geometry.bytes(), false)?;
        // SAFETY: the region is zeroed, page-aligned and that large; the driver keeps it mapped.
        let queue = unsafe { DriverQueue::new(region.as_ptr(), geometry)? };
        let (kick, call) = (Eventfd::new()?, Eventfd::new()?);
        let flags = SockFlag::SOCK_CLOEXEC;
        let (alive, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags)
            .map_err(|e| Error::Os { what: "socketpair".into(), source: e.into() })?;
        let handoff = Handoff {
            memory: region.try_clone_file()?.into(),
            kick: clone(&kick)?,
            call: clone(&call)?,
            alive: theirs,
            geometry,
        };
        let driver = Driver {
            id: next_id(),
            geometry,
            queue,
            pool: SlotPool::new(geometry.slots),
            in_flight: vec![None; geometry.slots as usize],
            fds: Notification { own: call, peer: kick, alive },
            parker: Parker::new(wait),
            region,
        };
        Ok((driver, handoff))
    }

    /// Takes a free slot; `None` when all are in use.
    #[inline]
    pub fn alloc(&mut self) -> Option<Slot> {
        self.pool.alloc().map(|index| Slot { driver: self.id, index })
    }

    /// Gives a slot back.
    ///
    /// # Panics
    /// On another driver's slot.
    #[inline]
    #[track_caller]
    pub fn free(&mut self, slot: Slot) {
        self.pool.free(self.check(&slot));
    }

    /// Returns a slot's buffer.
    ///
    /// # Panics
    /// On another driver's slot.
    #[track_caller]
    pub fn payload<'a>(&'a self, slot: &'a mut Slot) -> Payload<'a> {
        let size = self.geometry.slot_size as usize;
        let start = self.geometry.control_bytes() + self.check(slot) as usize * size;
        // SAFETY: the slot lies in the region, which outlives the borrow of `self`.
        unsafe { Payload::new(self.region.as_ptr().add(start), size) }
    }

    /// Submits a request: `msg` travels in the entry, `payload_len` bytes lie in the slot, and the device may write up
    /// to `reply_max` bytes there. Each request takes a slot along, also one that is only a message (0 and 0). A device
    /// that has gone is not noticed here, but by [`Self::wait`].
    ///
    /// # Errors
    /// [`SubmitError`]. Unless the queue is broken the slot comes back in it.
    ///
    /// # Panics
    /// On another driver's slot.
    #[inline]
    #[track_caller]
    pub fn submit(&mut self, msg: &[u8], slot: Slot, payload_len: u32, reply_max: u32) -> Result<(), SubmitError> {
        let index = self.check(&slot);
        let mut sqe = Sqe {
            user_data: index,
            slot: index,
            payload_len,
            reply_max,
            inline_len: msg.len() as u32,
            inline: [0; SQE_INLINE_BYTES],
        };
        let most = self.geometry.slot_size;
        let Some(room) = sqe.inline.get_mut(..msg.len()).filter(|_| payload_len.max(reply_max) <= most) else {
            let error = too_long(msg.len(), payload_len, reply_max, most);
            return Err(SubmitError::TooLong { slot, error });
        };
        room.copy_from_slice(msg);
        if !self.queue.sq.push(&sqe)? {
            return Err(SubmitError::Full(slot));
        }
        self.in_flight[index as usize] = Some(reply_max);
        if self.queue.peer_wakeup.take() {
            self.parker.counters.kicks += 1;
            Eventfd::signal(&self.fds.peer);
        }
        Ok(())
    }

    /// Takes one reply; `None` when none is there. Replies come in the order in which the device completes: a number in
    /// the message, or [`Slot::index`], says whose each is.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the device broke the protocol: the queue must not be used any more.
    #[inline]
    pub fn reap(&mut self) -> Result<Option<Reply>, Error> {
        let Some(cqe) = self.queue.cq.pop() else { return Ok(None) };
        let room = self.in_flight.get_mut(cqe.user_data as usize).and_then(Option::take);
        let room = room.ok_or(Error::Corrupt("completion of a request that is not in flight"))?;
        if cqe.payload_len > room || cqe.inline_len as usize > CQE_INLINE_BYTES {
            return Err(Error::Corrupt("completion with lengths out of range"));
        }
        Ok(Some(Reply { slot: Slot { driver: self.id, index: cqe.user_data }, cqe }))
    }

    /// Waits for one reply. A device that signals without completing anything cannot make it last longer than
    /// `timeout`.
    ///
    /// # Errors
    /// Those of [`Self::wait`] and [`Self::reap`].
    #[inline]
    pub fn reap_within(&mut self, timeout: Option<Duration>) -> Result<Reply, Error> {
        take_until(self, deadline(timeout), Self::reap, Self::wait_until)
    }

    /// Waits until a reply may be there: there may be none, as often as the device likes. `None`: without a limit, and
    /// with no request in flight until the device has gone.
    ///
    /// # Errors
    /// [`Error::TimedOut`] after `timeout`: a request stays in flight, and its reply may come later.
    /// [`Error::PeerGone`] soon after the device has gone, and after what it completed before: the queue is finished, its
    /// slots with it.
    #[inline]
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<(), Error> {
        self.wait_until(deadline(timeout))
    }

    #[inline]
    fn wait_until(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        self.parker.set_mode(match self.queue.peer_wakeup.peer_cpu() {
            PeerCpu::Same => SpinMode::Handoff,
            PeerCpu::Other | PeerCpu::Unknown => SpinMode::Busy,
        });
        let cq = &self.queue.cq;
        Sleep::new(|| cq.ready(), &self.queue.own_wakeup, &self.fds, deadline).wait(&mut self.parker)
    }

    /// Returns how the waits ended so far.
    pub fn counters(&self) -> Counters {
        self.parker.counters
    }

    #[inline]
    #[track_caller]
    fn check(&self, slot: &Slot) -> u32 {
        assert!(slot.driver == self.id, "a slot of another driver");
        slot.index
    }
}

#[cold]
fn too_long(msg: usize, payload: u32, reply: u32, slot: u32) -> Error {
    let (what, len, most) = match slot {
        _ if msg > SQE_INLINE_BYTES => ("message", msg, SQE_INLINE_BYTES),
        slot if payload > slot => ("payload_len", payload as usize, slot as usize),
        slot => ("reply_max", reply as usize, slot as usize),
    };
    Error::TooLong { what, len, most }
}

fn clone(fd: &OwnedFd) -> Result<OwnedFd, Error> {
    fd.try_clone().map_err(|source| Error::Os { what: "duplicating an eventfd".into(), source })
}
