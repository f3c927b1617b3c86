//! Sleeping without losing a wake-up.
//!
//! The sleeper sets its flag, fences, looks once more, then sleeps on its
//! eventfd; the waker publishes, fences, looks at the flag and rings only when
//! it is set. Of the two fences one comes first: either the sleeper's second
//! look sees the entry, or the waker sees the flag.

use crate::spsc::CacheLine;
use crate::sync::{fence, Ordering};

/// What a side that knows where it runs tells its peer about waiting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum PeerCpu {
    /// Nothing: find out.
    #[default]
    None = 0,
    /// "I have a core of my own."
    Spin = 1,
    /// "I run on your core: while you spin, I cannot."
    Share = 2,
}

/// One side's "I am about to sleep" word in shared memory.
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

    fn line(&self) -> &CacheLine {
        // SAFETY: mapped by `new`'s contract; a line is atomics only.
        unsafe { &*self.0 }
    }

    fn word(&self) -> &crate::sync::AtomicU32 {
        &self.line().word
    }

    /// Tells the peer how to wait for this side.
    pub fn set_peer_cpu(&self, hint: PeerCpu) {
        self.line().hint.store(hint as u32, Ordering::Relaxed);
    }

    /// How this side says it is best waited for: no more than advice.
    pub fn peer_cpu(&self) -> PeerCpu {
        match self.line().hint.load(Ordering::Relaxed) {
            1 => PeerCpu::Other,
            2 => PeerCpu::Same,
            _ => PeerCpu::Unknown,
        }
    }

    /// Sleeper: announces the sleep. Look for work once more before sleeping.
    pub fn set(&self) {
        self.word().store(1, Ordering::Relaxed);
        // Pairs with the fence in `take`: flag before second look.
        fence(Ordering::SeqCst);
    }

    /// Sleeper: is awake again.
    pub fn clear(&self) {
        self.word().store(0, Ordering::Relaxed);
    }

    /// Waker, after publishing: whether the bell must be rung (once per sleep).
    pub fn take(&self) -> bool {
        // Pairs with the fence in `set`: entry before the flag's look.
        fence(Ordering::SeqCst);
        self.word().load(Ordering::Relaxed) != 0 && self.word().swap(0, Ordering::AcqRel) != 0
    }
}

#[cfg(not(loom))]
mod bell {
    use crate::Error;
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::os::fd::{AsFd, OwnedFd};

    /// A new non-blocking doorbell.
    ///
    /// # Errors
    /// [`Error::Os`] when the process has no descriptor left.
    pub fn Eventfd::new() -> Result<OwnedFd, Error> {
        EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map(OwnedFd::from)
            .map_err(|e| Error::Os { what: "eventfd".into(), source: e.into() })
    }

    /// Rings a doorbell. A saturated counter already wakes the sleeper.
    pub fn Eventfd::signal(fd: impl AsFd) {
        let _ = nix::unistd::write(fd, &1u64.to_ne_bytes());
    }

    /// Takes all rings off a non-blocking doorbell.
    pub fn Eventfd::drain(fd: impl AsFd) {
        let _ = nix::unistd::read(fd, &mut [0; 8]);
    }
}
#[cfg(not(loom))]
pub use bell::{drain, new_eventfd, ring_bell};

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
