//! Nobody waits for ever: a host that owes an answer for longer than
//! `mount.timeout` is given up, and the kernel gives its callers errors.

use crate::stats::QueueStats;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Looks at the requests under way; ended when dropped.
pub struct Watchdog {
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    over: AtomicBool,
    late: AtomicBool,
}

impl Watchdog {
    /// Calls `give_up` when any request of `queues` has waited for `timeout`.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(
        timeout: Duration,
        queues: Vec<Arc<QueueStats>>,
        give_up: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Watchdog> {
        let state = Arc::new(State::default());
        let watched = state.clone();
        let work = move || {
            while !watched.over.load(Ordering::Acquire) {
                std::thread::park_timeout(timeout / 8);
                if queues.iter().any(|q| q.longest_wait() >= timeout) {
                    tracing::error!("the host has not answered for {timeout:?} (mount.timeout): giving it up");
                    watched.late.store(true, Ordering::Release);
                    return give_up();
                }
            }
        };
        let thread = std::thread::Builder::new().name("watchdog".into()).spawn(work)?;
        Ok(Watchdog { state, thread: Some(thread) })
    }

    /// Whether the host has been given up.
    pub fn has_given_up(&self) -> bool {
        self.state.late.load(Ordering::Acquire)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.state.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}
