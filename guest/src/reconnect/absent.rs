//! What stands for a host while there is none.

use crate::error::Error;
use crate::transport::{Completion, Transport};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;
use tunnelfs_ring::Counters;

/// How often whoever waits looks whether there is a host.
pub const TICK: Duration = Duration::from_millis(25);

/// Takes no request, gives no answer, and rings at each [`TICK`] of a sleep.
pub struct Absent {
    name: &'static str,
    slots: Vec<(*mut u8, usize)>,
    waits: Counters,
    copied: u64,
    tick: TimerFd,
}

// SAFETY: the pointers are only handed out as such.
unsafe impl Send for Absent {}

impl Absent {
    /// In place of a transport whose host has gone. Its slots must stay mapped as long as this lives.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn of(gone: &dyn Transport) -> std::io::Result<Self> {
        let slots = (0..gone.slots()).map(|slot| gone.slot(slot)).collect();
        Ok(Absent { name: gone.name(), slots, waits: gone.wait_counters(), copied: gone.copied(), tick: timer()? })
    }
}

fn timer() -> nix::Result<TimerFd> {
    TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)
}

impl Transport for Absent {
    fn name(&self) -> &'static str {
        self.name
    }

    fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    fn slot(&self, slot: u32) -> (*mut u8, usize) {
        self.slots[slot as usize]
    }

    fn submit(&mut self, _slot: u32, _head: &[u8], _payload_len: u32, _reply_max: u32) -> Result<bool, Error> {
        Ok(false)
    }

    fn reap(&mut self) -> Result<Option<Completion>, Error> {
        Ok(None)
    }

    fn spin(&mut self, other: &mut dyn FnMut() -> bool) -> bool {
        other()
    }

    fn announce_sleep(&mut self) -> bool {
        let often = Expiration::Interval(TimeSpec::from_duration(TICK));
        // Without a clock there is no sleep.
        self.tick.set(often, TimerSetTimeFlags::empty()).is_ok()
    }

    fn awake(&mut self) {
        let _ = self.tick.unset();
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.tick.as_fd()
    }

    fn hangup_fd(&self) -> BorrowedFd<'_> {
        self.tick.as_fd()
    }

    fn wait_counters(&self) -> Counters {
        self.waits
    }

    fn copied(&self) -> u64 {
        self.copied
    }
}
