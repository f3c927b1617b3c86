//! What serves a guest's requests.

use crate::server::{Caller, Outcome, Server};
use crate::shared::Shared;
use std::sync::atomic::Ordering;
use virtiofsd::filesystem::FileSystem;

/// A server of FUSE requests for one guest. All of its queues share it.
pub trait Handler: Send + Sync + 'static {
    /// Serves one request. It may take as long as it likes: see [`crate::takeover`].
    fn handle(&self, head: &[u8], payload: Shared<'_>, out: Shared<'_>, caller: Caller<'_>) -> Outcome;

    /// Forgets all that the guest had open: it has gone.
    fn reset(&self);

    /// Counts payload bytes that a transport has copied.
    fn count_copied(&self, bytes: u64);
}

impl<F: FileSystem + Send + Sync + 'static> Handler for Server<F> {
    fn handle(&self, head: &[u8], payload: Shared<'_>, out: Shared<'_>, caller: Caller<'_>) -> Outcome {
        Server::handle(self, head, payload, out, caller)
    }

    fn reset(&self) {
        Server::reset(self);
    }

    fn count_copied(&self, bytes: u64) {
        self.copied.fetch_add(bytes, Ordering::Relaxed);
    }
}
