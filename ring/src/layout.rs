//! The shared structures. No logic, plain integers only: any bit pattern is valid.

use crate::sync::{Entry, FIRST_LINE};

/// Bytes of a page: slots are aligned to it.
pub const PAGE: usize = 4096;
/// Message bytes that a submission entry carries.
pub const SQE_INLINE_BYTES: usize = 104;
/// Message bytes that a completion entry carries.
pub const CQE_INLINE_BYTES: usize = 48;
/// The slot number of a request without a payload buffer.
pub const NO_SLOT: u32 = u32::MAX;

/// A submission: what follows the 4-byte sequence number in a 128-byte entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Sqe {
    /// The driver's own number for the request; comes back in the completion.
    pub user_data: u32,
    /// The payload slot, or [`NO_SLOT`].
    pub slot: u32,
    /// Request bytes in the slot, from its start.
    pub payload_len: u32,
    /// Reply bytes that the device may write into the slot.
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

/// Inline bytes of a submission that lie in its first cache line, behind the sequence number.
const SQE_FIRST_LINE_INLINE: u32 = (FIRST_LINE - std::mem::offset_of!(Sqe, inline)) as u32;

#[cfg(not(loom))]
const _: () = {
    use crate::spsc::{CacheLine, Cell};
    assert!(size_of::<Cell<Sqe>>() == 128);
    assert!(size_of::<Cell<Cqe>>() == 64);
    assert!(size_of::<CacheLine>() == 128 && align_of::<CacheLine>() == 128);
};
