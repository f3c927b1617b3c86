//! Whether file I/O may run on a queue's own thread, or would hold it up.
//!
//! A READ or WRITE is first tried with `RWF_NOWAIT`. Where a file system does
//! not know the flag, a file in memory (tmpfs) never waits for a device; other
//! READs go to the pool, and so do WRITEs for a while after one has been slow
//! (the kernel throttles whoever dirties pages faster than the device writes).

use parking_lot::RwLock;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// An inline WRITE that takes longer than this sends those after it to the pool.
const SLOW: Duration = Duration::from_millis(2);
/// For how long.
const PENALTY: Duration = Duration::from_secs(1);
/// Handles whose answers are remembered at a time.
const REMEMBERED: usize = 256;

/// What is remembered of a handle, in the low bits of its word: the answers that need no asking,
const IN_MEMORY: u64 = 1;
const UNKNOWN: u64 = 2;
/// or only that its device is known.
const MET: u64 = 3;

/// How a file answers `RWF_NOWAIT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nowait {
    /// It knows the flag, or has not been asked.
    Ask,
    /// It does not, and never waits for a device.
    InMemory,
    /// It does not.
    Unknown,
}

/// What has been learnt, by FUSE file handle (virtiofsd never reuses one).
pub struct Patience {
    answers: [AtomicU64; REMEMBERED],
    start: Instant,
    /// Whether devices are memory. A number may come to mean another device: a wrong guess costs time, no more.
    devices: RwLock<HashMap<u64, bool>>,
    /// Nanoseconds after `start` until which WRITEs go to the pool.
    slow_until: AtomicU64,
}

impl Patience {
    pub fn new() -> Self {
        Patience {
            answers: [const { AtomicU64::new(0) }; REMEMBERED],
            start: Instant::now(),
            devices: RwLock::default(),
            slow_until: 0.into(),
        }
    }

    /// Whether a device is memory, if that has been found out.
    pub fn in_memory(&self, device: u64) -> Option<bool> {
        self.devices.read().get(&device).copied()
    }

    /// Remembers whether a device is memory.
    pub fn learn(&self, device: u64, in_memory: bool) {
        self.devices.write().insert(device, in_memory);
    }

    /// How the file behind `handle` has answered.
    pub fn of(&self, handle: u64) -> Nowait {
        match self.kind(handle) {
            IN_MEMORY => Nowait::InMemory,
            UNKNOWN => Nowait::Unknown,
            _ => Nowait::Ask,
        }
    }

    /// Remembers that the file behind `handle` does not know the flag.
    pub fn refused(&self, handle: u64, in_memory: bool) -> Nowait {
        let (kind, answer) = if in_memory { (IN_MEMORY, Nowait::InMemory) } else { (UNKNOWN, Nowait::Unknown) };
        self.remember(handle, kind);
        answer
    }

    /// Remembers that the device behind `handle` is known.
    pub fn met(&self, handle: u64) {
        if !self.has_met(handle) {
            self.remember(handle, MET);
        }
    }

    /// Whether the device behind `handle` is known for sure.
    pub fn has_met(&self, handle: u64) -> bool {
        self.kind(handle) != 0
    }

    /// What is remembered of `handle`; 0: nothing.
    fn kind(&self, handle: u64) -> u64 {
        let word = self.place(handle).load(Ordering::Relaxed);
        if word >> 2 == handle {
            word & 3
        } else {
            0
        }
    }

    fn remember(&self, handle: u64, kind: u64) {
        self.place(handle).store(handle << 2 | kind, Ordering::Relaxed);
    }

    /// Whether WRITEs have lately been slow.
    pub fn writes_are_slow(&self) -> bool {
        let until = self.slow_until.load(Ordering::Relaxed);
        until != 0 && self.start.elapsed().as_nanos() < u128::from(until)
    }

    /// Runs an inline WRITE and watches how long it takes.
    pub fn watch<R>(&self, write: impl FnOnce() -> R) -> R {
        let begin = Instant::now();
        let result = write();
        if begin.elapsed() > SLOW {
            let until = self.start.elapsed() + PENALTY;
            self.slow_until.store(until.as_nanos() as u64, Ordering::Relaxed);
        }
        result
    }

    fn place(&self, handle: u64) -> &AtomicU64 {
        &self.answers[handle as usize % REMEMBERED]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_kept_by_handle() {
        let p = Patience::new();
        assert_eq!(p.of(0), Nowait::Ask);
        p.refused(7, true);
        assert_eq!(p.of(7), Nowait::InMemory);
        p.refused(7 + REMEMBERED as u64, false);
        assert_eq!((p.of(7), p.of(7 + REMEMBERED as u64)), (Nowait::Ask, Nowait::Unknown));
    }

    #[test]
    fn a_device_that_is_known_leaves_the_answer_open() {
        let p = Patience::new();
        assert!(!p.has_met(7));
        p.met(7);
        assert!(p.has_met(7) && p.of(7) == Nowait::Ask);
        p.refused(7, true);
        p.met(7);
        assert!(p.has_met(7) && p.of(7) == Nowait::InMemory);
    }

    #[test]
    fn a_slow_write_sends_the_next_ones_to_the_pool() {
        let p = Patience::new();
        p.watch(|| ());
        assert!(!p.writes_are_slow());
        p.watch(|| std::thread::sleep(2 * SLOW));
        assert!(p.writes_are_slow());
    }
}
