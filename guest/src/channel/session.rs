//! One queue's reconnect state: which host it uses, and the copies of its requests that a replay on the next host
//! needs.

use super::request::PendingRequest;
use crate::connect::RetainedMemory;
use crate::error::Error;
use crate::fuse::message::{fixed_body_len, BODY};
use crate::reconnect::handle_cache::HandleCache;
use crate::reconnect::{HostPoll, Reconnect};
use crate::transport::Transport;
use std::sync::Arc;
use tunnelfs_fuse_abi::opcode::WRITE;

/// Bytes saved from the start of a slot, for replay: a dying host may have overwritten the request with part of its
/// reply. Holds two 255-byte names; no reply to a request with a payload is longer.
pub(super) const SAVED_BYTES: usize = 512;
/// Bytes saved of a WRITE's data; the reply to a WRITE is shorter.
const SAVED_DATA_BYTES: usize = 64;

/// How to go on with a request that was prepared for the current host.
pub enum Prepared {
    /// Submit it to the host.
    Submit,
    /// Answer it without the host: 0 or a negative errno.
    Reply(i32),
}

/// One queue's reconnect state.
pub struct Session {
    pub reconnect: Arc<Reconnect>,
    pub queue_index: usize,
    /// Id of the host that the transport leads to; 0 for the first one.
    pub host_id: u64,
    /// Whether there is no host now.
    pub away: bool,
    /// Whether the last completions of a dead host are being taken. It accepts no more requests.
    pub draining: bool,
    /// By slot: the first bytes of the request's payload.
    saved: Box<[[u8; SAVED_BYTES]]>,
    pub cache: HandleCache,
    /// Keeps the slots mapped.
    _kept: Option<RetainedMemory>,
}

impl Session {
    pub fn new(reconnect: Arc<Reconnect>, queue_index: usize, slots: u32, kept: Option<RetainedMemory>) -> Session {
        let saved = vec![[0; SAVED_BYTES]; slots as usize].into();
        let cache = HandleCache::default();
        Session { reconnect, queue_index, host_id: 0, away: false, draining: false, saved, cache, _kept: kept }
    }

    /// Saves the start of a request's payload.
    pub fn save(&mut self, slot: u32, request: &PendingRequest, (at, size): (*mut u8, usize)) {
        let bytes = saved_bytes(request).min(size);
        // SAFETY: the slot is this queue's now, and that large.
        unsafe { std::ptr::copy_nonoverlapping(at, self.saved[slot as usize].as_mut_ptr(), bytes) };
    }

    /// Writes the saved bytes back to the slot.
    pub fn restore(&self, slot: u32, request: &PendingRequest, (at, size): (*mut u8, usize)) {
        let bytes = saved_bytes(request).min(size);
        // SAFETY: as in `save`; the host that had the slot has died.
        unsafe { std::ptr::copy_nonoverlapping(self.saved[slot as usize].as_ptr(), at, bytes) };
    }

    /// Returns the request's bytes from its first name on, as far as they are in its header or saved.
    pub(super) fn names(&self, slot: u32, request: &PendingRequest) -> Vec<u8> {
        let from = BODY + fixed_body_len(request.opcode);
        let mut names = request.head[..request.head_len].get(from..).unwrap_or_default().to_vec();
        names.extend_from_slice(&self.saved[slot as usize][..saved_bytes(request)]);
        names
    }

    /// Records that this queue has detached from its host.
    pub fn detach(&mut self) {
        (self.away, self.draining) = (true, false);
        self.reconnect.handover.detach(self.queue_index);
    }

    /// Returns the transport to a new host, or `None` if there is no new host yet.
    ///
    /// # Errors
    /// [`Error::HostGone`] if no host will come.
    pub fn look(&mut self) -> Result<Option<Box<dyn Transport>>, Error> {
        match self.reconnect.handover.poll(self.queue_index) {
            HostPoll::Pending => Ok(None),
            HostPoll::Closed => Err(Error::HostGone),
            HostPoll::Ready(time, transport) => {
                (self.host_id, self.away) = (time, false);
                Ok(Some(transport))
            }
        }
    }
}

fn saved_bytes(request: &PendingRequest) -> usize {
    let most = if request.opcode == WRITE { SAVED_DATA_BYTES } else { SAVED_BYTES };
    most.min(request.payload_len as usize)
}
