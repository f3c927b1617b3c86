//! When names and inodes changed last, as numbers of one clock: counters by hash, so that their number is fixed. Two that
//! share a counter cost a question more, nothing else.

use std::sync::atomic::{fence, AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Counters; a power of two.
const COUNTERS: usize = 1 << 14;
/// Between two looks whether a reply has been delivered.
const LOOK_EVERY: Duration = Duration::from_micros(50);
/// How long a notification waits for the delivery of replies before it is sent again.
const DELIVERY_LIMIT: Duration = Duration::from_secs(1);

/// What a counter is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(usize);

impl Key {
    /// An inode by the number that the kernel has.
    pub fn node(node: u64) -> Key {
        Key::of(1, node, &[])
    }

    /// An inode by the number that this time's host has.
    pub fn host_node(node: u64) -> Key {
        Key::of(2, node, &[])
    }

    /// A name in a directory, which has the kernel's number.
    pub fn name(parent: u64, name: &[u8]) -> Key {
        Key::of(3, parent, name)
    }

    /// FNV-1a, and a last step that brings the high bits down.
    fn of(kind: u64, number: u64, name: &[u8]) -> Key {
        const PRIME: u64 = 0x0100_0000_01b3;
        let step = |hash: u64, word: u64| (hash ^ word).wrapping_mul(PRIME);
        let hash = name.iter().fold(step(step(0xcbf2_9ce4_8422_2325, kind), number), |h, &b| step(h, u64::from(b)));
        Key((hash ^ hash >> 29).wrapping_mul(0x9e37_79b9_7f4a_7c15) as usize >> 40 & (COUNTERS - 1))
    }
}

/// The counters, and which queues have replies under way to the kernel.
pub struct ChangeCounters {
    /// The host tells what changes.
    active: AtomicBool,
    now: AtomicU64,
    /// When everything changed last.
    everything: AtomicU64,
    last: Box<[AtomicU64]>,
    /// Of each queue: odd while it has a reply that was compared and is not delivered.
    deliveries: Box<[AtomicU64]>,
}

/// Replies that were on their way to the kernel.
pub struct UnderWay(Vec<(usize, u64)>);

impl ChangeCounters {
    /// For so many queues.
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

    /// Whether there is a host that tells what changes, as far as is known.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Sets whether there is.
    pub fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Relaxed);
    }

    /// The stamp of a request that is about to be sent.
    pub fn stamp(&self) -> u64 {
        self.now.load(Ordering::Acquire)
    }

    /// Something has changed.
    pub fn note(&self, key: Key) {
        let now = self.now.fetch_add(1, Ordering::AcqRel) + 1;
        self.last[key.0].fetch_max(now, Ordering::AcqRel);
    }

    /// Everything may have changed.
    pub fn note_everything(&self) {
        let now = self.now.fetch_add(1, Ordering::AcqRel) + 1;
        self.everything.fetch_max(now, Ordering::AcqRel);
    }

    /// Whether anything at all has changed since the stamp.
    pub fn any_since(&self, stamp: u64) -> bool {
        self.now.load(Ordering::Acquire) != stamp
    }

    /// Whether this has changed since the stamp.
    pub fn changed_since(&self, stamp: u64, key: Key) -> bool {
        self.everything.load(Ordering::Acquire) > stamp || self.last[key.0].load(Ordering::Acquire) > stamp
    }

    /// A queue is about to compare a reply.
    fn begin(&self, queue: usize) {
        self.deliveries[queue].fetch_add(1, Ordering::Relaxed);
        // Pairs with the fence in `under_way`: either the reply is compared with what was noted, or the one who noted
        // it sees that a reply is under way.
        fence(Ordering::SeqCst);
    }

    /// All that it compared has been given to the kernel.
    fn end(&self, queue: usize) {
        self.deliveries[queue].fetch_add(1, Ordering::Release);
    }

    /// The replies that may have been compared before what was noted last; `None`: there is none.
    pub fn under_way(&self) -> Option<UnderWay> {
        // Pairs with the fence in `begin`.
        fence(Ordering::SeqCst);
        let states = self.deliveries.iter().map(|state| state.load(Ordering::Acquire)).enumerate();
        let odd: Vec<_> = states.filter(|(_, state)| state % 2 == 1).collect();
        (!odd.is_empty()).then_some(UnderWay(odd))
    }

    /// Waits until those have been delivered.
    pub fn wait_for(&self, replies: &UnderWay) {
        let until = Instant::now() + DELIVERY_LIMIT;
        let same = |(queue, state): &(usize, u64)| self.deliveries[*queue].load(Ordering::Acquire) == *state;
        while replies.0.iter().any(same) && Instant::now() < until {
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// One queue's part: which of its replies are on their way to the kernel.
pub struct Deliveries {
    pub counters: std::sync::Arc<ChangeCounters>,
    queue: usize,
    comparing: bool,
}

impl Deliveries {
    pub fn new(counters: std::sync::Arc<ChangeCounters>, queue: usize) -> Self {
        Deliveries { counters, queue, comparing: false }
    }

    /// A reply is about to be compared.
    pub fn begin(&mut self) {
        if !std::mem::replace(&mut self.comparing, true) {
            self.counters.begin(self.queue);
        }
    }

    /// Whether one was compared that may not be with the kernel.
    pub fn has_any(&self) -> bool {
        self.comparing
    }

    /// All replies so far are with the kernel.
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
