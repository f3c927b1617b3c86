//! The memory that both sides map: a sealed memfd.

use crate::error::Error;
use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{fcntl, FcntlArg, SealFlag};
use nix::sys::memfd::{memfd_create, MFdFlags};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

const HUGE_PAGE: usize = 2 << 20;

/// A shared mapping of a memfd that can neither shrink nor grow.
#[derive(Debug)]
pub struct Region {
    map: MmapRaw,
    fd: OwnedFd,
}

impl Region {
    /// `bytes` (rounded up to whole pages) of zeroed shared memory.
    ///
    /// # Errors
    /// [`Error::Os`] when the memory cannot be had.
    pub fn new(bytes: usize, huge_pages: bool) -> Result<Self, Error> {
        let os = |what: &str| {
            let what = what.to_owned();
            move |e: nix::Error| Error::Os { what, source: e.into() }
        };
        let mut flags = MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC;
        let mut unit = crate::layout::PAGE;
        if huge_pages {
            flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
            unit = HUGE_PAGE;
        }
        let bytes = bytes.next_multiple_of(unit);
        let fd = memfd_create(c"tunnelfs", flags).map_err(os("memfd_create"))?;
        nix::unistd::ftruncate(&fd, bytes as i64).map_err(os("sizing the shared memory"))?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(os("sealing the shared memory"))?;
        let hint = if huge_pages { " (are there free 2 MiB huge pages? see /proc/meminfo)" } else { "" };
        let map = MmapOptions::new()
            .len(bytes)
            .map_raw(fd.as_raw_fd())
            .map_err(|source| Error::Os { what: format!("mapping {bytes} bytes of shared memory{hint}"), source })?;
        Ok(Region { map, fd })
    }

    /// Maps a peer's memory, which has `bytes`.
    ///
    /// # Errors
    /// [`Error::Handoff`] when it has another size, or could shrink: touching what is gone would end this process.
    pub fn from_fd(fd: OwnedFd, bytes: usize) -> Result<Self, Error> {
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map_err(|_| Error::Handoff("memory that is not a memfd"))?;
        if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
            return Err(Error::Handoff("memory that could shrink"));
        }
        let file = File::from(fd);
        let size = file.metadata().map_err(|source| Error::Os { what: "fstat of the memory".into(), source })?.len();
        if size != bytes as u64 {
            return Err(Error::Handoff("its memory has another size than its geometry"));
        }
        let map = MmapOptions::new()
            .len(bytes)
            .map_raw(&file)
            .map_err(|source| Error::Os { what: format!("mapping {bytes} bytes of shared memory"), source })?;
        Ok(Region { map, fd: file.into() })
    }

    /// Bytes that this machine could give now, if it tells.
    pub fn available(huge_pages: bool) -> Option<usize> {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let value = |key: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(key))?;
            line.trim_start_matches(':').split_whitespace().next()?.parse::<usize>().ok()
        };
        if huge_pages {
            Some(value("HugePages_Free")? * HUGE_PAGE)
        } else {
            Some(value("MemAvailable")? << 10)
        }
    }

    /// Where the region lies in this process.
    pub fn as_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Returns the bytes mapped.
    #[allow(clippy::len_without_is_empty)] // A region is never empty.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// A second handle on the memory, for the peer.
    ///
    /// # Errors
    /// [`Error::Os`] when the process has no descriptor left.
    pub fn try_clone_file(&self) -> Result<File, Error> {
        self.fd
            .try_clone()
            .map(File::from)
            .map_err(|source| Error::Os { what: "duplicating the memory's descriptor".into(), source })
    }
}

impl AsFd for Region {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
