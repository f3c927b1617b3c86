//! A payload buffer in shared memory: copied in and out, or handed to the kernel, never borrowed as a slice.

use crate::error::Error;
use std::marker::PhantomData;

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

    /// Whether the buffer has no bytes: a request without a slot.
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

    /// Returns the buffer for a system call that reads or writes it in place (`preadv`, `pwritev`, `sendmsg`). The call
    /// must have ended before the payload's slot is given away.
    pub fn iovec(&mut self) -> libc::iovec {
        libc::iovec { iov_base: self.start.cast(), iov_len: self.len }
    }

    fn place(&self, at: usize, len: usize) -> Result<*mut u8, Error> {
        let end = at.checked_add(len).filter(|&end| end <= self.len);
        end.map(|_| self.start.wrapping_add(at)).ok_or(Error::OutOfRange)
    }
}
