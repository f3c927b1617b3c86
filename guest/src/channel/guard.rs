//! Replies that a change has overtaken: see [`crate::coherence`].

use super::pending::PendingQueue;
use super::request::PendingRequest;
use crate::coherence::replies::{expire, is_cached};
use crate::transport::{reply_bytes, write_reply, Completion};

impl PendingQueue {
    /// Stamps a request that is about to be sent.
    pub(super) fn stamp(&self, request: &mut PendingRequest) {
        if let Some(deliveries) = &self.deliveries {
            request.stamp = deliveries.counters.stamp();
        }
    }

    /// Takes the time limits off what has changed since the request was sent. The reply has the host's numbers.
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

    /// Whether a reply was compared that may not be with the kernel yet.
    pub fn has_undelivered(&self) -> bool {
        self.deliveries.as_ref().is_some_and(|deliveries| deliveries.has_any())
    }

    /// All replies so far are with the kernel.
    pub fn delivered(&mut self) {
        if let Some(deliveries) = &mut self.deliveries {
            deliveries.end();
        }
    }
}
