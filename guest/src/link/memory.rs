//! Layout of a link's memory: the parts of each queue.

use crate::config::GuestConfig;
use crate::error::Error;
use crate::split_queue::memory_bytes;
use tunnelfs_ring::{Geometry, PAGE};

/// Most entries of a virtqueue.
const MAX_SIZE: u32 = 1024;
/// Bytes of the buffer for a set-up that must not overwrite the slots: after a reconnect they hold requests that are
/// still to be sent.
pub const SETUP_BUFFER: usize = PAGE;

/// The parts of one queue.
#[derive(Debug)]
pub struct QueueMemory {
    /// Number and size of the slots, and entries of the ring.
    pub geometry: Geometry,
    /// Number of entries of the virtqueue.
    pub size: u16,
    /// The virtqueue, with its headers behind it.
    pub virtqueue: *mut u8,
    /// The ring without its slots.
    pub control: *mut u8,
    /// The set-up buffer, [`SETUP_BUFFER`] bytes.
    pub scratch: *mut u8,
    slots: Vec<*mut u8>,
}

// SAFETY: the pointers are only passed on; `clear`, which writes through them, is unsafe.
unsafe impl Send for QueueMemory {}
// SAFETY: as above.
unsafe impl Sync for QueueMemory {}

impl QueueMemory {
    /// Allocates the parts of a queue from `memory`. Its virtqueue has at most `max_size` entries.
    ///
    /// # Errors
    /// [`Error::Setup`] if the memory is too fragmented.
    pub fn new(memory: &mut RegionAllocator<'_>, geometry: Geometry, max_size: u16) -> Result<Self, Error> {
        let size = virtqueue_size(geometry).min(max_size);
        Ok(QueueMemory {
            geometry,
            size,
            virtqueue: memory.take(memory_bytes(size))?,
            control: memory.take(geometry.control_bytes())?,
            scratch: memory.take(SETUP_BUFFER)?,
            slots: (0..geometry.slots).map(|_| memory.take(geometry.slot_size as usize)).collect::<Result<_, _>>()?,
        })
    }

    /// Zeroes the virtqueue and the ring for another host. Leaves the slots as they are.
    ///
    /// # Safety
    /// The memory must be mapped, and this side must not use the virtqueue or the ring.
    pub unsafe fn clear(&self) {
        // SAFETY: the parts have these lengths, by `new`; by this function's contract they are mapped and not in use.
        unsafe {
            self.virtqueue.write_bytes(0, memory_bytes(self.size));
            self.control.write_bytes(0, self.geometry.control_bytes());
        }
    }

    /// Returns a slot's memory and its size in bytes.
    pub fn slot(&self, slot: u32) -> (*mut u8, usize) {
        (self.slots[slot as usize], self.geometry.slot_size as usize)
    }
}

/// Returns the number of entries of a queue's virtqueue: four descriptors per slot.
fn virtqueue_size(geometry: Geometry) -> u16 {
    (geometry.slots * 4).next_power_of_two().clamp(4, MAX_SIZE) as u16
}

/// Allocates memory in ascending order. No part crosses from one segment (contiguous for the device) into the next.
pub struct RegionAllocator<'a> {
    base: *mut u8,
    at: usize,
    /// Returns the end of the segment at an offset; `None` behind the last segment.
    segment_end: &'a dyn Fn(usize) -> Option<usize>,
}

impl<'a> RegionAllocator<'a> {
    /// Starts at `base`, which must be page-aligned.
    pub fn new(base: *mut u8, segment_end: &'a dyn Fn(usize) -> Option<usize>) -> Self {
        RegionAllocator { base, at: 0, segment_end }
    }

    /// Number of bytes that queues need if segments end only at multiples of `piece` bytes.
    pub fn measure(geometries: &[Geometry], piece: usize) -> usize {
        // A part longer than `piece` may get contiguous pieces: reserve these.
        let end = |at: usize| Some((at + 1).next_multiple_of(piece));
        let mut carver = RegionAllocator::new(std::ptr::null_mut(), &end);
        for &g in geometries {
            let parts = [memory_bytes(virtqueue_size(g)), g.control_bytes(), SETUP_BUFFER];
            for bytes in parts.into_iter().chain(vec![g.slot_size as usize; g.slots as usize]) {
                match bytes.checked_sub(piece) {
                    Some(1..) => carver.at = carver.at.next_multiple_of(piece) + bytes,
                    _ => drop(carver.take(bytes)),
                }
            }
        }
        carver.at
    }

    /// Allocates whole pages for `bytes`.
    fn take(&mut self, bytes: usize) -> Result<*mut u8, Error> {
        let bytes = bytes.next_multiple_of(PAGE);
        loop {
            let end = (self.segment_end)(self.at).ok_or_else(|| {
                Error::Setup(format!("the guest's memory has too few pieces of {} KiB: reserve huge pages (sysctl vm.nr_hugepages) or make slot_size smaller", bytes >> 10))
            })?;
            if self.at + bytes <= end {
                let taken = self.base.wrapping_add(self.at);
                self.at += bytes;
                return Ok(taken);
            }
            self.at = end;
        }
    }
}

/// Most bytes of a slot for a list of changes: room for about a thousand.
const CHANGES_SLOT: u32 = 64 << 10;

/// Geometry of the hiprio queue. It carries few small messages, but the kernel requires a buffer for the largest
/// request.
pub(crate) fn hiprio_geometry(of: Geometry) -> Geometry {
    Geometry { entries: 4, slots: 2, slot_size: of.slot_size }
}

/// Geometry of the queue for changes: a slot for OP_CHANGES and one for OP_DROPPED.
pub(crate) fn changes_geometry(of: Geometry) -> Geometry {
    Geometry { entries: 4, slots: 2, slot_size: of.slot_size.min(CHANGES_SLOT) }
}

/// Returns the geometry of each virtqueue of a connection. `changes` adds one for changes at the end.
pub(super) fn geometries(config: &GuestConfig, request_queues: usize, changes: bool) -> Vec<Geometry> {
    let mut all = vec![config.geometry; request_queues + 1];
    all[0] = hiprio_geometry(config.geometry);
    all.extend(changes.then(|| changes_geometry(config.geometry)));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_part_crosses_a_piece_and_the_measured_bytes_suffice() {
        let geometries = [(4, 2, 1 << 20), (64, 32, 1 << 20), (8, 5, 12288), (8, 5, 3 << 19)];
        let geometries = geometries.map(|(entries, slots, slot_size)| Geometry { entries, slots, slot_size });
        let piece = 2 << 20;
        let bytes = RegionAllocator::measure(&geometries, piece);
        let end = |at: usize| (at < bytes).then(|| (at + 1).next_multiple_of(piece));
        let mut carver = RegionAllocator::new(std::ptr::null_mut(), &end);
        let mut last = 0;
        for g in geometries {
            let memory = QueueMemory::new(&mut carver, g, 1024).unwrap();
            let slots = (0..g.slots).map(|s| (memory.slot(s).0, g.slot_size as usize));
            for (at, bytes) in [(memory.virtqueue, 1), (memory.control, g.control_bytes())].into_iter().chain(slots) {
                let at = at as usize;
                assert!(at >= last && at / piece == (at + bytes - 1) / piece && at % PAGE == 0);
                last = at + bytes;
            }
        }
        assert!(last <= bytes);
        assert!(carver.take(piece).is_err());
    }
}
