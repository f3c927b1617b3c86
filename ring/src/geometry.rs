//! The sizes of one queue, and where its parts lie.

use crate::error::Error;
use crate::layout::{Cqe, Sqe, PAGE};
use crate::spsc::{CacheLine, Cell};

/// Most entries that a ring may have.
pub const MAX_ENTRIES: u32 = 1 << 15;
/// Largest payload slot, bytes.
pub const MAX_SLOT_SIZE: u32 = 16 << 20;

/// The sizes of one queue; both sides derive every offset from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Entries of each ring: a power of two from 2 to [`MAX_ENTRIES`].
    pub entries: u32,
    /// Payload slots, 1 to `entries`: the most requests in flight. Their memory is taken when they are used first.
    pub slots: u32,
    /// Bytes of each slot: whole pages.
    pub slot_size: u32,
}

const HEAD_LINES: usize = 4;

impl Geometry {
    /// Checks the sizes.
    ///
    /// # Errors
    /// [`Error::Geometry`] names the setting, its value and what is allowed.
    pub fn check(&self) -> Result<(), Error> {
        let refuse = |key, value: u32, allowed: String| Err(Error::Geometry { key, value: value.into(), allowed });
        if !self.entries.is_power_of_two() || !(2..=MAX_ENTRIES).contains(&self.entries) {
            return refuse("entries", self.entries, format!("must be a power of two from 2 to {MAX_ENTRIES}"));
        }
        if !(1..=self.entries).contains(&self.slots) {
            return refuse("slots", self.slots, format!("must be from 1 to entries ({})", self.entries));
        }
        if !(PAGE as u32..=MAX_SLOT_SIZE).contains(&self.slot_size) || self.slot_size as usize % PAGE != 0 {
            return refuse(
                "slot_size",
                self.slot_size,
                format!("must be a multiple of {PAGE} from {PAGE} to {MAX_SLOT_SIZE} bytes"),
            );
        }
        Ok(())
    }

    pub(crate) fn sq_head(&self) -> usize {
        0
    }

    pub(crate) fn cq_head(&self) -> usize {
        size_of::<CacheLine>()
    }

    pub(crate) fn device_wakeup(&self) -> usize {
        2 * size_of::<CacheLine>()
    }

    pub(crate) fn driver_wakeup(&self) -> usize {
        3 * size_of::<CacheLine>()
    }

    pub(crate) fn sqes(&self) -> usize {
        HEAD_LINES * size_of::<CacheLine>()
    }

    pub(crate) fn cqes(&self) -> usize {
        self.sqes() + self.entries as usize * size_of::<Cell<Sqe>>()
    }

    /// Bytes of all but the slots: whole pages.
    pub fn control_bytes(&self) -> usize {
        (self.cqes() + self.entries as usize * size_of::<Cell<Cqe>>()).next_multiple_of(PAGE)
    }

    /// Bytes of the whole queue: whole pages.
    pub fn bytes(&self) -> usize {
        self.control_bytes() + self.slots as usize * self.slot_size as usize
    }
}
