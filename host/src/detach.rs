//! READs that the host's kernel has begun when a stop abandons them: what they still copy must not reach the guest.
//!
//! The kernel copies to addresses of this process. A stop replaces the pages of such a READ by private ones:
//!
//! ```text
//! stop:    guest's pages -> a second mapping (mremap); private pages at the first address (mmap, MAP_FIXED)
//! READ:    ends, in private pages -> second mapping back to the first address; waits for the start; reads again
//! ```
//!
//! The buffers belong to the READ until it is answered, so nobody else misses the pages. A new driver may use them
//! before: it gets a new mapping of the guest's memory. Not held back: bytes in a
//! page that is not wholly in the buffers, huge pages, and O_DIRECT, for which the kernel has the pages themselves.

use libc::iovec;
use parking_lot::Mutex;
use std::io;
use std::ptr::{null_mut, without_provenance_mut};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use tunnelfs_ring::PAGE;

/// Stands in [`Current::buffers`] for buffers that a stop has looked at.
const TAKEN: *mut Buffers = without_provenance_mut(1);

/// All threads that serve requests.
static THREADS: Mutex<Vec<Weak<Current>>> = Mutex::new(Vec::new());

thread_local! {
    static CURRENT: Arc<Current> = {
        let current = Arc::<Current>::default();
        let mut threads = THREADS.lock();
        threads.retain(|thread| thread.strong_count() > 0);
        threads.push(Arc::downgrade(&current));
        current
    };
}

/// Buffers that a system call fills.
struct Buffers {
    iovs: *const iovec,
    count: usize,
}

/// What a thread's kernel call writes to.
#[derive(Default)]
struct Current {
    /// The key of the thread's queue.
    queue: AtomicUsize,
    /// The buffers; null: none; [`TAKEN`]: the thread must look at `detached`.
    buffers: AtomicPtr<Buffers>,
    detached: Mutex<Vec<Detached>>,
}

/// Pages that have been replaced by private ones.
struct Detached {
    at: usize,
    len: usize,
    /// Where the guest's pages are mapped meanwhile.
    kept: usize,
}

impl Detached {
    fn new(at: usize, len: usize) -> io::Result<Self> {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: the range is mapped guest memory. An old size of 0 makes a second mapping of shared pages.
        let kept = unsafe { libc::mremap(without_provenance_mut(at), 0, len, libc::MREMAP_MAYMOVE) };
        if kept == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let detached = Detached { at, len, kept: kept as usize };
        // SAFETY: only the pages of the READ's own buffers, which no other request uses before it is answered.
        let private = unsafe { libc::mmap(without_provenance_mut(at), len, access, flags | libc::MAP_FIXED, -1, 0) };
        if private == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            // SAFETY: the mapping that was made above.
            unsafe { libc::munmap(kept, len) };
            return Err(error);
        }
        Ok(detached)
    }

    /// Maps the guest's pages where they were.
    fn restore(&self) {
        let (kept, at) = (without_provenance_mut(self.kept), without_provenance_mut::<libc::c_void>(self.at));
        // SAFETY: moves the mapping made by `new` over the private pages, which nobody uses any more.
        let moved = unsafe { libc::mremap(kept, self.len, self.len, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, at) };
        if moved == libc::MAP_FAILED {
            tracing::warn!("a slow READ's buffer is lost to its guest: {}", io::Error::last_os_error());
        }
    }
}

/// Sets the queue, by any key of its own, that the calling thread serves from now on.
pub fn serve_for(queue: usize) {
    CURRENT.with(|current| current.queue.store(queue, Ordering::Relaxed));
}

/// Lets `call` fill guest buffers. `None`: a stop of the queue has taken them away, and they are back now; what was
/// filled is lost, and the caller may try again when the queue runs.
///
/// `permitted` is asked first: whether the request may write to the guest.
///
/// # Errors
/// Those of `permitted`.
pub fn fill<R>(
    iovs: &[iovec],
    permitted: impl FnOnce() -> io::Result<()>,
    call: impl FnOnce() -> R,
) -> io::Result<Option<R>> {
    CURRENT.with(|current| {
        let mut buffers = Buffers { iovs: iovs.as_ptr(), count: iovs.len() };
        // Before `permitted` looks: either it sees that a stop has abandoned the request, or the stop sees the buffers.
        current.buffers.store(&mut buffers, Ordering::SeqCst);
        std::sync::atomic::fence(Ordering::SeqCst);
        let result = permitted().map(|()| call());
        if current.buffers.swap(null_mut(), Ordering::AcqRel) != TAKEN {
            return result.map(Some);
        }
        // Waits for `detach`.
        let detached = std::mem::take(&mut *current.detached.lock());
        detached.iter().for_each(Detached::restore);
        result.map(|filled| detached.is_empty().then_some(filled))
    })
}

/// Takes the guest's pages away from the calls that threads of this queue are in. Returns whether there were any.
///
/// The queue must be stopped, and its requests abandoned.
pub fn detach(queue: usize) -> bool {
    std::sync::atomic::fence(Ordering::SeqCst);
    let threads: Vec<Arc<Current>> = THREADS.lock().iter().filter_map(Weak::upgrade).collect();
    let mine = threads.iter().filter(|thread| thread.queue.load(Ordering::Relaxed) == queue);
    mine.filter(|thread| thread.detach()).count() > 0
}

impl Current {
    fn detach(&self) -> bool {
        let mut detached = self.detached.lock();
        let buffers = self.buffers.swap(TAKEN, Ordering::AcqRel);
        if buffers == TAKEN {
            return false;
        }
        if buffers.is_null() {
            // The thread may have begun a call meanwhile: that has asked for permission.
            let _ = self.buffers.compare_exchange(TAKEN, null_mut(), Ordering::AcqRel, Ordering::Relaxed);
            return false;
        }
        // SAFETY: they live until `fill` has taken them back, which waits for the lock.
        let iovs = unsafe { std::slice::from_raw_parts((*buffers).iovs, (*buffers).count) };
        for iov in iovs {
            let (start, end) = (iov.iov_base as usize, iov.iov_base as usize + iov.iov_len);
            let (first, last) = (start.next_multiple_of(PAGE), end / PAGE * PAGE);
            if first < last {
                match Detached::new(first, last - first) {
                    Ok(pages) => detached.push(pages),
                    Err(e) => tracing::warn!("a READ that is stuck may still write to its stopped guest: {e}"),
                }
            }
        }
        !detached.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::time::Duration;
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap};

    /// A preadv that waits for its data, as for a disk, while its queue is stopped; it is done again after the start.
    #[test]
    fn what_a_begun_read_copies_after_a_stop_does_not_reach_the_guest() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 * PAGE as u64).unwrap();
        let region = (GuestAddress(0), 16 * PAGE, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files([region]).unwrap();
        let guest = |at: usize| memory.read_obj::<u8>(GuestAddress(at as u64)).unwrap();
        let start = memory.get_slice(GuestAddress(4 * PAGE as u64), PAGE).unwrap().ptr_guard_mut().as_ptr() as usize;
        let queue = 0x1234;
        let (reader, writer) = std::io::pipe().unwrap();
        let reader = File::from(std::os::fd::OwnedFd::from(reader));
        std::thread::scope(|scope| {
            // It goes when a check fails, too: the thread waits for it.
            let mut writer = writer;
            let thread = scope.spawn(|| {
                serve_for(queue);
                let iov = iovec { iov_base: without_provenance_mut(start), iov_len: PAGE };
                let again = || {
                    fill(
                        &[iov],
                        || Ok(()),
                        || {
                            // SAFETY: the iovec lies in `memory`.
                            unsafe { libc::readv(reader.as_raw_fd(), &iov, 1) }
                        },
                    )
                };
                let first = again().unwrap();
                (first, again().unwrap())
            });
            while !detach(queue) {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(!detach(queue), "detached twice");
            writer.write_all(&[1; PAGE]).unwrap();
            // The second try waits for data.
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!((guest(4 * PAGE), guest(5 * PAGE - 1)), (0, 0), "written to a stopped guest");
            writer.write_all(&[2; PAGE]).unwrap();
            let (first, second) = thread.join().unwrap();
            assert_eq!((first, second), (None, Some(PAGE as isize)));
            assert_eq!((guest(4 * PAGE), guest(5 * PAGE - 1), guest(4 * PAGE - 1)), (2, 2, 0));
        });
    }

    #[test]
    fn what_may_not_write_is_not_called() {
        let denied = fill(&[], || Err(io::ErrorKind::Other.into()), || unreachable!());
        assert!(denied.map(|none: Option<()>| none.is_none()).is_err());
    }
}
