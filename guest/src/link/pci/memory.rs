//! Pinned memory, and its guest-physical addresses.
//!
//! `mlock` keeps pages in memory, but compaction may move them. Pages that are registered as io_uring buffers are
//! pinned for the long term: they are neither moved nor freed. The pin outlives this process for a moment, as long as
//! the device may still write.

use crate::error::Error;
use io_uring::IoUring;
use std::fs::File;
use std::os::unix::fs::FileExt;
use tunnelfs_ring::PAGE;

/// Bytes of a huge page.
pub const HUGE_PAGE: usize = 2 << 20;
/// Most bytes of one registered buffer, the kernel's limit.
const MOST: usize = 1 << 30;

/// A part of the memory that is contiguous in guest-physical addresses.
struct Segment {
    /// Offsets in the memory.
    start: usize,
    end: usize,
    /// Guest-physical address of `start`.
    address: u64,
}

/// The pinned memory of a link.
pub struct Pinned {
    base: *mut u8,
    bytes: usize,
    pieces: Vec<Segment>,
    huge: bool,
    /// The io_uring whose registered buffers pin the pages.
    pin: IoUring,
    map: (*mut libc::c_void, usize),
}

// SAFETY: after `new` the pointers are only passed on, and unmapped in `drop`.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Allocates and pins at least `bytes` of zeroed memory: in reserved huge pages if enough are free, otherwise in
    /// ordinary pages, which the kernel may join to transparent huge pages.
    ///
    /// # Errors
    /// [`Error::Setup`], which says what to do about it.
    pub fn new(bytes: usize) -> Result<Self, Error> {
        let bytes = bytes.next_multiple_of(HUGE_PAGE);
        let pin = IoUring::new(2).map_err(|e| Error::Setup(format!("io_uring, which pins the memory: {e}")))?;
        let huge = map(bytes, libc::MAP_SHARED | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB | libc::MAP_POPULATE);
        // Ordinary pages get one huge page more, to start at a huge page's boundary.
        let (map, huge) = match huge {
            Ok(start) => ((start, bytes), true),
            Err(_) => {
                let room = bytes + HUGE_PAGE;
                let start = map(room, libc::MAP_PRIVATE)
                    .map_err(|e| Error::Setup(format!("{} MiB of memory: {e}", room >> 20)))?;
                ((start, room), false)
            }
        };
        let base = (map.0 as usize).next_multiple_of(HUGE_PAGE) as *mut u8;
        let mut pinned = Pinned { base, bytes, pieces: Vec::new(), huge, pin, map };
        pinned.pin()?;
        pinned.pieces = pinned.find_segments()?;
        Ok(pinned)
    }

    /// Faults in all pages, and pins them.
    fn pin(&self) -> Result<(), Error> {
        let advise = |advice| {
            // SAFETY: the mapping is ours, and not in use yet.
            unsafe { libc::madvise(self.map.0, self.map.1, advice) }
        };
        // After a fork(2), copy-on-write could give this process a copy, while the device uses the original page.
        advise(libc::MADV_DONTFORK);
        if !self.huge {
            advise(libc::MADV_HUGEPAGE);
            for offset in (0..self.bytes).step_by(PAGE) {
                // SAFETY: in the mapping.
                unsafe { self.base.add(offset).write_volatile(0) };
            }
            // Linux 6.1 and later: joins small pages to huge ones. Older kernels refuse.
            advise(libc::MADV_COLLAPSE);
        }
        let parts = (0..self.bytes).step_by(MOST).map(|offset| libc::iovec {
            iov_base: self.base.wrapping_add(offset).cast(),
            iov_len: MOST.min(self.bytes - offset),
        });
        let parts: Vec<_> = parts.collect();
        // SAFETY: the memory is mapped; its pages stay pinned until the ring is closed, also once it is unmapped.
        unsafe { self.pin.submitter().register_buffers(&parts) }.map_err(|e| {
            Error::Setup(format!(
                "cannot pin {} MiB: {e}; raise the memlock limit (ulimit -l) or run as root",
                self.bytes >> 20
            ))
        })
    }

    /// Reads the pages' guest-physical addresses, and joins contiguous pages to segments.
    fn find_segments(&self) -> Result<Vec<Segment>, Error> {
        // Source: the kernel's Documentation/admin-guide/mm/pagemap.rst.
        let (mut pieces, mut entries) = (Vec::<Segment>::new(), vec![0; self.bytes / PAGE * 8]);
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entries, (self.base as usize / PAGE * 8) as u64)?;
        for (start, entry) in (0..).step_by(PAGE).zip(entries.chunks_exact(8)) {
            let entry = u64::from_ne_bytes(entry.try_into().expect("eight bytes"));
            let (present, frame) = (entry >> 63 == 1, entry & ((1 << 55) - 1));
            if !present || frame == 0 {
                return Err(Error::Setup("/proc/self/pagemap does not tell addresses: it takes CAP_SYS_ADMIN".into()));
            }
            let (address, end) = (frame * PAGE as u64, start + PAGE);
            match pieces.last_mut() {
                Some(last) if last.address + (last.end - last.start) as u64 == address => last.end = end,
                _ => pieces.push(Segment { start, end, address }),
            }
        }
        Ok(pieces)
    }

    /// Returns the start of the memory, aligned to a huge page.
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    fn piece(&self, offset: usize) -> Option<&Segment> {
        let after = self.pieces.partition_point(|piece| piece.end <= offset);
        self.pieces.get(after)
    }

    /// Returns the end of the segment at an offset; `None` behind the last segment.
    pub fn segment_end(&self, offset: usize) -> Option<usize> {
        self.piece(offset).map(|piece| piece.end)
    }

    /// Returns the guest-physical address of bytes; `None` if they are not all in one segment.
    pub fn address(&self, at: *const u8, bytes: usize) -> Option<u64> {
        let offset = (at as usize).checked_sub(self.base as usize)?;
        let piece = self.piece(offset).filter(|piece| offset + bytes <= piece.end)?;
        Some(piece.address + (offset - piece.start) as u64)
    }

    /// Describes the memory for the log.
    pub fn describe(&self) -> String {
        let kind = if self.huge { "huge pages" } else { "ordinary pages" };
        format!("{} MiB pinned in {} piece(s) of {kind}", self.bytes >> 20, self.pieces.len())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: no pointers into it are left: the link owns this, and its users were dropped before.
        unsafe { libc::munmap(self.map.0, self.map.1) };
    }
}

fn map(bytes: usize, flags: i32) -> std::io::Result<*mut libc::c_void> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping of its own.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags | libc::MAP_ANONYMOUS, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    Ok(start)
}
