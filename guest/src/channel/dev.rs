//! `/dev/fuse`: one `readv` scatters a request into its header and a slot, one
//! `writev` gathers the reply from there. No payload is copied in user space.

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

/// Header and operation structure of WRITE: behind them the data starts, in the slot.
const HEAD: usize = IN_HEADER + 40;
/// At queue depth 1, probe for a second request only after every 8th reply: a failed `readv` per request costs more than it
/// finds.
const PROBE_EVERY: u32 = 8;

/// Which of a worker's two descriptors a request came by: its reply must go the same way.
const BLOCKING: usize = 0;
const NONBLOCKING: usize = 1;

pub struct Channel {
    devices: [OwnedFd; 2],
    queue: PendingQueue,
    slots: SlotPool,
    /// Slots that no request of the kernel's may take: one, for [`Self::interrupt_next`]. 0 where there is only one slot,
    /// or where all requests are ones that nobody waits for.
    reserved: usize,
    /// Requests to be interrupted, by their `unique`.
    signalled: Vec<u64>,
    reply_fds: Vec<usize>,
    /// Whether the last look beside requests under way has found another.
    expect_more: bool,
    since_probe: u32,
    /// How long to leave the kernel and the host alone after each request.
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
                        // The answer is there afterwards, without a call that nobody is in a hurry for.
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

    /// Whether another request of the kernel's can be read.
    fn has_room(&self) -> bool {
        self.slots.available() > self.reserved
    }

    fn should_probe(&mut self) -> bool {
        let look = self.has_room() && (self.expect_more || self.since_probe >= PROBE_EVERY);
        if look {
            self.since_probe = 0;
        }
        look
    }

    /// Reads a request into a free slot and submits it.
    fn read_request(&mut self, by: usize) -> Result<ReadOutcome, Error> {
        if !self.has_room() {
            return Ok(ReadOutcome::Nothing);
        }
        let Some(slot) = self.slots.alloc() else { return Ok(ReadOutcome::Nothing) };
        let mut head = [0u8; HEAD];
        let (ptr, size) = self.queue.transport.slot(slot);
        let parts = [
            iovec { iov_base: head.as_mut_ptr().cast(), iov_len: HEAD },
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
                // EAGAIN: nothing there; ENOENT: taken back before it was read.
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

    fn on_request(&mut self, slot: u32, by: usize, head: &[u8; HEAD], n: usize) -> Result<ReadOutcome, Error> {
        if n < IN_HEADER || request_len(head) != n {
            return Err(Error::Protocol("the kernel's request has another length than it says"));
        }
        self.reply_fds[slot as usize] = by;
        self.queue.submit(slot, &head[..n.min(HEAD)], n.saturating_sub(HEAD) as u32)?;
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
        // SAFETY: the header and inline bytes are `answer`'s, the payload lies in a slot that is ours again.
        let n = unsafe { libc::writev(device, parts.as_ptr(), parts.len() as i32) };
        if n >= 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            // The request was interrupted, or its mount has gone: `read_request` will be told.
            e if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => Ok(()),
            // The kernel refuses a reply that does not fit the question: the caller still gets an error.
            e if e.raw_os_error() == Some(libc::EINVAL) => self.refuse(answer, device),
            e => Err(e.into()),
        }
    }

    fn refuse(&self, answer: &Reply, device: i32) -> Result<(), Error> {
        let header = answer.error_header(-libc::EIO);
        // SAFETY: the bytes are this function's own.
        let n = unsafe { libc::write(device, header.as_ptr().cast(), header.len()) };
        if n < 0 {
            tracing::debug!("the kernel takes no answer: {}", io::Error::last_os_error());
        }
        Ok(())
    }

    /// Asks the host to end the next request whose caller has been sent a signal.
    fn interrupt_next(&mut self) -> Result<(), Error> {
        if self.signalled.is_empty() {
            return Ok(());
        }
        let Some(slot) = self.slots.alloc() else { return Ok(()) };
        match self.signalled.pop() {
            // As the kernel numbers its INTERRUPTs: the request's own number and FUSE_INT_REQ_BIT.
            Some(unique) => {
                let head = request(opcode::INTERRUPT, 0, unique | 1, &unique.to_ne_bytes(), 0);
                self.queue.submit(slot, &head, 0)
            }
            None => Ok(()),
        }
    }

    /// A sleep has ended without an event. The kernel's INTERRUPTs come by the same descriptor as its other requests, so
    /// while there is room for none of these, the callers are looked at instead.
    fn check_callers(&mut self) {
        self.queue.check_callers();
        if !self.has_room() {
            self.signalled = self.queue.signalled();
        }
    }

    /// Waits for the host by the policy, and beside a sleep for the kernel too; `false` when the kernel's connection has
    /// ended: what the host still owes, nobody waits for.
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
        transport.silence();
        transport.awake();
        Ok(!ended)
    }
}
