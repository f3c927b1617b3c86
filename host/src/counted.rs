//! Counts what a handler is asked.

use crate::copy_helper::CopyHelper;
use crate::guest_buf::GuestBuf;
use crate::handler::{Handler, Outcome};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// What a share has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Requests that have been served.
    pub requests: u64,
    /// Requests that were answered with an error. Many are ordinary: a name that does not exist, say.
    pub errors: u64,
    /// Payload bytes that came with requests (WRITE's data, and names).
    pub bytes_in: u64,
    /// Payload bytes of replies (READ's data, and listings).
    pub bytes_out: u64,
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    errors: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
}

/// Counts for any number of handlers.
#[derive(Clone, Debug, Default)]
pub struct Meter(Arc<Counters>);

impl Meter {
    /// A handler whose requests are counted here.
    pub fn count<H: Handler>(&self, handler: H) -> Counted<H> {
        Counted { handler, meter: self.clone() }
    }

    /// Returns the counts.
    pub fn statistics(&self) -> Statistics {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { requests, errors, bytes_in, bytes_out } = &*self.0;
        Statistics { requests: of(requests), errors: of(errors), bytes_in: of(bytes_in), bytes_out: of(bytes_out) }
    }
}

/// A handler whose requests are counted.
#[derive(Debug)]
pub struct Counted<H> {
    handler: H,
    meter: Meter,
}

impl<H: Handler> Handler for Counted<H> {
    fn handle(&self, head: &[u8], payload: GuestBuf<'_>, out: GuestBuf<'_>, helper: Option<&CopyHelper>) -> Outcome {
        let counters = &*self.meter.0;
        let add = |counter: &AtomicU64, n: usize| {
            if n > 0 {
                counter.fetch_add(n as u64, Ordering::Relaxed);
            }
        };
        add(&counters.bytes_in, payload.len());
        let outcome = self.handler.handle(head, payload, out, helper);
        add(&counters.requests, 1);
        if let Outcome::Reply(reply) = &outcome {
            add(&counters.errors, usize::from(reply.error != 0));
            add(&counters.bytes_out, reply.payload_len);
        }
        outcome
    }

    fn reset(&self) {
        self.handler.reset();
    }

    fn count_copied(&self, bytes: u64) {
        self.handler.count_copied(bytes);
    }
}
