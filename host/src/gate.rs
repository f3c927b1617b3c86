//! The gate of a queue: whether the queue runs, which requests are in flight, and what happens to replies that come after
//! a stop.
//!
//! A stop is acknowledged when no request is in flight any more. A request that takes longer than [`DRAIN_LIMIT`] is
//! abandoned: the driver goes on without its answer. If the same driver starts the queue again, the answer is
//! delivered then, or later. For another driver it is dropped.

use crate::detach;
use parking_lot::{Condvar, Mutex};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long a front end that stops a queue waits for the requests under way, at the most.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// Delivers a late answer.
type Delivery = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    /// Whether the driver has the queue running.
    running: bool,
    /// Whether the queue's thread is serving.
    serving: bool,
    /// Late requests that a stop waits for.
    late: usize,
    /// How often a stop has given up waiting for late requests.
    abandoned: u32,
    /// How many drivers the queue has had.
    driver: u32,
    /// Answers that the next start delivers.
    held: Vec<Delivery>,
}

/// The gate of one queue.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    /// `serving` or `late` has become less.
    quieter: Condvar,
    /// The queue runs again, or has another driver.
    started: Condvar,
    /// As in the state, to be looked at without the lock.
    abandoned: AtomicU32,
    /// Whether the queue's thread is to leave.
    closing: AtomicBool,
    /// Takes the queue from a thread that is held up.
    force: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// Maps the guest's memory once more.
    on_detached: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// Names the driver for which a request is served.
#[derive(Clone, Copy)]
pub struct Pass {
    abandoned: u32,
    /// The queue's driver: one that goes on after a pause of its VM is still the same.
    pub driver: u32,
}

impl Gate {
    /// Sets what takes the queue from a thread that is held up.
    pub fn on_stuck(&self, force: impl Fn() + Send + Sync + 'static) {
        let _ = self.force.set(Box::new(force));
    }

    /// Sets what maps the guest's memory once more, for the next driver: a stop has taken pages of the present mapping
    /// from a READ.
    pub fn on_detached(&self, remap: impl Fn() + Send + Sync + 'static) {
        let _ = self.on_detached.set(Box::new(remap));
    }

    /// The queue's thread begins to serve; `None`: the queue is stopped. Must be followed by [`Gate::leave`].
    pub fn enter(&self) -> Option<Pass> {
        let mut state = self.state.lock();
        state.serving = state.running;
        state.running.then_some(Pass { abandoned: state.abandoned, driver: state.driver })
    }

    /// The queue's thread has served.
    pub fn leave(&self) {
        let mut state = self.state.lock();
        state.serving = false;
        if !state.running {
            self.quieter.notify_all();
        }
    }

    /// What the queue is known by in [`detach`].
    pub fn key(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }

    /// Whether somebody stops the queue.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    /// The queue's thread is late, and another one takes the queue.
    pub fn taken_over(&self) {
        let mut state = self.state.lock();
        state.serving = false;
        state.late += 1;
        self.quieter.notify_all();
    }

    /// A late request has been handled: delivers its answer, keeps it for the next start, or drops it.
    pub fn finish_late(&self, pass: Pass, deliver: impl FnOnce() + Send + 'static) {
        let mut state = self.state.lock();
        let abandoned = pass.abandoned != state.abandoned;
        if !abandoned {
            state.late -= 1;
        }
        // Delivered with the lock held: a stop is not acknowledged meanwhile.
        match (pass.driver == state.driver, state.running || !abandoned) {
            (true, true) => deliver(),
            (true, false) => state.held.push(Box::new(deliver)),
            (false, _) => tracing::info!("the answer to a slow request of a former driver is dropped"),
        }
        self.quieter.notify_all();
    }

    /// Whether a request may write to the guest's memory. One that has been abandoned waits until the queue runs again;
    /// `false`: for another driver.
    pub fn may_write(&self, pass: Pass) -> bool {
        if self.abandoned.load(Ordering::Acquire) == pass.abandoned {
            return true;
        }
        let mut state = self.state.lock();
        while !state.running && state.driver == pass.driver {
            self.started.wait(&mut state);
        }
        state.driver == pass.driver
    }

    /// A new driver: replies to its predecessor are dropped.
    pub fn new_driver(&self) {
        let mut state = self.state.lock();
        state.driver = state.driver.wrapping_add(1);
        let dropped = std::mem::take(&mut state.held);
        drop(state);
        self.started.notify_all();
        drop(dropped);
    }

    /// Starts the queue.
    pub fn start(&self) {
        let mut state = self.state.lock();
        state.running = true;
        self.closing.store(false, Ordering::Relaxed);
        for deliver in std::mem::take(&mut state.held) {
            deliver();
        }
        self.started.notify_all();
    }

    /// Stops the queue, and waits for the requests in flight. What requests that are abandoned still write does not
    /// reach the guest.
    pub fn stop(&self) {
        self.drain();
        // Also those of former stops, if they went on meanwhile.
        if detach::detach(self.key()) {
            self.on_detached.get().into_iter().for_each(|remap| remap());
        }
    }

    fn drain(&self) {
        let mut state = self.state.lock();
        if !state.running {
            return;
        }
        state.running = false;
        self.closing.store(true, Ordering::Relaxed);
        let until = Instant::now() + DRAIN_LIMIT;
        while state.serving || state.late > 0 {
            if !self.quieter.wait_until(&mut state, until).timed_out() {
                continue;
            }
            if state.serving {
                // All other threads are held up too: the next start needs one.
                parking_lot::MutexGuard::unlocked(&mut state, || {
                    self.force.get().into_iter().for_each(|force| force())
                });
            }
            if state.serving {
                tracing::warn!("a queue is stopped while its thread writes to the guest");
            }
            tracing::warn!(
                "a queue is stopped with {} requests in flight after {DRAIN_LIMIT:?}: the shared directory is too slow; \
                 their replies are kept for this driver",
                state.late
            );
            state.abandoned = state.abandoned.wrapping_add(1);
            self.abandoned.store(state.abandoned, Ordering::Release);
            state.late = 0;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use std::sync::Arc;

    fn abandoned_request() -> (Gate, Pass, Arc<AtomicU32>) {
        let gate = Gate::default();
        gate.new_driver();
        gate.start();
        let pass = gate.enter().unwrap();
        gate.taken_over();
        gate.stop();
        assert!(gate.enter().is_none());
        (gate, pass, Arc::default())
    }

    fn count(counter: &Arc<AtomicU32>) -> impl FnOnce() + Send + 'static {
        let counter = counter.clone();
        move || {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn an_answer_that_comes_while_stopped_waits_for_the_same_driver() {
        let (gate, pass, delivered) = abandoned_request();
        gate.finish_late(pass, count(&delivered));
        assert_eq!(delivered.load(Ordering::Relaxed), 0);
        gate.start();
        assert_eq!(delivered.load(Ordering::Relaxed), 1);
        assert!(gate.enter().is_some());
    }

    #[test]
    fn an_answer_that_comes_after_the_start_is_delivered() {
        let (gate, pass, delivered) = abandoned_request();
        gate.start();
        gate.finish_late(pass, count(&delivered));
        assert_eq!(delivered.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn another_driver_gets_no_answers_of_its_predecessor() {
        let (gate, pass, delivered) = abandoned_request();
        gate.finish_late(pass, count(&delivered));
        gate.new_driver();
        gate.start();
        gate.finish_late(pass, count(&delivered));
        assert_eq!(delivered.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn an_abandoned_request_writes_when_its_driver_goes_on() {
        for (another, may) in [(false, true), (true, false)] {
            let (gate, pass, _) = abandoned_request();
            std::thread::scope(|scope| {
                let writer = scope.spawn(|| gate.may_write(pass));
                std::thread::sleep(Duration::from_millis(50));
                assert!(!writer.is_finished(), "a write to a stopped guest");
                if another {
                    gate.new_driver();
                }
                gate.start();
                assert_eq!(writer.join().unwrap(), may);
            });
        }
    }

    #[test]
    fn a_stop_takes_the_queue_from_a_stuck_thread() {
        let gate = Arc::new(Gate::default());
        let (its, forced) = (Arc::downgrade(&gate), Arc::new(AtomicU32::new(0)));
        let counter = forced.clone();
        gate.on_stuck(move || {
            counter.fetch_add(1, Ordering::Relaxed);
            its.upgrade().unwrap().taken_over();
        });
        gate.start();
        let pass = gate.enter().unwrap();
        gate.stop();
        assert_eq!(forced.load(Ordering::Relaxed), 1);
        // Another thread has the queue; the late one is abandoned.
        gate.start();
        assert_eq!(gate.enter().unwrap().abandoned, pass.abandoned + 1);
    }

    #[test]
    fn a_stop_waits_for_late_requests() {
        let gate = Arc::new(Gate::default());
        gate.start();
        let pass = gate.enter().unwrap();
        gate.taken_over();
        let (its, delivered) = (gate.clone(), Arc::default());
        let answer = count(&delivered);
        let late = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            its.finish_late(pass, answer);
        });
        gate.stop();
        assert_eq!(delivered.load(Ordering::Relaxed), 1);
        late.join().unwrap();
    }
}
