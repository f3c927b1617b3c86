//! The last change of each name and inode, as a time of one logical clock. Names and inodes hash to a fixed number of
//! counters. If two share a counter, a reply may lose its timeout without need, and the kernel asks once more.

use std::sync::atomic::{fence, AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Number of counters; a power of two, so that a mask selects one.
const COUNTERS: usize = 1 << 14;
/// Interval between two checks whether replies have been delivered.
const DELIVERY_POLL: Duration = Duration::from_micros(50);
/// Most time that a notification waits for the delivery of replies before it is sent again.
const DELIVERY_LIMIT: Duration = Duration::from_secs(1);

/// Selects the counter of an inode or a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(usize);

impl Key {
    /// An inode, by the kernel's nodeid.
    pub fn node(node: u64) -> Key {
        Key::of(1, node, &[])
    }

    /// An inode, by the current host's nodeid.
    pub fn host_node(node: u64) -> Key {
        Key::of(2, node, &[])
    }

    /// A name in a directory; `parent` is the kernel's nodeid.
    pub fn name(parent: u64, name: &[u8]) -> Key {
        Key::of(3, parent, name)
    }

    /// Hashes with FNV-1a, and a last step that mixes the high bits into the low ones.
    fn of(kind: u64, number: u64, name: &[u8]) -> Key {
        const PRIME: u64 = 0x0100_0000_01b3;
        let step = |hash: u64, word: u64| (hash ^ word).wrapping_mul(PRIME);
        let hash = name.iter().fold(step(step(0xcbf2_9ce4_8422_2325, kind), number), |h, &b| step(h, u64::from(b)));
        Key((hash ^ hash >> 29).wrapping_mul(0x9e37_79b9_7f4a_7c15) as usize >> 40 & (COUNTERS - 1))
    }
}

/// The counters, and which queues have replies on their way to the kernel.
pub struct ChangeCounters {
    /// Whether the host reports changes.
    active: AtomicBool,
    /// The clock: number of changes so far.
    now: AtomicU64,
    /// Time of the last change that concerns everything.
    everything: AtomicU64,
    /// By key: time of the last change.
    last: Box<[AtomicU64]>,
    /// By queue: odd while the queue has a reply that was compared and is not delivered.
    deliveries: Box<[AtomicU64]>,
}

/// Replies that were on their way to the kernel: their queues, and the value of `deliveries`.
pub struct InFlightReplies(Vec<(usize, u64)>);

impl ChangeCounters {
    /// Makes the counters for `queues` queues.
    pub fn new(queues: usize) -> Self {
        let zeros = |count| (0..count).map(|_| AtomicU64::new(0)).collect();
        let (now, everything) = (AtomicU64::new(0), AtomicU64::new(0));
        ChangeCounters {
            active: AtomicBool::new(true),
            now,
            everything,
            last: zeros(COUNTERS),
            deliveries: zeros(queues),
        }
    }

    /// Returns `false` if the host has said that it reports no changes, otherwise `true`.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Sets whether the host reports changes.
    pub fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Relaxed);
    }

    /// Returns the current time, for a request that is about to be sent.
    pub fn stamp(&self) -> u64 {
        self.now.load(Ordering::Acquire)
    }

    /// Records a change of an inode or a name.
    pub fn note(&self, key: Key) {
        let now = self.now.fetch_add(1, Ordering::AcqRel) + 1;
        self.last[key.0].fetch_max(now, Ordering::AcqRel);
    }

    /// Records that everything may have changed.
    pub fn note_everything(&self) {
        let now = self.now.fetch_add(1, Ordering::AcqRel) + 1;
        self.everything.fetch_max(now, Ordering::AcqRel);
    }

    /// Returns `true` if anything has changed since `stamp`, `false` if nothing has.
    pub fn any_since(&self, stamp: u64) -> bool {
        self.now.load(Ordering::Acquire) != stamp
    }

    /// Returns `true` if this inode or name may have changed since `stamp`, `false` if it has not.
    pub fn changed_since(&self, stamp: u64, key: Key) -> bool {
        self.everything.load(Ordering::Acquire) > stamp || self.last[key.0].load(Ordering::Acquire) > stamp
    }

    /// Records that a queue is about to compare a reply.
    fn begin(&self, queue: usize) {
        self.deliveries[queue].fetch_add(1, Ordering::Relaxed);
        // Pairs with the fence in `under_way`: either the comparison sees the noted change, or the thread that noted it
        // sees that a reply is on its way.
        fence(Ordering::SeqCst);
    }

    /// Records that all replies which the queue compared have reached the kernel.
    fn end(&self, queue: usize) {
        self.deliveries[queue].fetch_add(1, Ordering::Release);
    }

    /// Returns the undelivered replies that may have been compared before the last change was noted; `None` if there
    /// are none.
    pub fn under_way(&self) -> Option<InFlightReplies> {
        // Pairs with the fence in `begin`.
        fence(Ordering::SeqCst);
        let states = self.deliveries.iter().map(|state| state.load(Ordering::Acquire)).enumerate();
        let odd: Vec<_> = states.filter(|(_, state)| state % 2 == 1).collect();
        (!odd.is_empty()).then_some(InFlightReplies(odd))
    }

    /// Waits until these replies have been delivered, for at most one second.
    pub fn wait_for(&self, replies: &InFlightReplies) {
        let until = Instant::now() + DELIVERY_LIMIT;
        let same = |(queue, state): &(usize, u64)| self.deliveries[*queue].load(Ordering::Acquire) == *state;
        while replies.0.iter().any(same) && Instant::now() < until {
            std::thread::sleep(DELIVERY_POLL);
        }
    }
}

/// One queue's replies on their way to the kernel.
pub struct Deliveries {
    pub counters: std::sync::Arc<ChangeCounters>,
    queue: usize,
    comparing: bool,
}

impl Deliveries {
    pub fn new(counters: std::sync::Arc<ChangeCounters>, queue: usize) -> Self {
        Deliveries { counters, queue, comparing: false }
    }

    /// Records that a reply is about to be compared.
    pub fn begin(&mut self) {
        if !std::mem::replace(&mut self.comparing, true) {
            self.counters.begin(self.queue);
        }
    }

    /// Returns `true` if a reply was compared and may not have reached the kernel yet.
    pub fn has_any(&self) -> bool {
        self.comparing
    }

    /// Records that all replies so far have reached the kernel.
    pub fn end(&mut self) {
        if std::mem::take(&mut self.comparing) {
            self.counters.end(self.queue);
        }
    }
}

impl Drop for Deliveries {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn what_changed_since_a_stamp() {
        let counters = ChangeCounters::new(1);
        let (node, name) = (Key::node(7), Key::name(1, b"a"));
        counters.note(node);
        let stamp = counters.stamp();
        assert!(!counters.any_since(stamp) && !counters.changed_since(stamp, node));
        counters.note(name);
        assert!(counters.any_since(stamp) && counters.changed_since(stamp, name));
        assert!(!counters.changed_since(stamp, node));
        counters.note_everything();
        assert!(counters.changed_since(stamp, node));
        assert!(!counters.changed_since(counters.stamp(), node));
    }

    #[test]
    fn names_and_numbers_have_counters_of_their_own() {
        let keys: std::collections::HashSet<_> = (0..1000u64)
            .flat_map(|n| [Key::node(n).0, Key::host_node(n).0, Key::name(1, &n.to_le_bytes()).0])
            .collect();
        assert!(keys.len() > 2500, "{} of 3000", keys.len());
    }

    #[test]
    fn a_notification_waits_for_replies_that_were_under_way() {
        let counters = Arc::new(ChangeCounters::new(2));
        let mut queue = Deliveries::new(counters.clone(), 1);
        assert!(counters.under_way().is_none());
        queue.begin();
        queue.begin();
        let replies = counters.under_way().expect("one is");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| counters.wait_for(&replies));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished());
            queue.end();
            // Another reply of the queue is not waited for.
            queue.begin();
            waiting.join().unwrap();
        });
        drop(queue);
        assert!(counters.under_way().is_none());
    }
}
