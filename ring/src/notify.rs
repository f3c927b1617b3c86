//! Notifying a peer that sleeps, without losing a wake-up.
//!
//! The sleeper sets its flag, fences, looks for work once more, then sleeps on its eventfd. The waker publishes, fences,
//! reads the flag, and signals the eventfd only when it is set. One of the two fences comes first: either the sleeper's
//! second look sees the entry, or the waker sees the flag.

#[cfg(not(loom))]
use crate::error::Error;
use crate::spsc::CacheLine;
use crate::sync::{fence, Ordering};
#[cfg(not(loom))]
use nix::fcntl::{fcntl, FcntlArg, OFlag};
#[cfg(not(loom))]
use nix::sys::eventfd::{EfdFlags, EventFd};
#[cfg(not(loom))]
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Where the device says that it runs, relative to the driver. No more than advice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum PeerCpu {
    /// Not known.
    #[default]
    Unknown = 0,
    /// On a core of its own.
    Other = 1,
    /// On the driver's core: while the driver spins, the device cannot run.
    Same = 2,
}

/// A word in shared memory that says that its side sleeps and wants a notification (io_uring's `NEED_WAKEUP`).
#[derive(Debug)]
pub struct NeedWakeup(*const CacheLine);

// SAFETY: only atomic accesses are made through the pointer.
unsafe impl Send for NeedWakeup {}
// SAFETY: as above.
unsafe impl Sync for NeedWakeup {}

impl NeedWakeup {
    /// # Safety
    /// `line` must stay mapped as long as this lives.
    pub unsafe fn new(line: *const CacheLine) -> Self {
        NeedWakeup(line)
    }

    #[inline]
    fn line(&self) -> &CacheLine {
        // SAFETY: mapped by `new`'s contract; a line is atomics only.
        unsafe { &*self.0 }
    }

    #[inline]
    fn word(&self) -> &crate::sync::AtomicU32 {
        &self.line().word
    }

    /// Tells the peer where this side runs.
    pub fn set_peer_cpu(&self, cpu: PeerCpu) {
        self.line().peer_cpu.store(cpu as u32, Ordering::Relaxed);
    }

    /// Returns where this side says that it runs.
    #[inline]
    pub fn peer_cpu(&self) -> PeerCpu {
        match self.line().peer_cpu.load(Ordering::Relaxed) {
            1 => PeerCpu::Other,
            2 => PeerCpu::Same,
            _ => PeerCpu::Unknown,
        }
    }

    /// Sleeper: sets the flag. Look for work once more before sleeping.
    #[inline]
    pub fn set(&self) {
        self.word().store(1, Ordering::Relaxed);
        // Pairs with the fence in `take`: the flag is set before the second look.
        fence(Ordering::SeqCst);
    }

    /// Sleeper: clears the flag after the sleep.
    #[inline]
    pub fn clear(&self) {
        self.word().store(0, Ordering::Relaxed);
    }

    /// Waker, after publishing: clears the flag. Returns `true` when the sleeper must be notified, once per sleep.
    #[inline]
    pub fn take(&self) -> bool {
        // Pairs with the fence in `set`: the entry is published before the flag is read.
        fence(Ordering::SeqCst);
        self.word().load(Ordering::Relaxed) != 0 && self.word().swap(0, Ordering::AcqRel) != 0
    }
}

/// What both sides do with an eventfd: kick the device, call the driver.
#[cfg(not(loom))]
#[derive(Debug)]
pub enum Eventfd {}

#[cfg(not(loom))]
impl Eventfd {
    /// Creates a non-blocking eventfd.
    ///
    /// # Errors
    /// [`Error::Os`] when the process has no descriptor left.
    #[allow(clippy::new_ret_no_self)]
    pub fn new() -> Result<OwnedFd, Error> {
        EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map(OwnedFd::from)
            .map_err(|e| Error::Os { what: "eventfd".into(), source: e.into() })
    }

    /// Checks that a peer's descriptor is an eventfd, and makes it non-blocking.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is something else: reading or writing that might block, or do harm.
    pub fn check(fd: impl AsFd) -> Result<(), Error> {
        let link = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
        let kind = std::fs::read_link(link).map_err(|source| Error::Os { what: "/proc/self/fd".into(), source })?;
        if kind.as_os_str() != "anon_inode:[eventfd]" {
            return Err(Error::Corrupt("a descriptor that is not an eventfd"));
        }
        fcntl(fd, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))
            .map(drop)
            .map_err(|e| Error::Os { what: "F_SETFL of an eventfd".into(), source: e.into() })
    }

    /// Signals an eventfd. Nothing is lost where its counter is full: it is readable then.
    pub fn signal(fd: impl AsFd) {
        let _ = nix::unistd::write(fd, &1u64.to_ne_bytes());
    }

    /// Resets a non-blocking eventfd's counter.
    pub fn drain(fd: impl AsFd) {
        let _ = nix::unistd::read(fd, &mut [0; 8]);
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use crate::sync::AtomicU32;
    use loom::sync::Arc;

    struct Shared {
        flag: CacheLine,
        entry: AtomicU32,
        bell: AtomicU32,
    }

    #[test]
    fn no_wake_up_is_lost() {
        loom::model(|| {
            let s = Arc::new(Shared { flag: CacheLine::default(), entry: AtomicU32::new(0), bell: AtomicU32::new(0) });
            let waker = {
                let s = s.clone();
                loom::thread::spawn(move || {
                    // SAFETY: the `Arc` keeps the line alive.
                    let flag = unsafe { NeedWakeup::new(&s.flag) };
                    s.entry.store(1, Ordering::Release);
                    if flag.take() {
                        s.bell.store(1, Ordering::Release);
                    }
                })
            };
            // SAFETY: the `Arc` keeps the line alive.
            let flag = unsafe { NeedWakeup::new(&s.flag) };
            flag.set();
            let slept = s.entry.load(Ordering::Acquire) == 0;
            waker.join().unwrap();
            // Whoever went to sleep must have been rung by the time the waker is done.
            assert!(!slept || s.bell.load(Ordering::Acquire) == 1);
        });
    }
}
