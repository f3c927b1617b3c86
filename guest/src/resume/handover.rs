//! Which queue has let go of which host, and what it goes on with. Only flags and a lock, so that loom can model it: the
//! module is compiled once more in its test, with loom's types.
//!
//! The next host gets the memory of the one before. Nobody may touch it between `let_go` and `arrive` but the thread
//! that brings the next host; so a queue's thread has parked by then, or rests: it waits for the kernel alone.

use super::sync::{fence, AtomicBool, AtomicU64, Mutex, Ordering};

/// The seats of all queues; `T` is what a queue goes on with.
pub struct Handover<T> {
    seats: Vec<Seat<T>>,
    /// How many hosts have gone.
    time: AtomicU64,
    away: AtomicBool,
    over: AtomicBool,
}

/// One queue's place.
struct Seat<T> {
    /// Its thread does nothing but wait for the kernel, and will look here before it does anything else.
    at_rest: AtomicBool,
    state: Mutex<State<T>>,
}

struct State<T> {
    /// Its thread has let go of the host that has gone.
    parked: bool,
    /// And is to go on with this.
    next: Option<(u64, T)>,
}

/// What a parked queue finds.
pub enum News<T> {
    /// No host yet.
    Wait,
    /// A host, and its time.
    Host(u64, T),
    /// There will be none.
    Over,
}

impl<T> Seat<T> {
    fn new() -> Self {
        Seat { at_rest: AtomicBool::new(false), state: Mutex::new(State { parked: false, next: None }) }
    }

    fn with<R>(&self, work: impl FnOnce(&mut State<T>) -> R) -> R {
        // What is in there is right after every step: a panic elsewhere changes nothing.
        work(&mut self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

impl<T> Handover<T> {
    /// For so many queues.
    pub fn new(queues: usize) -> Self {
        let seats = (0..queues).map(|_| Seat::new()).collect();
        Handover { seats, time: AtomicU64::new(0), away: AtomicBool::new(false), over: AtomicBool::new(false) }
    }

    /// A queue's thread goes to wait for the kernel alone.
    pub fn rest(&self, seat: usize) {
        // Pairs with the acquiring load in `let_go`: what this thread has done in the host's memory comes before.
        self.seats[seat].at_rest.store(true, Ordering::Release);
    }

    /// It is back, which must be said whatever it finds; whether the host of `time` has gone meanwhile.
    pub fn rested(&self, seat: usize, time: u64) -> bool {
        self.seats[seat].at_rest.store(false, Ordering::Relaxed);
        // Pairs with the fence in `leave`: either this sees that the host is away, or `let_go` waits for this queue.
        fence(Ordering::SeqCst);
        self.away.load(Ordering::Acquire) || self.time.load(Ordering::Relaxed) != time
    }

    /// A queue's thread has let go of its host.
    pub fn park(&self, seat: usize) {
        self.seats[seat].with(|state| state.parked = true);
    }

    /// What there is for a parked queue.
    pub fn news(&self, seat: usize) -> News<T> {
        if self.is_over() {
            return News::Over;
        }
        self.seats[seat].with(|state| match state.next.take() {
            Some((time, next)) => {
                state.parked = false;
                News::Host(time, next)
            }
            None => News::Wait,
        })
    }

    /// The host has gone.
    pub fn leave(&self) {
        self.away.store(true, Ordering::Relaxed);
        // Pairs with the fence in `rested`.
        fence(Ordering::SeqCst);
        for seat in &self.seats {
            // One that nobody has taken is of the same host.
            drop(seat.with(|state| state.next.take()));
        }
    }

    /// Whether every queue has let go of it.
    pub fn let_go(&self) -> bool {
        self.seats.iter().all(|seat| seat.with(|state| state.parked) || seat.at_rest.load(Ordering::Acquire))
    }

    /// Another host is here, the `time`th after the first.
    pub fn arrive(&self, time: u64, next: Vec<T>) {
        self.time.store(time, Ordering::Relaxed);
        for (seat, next) in self.seats.iter().zip(next) {
            seat.with(|state| state.next = Some((time, next)));
        }
        // Pairs with the load in `rested`: whoever sees this sees the time.
        self.away.store(false, Ordering::Release);
    }

    /// No host will come.
    pub fn give_up(&self) {
        self.over.store(true, Ordering::Release);
    }

    /// Whether there will be no host any more.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}
