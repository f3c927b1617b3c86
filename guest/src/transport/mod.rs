//! The driver side of a transport, as a FUSE channel or a benchmark uses it.

use crate::error::Error;
use crate::fuse::message::{parse_reply_header, OUT_HEADER};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::os::fd::BorrowedFd;
use tunnelfs_ring::{Counters, Eventfd, CQE_INLINE_BYTES};

pub mod ring;
pub mod socket;
pub mod virtqueue;

/// A completed request.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// The request's slot, which the submitter owns again.
    pub slot: u32,
    /// `fuse_out_header`, and for a ring the first bytes of the reply, if any.
    pub head: [u8; CQE_INLINE_BYTES],
    /// Valid bytes of `head`.
    pub head_len: usize,
    /// Number of reply bytes that follow, in the slot.
    pub payload_len: usize,
}

impl Completion {
    /// Returns the host's error: 0 or a negative errno, but not checked.
    pub fn error(&self) -> i32 {
        parse_reply_header(&self.head).1
    }

    /// Returns the reply bytes of `head`, without the header.
    pub fn inline(&self) -> &[u8] {
        &self.head[OUT_HEADER..self.head_len]
    }
}

/// One request queue of a connection. Each request uses a slot: its first bytes are passed to [`Self::submit`], the
/// others are in the slot's memory.
pub trait Transport: Send {
    /// Returns the transport in use: `ring`, `virtqueue` or `socket`.
    fn name(&self) -> &'static str;

    /// Number of slots.
    fn slots(&self) -> u32;

    /// Returns a slot's memory and its size in bytes. The host may access it while the request is in flight.
    fn slot(&self, slot: u32) -> (*mut u8, usize);

    /// Submits a request. `head` is its first bytes, `payload_len` the number of bytes in the slot, and `reply_max` the
    /// most reply bytes that the host may write to the slot. Returns `true` if it is submitted: the host owns `slot`
    /// until the completion. `false` if there is no room now.
    ///
    /// # Errors
    /// [`Error::HostGone`], or another error if the queue cannot be used any more.
    fn submit(&mut self, slot: u32, head: &[u8], payload_len: u32, reply_max: u32) -> Result<bool, Error>;

    /// Takes one completion; `None` if there is none now.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the host broke the protocol, [`Error::HostGone`] if it has died.
    fn reap(&mut self) -> Result<Option<Completion>, Error>;

    /// Spins, by the wait policy. Returns `true` if there may be a completion or `other` has returned `true`; `false`
    /// if the caller should sleep.
    fn spin(&mut self, other: &mut dyn FnMut() -> bool) -> bool;

    /// Asks the host to signal [`Self::fd`] from now on, until [`Self::awake`]. Returns `false` if there is a
    /// completion already: the caller must not sleep.
    fn announce_sleep(&mut self) -> bool;

    /// Ends [`Self::announce_sleep`]: the host need not signal [`Self::fd`] any more. A caller that polls its level
    /// must also call [`Self::drain_call`].
    fn awake(&mut self);

    /// Drains the call eventfd, [`Self::fd`].
    fn drain_call(&self) {
        Eventfd::drain(self.fd());
    }

    /// Returns the descriptor that becomes readable with a completion, after [`Self::announce_sleep`].
    fn fd(&self) -> BorrowedFd<'_>;

    /// Returns the descriptor that hangs up when the host dies.
    fn hangup_fd(&self) -> BorrowedFd<'_>;

    /// Waits by the wait policy until there may be a completion.
    ///
    /// # Errors
    /// [`Error::HostGone`] if the host has died.
    fn wait(&mut self) -> Result<(), Error> {
        self.wait_within(PollTimeout::NONE)
    }

    /// As [`Self::wait`], but sleeps for at most `limit`.
    ///
    /// # Errors
    /// Also [`Error::HostSilent`] after `limit`.
    fn wait_within(&mut self, limit: PollTimeout) -> Result<(), Error> {
        if self.spin(&mut || false) {
            return Ok(());
        }
        let slept = if self.announce_sleep() { sleep_on(self.fd(), self.hangup_fd(), limit) } else { Ok(()) };
        self.drain_call();
        self.awake();
        slept
    }

    /// Returns how the waits have ended so far.
    fn wait_counters(&self) -> Counters;

    /// Number of payload bytes that this side has copied in user space.
    fn copied(&self) -> u64;

    /// Returns `true` if the host runs on this thread's core. The applications then probably run there too.
    fn on_peer_core(&self) -> bool {
        false
    }
}

/// Sleeps until the call descriptor is readable, for at most `limit`.
///
/// # Errors
/// [`Error::HostGone`] if the host hangs up first; [`Error::HostSilent`] after `limit`.
fn sleep_on(call: BorrowedFd<'_>, hangup: BorrowedFd<'_>, limit: PollTimeout) -> Result<(), Error> {
    let mut fds = [PollFd::new(call, PollFlags::POLLIN), PollFd::new(hangup, PollFlags::POLLIN)];
    match poll(&mut fds, limit) {
        Err(nix::Error::EINTR) => Ok(()),
        Err(e) => Err(Error::Io(e.into())),
        Ok(0) => Err(Error::HostSilent),
        // The call descriptor comes first, so that a dead host's last completions are taken.
        Ok(_) if fds[0].any() == Some(true) => Ok(()),
        // A socket is in both places, and may have become readable between poll's two checks: only a hang-up counts.
        Ok(_) if fds[1].revents().is_some_and(|r| r.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)) => {
            Err(Error::HostGone)
        }
        Ok(_) => Ok(()),
    }
}

/// Writes the bytes of [`reply_bytes`] back to the completion and its slot. Their number must not have changed.
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

/// Returns a private copy of a reply without its header.
pub fn reply_bytes(transport: &dyn Transport, done: &Completion) -> Vec<u8> {
    let mut body = done.inline().to_vec();
    let inline = body.len();
    body.resize(inline + done.payload_len, 0);
    let (ptr, _) = transport.slot(done.slot);
    // SAFETY: the transport has checked that the reply lies in the slot.
    unsafe { std::ptr::copy_nonoverlapping(ptr, body[inline..].as_mut_ptr(), done.payload_len) };
    body
}

/// Sends one request in slot 0 and waits for its completion. Only for a queue with no request in flight.
///
/// # Errors
/// As [`Transport::submit`], [`Transport::reap`] and [`Transport::wait`].
pub fn call(t: &mut dyn Transport, head: &[u8], payload_len: u32, reply_max: u32) -> Result<Completion, Error> {
    call_within(t, head, payload_len, reply_max, PollTimeout::NONE)
}

/// As [`call`], but each sleep takes at most `limit`.
///
/// # Errors
/// Also [`Error::HostSilent`] after `limit`.
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
