//! File I/O straight between a file and the guest's buffers.

use crate::copy_helper::CopyHelper;
use crate::guest_buf::{einval, GuestBuf};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::OnceLock;

/// Bytes of one part of a READ that two threads do together.
const PART: usize = 128 << 10;

/// A part of a request's buffers.
pub struct ZeroCopyBuf<'a> {
    buf: GuestBuf<'a>,
    /// Where in the buffers the data starts.
    offset: usize,
    /// Bytes there.
    len: usize,
    /// Copies parts of a large READ.
    helper: Option<&'a CopyHelper>,
}

/// The direction of a transfer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Into a file. An error after some bytes becomes a short count, as in write(2).
    In,
    /// Out of a file. An error after some bytes is an error: to the guest's kernel a short count is the end of the file.
    Out,
}

/// Moves up to `count` bytes between `start` in the buffers and `off` in the file.
///
/// A short READ is followed by another one, until one finds nothing. By POSIX a short count on a regular file is its
/// end, unless a signal came. Linux gives more of them: `filemap_read` returns what it has when a later page cannot be
/// read; FUSE in direct_io mode passes on its server's count; seq_file ends where the next record does not fit. Asking
/// for the size instead costs as much: 0.6 us, measured in a VM.
fn transfer(
    buf: GuestBuf<'_>,
    start: usize,
    count: usize,
    off: u64,
    way: Way,
    call: impl Fn(&[libc::iovec], i64) -> isize,
) -> io::Result<usize> {
    let mut done = 0;
    while done < count {
        let at = i64::try_from(off + done as u64).map_err(|_| einval())?;
        let n = buf.with_iovecs(start + done, count - done, |v| call(v, at));
        match n {
            0 => break,
            1.. => done += n as usize,
            _ => match io::Error::last_os_error() {
                e if done == 0 || way == Way::Out => return Err(e),
                _ => break,
            },
        }
    }
    Ok(done)
}

impl<'a> ZeroCopyBuf<'a> {
    /// `len` bytes from `offset` on in a request's buffers.
    pub(crate) fn new(buf: GuestBuf<'a>, offset: usize, len: usize, helper: Option<&'a CopyHelper>) -> Self {
        ZeroCopyBuf { buf, offset, len, helper }
    }
}

impl ZeroCopyBuf<'_> {
    /// Bytes of the buffer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the buffer is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes at `at` of the buffer out of it, for a file system whose data is in no file.
    ///
    /// # Errors
    /// `EINVAL` when they do not all lie in it.
    pub fn read_bytes(&self, at: usize, bytes: &mut [u8]) -> io::Result<()> {
        self.check(at, bytes.len())?;
        self.buf.read(self.offset + at, bytes)
    }

    /// Copies bytes to `at` of the buffer.
    ///
    /// # Errors
    /// `EINVAL` when they do not all fit into it.
    pub fn write_bytes(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.check(at, bytes.len())?;
        self.buf.write(self.offset + at, bytes)
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
        transfer(self.buf, self.offset, count.min(self.len), off, way, call)
    }

    /// The helper, if there is enough to copy for two threads.
    fn helper(&self, count: usize) -> Option<&CopyHelper> {
        self.helper.filter(|_| count.min(self.len) > PART)
    }

    /// As `transfer`, by two threads, part by part. Returns the bytes up to the first part that is not complete.
    fn transfer_together(
        &self,
        helper: &CopyHelper,
        count: usize,
        off: u64,
        call: impl Fn(&[libc::iovec], i64) -> isize + Sync,
    ) -> io::Result<usize> {
        let count = count.min(self.len);
        let part_len = |part: usize| PART.min(count - part * PART);
        let ends: Vec<OnceLock<_>> = (0..count.div_ceil(PART)).map(|_| OnceLock::new()).collect();
        let (buffers, offset) = (AnyThread(self.buf), self.offset);
        helper.run_parts(ends.len(), &|part| {
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
}

/// A request's buffers for two threads.
struct AnyThread<'a>(GuestBuf<'a>);

impl<'a> AnyThread<'a> {
    fn get(&self) -> GuestBuf<'a> {
        self.0
    }
}

// SAFETY: the buffers are only handed to the kernel, each thread its own parts of them.
unsafe impl Sync for AnyThread<'_> {}

impl ZeroCopyBuf<'_> {
    /// Reads up to `count` bytes at `off` of a file into the buffer: fewer at the file's end alone.
    ///
    /// # Errors
    /// The file's, also when some bytes were read before it.
    pub fn read_from(&self, f: BorrowedFd<'_>, count: usize, off: u64) -> io::Result<usize> {
        // SAFETY: the iovecs lie in mapped guest memory; the kernel checks the rest.
        let call = |v: &[libc::iovec], at| unsafe {
            match v {
                // Cheaper by a twelfth of a READ of 4 KiB.
                [one] => libc::pread(f.as_raw_fd(), one.iov_base, one.iov_len, at),
                _ => libc::preadv(f.as_raw_fd(), v.as_ptr(), v.len() as i32, at),
            }
        };
        self.buf.fill(|| match self.helper(count) {
            Some(helper) => self.transfer_together(helper, count, off, call),
            None => self.transfer(count, off, Way::Out, call),
        })
    }

    /// Writes up to `count` bytes of the buffer at `off` of a file; `flags`: `RWF_...` of linux/fs.h.
    ///
    /// # Errors
    /// The file's, when nothing was written.
    pub fn write_to(&self, f: BorrowedFd<'_>, count: usize, off: u64, flags: i32) -> io::Result<usize> {
        // SAFETY: as in `read_from`.
        self.transfer(count, off, Way::In, |v, at| unsafe {
            match v {
                [one] if flags == 0 => libc::pwrite(f.as_raw_fd(), one.iov_base, one.iov_len, at),
                _ => libc::pwritev2(f.as_raw_fd(), v.as_ptr(), v.len() as i32, at, flags),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Moves bytes 100 at a time; the third call fails.
    fn failing(way: Way, error: i32) -> io::Result<usize> {
        let mut bytes = [0u8; 1000];
        let iovs = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        // SAFETY: the iovec lies in `bytes`.
        let buf = unsafe { GuestBuf::new(&iovs) };
        transfer(buf, 0, 1000, 0, way, |_, at| {
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
    }
}
