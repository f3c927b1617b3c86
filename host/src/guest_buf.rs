//! Buffers in memory that the guest may change at any time: no references into them, only copies, and iovecs for the
//! kernel.

use crate::detach;
use crate::gate::Pass;
use crate::vring::Vring;
use libc::iovec;
use std::cell::RefCell;
use std::io;
use vm_memory::VolatileSlice;

thread_local! {
    /// The queue whose request this thread serves. A stop of the queue may abandon the request meanwhile.
    static SERVED: RefCell<Option<(Vring, Pass)>> = const { RefCell::new(None) };
}

/// Sets the queue for which the calling thread writes to guest memory from now on.
pub(crate) fn serve_for(vring: &Vring, pass: Pass) {
    detach::serve_for(vring.gate().key());
    SERVED.set(Some((vring.clone(), pass)));
}

/// Waits while the queue of an abandoned request is stopped.
///
/// # Errors
/// `EIO`: the memory belongs to another driver now.
fn wait_for_permission() -> io::Result<()> {
    let may_write =
        SERVED.with_borrow(|served| served.as_ref().is_none_or(|(vring, pass)| vring.gate().may_write(*pass)));
    may_write.then_some(()).ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))
}

/// The error for a request that breaks the protocol.
pub fn einval() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

/// A list of guest buffers, read and written as one sequence of bytes.
#[derive(Clone, Copy)]
pub struct GuestBuf<'a> {
    iovs: &'a [iovec],
}

/// A [`GuestBuf`] that owns its list, for a request that another thread may finish.
pub struct OwnedGuestBuf(pub Vec<iovec>);

// SAFETY: the buffers are only touched by raw copies and system calls, which
// may run on any thread; the request that has an `OwnedGuestBuf` also keeps the mapping.
unsafe impl Send for OwnedGuestBuf {}

impl<'a> GuestBuf<'a> {
    /// # Safety
    /// Each iovec must lie in mapped memory as long as this lives.
    pub unsafe fn new(iovs: &'a [iovec]) -> Self {
        GuestBuf { iovs }
    }

    /// Bytes in all buffers.
    pub fn len(&self) -> usize {
        self.iovs.iter().map(|v| v.iov_len).sum()
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies bytes at `offset` out into private memory.
    ///
    /// # Errors
    /// `EINVAL` when they do not all lie in the buffers.
    pub fn read(&self, offset: usize, out: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        self.window(offset, out.len(), &mut |v| {
            done += volatile(v).copy_to(&mut out[done..]);
        })
    }

    /// Copies private bytes to `offset`.
    ///
    /// # Errors
    /// `EINVAL` when they do not all fit into the buffers, `EIO` when the guest has gone meanwhile.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        wait_for_permission()?;
        let mut done = 0;
        self.window(offset, bytes.len(), &mut |v| {
            volatile(v).copy_from(&bytes[done..done + v.iov_len]);
            done += v.iov_len;
        })
    }

    /// Lets `call` have the kernel fill the buffers. Done again when a stop of the queue has abandoned the request
    /// meanwhile, and the queue runs again.
    ///
    /// # Errors
    /// `EIO` when the guest has gone meanwhile, and those of `call`.
    pub fn fill<R>(&self, call: impl Fn() -> io::Result<R>) -> io::Result<R> {
        loop {
            if let Some(filled) = detach::fill(self.iovs, wait_for_permission, &call)? {
                return filled;
            }
        }
    }

    /// Hands the iovecs of up to `len` bytes from `offset` to one system call.
    pub fn with_iovecs<R>(&self, offset: usize, len: usize, call: impl FnOnce(&[iovec]) -> R) -> R {
        if let [one] = self.iovs {
            let skip = offset.min(one.iov_len);
            // SAFETY: `skip` is at most the buffer's length.
            let base = unsafe { one.iov_base.cast::<u8>().add(skip) }.cast();
            return call(&[iovec { iov_base: base, iov_len: len.min(one.iov_len - skip) }]);
        }
        let mut parts = Vec::with_capacity(self.iovs.len());
        let len = len.min(self.len().saturating_sub(offset));
        let _ = self.window(offset, len, &mut |v| parts.push(v));
        // UIO_MAXIOV; the caller loops over what is left.
        parts.truncate(1024);
        call(&parts)
    }

    fn window(&self, offset: usize, len: usize, each: &mut dyn FnMut(iovec)) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.len()) {
            return Err(einval());
        }
        let (mut skip, mut left) = (offset, len);
        for v in self.iovs {
            let from = skip.min(v.iov_len);
            skip -= from;
            let take = left.min(v.iov_len - from);
            if take > 0 {
                // SAFETY: `from` is at most the buffer's length.
                let base = unsafe { v.iov_base.cast::<u8>().add(from) }.cast();
                each(iovec { iov_base: base, iov_len: take });
                left -= take;
            }
        }
        Ok(())
    }
}

/// A slice for copies that may race with the guest's accesses.
fn volatile<'a>(part: iovec) -> VolatileSlice<'a> {
    // SAFETY: only called for what `window` yields: mapped parts, by the promise of `GuestBuf::new`.
    unsafe { VolatileSlice::new(part.iov_base.cast(), part.iov_len) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_over_scattered_buffers() {
        let mut bytes = *b"0123456789";
        let p = bytes.as_mut_ptr();
        let iovs = [(0, 3), (5, 0), (4, 6)].map(|(at, iov_len)| iovec {
            // SAFETY: inside `bytes`.
            iov_base: unsafe { p.add(at) }.cast(),
            iov_len,
        });
        // SAFETY: the iovecs lie in `bytes`.
        let s = unsafe { GuestBuf::new(&iovs) };
        let mut out = [0; 5];
        s.read(1, &mut out).unwrap();
        assert_eq!(&out, b"12456");
        s.write(2, b"ab").unwrap();
        assert!(s.read(5, &mut out).is_err());
        assert!(s.write(usize::MAX, b"x").is_err());
        assert_eq!(s.with_iovecs(2, 100, |v| v.iter().map(|v| v.iov_len).sum::<usize>()), 7);
        assert_eq!(&bytes, b"01a3b56789");
    }
}
