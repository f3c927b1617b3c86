//! A virtio device's registers, in a mapped BAR.

use memmap2::MmapRaw;
use std::sync::Arc;

/// Registers in a mapped BAR; the mapping lives as long as any of them.
#[derive(Clone)]
pub struct Registers {
    map: Arc<MmapRaw>,
    offset: usize,
    bytes: usize,
}

impl Registers {
    /// Makes the registers in `bytes` bytes at `offset` of a mapping.
    pub fn new(map: Arc<MmapRaw>, offset: usize, bytes: usize) -> Registers {
        assert!(offset <= map.len() && bytes <= map.len() - offset);
        Registers { map, offset, bytes }
    }

    /// Number of bytes of the registers.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Returns the address of the register at `offset`.
    pub fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset + size_of::<T>() <= self.bytes, "register {offset} of {}", self.bytes);
        let at = self.map.as_mut_ptr().wrapping_add(self.offset + offset);
        assert!(at as usize % align_of::<T>() == 0);
        at.cast()
    }

    /// Reads the register at `offset`.
    pub fn read<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: in the mapped registers and aligned, by `at`.
        unsafe { self.at::<T>(offset).read_volatile() }
    }

    /// Writes the register at `offset`.
    pub fn write<T: Copy>(&self, offset: usize, value: T) {
        // SAFETY: as in `read`.
        unsafe { self.at::<T>(offset).write_volatile(value) }
    }

    /// Writes a 64-bit address, as two 32-bit registers.
    pub fn write_address(&self, offset: usize, address: u64) {
        self.write(offset, address as u32);
        self.write(offset + 4, (address >> 32) as u32);
    }
}
