//! How a link's memory is divided among its queues.

use crate::config::GuestConfig;
use crate::error::Error;
use crate::split_queue::memory_bytes;
use tunnelfs_ring::{Geometry, PAGE};

/// Most entries of a virtqueue that are asked for.
const MAX_SIZE: u32 = 1024;
/// Bytes for the set-up of a connection that takes over another one's slots, with all that lies in them.
pub const SETUP_BUFFER: usize = PAGE;

/// Where the parts of one queue lie.
#[derive(Debug)]
pub struct QueueMemory {
    /// The queue's sizes.
    pub geometry: Geometry,
    /// Entries of the virtqueue.
    pub size: u16,
    /// The virtqueue itself, and its headers.
    pub virtqueue: *mut u8,
    /// The control part of its ring.
    pub control: *mut u8,
    /// [`SETUP_BUFFER`] bytes.
    pub scratch: *mut u8,
    slots: Vec<*mut u8>,
}

// SAFETY: the pointers are only handed out as such.
unsafe impl Send for QueueMemory {}
// SAFETY: as above.
unsafe impl Sync for QueueMemory {}

impl QueueMemory {
    /// Takes what a queue needs off `memory`; its virtqueue has at most `max_size` entries.
    ///
    /// # Errors
    /// [`Error::Setup`] when the memory is in too many pieces.
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

    /// Makes the queue new for another host. The slots stay as they are.
    ///
    /// # Safety
    /// The memory must be mapped, and nobody on this side use the virtqueue or the ring.
    pub unsafe fn clear(&self) {
        // SAFETY: they are that long, by `new`; by this function's contract the bytes are there, and ours.
        unsafe {
            self.virtqueue.write_bytes(0, memory_bytes(self.size));
            self.control.write_bytes(0, self.geometry.control_bytes());
        }
    }

    /// A slot's memory and its bytes.
    pub fn slot(&self, slot: u32) -> (*mut u8, usize) {
        (self.slots[slot as usize], self.geometry.slot_size as usize)
    }
}

/// Four descriptors a slot.
fn virtqueue_size(geometry: Geometry) -> u16 {
    (geometry.slots * 4).next_power_of_two().clamp(4, MAX_SIZE) as u16
}

/// Hands out memory in order. No part crosses from one piece (as the device sees it) into the next.
pub struct RegionAllocator<'a> {
    base: *mut u8,
    at: usize,
    /// The end of the piece that an offset lies in; `None` behind the last one.
    segment_end: &'a dyn Fn(usize) -> Option<usize>,
}

impl<'a> RegionAllocator<'a> {
    /// From `base` on, which must be page-aligned.
    pub fn new(base: *mut u8, segment_end: &'a dyn Fn(usize) -> Option<usize>) -> Self {
        RegionAllocator { base, at: 0, segment_end }
    }

    /// Bytes that queues need where pieces end at multiples of `piece` at the soonest.
    pub fn measure(geometries: &[Geometry], piece: usize) -> usize {
        // What is longer than a piece is hoped for in pieces that follow each other.
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

/// The control queue has few small messages; but a slot must take the largest
/// request, for the kernel reads none into less.
pub(crate) fn hiprio_geometry(of: Geometry) -> Geometry {
    Geometry { entries: 4, slots: 2, slot_size: of.slot_size }
}

/// The geometry of every virtqueue of a connection.
pub(super) fn geometries(config: &GuestConfig, request_queues: usize) -> Vec<Geometry> {
    let mut all = vec![config.geometry; request_queues + 1];
    all[0] = hiprio_geometry(config.geometry);
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
