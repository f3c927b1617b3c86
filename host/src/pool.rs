//! Threads for what would block, so that a queue's own thread goes on.

use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce() + Send>;

struct Inbox {
    jobs: Mutex<(VecDeque<Job>, bool)>,
    more: Condvar,
}

/// A fixed number of threads. Each queue bounds its own requests in flight,
/// which bounds the inbox.
pub struct Pool {
    inbox: Arc<Inbox>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let inbox = Arc::new(Inbox { jobs: Mutex::default(), more: Condvar::new() });
        let threads = (0..threads.max(1))
            .map(|i| {
                let inbox = inbox.clone();
                std::thread::Builder::new().name(format!("pool-{i}")).spawn(move || work(&inbox))
            })
            .collect::<Result<_, _>>()?;
        Ok(Pool { inbox, threads })
    }

    pub fn run(&self, job: Job) {
        self.inbox.jobs.lock().0.push_back(job);
        self.inbox.more.notify_one();
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
        self.inbox.jobs.lock().1 = true;
        self.inbox.more.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
