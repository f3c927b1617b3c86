//! handover.rs once more, with loom's types: every order of the threads' steps, and of what they see.

mod sync {
    pub use loom::sync::atomic::{fence, AtomicBool, AtomicU64, Ordering};
    pub use loom::sync::Mutex;
}
#[allow(dead_code, clippy::duplicate_mod)] // That is the point.
#[path = "handover.rs"]
mod handover;

use handover::{Handover, HostPoll};
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
    fn replace(&self, host_id: u64, queues: usize) {
        self.handover.host_lost();
        while !self.handover.all_detached() {
            loom::thread::yield_now();
        }
        // SAFETY: loom checks that nobody else is in it.
        self.memory.with_mut(|memory| unsafe { *memory = host_id });
        self.handover.host_ready(host_id, vec![host_id; queues]);
    }
}

/// A queue's thread, as channel/queue.rs has it.
struct Queue {
    shared: Arc<Shared>,
    queue: usize,
    host_id: u64,
    away: bool,
}

impl Queue {
    fn new(shared: Arc<Shared>, queue: usize) -> Queue {
        Queue { shared, queue, host_id: 0, away: false }
    }

    fn use_memory(&self) {
        // SAFETY: loom checks that nobody else is in it.
        self.shared.memory.with(|memory| assert_eq!(unsafe { *memory }, self.host_id, "the memory is another host's"));
    }

    fn lose(&mut self) {
        self.shared.handover.detach(self.queue);
        self.away = true;
    }

    fn look(&mut self) {
        if let HostPoll::Ready(host_id, next) = self.shared.handover.poll(self.queue) {
            assert_eq!(host_id, next);
            (self.host_id, self.away) = (host_id, false);
        }
    }

    /// Waits for the kernel. (Without a yield: loom lets who has yielded see no old values any more.)
    fn enter_idle(&mut self) {
        self.shared.handover.enter_idle(self.queue);
        let lost = self.shared.handover.leave_idle(self.queue, self.host_id);
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
            queue.enter_idle();
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
            loom::thread::spawn(move || (1..=2).for_each(|host_id| shared.replace(host_id, 1)))
        };
        let mut queue = Queue::new(shared, 0);
        // It rests while it has no host, as one does that has nothing to ask.
        queue.lose();
        queue.enter_idle();
        queue.look();
        if !queue.away {
            queue.use_memory();
            queue.lose();
        }
        queue.shared.handover.enter_idle(0);
        bringer.join().unwrap();
    });
}

#[test]
fn giving_up_reaches_whoever_waits() {
    check(None, || {
        let shared = Shared::new(1);
        let ender = {
            let shared = shared.clone();
            loom::thread::spawn(move || shared.handover.close())
        };
        shared.handover.detach(0);
        let over = matches!(shared.handover.poll(0), HostPoll::Closed);
        ender.join().unwrap();
        assert!(over || matches!(shared.handover.poll(0), HostPoll::Closed));
    });
}
