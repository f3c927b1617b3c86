//! Threads for what would block, so that a queue's own thread goes on.

use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce() + Send>;

struct Inbox {
    jobs: Mutex<(VecDeque<Job>, bool)>,
    more: Condvar,
}

/// How many requests a queue may have in the pool at a time, which bounds the
/// inbox: a guest that submits more than its queue holds has broken the protocol.
#[derive(Clone, Debug)]
pub struct Budget {
    used: Arc<AtomicU32>,
    most: u32,
}

/// One request's part of a [`Budget`], given back when it is dropped.
pub struct Share(Arc<AtomicU32>);

impl Budget {
    pub fn new(most: u32) -> Self {
        Budget { used: Arc::default(), most }
    }

    /// A share, if one is left. Called by the queue's thread alone.
    pub fn take(&self) -> Option<Share> {
        if self.used.load(Ordering::Acquire) >= self.most {
            return None;
        }
        self.used.fetch_add(1, Ordering::AcqRel);
        Some(Share(self.used.clone()))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A fixed number of threads. What still waits there when the pool ends is not done.
pub struct Pool {
    inbox: Arc<Inbox>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Pool {
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let inbox = Arc::new(Inbox { jobs: Mutex::default(), more: Condvar::new() });
        let threads = (0..threads.max(1))
            .map(|i| {
                let inbox = inbox.clone();
                std::thread::Builder::new().name(format!("pool-{i}")).spawn(move || work(&inbox))
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Pool { inbox, threads: Mutex::new(threads) })
    }

    pub fn run(&self, job: Job) {
        let mut jobs = self.inbox.jobs.lock();
        if jobs.1 {
            return;
        }
        jobs.0.push_back(job);
        drop(jobs);
        self.inbox.more.notify_one();
    }

    /// Waits for what runs, and ends the threads.
    pub fn end(&self) {
        let waiting = std::mem::replace(&mut *self.inbox.jobs.lock(), (VecDeque::new(), true));
        drop(waiting);
        self.inbox.more.notify_all();
        for thread in self.threads.lock().drain(..) {
            let _ = thread.join();
        }
    }
}

fn work(inbox: &Inbox) {
    loop {
        let mut jobs = inbox.jobs.lock();
        let job = loop {
            match jobs.0.pop_front() {
                Some(job) => break job,
                None if jobs.1 => return,
                None => inbox.more.wait(&mut jobs),
            }
        };
        drop(jobs);
        job();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_given_back() {
        let budget = Budget::new(2);
        let (first, second) = (budget.take(), budget.take());
        assert!(first.is_some() && second.is_some() && budget.take().is_none());
        drop(first);
        assert!(budget.take().is_some());
    }

    #[test]
    fn what_waits_is_dropped_with_the_pool() {
        let (pool, budget) = (Pool::new(1).unwrap(), Budget::new(100));
        let (go, started) = (Arc::new(Mutex::new(())), Arc::new(AtomicU32::new(0)));
        let held = go.lock();
        for _ in 0..100 {
            let (share, go, started) = (budget.take().unwrap(), go.clone(), started.clone());
            pool.run(Box::new(move || {
                let _share = share;
                started.fetch_add(1, Ordering::AcqRel);
                drop(go.lock());
            }));
        }
        while started.load(Ordering::Acquire) == 0 {
            std::thread::yield_now();
        }
        std::thread::scope(|s| {
            s.spawn(|| pool.end());
            while !pool.inbox.jobs.lock().1 {
                std::thread::yield_now();
            }
            drop(held);
        });
        assert_eq!((started.load(Ordering::Acquire), budget.used.load(Ordering::Acquire)), (1, 0));
    }
}
