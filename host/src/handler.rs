//! What a transport hands its requests to.

use crate::copy_helper::CopyHelper;
use crate::guest_buf::GuestBuf;
use std::io;
use zerocopy::{Immutable, IntoBytes};

/// Bytes that the largest reply of a fixed size needs (CREATE: an entry and an open file). STATX's, which is larger and
/// seldom, goes to the guest's buffer.
pub const MAX_REPLY_BODY: usize = 144;

/// The reply to a request.
pub struct Reply {
    /// 0 or a negative errno.
    pub error: i32,
    body: [u8; MAX_REPLY_BODY],
    body_len: usize,
    /// Bytes of the reply that already lie in the guest's buffer.
    pub payload_len: usize,
}

impl Reply {
    /// A success without a body.
    pub fn ok() -> Self {
        Reply { error: 0, body: [0; MAX_REPLY_BODY], body_len: 0, payload_len: 0 }
    }

    /// A success with a structure of at most [`MAX_REPLY_BODY`] bytes.
    pub fn with<T: IntoBytes + Immutable>(value: &T) -> Self {
        const { assert!(size_of::<T>() <= MAX_REPLY_BODY) };
        let mut reply = Reply::ok();
        reply.body[..size_of::<T>()].copy_from_slice(value.as_bytes());
        reply.body_len = size_of::<T>();
        reply
    }

    /// A success with bytes that already lie in the guest's buffer.
    pub fn with_payload(bytes: usize) -> Self {
        Reply { payload_len: bytes, ..Reply::ok() }
    }

    /// An error.
    pub fn error(e: &io::Error) -> Self {
        Reply { error: -e.raw_os_error().unwrap_or(libc::EIO), ..Reply::ok() }
    }

    /// The reply's structure, which the transport delivers.
    pub fn body(&self) -> &[u8] {
        &self.body[..self.body_len]
    }
}

/// How a request came out of [`Handler::handle`].
pub enum Outcome {
    /// Deliver this.
    Reply(Reply),
    /// The operation has no reply (FORGET).
    NoReply,
}

/// Serves one guest's requests; shared by all its queues. Buffers are borrowed for the call: the transport keeps them
/// mapped.
pub trait Handler: Send + Sync + 'static {
    /// Serves one request: `head` is a private copy of its first bytes, `payload` the rest, `out` where reply data may
    /// go. May block: another thread takes the queue of a request that takes too long. `helper`, if there is one,
    /// copies parts of a large READ.
    fn handle(&self, head: &[u8], payload: GuestBuf<'_>, out: GuestBuf<'_>, helper: Option<&CopyHelper>) -> Outcome;

    /// Forgets all that the guest had open; called when it has gone.
    fn reset(&self);

    /// Counts payload bytes that a transport has copied.
    fn count_copied(&self, bytes: u64);
}
