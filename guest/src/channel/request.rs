//! A request of the kernel's, and the answer that it gets.

use super::write_order::Repeats;
use crate::fuse::message::{has_reply, reply_header, request_opcode, request_unique, u32_at, OUT_HEADER};
use crate::transport::Completion;
use std::time::{Duration, Instant};
use tunnelfs_ring::{CQE_INLINE_BYTES, SQE_INLINE_BYTES};

/// How long a request waits, for room or for another host, until the guest checks whether its caller has been killed.
pub const CALLER_CHECK: Duration = Duration::from_millis(100);

/// A request that the host has, or that waits for room.
pub struct PendingRequest {
    pub unique: u64,
    pub opcode: u32,
    /// When the kernel asked.
    pub start: Instant,
    /// As the kernel has it.
    pub head: [u8; SQE_INLINE_BYTES],
    pub head_len: usize,
    pub payload_len: u32,
    /// The host has it.
    pub sent: bool,
    /// A host that has gone had it.
    pub replay: bool,
    /// An INTERRUPT of ours has been sent for it.
    pub interrupted: bool,
    /// What it gives back has been taken off the tables, for the host of this time.
    pub forgotten_on: Option<u64>,
    /// When it was sent, by the clock of changes.
    pub stamp: u64,
    /// Of a READ that was beside a WRITE of its bytes.
    pub repeats: Repeats,
}

/// The host's answer to the request in `slot`, fit for the kernel.
pub struct Reply {
    pub slot: u32,
    /// `fuse_out_header`, made here: the host's word is only taken for the error.
    pub header: [u8; OUT_HEADER],
    pub opcode: u32,
    pub completion: Completion,
}

impl Reply {
    /// Without a host.
    pub fn own(slot: u32, request: &PendingRequest, error: i32) -> Reply {
        let completion = Completion { slot, head: [0; CQE_INLINE_BYTES], head_len: OUT_HEADER, payload_len: 0 };
        Reply { slot, header: reply_header(OUT_HEADER, error, request.unique), opcode: request.opcode, completion }
    }

    /// Whether the kernel expects no reply (FORGET, INTERRUPT).
    pub fn expects_no_reply(&self) -> bool {
        !has_reply(self.opcode)
    }

    /// The header of a reply that is an error instead.
    pub fn error_header(&self, error: i32) -> [u8; OUT_HEADER] {
        reply_header(OUT_HEADER, error, request_unique(&self.header))
    }

    /// Reply bytes before those in the slot.
    pub fn inline(&self) -> &[u8] {
        if self.failed() {
            &[]
        } else {
            self.completion.inline()
        }
    }

    /// Reply bytes in the slot.
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

    /// Whether the thread that asks is being killed, as proc_pid_status(5) tells.
    pub fn caller_has_sigkill(&self) -> bool {
        self.caller_signals().0 & 1 << (libc::SIGKILL - 1) != 0
    }

    /// Whether a signal waits for it that it does not block: then the kernel sends an INTERRUPT.
    pub fn caller_has_signal(&self) -> bool {
        let (pending, blocked) = self.caller_signals();
        pending & !blocked != 0
    }

    /// Its pending and its blocked signals, as bits; none for a caller that this process cannot see.
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
