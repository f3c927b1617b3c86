//! Payload slots: which are free (the driver's knowledge), and where they lie (the device's, checked).

use crate::error::Error;
use crate::layout::{Sqe, NO_SLOT};
use std::ptr::NonNull;

/// The free slots of one queue, most recently used first: their cache lines are warm.
#[derive(Debug)]
pub struct SlotPool(Vec<u32>);

impl SlotPool {
    /// Creates a pool in which all of `count` slots are free.
    pub fn new(count: u32) -> Self {
        SlotPool((0..count).rev().collect())
    }

    /// Takes a free slot; `None` when all are in use.
    #[inline]
    pub fn alloc(&mut self) -> Option<u32> {
        self.0.pop()
    }

    /// Gives a slot back.
    #[inline]
    pub fn free(&mut self, slot: u32) {
        debug_assert!(!self.0.contains(&slot));
        self.0.push(slot);
    }

    /// Returns how many are free.
    pub fn available(&self) -> usize {
        self.0.len()
    }
}

/// The payload slots as the device sees them: every number is checked.
#[derive(Debug)]
pub struct SlotTable {
    slots: Vec<*mut u8>,
    slot_size: u32,
}

// SAFETY: the pointers are only handed out as such.
unsafe impl Send for SlotTable {}

impl SlotTable {
    /// Creates the table of slots that start at `slots`, each of `slot_size` bytes.
    pub(crate) fn new(slots: Vec<*mut u8>, slot_size: u32) -> Self {
        SlotTable { slots, slot_size }
    }

    /// Returns where a submission's slot starts (dangling for [`NO_SLOT`]), after checking all lengths of the
    /// submission against the slot and the entry.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the number or a length is out of range.
    #[inline]
    pub fn get(&self, sqe: &Sqe) -> Result<*mut u8, Error> {
        let (size, start) = match self.slots.get(sqe.slot as usize) {
            Some(&start) => (self.slot_size, start),
            None if sqe.slot == NO_SLOT => (0, NonNull::dangling().as_ptr()),
            None => return Err(Error::Corrupt("slot number out of range")),
        };
        if sqe.payload_len > size || sqe.reply_max > size {
            return Err(Error::Corrupt("payload longer than its slot"));
        }
        if sqe.inline_len as usize > sqe.inline.len() {
            return Err(Error::Corrupt("inline bytes longer than their entry"));
        }
        Ok(start)
    }
}
