//! Shared bytes to a checked request: the trust boundary.
//!
//! A request is a stream of bytes: a private copy of its first bytes (the
//! header and mostly the operation's structure), then shared buffers. Each
//! byte is copied out at most once, and only the copy is looked at.

use crate::shared::Shared;
use std::ffi::CStr;
use std::io;
use virtiofsd::filesystem::Context;
use virtiofsd::fuse::InHeader;
use vm_memory::ByteValued;

/// Most bytes of names and values that a request may carry beside WRITE data.
const MAX_TAIL: usize = 128 << 10;

/// One decoded request.
pub struct Request<'a> {
    /// The private copy of `fuse_in_header`.
    pub header: InHeader,
    head: &'a [u8],
    payload: Shared<'a>,
    pos: usize,
    end: usize,
}

impl<'a> Request<'a> {
    /// # Errors
    /// `EINVAL` when the header is cut off or announces more than there is.
    pub fn new(head: &'a [u8], payload: Shared<'a>) -> io::Result<Self> {
        let size = size_of::<InHeader>();
        let header = copy_of::<InHeader>(head.get(..size).ok_or_else(einval)?);
        let end = header.len as usize;
        if end < size || end > head.len() + payload.len() {
            return Err(einval());
        }
        Ok(Request { header, head, payload, pos: size, end })
    }

    /// The caller's identity.
    pub fn context(&self) -> Context {
        Context::from(self.header)
    }

    /// The next structure of the stream.
    ///
    /// # Errors
    /// `EINVAL` when the request ends before it.
    pub fn object<T: ByteValued>(&mut self) -> io::Result<T> {
        // The largest operation structure is SETATTR's 88 bytes.
        let mut bytes = [0; 128];
        let bytes = bytes.get_mut(..size_of::<T>()).ok_or_else(einval)?;
        self.take(bytes)?;
        Ok(copy_of(bytes))
    }

    /// All that is left, privately.
    ///
    /// # Errors
    /// `EINVAL` when that is more than names and values can be.
    pub fn rest(&mut self) -> io::Result<Vec<u8>> {
        let left = self.end - self.pos;
        if left > MAX_TAIL {
            return Err(einval());
        }
        let mut bytes = vec![0; left];
        self.take(&mut bytes)?;
        Ok(bytes)
    }

    /// The shared buffers, and where in them the rest of the stream starts, and its length.
    ///
    /// # Errors
    /// `EINVAL` when the rest starts in the private head.
    pub fn data(&self) -> io::Result<(Shared<'a>, usize, usize)> {
        let offset = self.pos.checked_sub(self.head.len()).ok_or_else(einval)?;
        Ok((self.payload, offset, self.end - self.pos))
    }

    fn take(&mut self, out: &mut [u8]) -> io::Result<()> {
        if out.len() > self.end - self.pos {
            return Err(einval());
        }
        let in_head = self.head.len().saturating_sub(self.pos).min(out.len());
        let (first, second) = out.split_at_mut(in_head);
        first.copy_from_slice(&self.head[self.pos.min(self.head.len())..][..in_head]);
        if !second.is_empty() {
            self.payload.read(self.pos + in_head - self.head.len(), second)?;
        }
        self.pos += out.len();
        Ok(())
    }
}

/// Splits NUL-ended strings off the front of `bytes`.
///
/// # Errors
/// `EINVAL` when there is no NUL.
pub fn take_name<'a>(bytes: &mut &'a [u8]) -> io::Result<&'a CStr> {
    let name = CStr::from_bytes_until_nul(bytes).map_err(|_| einval())?;
    *bytes = &bytes[name.to_bytes_with_nul().len()..];
    Ok(name)
}

/// The error for a request that breaks the protocol.
pub fn einval() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

fn copy_of<T: ByteValued>(bytes: &[u8]) -> T {
    let mut value = T::zeroed();
    value.as_mut_slice().copy_from_slice(bytes);
    value
}
