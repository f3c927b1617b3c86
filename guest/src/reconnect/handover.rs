//! Which queue has let go of which host, and what it goes on with. Only flags and a lock, so that loom can model it: the
//! module is compiled once more in its test, with loom's types.
//!
//! The next host gets the memory of the one before. Nobody may touch it between `all_detached` and `host_ready` but the thread
//! that brings the next host; so a queue's thread has detached by then, or is idle: it waits for the kernel alone.

use super::sync::{fence, AtomicBool, AtomicU64, Mutex, Ordering};

/// What all queues share; `T` is what a queue goes on with.
pub struct Handover<T> {
    queues: Vec<QueueSlot<T>>,
    /// How many hosts have gone.
    host_id: AtomicU64,
    away: AtomicBool,
    closed: AtomicBool,
}

/// One queue's place.
struct QueueSlot<T> {
    /// Its thread does nothing but wait for the kernel, and will look here before it does anything else.
    idle: AtomicBool,
    state: Mutex<State<T>>,
}

struct State<T> {
    /// Its thread has let go of the host that has gone.
    detached: bool,
    /// And is to go on with this.
    next: Option<(u64, T)>,
}

/// What a detached queue finds.
pub enum HostPoll<T> {
    /// No host yet.
    Pending,
    /// A host, and its id.
    Ready(u64, T),
    /// There will be none.
    Closed,
}

impl<T> QueueSlot<T> {
    fn new() -> Self {
        QueueSlot { idle: AtomicBool::new(false), state: Mutex::new(State { detached: false, next: None }) }
    }

    fn with<R>(&self, work: impl FnOnce(&mut State<T>) -> R) -> R {
        // What is in there is right after every step: a panic elsewhere changes nothing.
        work(&mut self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

impl<T> Handover<T> {
    /// For so many queues.
    pub fn new(queues: usize) -> Self {
        let queues = (0..queues).map(|_| QueueSlot::new()).collect();
        Handover { queues, host_id: AtomicU64::new(0), away: AtomicBool::new(false), closed: AtomicBool::new(false) }
    }

    /// A queue's thread goes to wait for the kernel alone.
    pub fn enter_idle(&self, queue: usize) {
        // Pairs with the acquiring load in `all_detached`: what this thread has done in the host's memory comes before.
        self.queues[queue].idle.store(true, Ordering::Release);
    }

    /// It is back, which must be said whatever it finds; whether the host `host_id` has gone meanwhile.
    pub fn leave_idle(&self, queue: usize, host_id: u64) -> bool {
        self.queues[queue].idle.store(false, Ordering::Relaxed);
        // Pairs with the fence in `host_lost`: either this sees that the host is away, or `all_detached` waits for this queue.
        fence(Ordering::SeqCst);
        self.away.load(Ordering::Acquire) || self.host_id.load(Ordering::Relaxed) != host_id
    }

    /// A queue's thread has let go of its host.
    pub fn detach(&self, queue: usize) {
        self.queues[queue].with(|state| state.detached = true);
    }

    /// What there is for a detached queue.
    pub fn poll(&self, queue: usize) -> HostPoll<T> {
        if self.is_closed() {
            return HostPoll::Closed;
        }
        self.queues[queue].with(|state| match state.next.take() {
            Some((host_id, next)) => {
                state.detached = false;
                HostPoll::Ready(host_id, next)
            }
            None => HostPoll::Pending,
        })
    }

    /// The host has gone.
    pub fn host_lost(&self) {
        self.away.store(true, Ordering::Relaxed);
        // Pairs with the fence in `leave_idle`.
        fence(Ordering::SeqCst);
        for queue in &self.queues {
            // Drop transports that no queue picked up: they lead to the host that just died.
            drop(queue.with(|state| state.next.take()));
        }
    }

    /// Whether a host is waited for.
    pub fn is_away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    /// Whether every queue has let go of it.
    pub fn all_detached(&self) -> bool {
        self.queues.iter().all(|queue| queue.with(|state| state.detached) || queue.idle.load(Ordering::Acquire))
    }

    /// Another host is here, the `host_id`th after the first.
    pub fn host_ready(&self, host_id: u64, next: Vec<T>) {
        self.host_id.store(host_id, Ordering::Relaxed);
        for (queue, next) in self.queues.iter().zip(next) {
            queue.with(|state| state.next = Some((host_id, next)));
        }
        // Pairs with the load in `leave_idle`: whoever sees this sees the id.
        self.away.store(false, Ordering::Release);
    }

    /// No host will come.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Whether there will be no host any more.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}
