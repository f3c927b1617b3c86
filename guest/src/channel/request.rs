//! A request of the kernel, and its reply.

use super::write_order::Repeats;
use crate::fuse::message::{has_reply, reply_header, request_opcode, request_unique, u32_at, OUT_HEADER};
use crate::transport::Completion;
use std::time::{Duration, Instant};
use tunnelfs_ring::{CQE_INLINE_BYTES, SQE_INLINE_BYTES};

/// Interval between two checks whether the caller of a waiting request has been killed. Requests wait for room in the
/// queue, or for another host.
pub const CALLER_CHECK: Duration = Duration::from_millis(100);

/// A request that the host has, or that waits for room or for a host.
pub struct PendingRequest {
    pub unique: u64,
    pub opcode: u32,
    /// When the guest received the request.
    pub start: Instant,
    /// First bytes, with the kernel's nodeids and handles. `prepare` changes a FORGET or RELEASE to the host's.
    pub head: [u8; SQE_INLINE_BYTES],
    /// Valid bytes of `head`.
    pub head_len: usize,
    /// Bytes in the slot.
    pub payload_len: u32,
    /// Whether the host has it.
    pub sent: bool,
    /// Whether a dead host had it and may have carried it out.
    pub replay: bool,
    /// Whether `PendingQueue::signalled` has returned it: the guest sends at most one INTERRUPT of its own.
    pub interrupted: bool,
    /// Id of the host for which this FORGET or RELEASE was applied to the tables; `None`: not applied yet. Stops a
    /// replay from applying it twice.
    pub forgotten_on: Option<u64>,
    /// Time of the change counters when it was submitted.
    pub stamp: u64,
    /// For a READ: its repeats because of concurrent WRITEs.
    pub repeats: Repeats,
}

/// The reply to the request in `slot`, checked for the kernel.
pub struct Reply {
    pub slot: u32,
    /// `fuse_out_header`, built by the guest. Only its `error` comes from the host.
    pub header: [u8; OUT_HEADER],
    pub opcode: u32,
    pub completion: Completion,
}

impl Reply {
    /// Builds a reply without the host; `error` is 0 or a negative errno.
    pub fn own(slot: u32, request: &PendingRequest, error: i32) -> Reply {
        let completion = Completion { slot, head: [0; CQE_INLINE_BYTES], head_len: OUT_HEADER, payload_len: 0 };
        Reply { slot, header: reply_header(OUT_HEADER, error, request.unique), opcode: request.opcode, completion }
    }

    /// Returns `true` if the kernel expects no reply (FORGET, BATCH_FORGET, INTERRUPT).
    pub fn expects_no_reply(&self) -> bool {
        !has_reply(self.opcode)
    }

    /// Returns the header of an error reply to the request; `error` is a negative errno.
    pub fn error_header(&self, error: i32) -> [u8; OUT_HEADER] {
        reply_header(OUT_HEADER, error, request_unique(&self.header))
    }

    /// Returns the reply bytes that precede those in the slot; none if the reply is an error.
    pub fn inline(&self) -> &[u8] {
        if self.failed() {
            &[]
        } else {
            self.completion.inline()
        }
    }

    /// Number of reply bytes in the slot; 0 if the reply is an error.
    pub fn payload_len(&self) -> usize {
        if self.failed() {
            0
        } else {
            self.completion.payload_len
        }
    }

    fn failed(&self) -> bool {
        self.header[4..8] != [0; 4]
    }
}

impl PendingRequest {
    pub fn new(head: &[u8], payload_len: u32) -> PendingRequest {
        let mut copy = [0; SQE_INLINE_BYTES];
        copy[..head.len()].copy_from_slice(head);
        PendingRequest {
            unique: request_unique(head),
            opcode: request_opcode(head),
            start: Instant::now(),
            head: copy,
            head_len: head.len(),
            payload_len,
            sent: false,
            replay: false,
            interrupted: false,
            forgotten_on: None,
            stamp: 0,
            repeats: Repeats::default(),
        }
    }

    /// Returns `true` if SIGKILL is pending for the calling thread, by proc_pid_status(5); `false` if it is not, or if
    /// the thread is not visible here.
    pub fn caller_has_sigkill(&self) -> bool {
        self.caller_signals().0 & 1 << (libc::SIGKILL - 1) != 0
    }

    /// Returns `true` if a signal is pending that the calling thread does not block. The kernel sends an INTERRUPT
    /// then.
    pub fn caller_has_signal(&self) -> bool {
        let (pending, blocked) = self.caller_signals();
        pending & !blocked != 0
    }

    /// Returns the caller's pending and blocked signals as bit masks; 0 for a caller that this process cannot see.
    fn caller_signals(&self) -> (u64, u64) {
        let caller = u32_at(&self.head, 32);
        if caller == 0 {
            return (0, 0);
        }
        let status = std::fs::read_to_string(format!("/proc/{caller}/status")).unwrap_or_default();
        let set = |name: &str| {
            let set = status.lines().find_map(|line| line.strip_prefix(name));
            set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or(0)
        };
        (set("SigPnd:") | set("ShdPnd:"), set("SigBlk:"))
    }
}
