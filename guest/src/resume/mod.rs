//! A mount outlives its host: another one on the same socket takes over.
//!
//! The guest keeps all state, so that any host will do. To the kernel, nodes
//! and handles have the first host's numbers for good; what later hosts call
//! them is found out on first use, by names and inode numbers.
//!
//! ```text
//! channel/queue.rs -- a request, a reply --> tables.rs (nodes.rs; wire.rs: where messages have numbers)
//!       |                                       what is needed before a request can go out
//!       +-- the host has gone: absent.rs takes its place; repeat.rs: what may be asked again
//! watch.rs (a thread): sees the host go, waits until every queue has let go of the shared memory,
//!                      connects anew and hands each queue its new transport
//! ```
//!
//! Nothing of this costs a READ or WRITE anything before the first host has gone but a private copy of its header, and
//! later a look into the queue's cache.rs.

pub mod absent;
pub mod cache;
mod lacking;
pub mod nodes;
pub mod repeat;
pub mod tables;
pub mod watch;
pub mod wire;

use crate::transport::Transport;
use parking_lot::{Mutex, RwLock};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tables::Tables;

/// What all queues of a mount share.
#[derive(Default)]
pub struct Resume {
    /// What the kernel knows.
    pub tables: RwLock<Tables>,
    seats: Vec<Seat>,
    /// How many hosts have gone.
    time: AtomicU64,
    away: AtomicBool,
    over: AtomicBool,
}

/// One queue's place.
#[derive(Default)]
struct Seat {
    /// Its thread does nothing but wait for the kernel, and will look here before it does anything else.
    at_rest: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Its thread has let go of the host that has gone.
    parked: bool,
    /// And is to go on with this.
    next: Option<(u64, Box<dyn Transport>)>,
}

/// What a parked queue finds.
pub enum News {
    /// No host yet.
    Wait,
    /// A host, and its time.
    Host(u64, Box<dyn Transport>),
    /// There will be none.
    Over,
}

impl Resume {
    /// For so many queues.
    pub fn new(queues: usize) -> Self {
        Resume { seats: (0..queues).map(|_| Seat::default()).collect(), ..Resume::default() }
    }

    /// A queue's thread goes to wait for the kernel alone.
    pub fn rest(&self, seat: usize) {
        self.seats[seat].at_rest.store(true, Ordering::SeqCst);
    }

    /// It is back; whether the host of `time` has gone meanwhile. Pairs with [`Self::let_go`]: either this sees that the
    /// host is away, or that waits for this queue.
    pub fn rested(&self, seat: usize, time: u64) -> bool {
        self.seats[seat].at_rest.store(false, Ordering::SeqCst);
        self.away.load(Ordering::SeqCst) || self.time.load(Ordering::SeqCst) != time
    }

    /// A queue's thread has let go of its host.
    pub fn park(&self, seat: usize) {
        self.seats[seat].state.lock().parked = true;
    }

    /// What there is for a parked queue.
    pub fn news(&self, seat: usize) -> News {
        if self.over.load(Ordering::SeqCst) {
            return News::Over;
        }
        let mut state = self.seats[seat].state.lock();
        match state.next.take() {
            Some((time, transport)) => {
                state.parked = false;
                News::Host(time, transport)
            }
            None => News::Wait,
        }
    }

    /// Whether there will be no host any more.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// The host has gone.
    fn leave(&self) {
        self.away.store(true, Ordering::SeqCst);
        for seat in &self.seats {
            // One that nobody has taken is of the same host.
            seat.state.lock().next = None;
        }
    }

    /// Whether every queue has let go of it.
    fn let_go(&self) -> bool {
        self.seats.iter().all(|seat| seat.state.lock().parked || seat.at_rest.load(Ordering::SeqCst))
    }

    /// Another host is here.
    fn arrive(&self, transports: Vec<Box<dyn Transport>>, same_root: bool) {
        let mut tables = self.tables.write();
        tables.nodes.advance(same_root);
        let time = tables.nodes.time();
        self.time.store(time, Ordering::SeqCst);
        for (seat, transport) in self.seats.iter().zip(transports) {
            seat.state.lock().next = Some((time, transport));
        }
        self.away.store(false, Ordering::SeqCst);
    }

    /// No host will come.
    pub fn give_up(&self) {
        self.over.store(true, Ordering::SeqCst);
    }
}
