//! The shared structures. No logic, plain integers only: any bit pattern is valid.

use crate::sync::Entry;

/// Bytes of a page: slots are aligned to it.
pub const PAGE: usize = 4096;
/// Bytes of message header that a submission entry carries.
pub const SQE_INLINE_BYTES: usize = 104;
/// Bytes of message header that a completion entry carries.
pub const CQE_INLINE_BYTES: usize = 48;
/// The slot number of a request without a payload buffer.
pub const NO_SLOT: u32 = u32::MAX;

/// A submission: what follows the 4-byte sequence number in a 128-byte entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Sqe {
    /// The guest's own number for the request; comes back in the completion.
    pub user_data: u32,
    /// The payload slot, or [`NO_SLOT`].
    pub slot: u32,
    /// Request bytes in the slot, from its start.
    pub payload_len: u32,
    /// Reply bytes that the host may write into the slot.
    pub reply_max: u32,
    /// Valid bytes of `inline`.
    pub inline_len: u32,
    /// The message's first bytes.
    pub inline: [u8; SQE_INLINE_BYTES],
}

/// A completion: what follows the 4-byte sequence number in a 64-byte entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Cqe {
    /// The submission's `user_data`.
    pub user_data: u32,
    /// Reply bytes in the slot, from its start.
    pub payload_len: u32,
    /// Valid bytes of `inline`.
    pub inline_len: u32,
    /// The reply's first bytes.
    pub inline: [u8; CQE_INLINE_BYTES],
}

// SAFETY: integers only, 4-aligned, 4 + 15 * 8 bytes.
unsafe impl Entry for Sqe {
    fn fits_first_line(&self) -> bool {
        self.inline_len <= SQE_FIRST_LINE_INLINE
    }
}

// SAFETY: integers only, 4-aligned, 4 + 7 * 8 bytes.
unsafe impl Entry for Cqe {
    fn fits_first_line(&self) -> bool {
        true
    }
}

/// Header bytes that lie in a submission's first cache line.
const SQE_FIRST_LINE_INLINE: u32 = 40;

#[cfg(not(loom))]
const _: () = {
    use crate::spsc::{Cell, CacheLine};
    assert!(size_of::<Cell<Sqe>>() == 128);
    assert!(size_of::<Cell<Cqe>>() == 64);
    assert!(size_of::<CacheLine>() == 128 && align_of::<CacheLine>() == 128);
};
