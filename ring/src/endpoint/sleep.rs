//! What both ends sleep on, and how they are told apart.

use crate::error::Error;
use crate::notify::{Eventfd, NeedWakeup};
use crate::wait::{Parker, Wait};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Numbers the ends of this process: slots and requests tell by it whose they are.
pub(super) fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// When a time is over; `None`: never, also where it is beyond what the clock can tell.
pub(super) fn deadline(timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| Instant::now().checked_add(timeout))
}

/// Takes what there is at `end`, and waits for it until the deadline as often as it must.
///
/// # Errors
/// Those of `take` and `wait`.
#[inline]
pub(super) fn take_until<E, T>(
    end: &mut E,
    deadline: Option<Instant>,
    take: impl Fn(&mut E) -> Result<Option<T>, Error>,
    wait: impl Fn(&mut E, Option<Instant>) -> Result<(), Error>,
) -> Result<T, Error> {
    loop {
        if let Some(taken) = take(end)? {
            return Ok(taken);
        }
        wait(end, deadline)?;
    }
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

/// Looks of a spin between two reads of the clock, where there is a deadline (1 to 5 us).
const LOOKS_PER_CLOCK: u32 = 64;
/// Looks of a spin between two looks at the peer's process (0.3 to 1 ms).
const LOOKS_PER_PEER: u32 = 1 << 14;

/// One wait of an end, for [`Parker`]. A spin of it ends at the deadline too, and soon after the peer.
pub(super) struct Sleep<'a, R> {
    ready: R,
    flag: &'a NeedWakeup,
    fds: &'a Notification,
    deadline: Option<Instant>,
    looks: Cell<u32>,
    /// Why the spin has ended, if nothing was ready.
    ended: Cell<Option<Error>>,
}

impl<'a, R: Fn() -> bool> Sleep<'a, R> {
    #[inline]
    pub fn new(ready: R, flag: &'a NeedWakeup, fds: &'a Notification, deadline: Option<Instant>) -> Self {
        Sleep { ready, flag, fds, deadline, looks: Cell::new(0), ended: Cell::new(None) }
    }

    /// Waits as `parker` says.
    ///
    /// # Errors
    /// [`Error::TimedOut`], [`Error::PeerGone`], or the system's.
    #[inline]
    pub fn wait(mut self, parker: &mut Parker) -> Result<(), Error> {
        parker.wait(&mut self)?;
        match self.ended.take() {
            Some(error) if !(self.ready)() => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether the wait is over though nothing is ready. Looks only now and then.
    fn is_over(&self) -> bool {
        let looks = self.looks.get().wrapping_add(1);
        self.looks.set(looks);
        if looks % LOOKS_PER_CLOCK == 0 && self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            self.ended.set(Some(Error::TimedOut));
            return true;
        }
        let gone = looks % LOOKS_PER_PEER == 0 && self.peer_is_gone();
        if gone {
            self.ended.set(Some(Error::PeerGone));
        }
        gone
    }

    fn peer_is_gone(&self) -> bool {
        let mut fds = [PollFd::new(self.fds.alive.as_fd(), PollFlags::empty())];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
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
        (self.ready)() || self.is_over()
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
                Ok(_) if fds[0].any() == Some(true) || (self.ready)() => return Ok(()),
                Ok(_) => return Err(Error::PeerGone),
            }
        }
    }

    fn disarm(&mut self) {
        self.flag.clear();
        Eventfd::drain(&self.fds.own);
    }
}
