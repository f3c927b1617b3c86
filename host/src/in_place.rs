//! File I/O straight between a file and the guest's buffers.

use crate::handler::{Caller, Helper};
use crate::patience::{Nowait, Patience};
use crate::request::einval;
use crate::shared::Shared;
use libc::{EOPNOTSUPP, RWF_NOWAIT};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::OnceLock;

/// Bytes of one part of a READ that two threads do together.
const PART: usize = 128 << 10;

/// A part of a request's buffers, and what is known of the file behind its handle.
pub struct InPlace<'a> {
    shared: Shared<'a>,
    /// Where in the buffers the data starts.
    offset: usize,
    /// Bytes there.
    len: usize,
    /// The request's file handle.
    handle: u64,
    /// Who waits for it.
    caller: Caller<'a>,
    patience: &'a Patience,
}

/// Which way data goes: into a file a part of it may go, out of one fewer bytes would be the end of the file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    In,
    Out,
}

/// Moves up to `count` bytes between `start` in the buffers and `off` in the file.
fn transfer(
    shared: Shared<'_>,
    start: usize,
    count: usize,
    off: u64,
    way: Way,
    call: impl Fn(&[libc::iovec], i64) -> isize,
) -> io::Result<usize> {
    let mut done = 0;
    while done < count {
        let at = i64::try_from(off + done as u64).map_err(|_| einval())?;
        let n = shared.with_iovecs(start + done, count - done, |v| call(v, at));
        match n {
            0 => break,
            1.. => done += n as usize,
            _ => match io::Error::last_os_error() {
                // A transfer that must wait for the rest starts again on a pool thread.
                e if done == 0 || way == Way::Out || e.kind() == io::ErrorKind::WouldBlock => return Err(e),
                _ => break,
            },
        }
    }
    Ok(done)
}

impl<'a> InPlace<'a> {
    /// `len` bytes from `offset` on in a request's buffers; `handle` is its file handle.
    pub(crate) fn new(
        shared: Shared<'a>,
        offset: usize,
        len: usize,
        handle: u64,
        caller: Caller<'a>,
        patience: &'a Patience,
    ) -> Self {
        InPlace { shared, offset, len, handle, caller, patience }
    }
}

impl InPlace<'_> {
    /// Bytes of the buffer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes at `at` of the buffer out of it, for a file system whose data is in no file.
    ///
    /// # Errors
    /// `EINVAL` when they do not all lie in it.
    pub fn read_bytes(&self, at: usize, bytes: &mut [u8]) -> io::Result<()> {
        self.check(at, bytes.len())?;
        self.shared.read(self.offset + at, bytes)
    }

    /// Copies bytes to `at` of the buffer.
    ///
    /// # Errors
    /// `EINVAL` when they do not all fit into it.
    pub fn write_bytes(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.check(at, bytes.len())?;
        self.shared.write(self.offset + at, bytes)
    }

    fn check(&self, at: usize, len: usize) -> io::Result<()> {
        match at.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(einval()),
        }
    }

    fn transfer(
        &self,
        count: usize,
        off: u64,
        way: Way,
        call: impl Fn(&[libc::iovec], i64) -> isize,
    ) -> io::Result<usize> {
        transfer(self.shared, self.offset, count.min(self.len), off, way, call)
    }

    /// Who helps, if there is enough to do for two.
    fn helper(&self, count: usize) -> Option<&Helper> {
        match self.caller {
            Caller::Queue(helper) if count.min(self.len) > PART => helper,
            _ => None,
        }
    }

    /// The same by two threads, part by part: what is there up to the first part that is not complete.
    fn transfer_together(
        &self,
        helper: &Helper,
        count: usize,
        off: u64,
        call: impl Fn(&[libc::iovec], i64) -> isize + Sync,
    ) -> io::Result<usize> {
        let count = count.min(self.len);
        let part_len = |part: usize| PART.min(count - part * PART);
        let ends: Vec<OnceLock<_>> = (0..count.div_ceil(PART)).map(|_| OnceLock::new()).collect();
        let (buffers, offset) = (AnyThread(self.shared), self.offset);
        helper.share(ends.len(), &|part| {
            let start = part * PART;
            let at = off + start as u64;
            let _ = ends[part].set(transfer(buffers.get(), offset + start, part_len(part), at, Way::Out, &call));
        });
        let mut done = 0;
        for (part, end) in ends.into_iter().filter_map(OnceLock::into_inner).enumerate() {
            match end {
                Ok(n) if n == part_len(part) => done += n,
                Ok(n) => return Ok(done + n),
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    /// Looks whether the file's device is memory, if that is not known: the device itself is asked, which may take long.
    fn find_out(&self, f: BorrowedFd<'_>) {
        if self.patience.has_met(self.handle) {
            return;
        }
        if let Some(device) = device(f).filter(|&device| self.patience.in_memory(device).is_none()) {
            self.patience.learn(device, in_memory(f));
        }
        self.patience.met(self.handle);
    }

    /// `io` without waiting, or the file's answer why not.
    fn ask(&self, f: BorrowedFd<'_>, io: impl Fn(i32) -> io::Result<usize>) -> Result<io::Result<usize>, Nowait> {
        match self.patience.of(self.handle) {
            Nowait::Ask => match io(RWF_NOWAIT) {
                Err(e) if e.raw_os_error() == Some(EOPNOTSUPP) => {
                    let known = device(f).and_then(|device| self.patience.in_memory(device));
                    Err(known.map_or(Nowait::Unknown, |in_memory| self.patience.refused(self.handle, in_memory)))
                }
                other => Ok(other),
            },
            known => Err(known),
        }
    }
}

/// A request's buffers for two threads.
struct AnyThread<'a>(Shared<'a>);

impl<'a> AnyThread<'a> {
    fn get(&self) -> Shared<'a> {
        self.0
    }
}

// SAFETY: the buffers are only handed to the kernel, each thread its own parts of them.
unsafe impl Sync for AnyThread<'_> {}

impl InPlace<'_> {
    /// Reads up to `count` bytes at `off` of a file into the buffer: fewer at the file's end alone.
    ///
    /// # Errors
    /// The file's, also when some bytes were read before it; `EWOULDBLOCK` to have it done by a thread that may wait.
    pub fn read_from(&self, f: BorrowedFd<'_>, count: usize, off: u64) -> io::Result<usize> {
        let read = |extra: i32| {
            let call = |v: &[libc::iovec], at| {
                // SAFETY: the iovecs lie in mapped guest memory; the kernel checks the rest.
                unsafe { libc::preadv2(f.as_raw_fd(), v.as_ptr(), v.len() as i32, at, extra) }
            };
            match self.helper(count) {
                Some(helper) => self.transfer_together(helper, count, off, call),
                None => self.transfer(count, off, Way::Out, call),
            }
        };
        if self.caller.may_block() {
            return read(0);
        }
        match self.ask(f, read) {
            Ok(answer) => answer,
            Err(Nowait::InMemory) => read(0),
            Err(_) => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Writes up to `count` bytes of the buffer at `off` of a file; `how`: `RWF_...` of linux/fs.h.
    ///
    /// # Errors
    /// The file's, when nothing was written; `EWOULDBLOCK` to have it done by a thread that may wait.
    pub fn write_to(&self, f: BorrowedFd<'_>, count: usize, off: u64, how: i32) -> io::Result<usize> {
        let write = |extra: i32| {
            self.transfer(count, off, Way::In, |v, at| {
                // SAFETY: as in `read_from`.
                unsafe { libc::pwritev2(f.as_raw_fd(), v.as_ptr(), v.len() as i32, at, how | extra) }
            })
        };
        if self.caller.may_block() {
            return write(0);
        }
        // What has been appended before a wait would be appended again on the pool.
        let append = how & libc::RWF_APPEND != 0;
        let answer = if append { Err(Nowait::Unknown) } else { self.ask(f, write) };
        match answer {
            Ok(answer) => answer,
            Err(Nowait::InMemory) => write(0),
            Err(_) if self.patience.writes_are_slow() => Err(io::ErrorKind::WouldBlock.into()),
            Err(_) => self.patience.watch(|| {
                self.find_out(f);
                write(0)
            }),
        }
    }
}

/// The device's number, from what the kernel has: a file system behind it is not asked.
fn device(f: BorrowedFd<'_>) -> Option<u64> {
    // SAFETY: all-zero bytes are a valid `statx`.
    let mut st = unsafe { std::mem::zeroed::<libc::statx>() };
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: an open descriptor, an empty path, and room for the answer.
    let done = unsafe { libc::statx(f.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_TYPE, &raw mut st) };
    (done == 0).then_some(u64::from(st.stx_dev_major) << 32 | u64::from(st.stx_dev_minor))
}

/// Whether the file's data is always in memory, so that I/O never waits for a device.
fn in_memory(f: BorrowedFd<'_>) -> bool {
    nix::sys::statfs::fstatfs(f).is_ok_and(|st| st.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Moves bytes 100 at a time; the third call fails.
    fn failing(way: Way, error: i32) -> io::Result<usize> {
        let mut bytes = [0u8; 1000];
        let iovs = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        // SAFETY: the iovec lies in `bytes`.
        let shared = unsafe { Shared::new(&iovs) };
        transfer(shared, 0, 1000, 0, way, |_, at| {
            if at < 200 {
                return 100;
            }
            // SAFETY: the thread's own errno.
            unsafe { *libc::__errno_location() = error };
            -1
        })
    }

    #[test]
    fn a_read_that_fails_half_way_is_no_end_of_file() {
        assert_eq!(failing(Way::Out, libc::EIO).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(failing(Way::In, libc::ENOSPC).unwrap(), 200);
        assert!(failing(Way::In, libc::EAGAIN).is_err(), "done again by who may wait");
    }
}
