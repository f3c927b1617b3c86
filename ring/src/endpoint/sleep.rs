//! What both ends sleep on, and how they are told apart.

use crate::error::Error;
use crate::notify::{Eventfd, NeedWakeup};
use crate::wait::Wait;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Numbers the ends of this process: slots and requests tell by it whose they are.
pub(super) fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// What one end sleeps on.
#[derive(Debug)]
pub(super) struct Notification {
    /// Signalled by the peer when there is something for this end.
    pub own: OwnedFd,
    /// Signalled by this end.
    pub peer: OwnedFd,
    /// Hangs up when the peer's process ends, or drops its end.
    pub alive: OwnedFd,
}

/// One wait of an end, for [`crate::Parker`].
pub(super) struct Sleep<'a, R> {
    ready: R,
    flag: &'a NeedWakeup,
    fds: &'a Notification,
    deadline: Option<Instant>,
}

impl<'a, R: Fn() -> bool> Sleep<'a, R> {
    #[inline]
    pub fn new(ready: R, flag: &'a NeedWakeup, fds: &'a Notification, timeout: Option<Duration>) -> Self {
        // A timeout beyond what the clock can tell is none.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        Sleep { ready, flag, fds, deadline }
    }

    /// The time left, rounded up to a millisecond; `None` when it is over.
    fn time_left(&self) -> Option<PollTimeout> {
        let Some(deadline) = self.deadline else { return Some(PollTimeout::NONE) };
        let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
        Some(PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX))
    }
}

impl<R: Fn() -> bool> Wait for Sleep<'_, R> {
    type Error = Error;

    fn ready(&self) -> bool {
        (self.ready)()
    }

    fn arm(&mut self) {
        self.flag.set();
    }

    fn sleep(&mut self) -> Result<(), Error> {
        loop {
            let timeout = self.time_left().ok_or(Error::TimedOut)?;
            let mut fds = [
                PollFd::new(self.fds.own.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.fds.alive.as_fd(), PollFlags::empty()),
            ];
            match poll(&mut fds, timeout) {
                Err(nix::Error::EINTR) | Ok(0) => {}
                Err(e) => return Err(Error::Os { what: "poll".into(), source: e.into() }),
                // What the peer published before it died is delivered first.
                Ok(_) if fds[0].any() == Some(true) || self.ready() => return Ok(()),
                Ok(_) => return Err(Error::PeerGone),
            }
        }
    }

    fn disarm(&mut self) {
        self.flag.clear();
        Eventfd::drain(&self.fds.own);
    }
}
