//! A second thread for large READs, on another core than the queue's own.
//!
//! Copying a large payload out of the page cache takes longer than everything else together; two cores do it in half the
//! time. Both threads take one part after the other until none is left, so a helper that gets no CPU costs nothing.

use crossbeam_utils::CachePadded;
use parking_lot::Mutex;
use std::io;
use std::sync::atomic::{fence, AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use tunnelfs_ring::{set_affinity, LiveWait, Parker};

/// A function of a part's number.
type Work<'a> = dyn Fn(usize) + Sync + 'a;

/// One piece of work, in parts.
struct Job {
    /// Valid until all parts have been taken and done: [`CopyHelper::run_parts`] waits for that.
    work: *const Work<'static>,
    parts: usize,
    taken: CachePadded<AtomicUsize>,
    done: CachePadded<AtomicUsize>,
}

// SAFETY: `work` is `Sync`, and valid as long as it is used (see there).
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

impl Job {
    /// Does parts until all are taken.
    fn take_part(&self) {
        loop {
            let part = self.taken.fetch_add(1, Ordering::AcqRel);
            if part >= self.parts {
                return;
            }
            let _done = Done(&self.done);
            // SAFETY: this part is taken and not done.
            unsafe { (*self.work)(part) };
        }
    }

    /// Waits for the parts that the other thread has taken. Parts that are not taken are dropped.
    fn finish(&self) {
        let left = self.parts.saturating_sub(self.taken.swap(self.parts, Ordering::AcqRel));
        while self.done.load(Ordering::Acquire) + left < self.parts {
            thread::yield_now();
        }
    }
}

/// Counts a part as done, also when it panics.
struct Done<'a>(&'a AtomicUsize);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// Waits for a job's end, also when its owner panics.
struct Finish<'a>(&'a Job);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.finish();
    }
}

/// Shared by both threads. The helper spins on `number`, so each field has a cache line of its own.
#[derive(Default)]
struct Mailbox {
    job: CachePadded<Mutex<Option<Arc<Job>>>>,
    /// Changes with each job.
    number: CachePadded<AtomicU32>,
    asleep: CachePadded<AtomicBool>,
    stopping: AtomicBool,
}

/// The helper's thread. Ends when this is dropped.
pub struct CopyHelper {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
}

impl CopyHelper {
    /// A helper on one of `cpus`, which waits as `wait` says.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn new(cpus: Vec<usize>, wait: LiveWait) -> io::Result<CopyHelper> {
        let mailbox = Arc::new(Mailbox::default());
        let its = mailbox.clone();
        let thread = tunnelfs_program::thread::spawn("helper", move || {
            let _ = set_affinity(&cpus);
            its.serve(Parker::new(wait));
        })?;
        Ok(CopyHelper { mailbox, thread: Some(thread) })
    }

    /// Does `work` for each number below `parts`, here and on the helper's thread, in any order.
    pub fn run_parts(&self, parts: usize, work: &Work<'_>) {
        // SAFETY: only the lifetime changes; `Finish` keeps this call from ending while the job may use it.
        let work: *const Work<'static> = unsafe { std::mem::transmute(work) };
        let job = Arc::new(Job { work, parts, taken: CachePadded::default(), done: CachePadded::default() });
        let _finish = Finish(&job);
        self.mailbox.post(job.clone());
        self.wake();
        job.take_part();
    }

    /// Has the helper spin on its core until the next job. The kernel moves a woken application to an idle core, away
    /// from its data and from the threads that serve it: the helper's core is then not idle.
    pub fn keep_spinning(&self) {
        self.mailbox.number.fetch_add(1, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // Pairs with the fence in `Mailbox::serve`: either the helper sees the job, or this sees that it sleeps.
        fence(Ordering::SeqCst);
        if self.mailbox.asleep.swap(false, Ordering::AcqRel) {
            if let Some(thread) = &self.thread {
                thread.thread().unpark();
            }
        }
    }
}

impl Drop for CopyHelper {
    fn drop(&mut self) {
        self.mailbox.stopping.store(true, Ordering::Release);
        self.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Mailbox {
    fn post(&self, job: Arc<Job>) {
        *self.job.lock() = Some(job);
        self.number.fetch_add(1, Ordering::Release);
    }

    fn serve(&self, mut parker: Parker) {
        let mut seen = 0;
        while !self.stopping.load(Ordering::Acquire) {
            let news = || self.number.load(Ordering::Acquire) != seen || self.stopping.load(Ordering::Acquire);
            if !parker.spin(news) {
                self.asleep.store(true, Ordering::Release);
                fence(Ordering::SeqCst);
                while !news() && self.asleep.load(Ordering::Acquire) {
                    thread::park();
                }
                self.asleep.store(false, Ordering::Release);
                parker.unparked();
            }
            seen = self.number.load(Ordering::Acquire);
            let job = self.job.lock().take();
            if let Some(job) = job {
                job.take_part();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{catch_unwind, AssertUnwindSafe};
    use tunnelfs_ring::{Policy, WaitConfig};

    fn helper(policy: Policy) -> CopyHelper {
        CopyHelper::new(tunnelfs_ring::allowed_cpus(), WaitConfig { policy, ..WaitConfig::default() }.into()).unwrap()
    }

    #[test]
    fn every_part_is_done_once_before_run_parts_returns() {
        for policy in [Policy::Auto, Policy::Park, Policy::Spin] {
            let helper = helper(policy);
            for parts in (0..300).map(|i| i % 9) {
                let counts = [const { AtomicU32::new(0) }; 9];
                helper.run_parts(parts, &|part| {
                    counts[part].fetch_add(1, Ordering::Relaxed);
                });
                let counts = counts.map(AtomicU32::into_inner);
                assert!(counts.iter().enumerate().all(|(i, &n)| n == u32::from(i < parts)), "{parts}: {counts:?}");
            }
        }
    }

    #[test]
    fn both_threads_take_part() {
        let (helper, threads) = (helper(Policy::Auto), Mutex::new(Vec::new()));
        helper.run_parts(2, &|_| {
            threads.lock().push(thread::current().id());
            // Each waits for the other.
            while threads.lock().len() < 2 {
                thread::yield_now();
            }
        });
        let threads = threads.into_inner();
        assert_ne!(threads[0], threads[1]);
    }

    #[test]
    fn a_panic_here_waits_for_the_other_thread() {
        let helper = helper(Policy::Park);
        let (own, finished) = (thread::current().id(), AtomicUsize::new(0));
        for _ in 0..20 {
            let started = AtomicUsize::new(0);
            let ended = catch_unwind(AssertUnwindSafe(|| {
                helper.run_parts(2, &|_| {
                    started.fetch_add(1, Ordering::AcqRel);
                    while started.load(Ordering::Acquire) < 2 {
                        thread::yield_now();
                    }
                    assert_ne!(thread::current().id(), own, "as planned");
                    thread::sleep(std::time::Duration::from_millis(2));
                    finished.fetch_add(1, Ordering::AcqRel);
                });
            }));
            assert!(ended.is_err());
        }
        assert_eq!(finished.into_inner(), 20);
    }
}
