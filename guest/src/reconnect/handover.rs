//! Handover of the queues from one host to the next: which queue has detached, and its next transport. The module has
//! only flags and a lock, so that loom can model it. Its test compiles it once more, with loom's types.
//!
//! The next host gets the memory of the last one. Between `all_detached` and `host_ready` only the thread that connects
//! to the next host may access it. So each queue's thread has detached by then, or is idle: it waits for the kernel
//! alone.

use super::sync::{fence, AtomicBool, AtomicU64, Mutex, Ordering};

/// State that all queues share; `T` is a queue's transport.
pub struct Handover<T> {
    queues: Vec<QueueSlot<T>>,
    /// Id of the current host; while there is none, of the last one. 0 is the first host.
    host_id: AtomicU64,
    /// Whether there is no host now.
    away: AtomicBool,
    /// Whether no host will come any more.
    closed: AtomicBool,
}

/// One queue's state.
struct QueueSlot<T> {
    /// Whether its thread only waits for the kernel. The thread calls `leave_idle` before it does anything else.
    idle: AtomicBool,
    state: Mutex<State<T>>,
}

struct State<T> {
    /// Whether its thread has detached from the dead host.
    detached: bool,
    /// The next host's id and the transport to it; `None` before `host_ready`, and after the queue has taken it.
    next: Option<(u64, T)>,
}

/// Result of [`Handover::poll`].
pub enum HostPoll<T> {
    /// No host yet.
    Pending,
    /// The new host's id, and the transport to it.
    Ready(u64, T),
    /// No host will come.
    Closed,
}

impl<T> QueueSlot<T> {
    fn new() -> Self {
        QueueSlot { idle: AtomicBool::new(false), state: Mutex::new(State { detached: false, next: None }) }
    }

    fn with<R>(&self, work: impl FnOnce(&mut State<T>) -> R) -> R {
        // The state is valid after every step, so a poisoned lock is safe to use.
        work(&mut self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

impl<T> Handover<T> {
    /// Makes the state for `queues` queues, all with the first host.
    pub fn new(queues: usize) -> Self {
        let queues = (0..queues).map(|_| QueueSlot::new()).collect();
        Handover { queues, host_id: AtomicU64::new(0), away: AtomicBool::new(false), closed: AtomicBool::new(false) }
    }

    /// Records that a queue's thread is about to wait for the kernel alone.
    pub fn enter_idle(&self, queue: usize) {
        // Pairs with the acquire load in `all_detached`: orders this thread's accesses to the host's memory before it.
        self.queues[queue].idle.store(true, Ordering::Release);
    }

    /// Records that a queue's thread no longer waits for the kernel alone. Must follow each [`Self::enter_idle`].
    /// Returns `true` if the host `host_id` has died meanwhile, `false` if it is still the current one.
    pub fn leave_idle(&self, queue: usize, host_id: u64) -> bool {
        self.queues[queue].idle.store(false, Ordering::Relaxed);
        // Pairs with the fence in `host_lost`: either this thread sees `away`, or `all_detached` waits for this queue.
        fence(Ordering::SeqCst);
        self.away.load(Ordering::Acquire) || self.host_id.load(Ordering::Relaxed) != host_id
    }

    /// Records that a queue's thread has detached from its host.
    pub fn detach(&self, queue: usize) {
        self.queues[queue].with(|state| state.detached = true);
    }

    /// Takes a detached queue's transport to the next host, if there is one.
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

    /// Records that the host has died.
    pub fn host_lost(&self) {
        self.away.store(true, Ordering::Relaxed);
        // Pairs with the fence in `leave_idle`.
        fence(Ordering::SeqCst);
        for queue in &self.queues {
            // Drop transports that no queue picked up: they lead to the host that just died.
            drop(queue.with(|state| state.next.take()));
        }
    }

    /// Returns `true` between a host's death and the next host.
    pub fn is_away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    /// Returns `true` if every queue has detached from the dead host or is idle, `false` if a queue may still access
    /// its memory.
    pub fn all_detached(&self) -> bool {
        self.queues.iter().all(|queue| queue.with(|state| state.detached) || queue.idle.load(Ordering::Acquire))
    }

    /// Hands each queue its transport to the next host, the `host_id`th after the first.
    pub fn host_ready(&self, host_id: u64, next: Vec<T>) {
        self.host_id.store(host_id, Ordering::Relaxed);
        for (queue, next) in self.queues.iter().zip(next) {
            queue.with(|state| state.next = Some((host_id, next)));
        }
        // Pairs with the load of `away` in `leave_idle`: a thread that sees this store sees the id too.
        self.away.store(false, Ordering::Release);
    }

    /// Records that no host will come.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Returns `true` if no host will come any more.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}
