//! Threads for what would block, so that a queue's own thread goes on.

use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

type Job = Box<dyn FnOnce() + Send>;

struct Inbox {
    jobs: Mutex<(VecDeque<Job>, bool)>,
    more: Condvar,
}

/// How many requests a queue may have in the pool at a time, which bounds the
/// inbox: a guest that submits more than its queue holds has broken the protocol.
#[derive(Clone, Debug)]
pub struct Budget {
    counts: Arc<Counts>,
    most: u32,
}

#[derive(Debug, Default)]
struct Counts {
    used: AtomicU32,
    /// How often the wait for all of them has been given up.
    abandoned: AtomicU32,
}

/// One request's part of a [`Budget`], given back when it is dropped.
pub struct Share {
    counts: Arc<Counts>,
    abandoned: u32,
}

impl Budget {
    pub fn new(most: u32) -> Self {
        Budget { counts: Arc::default(), most }
    }

    /// The same requests, of which there may be no more than this.
    pub fn limited(&self, most: u32) -> Self {
        Budget { counts: self.counts.clone(), most }
    }

    /// A share, if one is left. Called by the queue's thread alone.
    pub fn take(&self) -> Option<Share> {
        if self.counts.used.load(Ordering::Acquire) >= self.most {
            return None;
        }
        self.counts.used.fetch_add(1, Ordering::AcqRel);
        Some(Share { counts: self.counts.clone(), abandoned: self.counts.abandoned.load(Ordering::Acquire) })
    }

    /// Waits until all shares have been given back. If that takes longer than `limit` they are abandoned.
    pub fn wait(&self, limit: Duration) -> bool {
        let start = Instant::now();
        while self.counts.used.load(Ordering::Acquire) > 0 {
            if start.elapsed() > limit {
                self.counts.abandoned.fetch_add(1, Ordering::AcqRel);
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl Share {
    /// Whether nobody waits for the request any more, and its memory may be somebody else's.
    pub fn is_abandoned(&self) -> bool {
        self.counts.abandoned.load(Ordering::Acquire) != self.abandoned
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.counts.used.fetch_sub(1, Ordering::AcqRel);
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
    fn what_does_not_end_in_time_is_abandoned() {
        let budget = Budget::new(2);
        let share = budget.take().unwrap();
        assert!(!share.is_abandoned() && !budget.wait(Duration::from_millis(5)) && share.is_abandoned());
        let next = budget.take().unwrap();
        assert!(!next.is_abandoned());
        let late = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            drop((share, next));
        });
        assert!(budget.wait(Duration::from_secs(20)));
        late.join().unwrap();
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
        assert_eq!((started.load(Ordering::Acquire), budget.counts.used.load(Ordering::Acquire)), (1, 0));
    }
}
