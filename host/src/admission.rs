//! How many guests and connections the host has at a time.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// Guests at a time. One more is refused: its connection is closed, and both sides log it.
pub const MAX_GUESTS: usize = 64;
/// Pause before the next try when the system refuses descriptors, threads or connections.
pub const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// The number of the next guest, for the log.
pub fn next_guest() -> u64 {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    NUMBER.fetch_add(1, Ordering::Relaxed) + 1
}

/// A counting semaphore whose permits may outlive it.
#[derive(Clone)]
pub struct Semaphore {
    count: Arc<AtomicUsize>,
    most: usize,
}

/// One of a semaphore's permits. Returned when it is dropped.
pub struct Permit(Arc<AtomicUsize>);

impl Semaphore {
    /// A semaphore with `most` permits.
    pub fn new(most: usize) -> Self {
        Semaphore { count: Arc::default(), most }
    }

    /// Takes a permit; `None`: there is none left.
    pub fn try_acquire(&self) -> Option<Permit> {
        let more = |count| (count < self.most).then_some(count + 1);
        let acquired = self.count.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        acquired.ok().map(|_| Permit(self.count.clone()))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
