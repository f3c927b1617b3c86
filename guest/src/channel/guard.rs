//! Checks replies that a change of the file system may have overtaken: see [`crate::coherence`].

use super::pending::PendingQueue;
use super::request::PendingRequest;
use crate::coherence::replies::{expire, is_cached};
use crate::transport::{reply_bytes, write_reply, Completion};

impl PendingQueue {
    /// Stores the current time of the change counters in a request that is about to be sent.
    pub(super) fn stamp(&self, request: &mut PendingRequest) {
        if let Some(deliveries) = &self.deliveries {
            request.stamp = deliveries.counters.stamp();
        }
    }

    /// Clears a reply's cache timeouts for each name and inode that has changed since the request was sent. The reply
    /// must still have the host's nodeids.
    pub(super) fn expire_stale(&mut self, completion: &mut Completion, error: i32) {
        let slot = completion.slot;
        let (Some(deliveries), Some(session)) = (&mut self.deliveries, &self.session) else { return };
        let Some(request) = &self.requests[slot as usize] else { return };
        if error != 0 || !is_cached(request.opcode) || !deliveries.counters.is_active() {
            return;
        }
        deliveries.begin();
        if !deliveries.counters.any_since(request.stamp) {
            return;
        }
        let (names, mut reply) = (session.names(slot, request), reply_bytes(&*self.transport, completion));
        if expire(&deliveries.counters, request.stamp, &request.head[..request.head_len], &names, &mut reply) {
            write_reply(&*self.transport, completion, &reply);
        }
    }

    /// Returns `true` if a reply was compared with the counters and may not have reached the kernel yet.
    pub fn has_undelivered(&self) -> bool {
        self.deliveries.as_ref().is_some_and(|deliveries| deliveries.has_any())
    }

    /// Records that all replies so far have reached the kernel.
    pub fn delivered(&mut self) {
        if let Some(deliveries) = &mut self.deliveries {
            deliveries.end();
        }
    }
}
