//! `/dev/fuse`: one `readv` reads a request into a header buffer and a slot, one `writev` writes the reply from there.
//! User space copies no payload.

use super::pending::PendingQueue;
use super::request::{Reply, CALLER_CHECK};
use crate::error::Error;
use crate::fuse::message::{request, request_len, IN_HEADER, OUT_HEADER};
use libc::iovec;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;
use tunnelfs_fuse_abi::opcode;
use tunnelfs_ring::SlotPool;

/// Bytes of `fuse_in_header` and `fuse_write_in`. `readv` reads them apart, so that a WRITE's data starts at the slot's
/// start.
const WRITE_HEAD_LEN: usize = IN_HEADER + 40;
/// Number of replies between two probes for a second request at queue depth 1. A failed `readv` after each reply would
/// cost more than it finds.
const PROBE_EVERY: u32 = 8;

/// Indices of a worker's two `/dev/fuse` descriptors. A reply must go to the descriptor that its request came from.
const BLOCKING: usize = 0;
const NONBLOCKING: usize = 1;

pub struct Channel {
    devices: [OwnedFd; 2],
    queue: PendingQueue,
    slots: SlotPool,
    /// Number of slots that kernel requests may not use: 1, for [`Self::interrupt_next`]. 0 if there is only one slot,
    /// or if no request gets a reply (`batch_delay`).
    reserved: usize,
    /// `unique` of each request to interrupt.
    signalled: Vec<u64>,
    /// By slot: index of the descriptor that the request came from.
    reply_fds: Vec<usize>,
    /// Whether the kernel probably has another request: the last probe found one, or poll(2) reported the device
    /// readable.
    expect_more: bool,
    /// Replies since the last probe.
    since_probe: u32,
    /// Pause after each request, to batch FORGETs; `None`: no pause.
    batch_delay: Option<Duration>,
}

enum ReadOutcome {
    Request,
    Nothing,
    Unmounted,
}

impl Channel {
    pub fn new(devices: [OwnedFd; 2], queue: PendingQueue, batch_delay: Option<Duration>) -> Self {
        let count = queue.transport.slots();
        let (slots, reply_fds) = (SlotPool::new(count), vec![BLOCKING; count as usize]);
        let reserved = usize::from(count > 1 && batch_delay.is_none());
        let signalled = Vec::new();
        Channel {
            devices,
            queue,
            slots,
            reserved,
            signalled,
            reply_fds,
            expect_more: false,
            since_probe: 0,
            batch_delay,
        }
    }

    /// Serves until the file system is unmounted.
    pub fn run(mut self) -> Result<(), Error> {
        loop {
            let idle = self.queue.pending() == 0;
            if idle || self.should_probe() {
                match self.read_request(if idle { BLOCKING } else { NONBLOCKING })? {
                    ReadOutcome::Unmounted => return Ok(()),
                    ReadOutcome::Request => {
                        self.expect_more = !idle;
                        // The completion arrives during this sleep, so the host need not signal the call eventfd.
                        self.batch_delay.inspect(|&batch_delay| std::thread::sleep(batch_delay));
                    }
                    ReadOutcome::Nothing => self.expect_more = false,
                }
            }
            while let Some(answer) = self.queue.reap()? {
                self.reply(&answer)?;
                self.since_probe += 1;
            }
            self.queue.delivered();
            self.interrupt_next()?;
            if self.queue.pending() > 0 && (!self.expect_more || !self.has_room()) && !self.wait()? {
                return Ok(());
            }
        }
    }

    /// Returns `true` if a slot is free for another kernel request.
    fn has_room(&self) -> bool {
        self.slots.available() > self.reserved
    }

    /// Returns `true` if a non-blocking read is worth its cost while requests are pending.
    fn should_probe(&mut self) -> bool {
        let look = self.has_room() && (self.expect_more || self.since_probe >= PROBE_EVERY);
        if look {
            self.since_probe = 0;
        }
        look
    }

    /// Reads a request from descriptor `by` into a free slot and submits it.
    fn read_request(&mut self, by: usize) -> Result<ReadOutcome, Error> {
        if !self.has_room() {
            return Ok(ReadOutcome::Nothing);
        }
        let Some(slot) = self.slots.alloc() else { return Ok(ReadOutcome::Nothing) };
        let mut head = [0u8; WRITE_HEAD_LEN];
        let (ptr, size) = self.queue.transport.slot(slot);
        let parts = [
            iovec { iov_base: head.as_mut_ptr().cast(), iov_len: WRITE_HEAD_LEN },
            iovec { iov_base: ptr.cast(), iov_len: size },
        ];
        if by == BLOCKING {
            self.queue.enter_idle();
        }
        // SAFETY: both buffers are ours: `head`, and a free slot.
        let n = unsafe { libc::readv(self.devices[by].as_raw_fd(), parts.as_ptr(), parts.len() as i32) };
        let error = io::Error::last_os_error();
        if by == BLOCKING {
            self.queue.leave_idle()?;
        }
        let outcome = match usize::try_from(n) {
            Ok(n) => self.on_request(slot, by, &head, n)?,
            Err(_) => match error {
                e if e.raw_os_error() == Some(libc::ENODEV) => ReadOutcome::Unmounted,
                // EAGAIN: no request there. ENOENT: the kernel withdrew the request before it was read.
                e if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EINTR | libc::ENOENT)) => {
                    ReadOutcome::Nothing
                }
                e => return Err(e.into()),
            },
        };
        if !matches!(outcome, ReadOutcome::Request) {
            self.slots.free(slot);
        }
        Ok(outcome)
    }

    fn on_request(
        &mut self,
        slot: u32,
        by: usize,
        head: &[u8; WRITE_HEAD_LEN],
        n: usize,
    ) -> Result<ReadOutcome, Error> {
        if n < IN_HEADER || request_len(head) != n {
            return Err(Error::Protocol("the kernel's request has another length than it says"));
        }
        self.reply_fds[slot as usize] = by;
        self.queue.submit(slot, &head[..n.min(WRITE_HEAD_LEN)], n.saturating_sub(WRITE_HEAD_LEN) as u32)?;
        Ok(ReadOutcome::Request)
    }

    fn reply(&mut self, answer: &Reply) -> Result<(), Error> {
        self.slots.free(answer.slot);
        if answer.expects_no_reply() {
            return Ok(());
        }
        let (ptr, _) = self.queue.transport.slot(answer.slot);
        let inline = answer.inline();
        let parts = [
            iovec { iov_base: answer.header.as_ptr().cast_mut().cast(), iov_len: OUT_HEADER },
            iovec { iov_base: inline.as_ptr().cast_mut().cast(), iov_len: inline.len() },
            iovec { iov_base: ptr.cast(), iov_len: answer.payload_len() },
        ];
        let device = self.devices[self.reply_fds[answer.slot as usize]].as_raw_fd();
        // SAFETY: the header and inline bytes belong to `answer`; the payload is in a slot that the host has returned.
        let n = unsafe { libc::writev(device, parts.as_ptr(), parts.len() as i32) };
        if n >= 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            // ENOENT: the request was interrupted. ENODEV: unmounted, which the next `read_request` reports.
            e if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => Ok(()),
            // EINVAL: the reply does not fit the request. Send EIO instead, so that the caller gets an error.
            e if e.raw_os_error() == Some(libc::EINVAL) => self.reply_eio(answer, device),
            e => Err(e.into()),
        }
    }

    /// Replies EIO.
    fn reply_eio(&self, answer: &Reply, device: i32) -> Result<(), Error> {
        let header = answer.error_header(-libc::EIO);
        // SAFETY: the bytes are this function's own.
        let n = unsafe { libc::write(device, header.as_ptr().cast(), header.len()) };
        if n < 0 {
            tracing::debug!("the kernel takes no answer: {}", io::Error::last_os_error());
        }
        Ok(())
    }

    /// Sends the host an INTERRUPT for one request in `signalled`, if a slot is free.
    fn interrupt_next(&mut self) -> Result<(), Error> {
        if self.signalled.is_empty() {
            return Ok(());
        }
        let Some(slot) = self.slots.alloc() else { return Ok(()) };
        match self.signalled.pop() {
            // The kernel's numbering of INTERRUPTs: the request's `unique` with FUSE_INT_REQ_BIT (1) set.
            Some(unique) => {
                let head = request(opcode::INTERRUPT, 0, unique | 1, &unique.to_ne_bytes(), 0);
                self.queue.submit(slot, &head, 0)
            }
            None => Ok(()),
        }
    }

    /// Checks callers for signals, after a sleep without an event. INTERRUPTs come from the same descriptor as other
    /// requests, so they are not read while no slot is free. The guest then makes its own INTERRUPTs.
    fn check_callers(&mut self) {
        self.queue.check_callers();
        if !self.has_room() {
            self.signalled = self.queue.signalled();
        }
    }

    /// Spins for the host by the wait policy, then sleeps until the host or the kernel has something. Returns `false`
    /// if the kernel's connection has ended: nobody waits for the outstanding replies then. `true` otherwise.
    fn wait(&mut self) -> Result<bool, Error> {
        let has_room = self.has_room();
        let limit = if has_room { self.queue.sleep_limit() } else { Some(CALLER_CHECK) };
        let limit = limit.map_or(PollTimeout::NONE, |limit| PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX));
        let transport = &mut self.queue.transport;
        if transport.spin(&mut || false) {
            return Ok(true);
        }
        let mut ended = false;
        if transport.announce_sleep() {
            let kernel = if has_room { PollFlags::POLLIN } else { PollFlags::empty() };
            let mut fds = [
                PollFd::new(self.devices[NONBLOCKING].as_fd(), kernel),
                PollFd::new(transport.fd(), PollFlags::POLLIN),
                PollFd::new(transport.hangup_fd(), PollFlags::empty()),
            ];
            let events = match poll(&mut fds, limit) {
                Ok(events) => events,
                Err(nix::Error::EINTR) => 1,
                Err(e) => return Err(io::Error::from(e).into()),
            };
            let hung_up = fds[2].any() == Some(true) && fds[1].any() != Some(true);
            self.expect_more = fds[0].any() == Some(true);
            ended = fds[0].revents().is_some_and(|r| r.contains(PollFlags::POLLERR));
            if hung_up {
                self.queue.detach_host()?;
                return Ok(!ended);
            }
            if events == 0 {
                self.check_callers();
            }
        }
        let transport = &mut self.queue.transport;
        transport.drain_call();
        transport.awake();
        Ok(!ended)
    }
}
