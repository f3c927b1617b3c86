//! Guest memory that another part of the process has mapped: the device has mappings of its own of the same pages. What
//! a stop does to them (see [`crate::detach`]) does not touch the program's.

use crate::memory::Memory;
use crate::sandbox::invalid;
use std::io;
use std::ptr::without_provenance_mut;
use tunnelfs_ring::PAGE;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// A piece of the guest's memory, as the program has it mapped.
#[derive(Clone, Copy, Debug)]
pub struct MemoryRegion {
    /// Where the guest has it.
    pub guest_address: u64,
    /// Where the program has it.
    pub start: *mut u8,
    /// Bytes.
    pub len: usize,
}

/// The program's mappings, of which the device makes its own.
#[derive(Clone)]
pub struct Regions(Vec<MemoryRegion>);

// SAFETY: the addresses are only given to the kernel, which maps what is there; they are valid for as long as the
// device lives, by the contract of `Device::new`.
unsafe impl Send for Regions {}
// SAFETY: as above.
unsafe impl Sync for Regions {}

impl Regions {
    /// Those of a device.
    pub fn new(regions: &[MemoryRegion]) -> Self {
        Regions(regions.to_vec())
    }

    /// A stop has taken pages of the present mappings from a READ: the next driver gets new ones.
    pub fn map_again(&self, memory: &Memory) {
        // SAFETY: mapped for as long as the device lives.
        let mapped = unsafe { map(&self.0) };
        match (mapped, memory.lock()) {
            (Ok(mapped), Ok(present)) => present.replace(mapped),
            (Err(e), _) => tracing::warn!("{e}: the next driver of this guest may lack pages"),
            (_, Err(e)) => tracing::warn!("{e}: the next driver of this guest may lack pages"),
        }
    }
}

/// Maps all of `regions` once more.
///
/// # Safety
/// They must be mapped.
///
/// # Errors
/// Regions that overlap, that are not whole pages, or whose memory is not shared.
pub unsafe fn map(regions: &[MemoryRegion]) -> io::Result<GuestMemoryMmap> {
    let mapped = regions.iter().map(|region| {
        // SAFETY: by this function's own contract.
        let map = unsafe { duplicate(region) };
        let map = map.map_err(|e| invalid(format!("guest memory at {:#x}: {e}", region.guest_address)))?;
        GuestRegionMmap::new(map, GuestAddress(region.guest_address))
            .ok_or_else(|| invalid(format!("guest memory at {:#x} ends behind 64 bits", region.guest_address)))
    });
    let mapped = mapped.collect::<io::Result<Vec<_>>>()?;
    GuestMemoryMmap::from_regions(mapped).map_err(|e| invalid(format!("guest memory: {e}")))
}

/// A second mapping of the same pages, which the region unmaps when it is dropped.
///
/// # Safety
/// The region must be mapped.
unsafe fn duplicate(region: &MemoryRegion) -> io::Result<MmapRegion> {
    let (start, len) = (region.start as usize, region.len);
    if len == 0 || start % PAGE != 0 || len % PAGE != 0 {
        return Err(io::Error::other("it must be whole pages"));
    }
    // Address space that the region owns; the second mapping takes its place.
    let place = MmapRegionBuilder::new(len)
        .with_mmap_prot(libc::PROT_NONE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
        .map_err(io::Error::other)?;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: only reads the program's mapping: an old size of 0 leaves it where it is. The new address is our own.
    let at = unsafe { libc::mremap(without_provenance_mut(start), 0, len, flags, place.as_ptr()) };
    if at != libc::MAP_FAILED {
        return Ok(place);
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::EINVAL) => {
            Err(io::Error::other("it is not shared memory: map it with MAP_SHARED, from a memfd for instance"))
        }
        e if e.raw_os_error() == Some(libc::EFAULT) => {
            Err(io::Error::other("it is not one mapping: hand over each mapping as a region of its own"))
        }
        e => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemory};

    fn mmap(flags: i32) -> MemoryRegion {
        // SAFETY: a new anonymous mapping.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), 16 * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        MemoryRegion { guest_address: 0x4000_0000, start: start.cast(), len: 16 * PAGE }
    }

    #[test]
    fn the_same_pages_are_mapped_at_another_place() {
        let region = mmap(libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: mapped above.
        let memory = unsafe { map(&[region]) }.unwrap();
        assert!(memory.iter().all(|own| own.as_ptr() != region.start));
        // SAFETY: mapped above, and nobody else uses it.
        unsafe { region.start.add(PAGE).write(7) };
        let at = GuestAddress(region.guest_address + PAGE as u64);
        assert_eq!(memory.read_obj::<u8>(at).unwrap(), 7);
        memory.write_obj(8u8, at).unwrap();
        drop(memory);
        // SAFETY: still mapped: only the second mapping has gone.
        assert_eq!(unsafe { region.start.add(PAGE).read() }, 8);
    }

    #[test]
    fn memory_that_cannot_be_shared_is_refused_with_the_reason() {
        // SAFETY: mapped by `mmap`.
        let refused = |region: MemoryRegion| unsafe { map(&[region]) }.map(drop).unwrap_err().to_string();
        let private = mmap(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        assert!(refused(private).contains("MAP_SHARED"), "{}", refused(private));
        let region = mmap(libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        assert!(refused(MemoryRegion { len: PAGE + 1, ..region }).contains("whole pages"));
        assert!(refused(MemoryRegion { len: 0, ..region }).contains("whole pages"));
        // SAFETY: as above.
        let overlap = unsafe { map(&[region, region]) }.map(drop).unwrap_err().to_string();
        assert!(overlap.contains("guest memory"), "{overlap}");
    }
}
