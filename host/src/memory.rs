//! The guest's memory: its regions, and what happens when one is lost. A guest may truncate the file behind a region;
//! its pages then raise SIGBUS. The signal handler maps private zero pages over the region: the guest gets no more
//! replies through it, and the host no requests.

use parking_lot::Mutex;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Once};
use vm_memory::{GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryMmap, GuestMemoryRegion};

/// The guest's memory table, which the front end may replace.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A mapped region: the address of its first byte (0: no region), and its length.
struct RegionEntry {
    start: AtomicUsize,
    len: AtomicUsize,
}

/// All regions of all guests; the signal handler may take no lock.
static REGIONS: [RegionEntry; 1024] =
    [const { RegionEntry { start: AtomicUsize::new(0), len: AtomicUsize::new(0) } }; 1024];
/// Locked while [`REGIONS`] is changed.
static CHANGES: Mutex<()> = Mutex::new(());

/// A memory table whose regions are in [`REGIONS`].
struct RegisteredTable {
    table: Arc<GuestMemoryMmap>,
    places: Vec<usize>,
}

impl Drop for RegisteredTable {
    fn drop(&mut self) {
        for &place in &self.places {
            REGIONS[place].start.store(0, Ordering::Release);
        }
    }
}

/// The memory tables of one guest: the present one, and former ones that requests still use.
#[derive(Default)]
pub struct GuestTables(Mutex<Vec<RegisteredTable>>);

impl GuestTables {
    /// Registers a new table's regions, and drops tables that no request uses.
    ///
    /// # Errors
    /// When there are too many regions.
    pub fn add(&self, table: Arc<GuestMemoryMmap>) -> io::Result<()> {
        let mut tables = self.0.lock();
        // A request that uses a table holds a reference.
        tables.retain(|old| Arc::strong_count(&old.table) > 1);
        let mut new = RegisteredTable { table, places: Vec::new() };
        let _alone = CHANGES.lock();
        for region in new.table.iter() {
            let free = REGIONS.iter().position(|known| known.start.load(Ordering::Relaxed) == 0);
            let place = free.ok_or_else(|| io::Error::other("too many regions of guest memory"))?;
            REGIONS[place].len.store(region.len() as usize, Ordering::Relaxed);
            REGIONS[place].start.store(region.as_ptr() as usize, Ordering::Release);
            new.places.push(place);
        }
        tables.push(new);
        Ok(())
    }
}

/// Replaces a guest's memory table by a new mapping of the same memory. The old one stays while requests use it.
///
/// # Errors
/// The system refuses a mapping.
pub fn remap(memory: &Memory, tables: &GuestTables) -> io::Result<()> {
    let refused = |e: String| io::Error::other(format!("mapping the guest's memory once more: {e}"));
    let lock = memory.lock().map_err(|e| refused(e.to_string()))?;
    let regions: Vec<_> = (memory.memory().iter())
        .map(|region| (region.start_addr(), region.len() as usize, region.file_offset().cloned()))
        .collect();
    let table = GuestMemoryMmap::from_ranges_with_files(regions).map_err(|e| refused(e.to_string()))?;
    lock.replace(table);
    tables.add(memory.memory().clone().into_inner())
}

/// Installs the SIGBUS handler: lost guest memory does not end the process.
///
/// # Errors
/// When the signal handler cannot be installed.
pub fn install_sigbus_handler() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| result = install());
    result
}

fn install() -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid `sigaction`; the handler makes no call that a signal handler may not make.
    let refused = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as extern "C" fn(_, _, _) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) != 0
    };
    if refused {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid `info`; errno and mmap are safe to use in a handler, and what is mapped over
    // is guest memory, which `GuestTables` keeps where it is.
    unsafe {
        let errno = *libc::__errno_location();
        if !replace_region((*info).si_addr() as usize) {
            // Not ours: the access is tried again, and ends the process.
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
        }
        *libc::__errno_location() = errno;
    }
}

/// # Safety
/// The regions in the table must be mapped.
unsafe fn replace_region(address: usize) -> bool {
    for known in &REGIONS {
        let (start, len) = (known.start.load(Ordering::Acquire), known.len.load(Ordering::Relaxed));
        if start == 0 || !(start..start + len).contains(&address) {
            continue;
        }
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the range is a whole mapping of guest memory, by the caller's promise.
        return unsafe { libc::mmap(start as *mut _, len, access, flags, -1, 0) } != libc::MAP_FAILED;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use vm_memory::{Bytes, FileOffset, GuestAddress};

    fn table(file: &File, bytes: usize) -> Arc<GuestMemoryMmap> {
        let part = (GuestAddress(0), bytes, Some(FileOffset::new(file.try_clone().unwrap(), 0)));
        Arc::new(GuestMemoryMmap::from_ranges_with_files([part]).unwrap())
    }

    #[test]
    fn lost_memory_reads_as_zeros() {
        install_sigbus_handler().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let (tables, memory) = (GuestTables::default(), table(&file, 1 << 20));
        tables.add(memory.clone()).unwrap();
        memory.write_obj(7u64, GuestAddress(0x8000)).unwrap();
        file.set_len(0).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x8000)).unwrap(), 0);
        memory.write_obj(8u64, GuestAddress(0xf_0000)).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0xf_0000)).unwrap(), 8);
    }

    #[test]
    fn a_table_is_mapped_once_more() {
        let (file, tables) = (tempfile::tempfile().unwrap(), GuestTables::default());
        file.set_len(1 << 20).unwrap();
        let memory = Memory::from(table(&file, 1 << 20));
        let old = memory.memory().clone().into_inner();
        old.write_obj(7u64, GuestAddress(0x8000)).unwrap();
        remap(&memory, &tables).unwrap();
        let new = memory.memory().clone().into_inner();
        assert_eq!(new.read_obj::<u64>(GuestAddress(0x8000)).unwrap(), 7);
        new.write_obj(8u64, GuestAddress(0x8000)).unwrap();
        assert_eq!(old.read_obj::<u64>(GuestAddress(0x8000)).unwrap(), 8);
        assert!(old.iter().zip(new.iter()).all(|(old, new)| old.as_ptr() != new.as_ptr()));
        assert_eq!(tables.0.lock().len(), 1);
    }

    #[test]
    fn tables_that_nobody_uses_are_let_go() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let tables = GuestTables::default();
        let in_use = table(&file, 4096);
        tables.add(in_use.clone()).unwrap();
        for _ in 0..3000 {
            tables.add(table(&file, 4096)).unwrap();
        }
        assert_eq!(tables.0.lock().len(), 2);
        drop(in_use);
        tables.add(table(&file, 4096)).unwrap();
        assert_eq!(tables.0.lock().len(), 1);
    }
}
