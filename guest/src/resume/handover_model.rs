//! handover.rs once more, with loom's types: every order of the threads' steps, and of what they see.

mod sync {
    pub use loom::sync::atomic::{fence, AtomicBool, AtomicU64, Ordering};
    pub use loom::sync::Mutex;
}
#[allow(dead_code, clippy::duplicate_mod)] // That is the point.
#[path = "handover.rs"]
mod handover;

use handover::{Handover, News};
use loom::cell::UnsafeCell;
use loom::sync::Arc;

struct Shared {
    handover: Handover<u64>,
    /// What is shared with a host, and which host it is for: loom finds two threads in it at once.
    memory: UnsafeCell<u64>,
}

impl Shared {
    fn new(queues: usize) -> Arc<Shared> {
        Arc::new(Shared { handover: Handover::new(queues), memory: UnsafeCell::new(0) })
    }

    /// Brings the next host.
    fn replace(&self, time: u64, queues: usize) {
        self.handover.leave();
        while !self.handover.let_go() {
            loom::thread::yield_now();
        }
        // SAFETY: loom checks that nobody else is in it.
        self.memory.with_mut(|memory| unsafe { *memory = time });
        self.handover.arrive(time, vec![time; queues]);
    }
}

/// A queue's thread, as channel/queue.rs has it.
struct Queue {
    shared: Arc<Shared>,
    seat: usize,
    time: u64,
    away: bool,
}

impl Queue {
    fn new(shared: Arc<Shared>, seat: usize) -> Queue {
        Queue { shared, seat, time: 0, away: false }
    }

    fn use_memory(&self) {
        // SAFETY: loom checks that nobody else is in it.
        self.shared.memory.with(|memory| assert_eq!(unsafe { *memory }, self.time, "the memory is another host's"));
    }

    fn lose(&mut self) {
        self.shared.handover.park(self.seat);
        self.away = true;
    }

    fn look(&mut self) {
        if let News::Host(time, next) = self.shared.handover.news(self.seat) {
            assert_eq!(time, next);
            (self.time, self.away) = (time, false);
        }
    }

    /// Waits for the kernel.
    fn rest(&mut self) {
        self.shared.handover.rest(self.seat);
        loom::thread::yield_now();
        let lost = self.shared.handover.rested(self.seat, self.time);
        if lost && !self.away {
            self.lose();
        }
    }
}

fn check(bound: Option<usize>, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = bound;
    builder.check(model);
}

#[test]
fn a_queue_that_rests_never_meets_the_next_host_unawares() {
    check(Some(3), || {
        let shared = Shared::new(1);
        let bringer = {
            let shared = shared.clone();
            loom::thread::spawn(move || shared.replace(1, 1))
        };
        let mut queue = Queue::new(shared, 0);
        for _ in 0..2 {
            if queue.away {
                queue.look();
            }
            if !queue.away {
                queue.use_memory();
            }
            queue.rest();
        }
        queue.lose();
        bringer.join().unwrap();
    });
}

/// Two hosts go, one after the other: what is found out about the first must not count for the second.
#[test]
fn a_queue_that_took_a_host_is_waited_for_when_that_one_goes() {
    check(Some(2), || {
        let shared = Shared::new(1);
        let bringer = {
            let shared = shared.clone();
            loom::thread::spawn(move || (1..=2).for_each(|time| shared.replace(time, 1)))
        };
        let mut queue = Queue::new(shared, 0);
        // It rests while it has no host, as one does that has nothing to ask.
        queue.lose();
        queue.rest();
        queue.look();
        if !queue.away {
            queue.use_memory();
            queue.lose();
        }
        queue.shared.handover.rest(0);
        bringer.join().unwrap();
    });
}

#[test]
fn giving_up_reaches_whoever_waits() {
    check(None, || {
        let shared = Shared::new(1);
        let ender = {
            let shared = shared.clone();
            loom::thread::spawn(move || shared.handover.give_up())
        };
        shared.handover.park(0);
        let over = matches!(shared.handover.news(0), News::Over);
        ender.join().unwrap();
        assert!(over || matches!(shared.handover.news(0), News::Over));
    });
}
