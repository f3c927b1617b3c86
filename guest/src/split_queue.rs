//! The driver side of a split virtqueue (virtio 1.2, section 2.7). It does not allocate descriptors: the caller owns
//! them, and passes the head of each chain.

use crate::fuse::message::OUT_HEADER;
use std::sync::atomic::{fence, AtomicU16, AtomicU32, Ordering};
use tunnelfs_ring::SQE_INLINE_BYTES;

/// A request's headers, in memory that the host reads and writes.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Headers {
    pub out_header: [u8; OUT_HEADER],
    pub head: [u8; SQE_INLINE_BYTES],
}

/// Descriptors per slot: the request's head and payload, and the reply's header and payload.
pub const PER_SLOT: u16 = 4;
/// Number of bytes of a queue of `size` entries with its headers.
pub fn memory_bytes(size: u16) -> usize {
    SplitQueue::bytes(size) + usize::from(size / PER_SLOT) * size_of::<Headers>()
}

/// `struct virtq_desc`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Descriptor {
    /// The buffer's address, as the device sees it.
    pub address: u64,
    /// The buffer's length in bytes.
    pub bytes: u32,
    /// Any of [`NEXT`] and [`WRITE`].
    pub flags: u16,
    /// Index of the next descriptor of the chain, if [`NEXT`] is set.
    pub next: u16,
}

/// The chain continues at `next`.
pub const NEXT: u16 = 1;
/// The device writes the buffer.
pub const WRITE: u16 = 2;

/// Returns the offsets of the available ring, of the used ring, and of the end, in bytes.
const fn offsets(size: u16) -> [usize; 3] {
    let n = size as usize;
    let (avail, avail_bytes, used_bytes) = (16 * n, 8 + 2 * n, 8 + 8 * n);
    let used = avail + avail_bytes.next_multiple_of(4);
    [avail, used, (used + used_bytes).next_multiple_of(16)]
}

/// The queue; both sides write its memory.
pub struct SplitQueue {
    memory: *mut u8,
    size: u16,
    event_idx: bool,
    /// Number of chains published and taken back so far, modulo 2^16.
    published: u16,
    taken: u16,
}

// SAFETY: only atomic and volatile accesses are made through the pointer, by one owner.
unsafe impl Send for SplitQueue {}

impl SplitQueue {
    /// Number of bytes of a queue of `size` entries, a power of two.
    pub const fn bytes(size: u16) -> usize {
        offsets(size)[2]
    }

    /// Returns the addresses of the descriptors, the available ring and the used ring of a queue in `memory`.
    pub fn areas(memory: *mut u8, size: u16) -> [*const u8; 3] {
        let [avail, used, _] = offsets(size);
        [memory, memory.wrapping_add(avail), memory.wrapping_add(used)].map(<*mut u8>::cast_const)
    }

    /// Makes an empty queue in `memory`.
    ///
    /// # Safety
    /// `memory` must be aligned to 16 bytes, zeroed, and stay mapped as long as this lives.
    pub unsafe fn new(memory: *mut u8, size: u16, event_idx: bool) -> Self {
        assert!(size.is_power_of_two());
        SplitQueue { memory, size, event_idx, published: 0, taken: 0 }
    }

    /// Returns a 16-bit field of the available ring (0) or the used ring (1), at an offset in bytes.
    fn field(&self, ring: usize, offset: usize) -> &AtomicU16 {
        let at = offsets(self.size)[ring] + offset;
        debug_assert!(at + 2 <= Self::bytes(self.size));
        // SAFETY: in the queue's memory, by `offsets`; even, so aligned; atomics may be shared with the device.
        unsafe { &*self.memory.add(at).cast() }
    }

    fn place(&self, position: u16) -> usize {
        usize::from(position % self.size)
    }

    /// Writes a descriptor.
    pub fn set(&mut self, index: u16, descriptor: Descriptor) {
        assert!(index < self.size);
        // SAFETY: in the table, and 16-aligned.
        unsafe { self.memory.cast::<Descriptor>().add(index.into()).write_volatile(descriptor) };
    }

    /// Makes a chain available to the device. Returns `true` if the device wants a kick for it, `false` if not.
    pub fn push_avail(&mut self, head: u16) -> bool {
        let at = self.place(self.published);
        self.field(0, 4 + 2 * at).store(head, Ordering::Relaxed);
        let (old, new) = (self.published, self.published.wrapping_add(1));
        self.published = new;
        self.field(0, 2).store(new, Ordering::Release);
        // Pairs with the device's fence between enabling kicks and its last check of the available index.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return self.field(1, 0).load(Ordering::Relaxed) & 1 == 0;
        }
        let event = self.field(1, 4 + 8 * usize::from(self.size)).load(Ordering::Relaxed);
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Returns `true` if the device has used a chain that was not taken back yet.
    pub fn ready(&self) -> bool {
        self.field(1, 2).load(Ordering::Acquire) != self.taken
    }

    /// Takes back a used chain. Returns its head, as the device wrote it: not checked. `None` if there is none.
    pub fn pop_used(&mut self) -> Option<u32> {
        if !self.ready() {
            return None;
        }
        let at = offsets(self.size)[1] + 4 + 8 * self.place(self.taken);
        // SAFETY: in the used ring, and 4-aligned; an atomic may be shared with the device.
        let head = unsafe { (*self.memory.add(at).cast::<AtomicU32>()).load(Ordering::Relaxed) };
        self.taken = self.taken.wrapping_add(1);
        Some(head)
    }

    /// Sets whether the device signals the call eventfd when it uses a chain. A caller that enables this must call
    /// [`Self::ready`] once more before it sleeps.
    pub fn set_notifications(&mut self, wanted: bool) {
        if self.event_idx {
            // An event index behind the used index is reached only after the index has wrapped.
            let event = if wanted { self.taken } else { self.taken.wrapping_sub(1) };
            self.field(0, 4 + 2 * usize::from(self.size)).store(event, Ordering::Relaxed);
        } else {
            self.field(0, 0).store(u16::from(!wanted), Ordering::Relaxed);
        }
        // Pairs with the device's fence between its store of the used index and its load of this setting.
        fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C, align(16))]
    struct Memory([u8; SplitQueue::bytes(4)]);

    /// Uses a chain as a device does; returns whether the driver is to be called.
    fn complete(queue: &SplitQueue, head: u32, old: u16) -> bool {
        let at = offsets(4)[1] + 4 + 8 * usize::from(old % 4);
        // SAFETY: in the used ring.
        unsafe { queue.memory.add(at).cast::<u32>().write(head) };
        queue.field(1, 2).store(old.wrapping_add(1), Ordering::Release);
        let event = queue.field(0, 4 + 2 * 4).load(Ordering::Relaxed);
        old.wrapping_add(1).wrapping_sub(event).wrapping_sub(1) < 1
    }

    #[test]
    fn chains_come_back_across_the_wrap_and_calls_come_when_wanted() {
        let mut memory = Memory([0; SplitQueue::bytes(4)]);
        // SAFETY: the memory is aligned, zeroed, and outlives the queue.
        let mut queue = unsafe { SplitQueue::new(memory.0.as_mut_ptr(), 4, true) };
        for n in 0..70_000u32 {
            let wanted = n % 3 == 0;
            queue.set_notifications(wanted);
            // Nobody has moved the device's event: it was to be kicked for the first chain of each round only.
            assert_eq!(queue.push_avail(n as u16 % 4), n % 65_536 == 0);
            assert!(!queue.ready() && queue.pop_used().is_none());
            assert_eq!(complete(&queue, n % 4, n as u16), wanted);
            assert_eq!(queue.pop_used(), Some(n % 4));
        }
    }
}
