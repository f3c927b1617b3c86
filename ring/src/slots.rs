//! Which payload slots are free: the guest's private knowledge.

/// The free slots of one queue, most recently used first (its lines are warm).
#[derive(Debug)]
pub struct SlotPool(Vec<u32>);

impl SlotPool {
    /// All of `count` slots free.
    pub fn new(count: u32) -> Self {
        SlotPool((0..count).rev().collect())
    }

    /// Takes a free slot, if there is one.
    pub fn alloc(&mut self) -> Option<u32> {
        self.0.pop()
    }

    /// Gives a slot back.
    pub fn free(&mut self, slot: u32) {
        debug_assert!(!self.0.contains(&slot));
        self.0.push(slot);
    }

    /// How many are free.
    pub fn available(&self) -> usize {
        self.0.len()
    }
}
