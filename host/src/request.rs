//! From shared bytes to a checked request: the trust boundary.
//!
//! A request is a stream of bytes: a private copy of its first bytes (the
//! header and mostly the operation's structure), then shared buffers. Each
//! byte is copied out at most once, and only the copy is looked at.

use crate::fs::Context;
use crate::guest_buf::{einval, GuestBuf};
use std::ffi::CStr;
use std::io;
use tunnelfs_fuse_abi::changes::OP_CHANGES;
use tunnelfs_fuse_abi::{InHeader, Opcode};
use zerocopy::{FromBytes, IntoBytes};

/// Most bytes of names and values that a request may carry beside WRITE data.
const MAX_TAIL: usize = 128 << 10;

/// One decoded request.
pub struct Request<'a> {
    /// The private copy of `fuse_in_header`.
    pub header: InHeader,
    head: &'a [u8],
    payload: GuestBuf<'a>,
    pos: usize,
    end: usize,
}

impl<'a> Request<'a> {
    /// # Errors
    /// `EINVAL` when the header is cut off or announces more than there is.
    pub fn new(head: &'a [u8], payload: GuestBuf<'a>) -> io::Result<Self> {
        let size = size_of::<InHeader>();
        let (header, _) = InHeader::read_from_prefix(head).map_err(|_| einval())?;
        let end = header.len as usize;
        if end < size || end > head.len() + payload.len() {
            return Err(einval());
        }
        Ok(Request { header, head, payload, pos: size, end })
    }

    /// The caller's identity.
    pub fn context(&self) -> Context {
        let InHeader { uid, gid, pid, unique, .. } = self.header;
        Context { uid, gid, pid, unique }
    }

    /// The next structure of the stream.
    ///
    /// # Errors
    /// `EINVAL` when the request ends before it.
    pub fn read_obj<T: FromBytes + IntoBytes>(&mut self) -> io::Result<T> {
        let mut value = T::new_zeroed();
        self.take(value.as_mut_bytes())?;
        Ok(value)
    }

    /// All that is left, privately.
    ///
    /// # Errors
    /// `EINVAL` when that is more than names and values can be.
    pub fn read_rest(&mut self) -> io::Result<Vec<u8>> {
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
    pub fn payload(&self) -> io::Result<(GuestBuf<'a>, usize, usize)> {
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

/// The request's `unique` in `fuse_in_header`; 0 where the header is cut off.
pub fn unique(head: &[u8]) -> u64 {
    head.get(8..16).map_or(0, |bytes| u64::from_ne_bytes(bytes.try_into().expect("eight bytes")))
}

/// Whether a request waits until something changes, however long that takes.
pub fn waits_for_changes(head: &[u8]) -> bool {
    head.get(4..8) == Some(&OP_CHANGES.to_ne_bytes())
}

/// The `unique` of the request that an INTERRUPT is about; `None` for other requests.
pub fn interrupted_unique(head: &[u8]) -> Option<u64> {
    let opcode = u32::from_ne_bytes(head.get(4..8)?.try_into().ok()?);
    // `struct fuse_interrupt_in` follows the header.
    let body = head.get(size_of::<InHeader>()..size_of::<InHeader>() + 8)?;
    (opcode == Opcode::Interrupt as u32).then(|| u64::from_ne_bytes(body.try_into().expect("eight bytes")))
}

/// Splits a NUL-ended string of any content (a link's target, an attribute's name) off the front of `bytes`.
///
/// # Errors
/// `EINVAL` when there is no NUL.
pub fn parse_cstr<'a>(bytes: &mut &'a [u8]) -> io::Result<&'a CStr> {
    let text = CStr::from_bytes_until_nul(bytes).map_err(|_| einval())?;
    *bytes = &bytes[text.to_bytes_with_nul().len()..];
    Ok(text)
}

/// Splits the name of a directory's entry off the front of `bytes`. The file system hands it to `mkdirat` and its like
/// as it is: one that is a path would lead out of the shared directory.
///
/// # Errors
/// `EINVAL` when there is no NUL, or the name is empty, `.`, `..` or has a `/`.
pub fn parse_name<'a>(bytes: &mut &'a [u8]) -> io::Result<&'a CStr> {
    let name = parse_cstr(bytes)?;
    let is_path = name.to_bytes().contains(&b'/');
    if is_path || matches!(name.to_bytes(), b"" | b"." | b"..") {
        return Err(einval());
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_never_a_path() {
        for name in ["a\0", "...\0", "..a\0", "\x01\0"] {
            assert!(parse_name(&mut name.as_bytes()).is_ok(), "{name:?}");
        }
        for name in ["", "a", "\0", ".\0", "..\0", "../a\0", "/etc\0", "a/b\0", "a/\0", "/\0"] {
            assert!(parse_name(&mut name.as_bytes()).is_err(), "{name:?}");
        }
        let mut two = &b"a\0../b\0rest"[..];
        assert_eq!((parse_name(&mut two).unwrap(), parse_cstr(&mut two).unwrap()), (c"a", c"../b"));
        assert_eq!(two, b"rest");
    }

    #[test]
    fn a_request_that_announces_more_than_there_is() {
        let mut head = [0u8; 40];
        // SAFETY: no buffers.
        let none = unsafe { GuestBuf::new(&[]) };
        for (len, good) in [(0u32, false), (39, false), (40, true), (41, false), (u32::MAX, false)] {
            head[..4].copy_from_slice(&len.to_ne_bytes());
            assert_eq!(Request::new(&head, none).is_ok(), good, "{len}");
        }
        assert!(Request::new(&head[..39], none).is_err());
    }
}
