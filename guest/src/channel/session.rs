//! A queue's part in going on with another host: which host it has, and what it keeps of its requests for the next one.

use super::request::PendingRequest;
use crate::connect::RetainedMemory;
use crate::error::Error;
use crate::fuse::message::{fixed_body_len, BODY};
use crate::reconnect::handle_cache::HandleCache;
use crate::reconnect::{HostPoll, Reconnect};
use crate::transport::Transport;
use std::sync::Arc;
use tunnelfs_fuse_abi::opcode::WRITE;

/// Bytes at a slot's start that are kept privately: two names, and more than any reply to a request with a payload
/// has. A host may have begun to answer where the question was.
pub(super) const SAVED_BYTES: usize = 512;
/// As much of data to be written.
const SAVED_DATA_BYTES: usize = 64;

/// What becomes of a request that is to go to a later host.
pub enum Prepared {
    /// To the host.
    Submit,
    /// This is the answer: 0 or a negative errno.
    Reply(i32),
}

/// One queue's.
pub struct Session {
    pub reconnect: Arc<Reconnect>,
    pub queue_index: usize,
    /// Which host the transport leads to.
    pub host_id: u64,
    /// There is none.
    pub away: bool,
    /// The last completions of one are being taken: it cannot be asked any more.
    pub draining: bool,
    /// The start of each slot's request.
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

    /// Keeps the start of a request's payload.
    pub fn save(&mut self, slot: u32, request: &PendingRequest, (at, size): (*mut u8, usize)) {
        let bytes = saved_bytes(request).min(size);
        // SAFETY: the slot is this queue's now, and that large.
        unsafe { std::ptr::copy_nonoverlapping(at, self.saved[slot as usize].as_mut_ptr(), bytes) };
    }

    /// Puts it back.
    pub fn restore(&self, slot: u32, request: &PendingRequest, (at, size): (*mut u8, usize)) {
        let bytes = saved_bytes(request).min(size);
        // SAFETY: as in `save`; the host that had it has gone.
        unsafe { std::ptr::copy_nonoverlapping(self.saved[slot as usize].as_ptr(), at, bytes) };
    }

    /// What a request has from its first name on.
    pub(super) fn names(&self, slot: u32, request: &PendingRequest) -> Vec<u8> {
        let from = BODY + fixed_body_len(request.opcode);
        let mut names = request.head[..request.head_len].get(from..).unwrap_or_default().to_vec();
        names.extend_from_slice(&self.saved[slot as usize][..saved_bytes(request)]);
        names
    }

    /// The host has been let go.
    pub fn detach(&mut self) {
        (self.away, self.draining) = (true, false);
        self.reconnect.handover.detach(self.queue_index);
    }

    /// Whether there is a new host.
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
