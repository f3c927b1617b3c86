//! A payload buffer in shared memory: copied in and out, or handed to the kernel, never borrowed as a slice.

use crate::error::Error;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};

/// Bytes that this end owns now. A hostile peer may still write them: copy out once, and check the copy.
#[derive(Debug)]
pub struct Payload<'a> {
    start: *mut u8,
    len: usize,
    slot: PhantomData<&'a mut u8>,
}

impl Payload<'_> {
    /// # Safety
    /// `len` bytes must stay mapped from `start` as long as the payload lives.
    pub(super) unsafe fn new(start: *mut u8, len: usize) -> Self {
        Payload { start, len, slot: PhantomData }
    }

    /// Returns the buffer's bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the buffer has no bytes: the request has none, and its reply may have none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes out, from `at` on.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when they do not all lie in the buffer.
    pub fn read_at(&self, at: usize, out: &mut [u8]) -> Result<(), Error> {
        let from = self.place(at, out.len())?;
        // SAFETY: `place` has checked that the bytes are mapped; `out` is private memory.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Copies bytes in, from `at` on.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when they do not all fit.
    pub fn write_at(&mut self, at: usize, bytes: &[u8]) -> Result<(), Error> {
        let to = self.place(at, bytes.len())?;
        // SAFETY: as in `read_at`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Reads up to `len` bytes of a file, from its byte `offset` on, to the buffer's start: the kernel writes them in
    /// place. Returns how many there were.
    ///
    /// # Errors
    /// `InvalidInput` when `len` bytes do not fit, or the system's.
    pub fn read_from(&mut self, file: impl AsFd, len: usize, offset: u64) -> io::Result<usize> {
        let (start, fd, offset) = (self.place(0, len)?, file.as_fd(), file_offset(offset)?);
        // SAFETY: `place` has checked that the bytes are mapped, and the kernel is the only one that touches them here.
        done(unsafe { libc::pread(fd.as_raw_fd(), start.cast(), len, offset) })
    }

    /// Writes the buffer's first `len` bytes to a file, at its byte `offset`: the kernel reads them in place. Returns how
    /// many were written.
    ///
    /// # Errors
    /// As [`Self::read_from`].
    pub fn write_to(&self, file: impl AsFd, len: usize, offset: u64) -> io::Result<usize> {
        let (start, fd, offset) = (self.place(0, len)?, file.as_fd(), file_offset(offset)?);
        // SAFETY: as in `read_from`.
        done(unsafe { libc::pwrite(fd.as_raw_fd(), start.cast_const().cast(), len, offset) })
    }

    /// Returns the buffer for another system call that reads or writes it in place (`sendmsg`, say). The call
    /// must have ended before the payload's slot is given away.
    pub fn iovec(&mut self) -> libc::iovec {
        libc::iovec { iov_base: self.start.cast(), iov_len: self.len }
    }

    fn place(&self, at: usize, len: usize) -> Result<*mut u8, Error> {
        let end = at.checked_add(len).filter(|&end| end <= self.len);
        end.map(|_| self.start.wrapping_add(at)).ok_or(Error::OutOfRange { at, len, size: self.len })
    }
}

fn file_offset(offset: u64) -> io::Result<i64> {
    offset.try_into().map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn done(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
