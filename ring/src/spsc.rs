//! One ring, one producer, one consumer, in two processes.
//!
//! Positions are free-running `u32`. The entry at position `p` is published by
//! storing `p + 1` into its sequence word: a word left from an earlier lap
//! differs by a multiple of the ring's size, and zeroed memory is position -1.

use crate::error::Error;
use crate::sync::{AtomicU32, Body, Entry, Ordering};

/// A shared word alone on its pair of cache lines (the prefetcher fetches pairs).
#[derive(Debug, Default)]
#[repr(C, align(128))]
pub struct CacheLine {
    pub(crate) word: AtomicU32,
    /// Of the device's wake-up line: where the device runs, a `PeerCpu`.
    pub(crate) peer_cpu: AtomicU32,
}

/// One ring entry: the sequence word and the message behind it.
#[derive(Debug)]
#[repr(C)]
pub struct Cell<T> {
    seq: AtomicU32,
    body: Body<T>,
}

#[cfg(loom)]
impl<T: Entry> Cell<T> {
    /// An entry as zeroed memory has it.
    pub fn new(body: T) -> Self {
        Cell { seq: AtomicU32::new(0), body: Body::new(body) }
    }
}

/// The half that publishes entries.
#[derive(Debug)]
pub struct Producer<T> {
    cells: *const Cell<T>,
    head: *const CacheLine,
    entries: u32,
    tail: u32,
    cached_head: u32,
}

/// The half that finds entries and publishes its head.
#[derive(Debug)]
pub struct Consumer<T> {
    cells: *const Cell<T>,
    head: *const CacheLine,
    entries: u32,
    next: u32,
}

// SAFETY: the pointers are to shared memory that both sides access only by
// atomics and whole-value volatile copies; one half may live on any one thread.
unsafe impl<T: Send> Send for Producer<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Consumer<T> {}

impl<T: Entry> Producer<T> {
    /// # Safety
    /// `cells` (`entries` of them, a power of two) and `head` must stay mapped
    /// as long as this lives, and no other producer may serve the ring.
    pub unsafe fn new(cells: *const Cell<T>, head: *const CacheLine, entries: u32) -> Self {
        debug_assert!(entries.is_power_of_two());
        Producer { cells, head, entries, tail: 0, cached_head: 0 }
    }

    /// For tests: puts the ring where it would be after `position` entries, before anybody uses it. The consumer must
    /// do the same.
    #[doc(hidden)]
    pub fn start_at(&mut self, position: u32) {
        for i in 0..self.entries {
            // The last lap's entries: zeroed memory would be right for position 0 alone.
            let last = position.wrapping_sub(self.entries).wrapping_add(i);
            // SAFETY: the masked index is in range, the cells are mapped by `new`'s contract.
            let cell = unsafe { &*self.cells.add((last & (self.entries - 1)) as usize) };
            cell.seq.store(last.wrapping_add(1), Ordering::Relaxed);
        }
        (self.tail, self.cached_head) = (position, position);
    }

    /// Publishes one entry; `false` when the ring is full.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the consumer's head lies out of range.
    pub fn push(&mut self, value: &T) -> Result<bool, Error> {
        if self.free()? == 0 {
            return Ok(false);
        }
        // SAFETY: the masked index is in range, the cells are mapped by `new`'s contract.
        unsafe {
            let cell = &*self.cells.add((self.tail & (self.entries - 1)) as usize);
            cell.body.set(value);
            self.tail = self.tail.wrapping_add(1);
            cell.seq.store(self.tail, Ordering::Release);
        }
        Ok(true)
    }

    /// Entries that can be pushed now. Reads the shared head only when the
    /// private copy says that the ring is full.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the consumer's head lies out of range.
    pub fn free(&mut self) -> Result<u32, Error> {
        if self.tail.wrapping_sub(self.cached_head) >= self.entries {
            // SAFETY: mapped by `new`'s contract.
            let head = unsafe { (*self.head).word.load(Ordering::Acquire) };
            if self.tail.wrapping_sub(head) > self.entries {
                return Err(Error::Corrupt("head out of range"));
            }
            self.cached_head = head;
        }
        Ok(self.entries - self.tail.wrapping_sub(self.cached_head))
    }
}

impl<T: Entry> Consumer<T> {
    /// # Safety
    /// As for [`Producer::new`]; `T` must be valid for any bit pattern.
    pub unsafe fn new(cells: *const Cell<T>, head: *const CacheLine, entries: u32) -> Self {
        debug_assert!(entries.is_power_of_two());
        Consumer { cells, head, entries, next: 0 }
    }

    /// For tests: as [`Producer::start_at`].
    #[doc(hidden)]
    pub fn start_at(&mut self, position: u32) {
        self.next = position;
        // SAFETY: mapped by `new`'s contract.
        unsafe { (*self.head).word.store(position, Ordering::Relaxed) };
    }

    /// Whether an entry waits.
    pub fn ready(&self) -> bool {
        self.cell().seq.load(Ordering::Acquire) == self.next.wrapping_add(1)
    }

    /// Copies the next entry out and frees its place.
    pub fn pop(&mut self) -> Option<T> {
        if !self.ready() {
            return None;
        }
        // SAFETY: mapped by `new`'s contract; any bit pattern is a valid `T`.
        let value = unsafe { self.cell().body.get() };
        self.next = self.next.wrapping_add(1);
        // SAFETY: mapped by `new`'s contract.
        unsafe { (*self.head).word.store(self.next, Ordering::Release) };
        Some(value)
    }

    fn cell(&self) -> &Cell<T> {
        // SAFETY: the masked index is in range, the cells are mapped by `new`'s
        // contract; a `Cell` is atomics and `UnsafeCell`s only.
        unsafe { &*self.cells.add((self.next & (self.entries - 1)) as usize) }
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::Arc;

    // SAFETY: one integer; a model copies it as a whole.
    unsafe impl Entry for u32 {
        fn fits_first_line(&self) -> bool {
            true
        }
    }

    struct Ring {
        cells: Vec<Cell<u32>>,
        head: CacheLine,
    }

    /// Three entries cross a ring of two, from `position` on.
    fn cross(position: u32) {
        loom::model(move || {
            let ring = Arc::new(Ring { cells: (0..2).map(|_| Cell::new(0)).collect(), head: CacheLine::default() });
            // SAFETY: the `Arc`s keep the memory alive for both halves.
            let mut tx = unsafe { Producer::new(ring.cells.as_ptr(), &ring.head, 2) };
            // SAFETY: as above.
            let mut rx = unsafe { Consumer::new(ring.cells.as_ptr(), &ring.head, 2) };
            if position != 0 {
                tx.start_at(position);
                rx.start_at(position);
            }
            let other = ring.clone();
            let producer = loom::thread::spawn(move || {
                let _alive = other;
                let mut next = 7;
                while next < 10 {
                    match tx.push(&next).unwrap() {
                        true => next += 1,
                        false => loom::thread::yield_now(),
                    }
                }
            });
            for expected in 7..10 {
                loop {
                    match rx.pop() {
                        Some(v) => break assert_eq!(v, expected),
                        None => loom::thread::yield_now(),
                    }
                }
            }
            assert!(rx.pop().is_none());
            producer.join().unwrap();
        });
    }

    #[test]
    fn entries_arrive_whole_and_in_order() {
        cross(0);
    }

    /// Positions u32::MAX - 1, u32::MAX and 0.
    #[test]
    fn entries_cross_the_last_position() {
        cross(u32::MAX - 1);
    }

    /// Positions u32::MAX, 0 and 1.
    #[test]
    fn entries_begin_at_the_last_position() {
        cross(u32::MAX);
    }
}
