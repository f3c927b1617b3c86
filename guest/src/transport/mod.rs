//! The driver side of a transport: what a FUSE channel or a benchmark needs.

use crate::error::Error;
use crate::fuse::message::{parse_reply_header, OUT_HEADER};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::os::fd::BorrowedFd;
use tunnelfs_ring::{Counters, Eventfd, CQE_INLINE_BYTES};

pub mod ring;
pub mod socket;
pub mod virtqueue;

/// An answered request.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// The request's slot, the submitter's again.
    pub slot: u32,
    /// `fuse_out_header` and perhaps the first bytes of the reply.
    pub head: [u8; CQE_INLINE_BYTES],
    /// Valid bytes of `head`.
    pub head_len: usize,
    /// Reply bytes that follow, in the slot.
    pub payload_len: usize,
}

impl Completion {
    /// 0, or a negative errno.
    pub fn error(&self) -> i32 {
        parse_reply_header(&self.head).1
    }

    /// Reply bytes in the entry, behind the header.
    pub fn inline(&self) -> &[u8] {
        &self.head[OUT_HEADER..self.head_len]
    }
}

/// One request queue of a connection. A request lies in a slot: its first
/// bytes are passed, the others are in the slot's memory.
pub trait Transport: Send {
    /// `ring`, `virtqueue` or `socket`: what is really in use.
    fn name(&self) -> &'static str;

    /// How many slots there are.
    fn slots(&self) -> u32;

    /// A slot's memory, shared with the host, and its bytes.
    fn slot(&self, slot: u32) -> (*mut u8, usize);

    /// Submits a request; `false` when there is no room now. The caller owns
    /// `slot` again when its completion comes.
    ///
    /// # Errors
    /// [`Error`] when the queue cannot be used any more.
    fn submit(&mut self, slot: u32, head: &[u8], payload_len: u32, reply_max: u32) -> Result<bool, Error>;

    /// Takes one completion, if one is there.
    ///
    /// # Errors
    /// [`Error`] when the host broke the protocol or has gone.
    fn reap(&mut self) -> Result<Option<Completion>, Error>;

    /// Spins as the policy has it until a completion or `other` is there;
    /// `false`: go to sleep.
    fn spin(&mut self, other: &mut dyn FnMut() -> bool) -> bool;

    /// Asks the host to ring [`Self::fd`] from now on; `false` when a
    /// completion has come meanwhile. [`Self::awake`] ends it.
    fn announce_sleep(&mut self) -> bool;

    /// The sleep is over: no more rings are wanted. The bell itself is still to be [`Self::silence`]d, if whoever slept
    /// looks at its level.
    fn awake(&mut self);

    /// Takes past rings off the bell.
    fn silence(&self) {
        Eventfd::drain(self.fd());
    }

    /// The descriptor that becomes readable with completions, while asleep.
    fn fd(&self) -> BorrowedFd<'_>;

    /// The descriptor that hangs up when the host goes.
    fn hangup_fd(&self) -> BorrowedFd<'_>;

    /// Waits by the policy until a completion may be there.
    ///
    /// # Errors
    /// [`Error::HostGone`] as soon as the host is.
    fn wait(&mut self) -> Result<(), Error> {
        self.wait_within(PollTimeout::NONE)
    }

    /// The same, for no longer than this.
    ///
    /// # Errors
    /// Also [`Error::HostSilent`].
    fn wait_within(&mut self, limit: PollTimeout) -> Result<(), Error> {
        if self.spin(&mut || false) {
            return Ok(());
        }
        let slept = if self.announce_sleep() { sleep_on(self.fd(), self.hangup_fd(), limit) } else { Ok(()) };
        self.silence();
        self.awake();
        slept
    }

    /// How the waits ended so far.
    fn wait_counters(&self) -> Counters;

    /// Payload bytes that this side has copied in user space.
    fn copied(&self) -> u64;

    /// Whether the host works on this thread's core: then so do the applications whose requests this thread brings.
    fn shares_core(&self) -> bool {
        false
    }
}

/// Sleeps until `call_fd` rings.
///
/// # Errors
/// [`Error::HostGone`] when `hangup_fd` hangs up first.
fn sleep_on(bell: BorrowedFd<'_>, alive: BorrowedFd<'_>, limit: PollTimeout) -> Result<(), Error> {
    let mut fds = [PollFd::new(bell, PollFlags::POLLIN), PollFd::new(alive, PollFlags::POLLIN)];
    match poll(&mut fds, limit) {
        Err(nix::Error::EINTR) => Ok(()),
        Err(e) => Err(Error::Io(e.into())),
        Ok(0) => Err(Error::HostSilent),
        // A call comes first: what the host still answered is delivered.
        Ok(_) if fds[0].any() == Some(true) => Ok(()),
        // A stream that is its own bell may have become readable between poll's two looks: only a hang-up counts.
        Ok(_) if fds[1].revents().is_some_and(|r| r.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)) => {
            Err(Error::HostGone)
        }
        Ok(_) => Ok(()),
    }
}

/// Writes a reply's bytes back to where they were.
pub fn write_reply(transport: &dyn Transport, completion: &mut Completion, reply: &[u8]) {
    let start = completion.head_len - completion.inline().len();
    let inline = completion.inline().len();
    let end = completion.head_len;
    completion.head[start..end].copy_from_slice(&reply[..inline]);
    let (at, size) = transport.slot(completion.slot);
    let rest = &reply[inline..];
    assert!(rest.len() <= size);
    // SAFETY: the slot is ours again, and that large.
    unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), at, rest.len()) };
}

/// A private copy of a reply without its header.
pub fn reply_bytes(transport: &dyn Transport, done: &Completion) -> Vec<u8> {
    let mut body = done.inline().to_vec();
    let inline = body.len();
    body.resize(inline + done.payload_len, 0);
    let (ptr, _) = transport.slot(done.slot);
    // SAFETY: the transport has checked that the reply lies in the slot.
    unsafe { std::ptr::copy_nonoverlapping(ptr, body[inline..].as_mut_ptr(), done.payload_len) };
    body
}

/// Sends one request in slot 0 and waits for its answer. Only for a queue with nothing in flight.
///
/// # Errors
/// As [`Transport::submit`], [`Transport::reap`] and [`Transport::wait`].
pub fn call(t: &mut dyn Transport, head: &[u8], payload_len: u32, reply_max: u32) -> Result<Completion, Error> {
    call_within(t, head, payload_len, reply_max, PollTimeout::NONE)
}

/// The same, where the host may sleep for no longer than `limit`.
///
/// # Errors
/// Also [`Error::HostSilent`].
pub fn call_within(
    t: &mut dyn Transport,
    head: &[u8],
    payload_len: u32,
    reply_max: u32,
    limit: PollTimeout,
) -> Result<Completion, Error> {
    if !t.submit(0, head, payload_len, reply_max)? {
        return Err(Error::Protocol("no room in an idle queue"));
    }
    loop {
        if let Some(done) = t.reap()? {
            return Ok(done);
        }
        t.wait_within(limit)?;
    }
}
