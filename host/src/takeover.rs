//! Nothing holds up a queue: a request that takes too long keeps its thread, and another thread takes the queue.
//!
//! A thread of a [`WorkerPool`] owns a [`Task`] (a queue or a connection) and serves it alone. It lends the task to its
//! [`Worker`] while it handles a request, and reclaims it afterwards. A watcher looks at all workers twice per [`BOUND`].
//! If it finds the same request as at its last look, it takes the task and gives it to a spare thread. The late thread
//! delivers the reply of its request when it has it, and becomes a spare. Go's scheduler does the same with a thread in
//! a system call.
//!
//! ```text
//! owner:   lend(task) -- handle the request -- reclaim() -> the task, or nothing: late
//! watcher:            -- same request as at the last look? take() -> the queue of tasks, a spare thread
//! ```
//!
//! A request costs its thread four stores and two loads; of the stores two are locked. The watcher sleeps while no
//! request comes. The number of threads is bounded: when all are held up, the next requests wait.

use crate::interrupt;
use crossbeam_utils::CachePadded;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// A request that takes longer is late: its queue goes on without it.
const BOUND: Duration = Duration::from_millis(1);
/// Between two looks of the watcher. A request that two looks find is late: it has taken half of the bound or more.
const TICK: Duration = Duration::from_micros(BOUND.as_micros() as u64 / 2);
/// Looks without any request after which the watcher sleeps: 20 ms. The next request wakes it.
const IDLE_TICKS: u32 = 40;
/// Threads without work that are kept. Others end.
const MAX_IDLE: usize = 2;
/// Most threads of one pool. Threads that are stuck in abandoned requests count too.
const MAX_THREADS: usize = 1024;
/// Between two signals to a request that is to be interrupted. The first may come before its system call.
const SIGNAL_EVERY: Duration = Duration::from_millis(10);
/// How long an INTERRUPT is kept for a request that has not been seen yet: it may be on its way in another queue.
const KEEP_INTERRUPT: Duration = Duration::from_secs(2);
/// INTERRUPTs that are kept. The oldest makes room.
const MAX_INTERRUPTS: usize = 256;

/// Served by one thread at a time.
pub trait Task: Sized + Send + 'static {
    /// Serves until the task has ended, or has been taken over (then `self` has moved into `worker`).
    fn run(self: Box<Self>, worker: &Worker<Self>);

    /// Another thread takes the task over. Called before that thread goes on, and before another thread
    /// runs the task.
    fn taken(&mut self);
}

/// Written by the thread for each request.
struct CurrentRequest<T> {
    /// The task, while its thread handles a request.
    lent: AtomicPtr<T>,
    /// Changes with each request.
    sequence: AtomicU32,
    /// The request's FUSE `unique`.
    unique: AtomicU64,
}

/// A late request, as other threads see it.
#[derive(Default)]
struct LateRequest {
    late: bool,
    signalled: Option<Instant>,
}

/// One thread, as the pool sees it.
pub struct Worker<T> {
    current: CachePadded<CurrentRequest<T>>,
    /// The number of the task that the thread runs.
    number: AtomicUsize,
    /// `sequence` at the watcher's last look. Only the watcher uses it.
    seen: AtomicU32,
    late: Mutex<LateRequest>,
    thread: libc::pid_t,
    watcher: Arc<WatcherWakeup>,
}

/// How the watcher is woken.
struct WatcherWakeup {
    asleep: CachePadded<AtomicBool>,
    thread: Mutex<Option<Thread>>,
}

impl WatcherWakeup {
    fn wake(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            if let Some(thread) = &*self.thread.lock() {
                thread.unpark();
            }
        }
    }
}

impl<T: Task> Worker<T> {
    fn new(watcher: Arc<WatcherWakeup>) -> Self {
        let current =
            CurrentRequest { lent: AtomicPtr::new(null_mut()), sequence: AtomicU32::new(0), unique: AtomicU64::new(0) };
        let (number, seen, late) = (AtomicUsize::new(usize::MAX), AtomicU32::new(0), Mutex::default());
        Worker {
            current: CachePadded::new(current),
            number,
            seen,
            late,
            thread: nix::unistd::gettid().as_raw(),
            watcher,
        }
    }

    /// The thread is about to handle a request of the task with this number.
    pub fn lend(&self, task: Box<T>, unique: u64) {
        self.current.unique.store(unique, Ordering::Relaxed);
        let sequence = self.current.sequence.load(Ordering::Relaxed);
        self.current.sequence.store(sequence.wrapping_add(1), Ordering::Relaxed);
        // Pairs with `Watcher::sleep`: either the watcher sees the task, or this thread sees that it sleeps.
        self.current.lent.store(Box::into_raw(task), Ordering::SeqCst);
        if self.watcher.asleep.load(Ordering::SeqCst) {
            self.watcher.wake();
        }
    }

    /// The request has been handled. `None`: it was late, and another thread has the task. Deliver the reply, then call
    /// [`Worker::leave`].
    pub fn reclaim(&self) -> Option<Box<T>> {
        let task = self.swap_out();
        if task.is_none() {
            // Waits for `take` to end: the task counts the late request before its answer is delivered.
            drop(self.late.lock());
        }
        task
    }

    fn swap_out(&self) -> Option<Box<T>> {
        let task = self.current.lent.swap(null_mut(), Ordering::AcqRel);
        // SAFETY: from `Box::into_raw` in `lend`; the swap gives it to one thread only.
        (!task.is_null()).then(|| unsafe { Box::from_raw(task) })
    }

    /// The reply of a late request has been delivered: the thread must not be signalled any more.
    pub fn leave(&self) {
        let late = std::mem::take(&mut *self.late.lock());
        self.current.unique.store(0, Ordering::Relaxed);
        if late.signalled.is_some() {
            // Delivers a pending signal here, so that it does not interrupt the next request.
            // SAFETY: a system call without arguments.
            unsafe { libc::syscall(libc::SYS_sched_yield) };
        }
    }

    /// Sets which task the thread runs, for [`WorkerPool::force_takeover`].
    pub fn set_number(&self, number: usize) {
        self.number.store(number, Ordering::Release);
    }

    fn is_lent(&self) -> bool {
        !self.current.lent.load(Ordering::SeqCst).is_null()
    }

    /// Takes the task away from a thread in a request.
    fn take(&self) -> Option<Box<T>> {
        let mut late = self.late.lock();
        let mut task = self.swap_out()?;
        task.taken();
        *late = LateRequest { late: true, signalled: None };
        Some(task)
    }

    /// Signals the thread, if its late request is the wanted one and the last signal was [`SIGNAL_EVERY`] ago.
    fn interrupt(&self, unique: impl FnOnce(u64) -> bool) {
        let mut late = self.late.lock();
        let due = late.signalled.is_none_or(|at| at.elapsed() >= SIGNAL_EVERY);
        if late.late && due && unique(self.current.unique.load(Ordering::Relaxed)) {
            late.signalled = Some(Instant::now());
            interrupt::send(self.thread);
        }
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        let task = *self.current.lent.get_mut();
        if !task.is_null() {
            // SAFETY: from `Box::into_raw` in `lend`, and nobody else has the worker any more.
            drop(unsafe { Box::from_raw(task) });
        }
    }
}

/// Tasks that wait for a thread, and the threads.
struct TaskQueue<T> {
    tasks: VecDeque<Box<T>>,
    /// Threads that wait for a task.
    idle: usize,
    /// All threads.
    threads: usize,
    /// Most threads, beside the pool's spares.
    limit: usize,
    stopping: bool,
    handles: Vec<JoinHandle<()>>,
}

struct PoolState<T> {
    /// Threads for late requests; may change at any time.
    spares: Arc<AtomicUsize>,
    queue: Mutex<TaskQueue<T>>,
    /// A task has come, or the end.
    more: Condvar,
    /// A thread has ended.
    ended: Condvar,
    workers: Mutex<Vec<Arc<Worker<T>>>>,
    watcher: Arc<WatcherWakeup>,
    interrupts: Mutex<VecDeque<(u64, Instant)>>,
    /// Whether late requests are interrupted by a signal.
    signals: bool,
}

/// The threads that serve one guest.
pub struct WorkerPool<T: Task>(Arc<PoolState<T>>);

impl<T: Task> Clone for WorkerPool<T> {
    fn clone(&self) -> Self {
        WorkerPool(self.0.clone())
    }
}

impl<T: Task> WorkerPool<T> {
    /// A pool that may hold `spares` late requests beside its tasks. It interrupts them by a signal.
    ///
    /// # Errors
    /// The system has no thread left, or refuses the signal's handler.
    pub fn new(spares: Arc<AtomicUsize>) -> io::Result<Self> {
        interrupt::install()?;
        Self::with_signals(spares, true)
    }

    /// A pool that sends no signal: a late request's system call takes its time.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn without_signals(spares: Arc<AtomicUsize>) -> io::Result<Self> {
        Self::with_signals(spares, false)
    }

    fn with_signals(spares: Arc<AtomicUsize>, signals: bool) -> io::Result<Self> {
        let queue =
            TaskQueue { tasks: VecDeque::new(), idle: 0, threads: 0, limit: 0, stopping: false, handles: Vec::new() };
        let watcher =
            Arc::new(WatcherWakeup { asleep: CachePadded::new(AtomicBool::new(false)), thread: Mutex::new(None) });
        let state = Arc::new(PoolState {
            spares,
            queue: Mutex::new(queue),
            more: Condvar::new(),
            ended: Condvar::new(),
            workers: Mutex::default(),
            watcher,
            interrupts: Mutex::default(),
            signals,
        });
        let its = state.clone();
        let watcher = tunnelfs_program::thread::spawn("watcher", move || Watcher::new(its).run())?;
        state.watcher.thread.lock().replace(watcher.thread().clone());
        state.queue.lock().handles.push(watcher);
        Ok(WorkerPool(state))
    }

    /// Gives a task to a thread of its own.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start(&self, task: T) -> io::Result<()> {
        let mut queue = self.0.queue.lock();
        queue.limit += 1;
        self.0.spawn(&mut queue)?;
        queue.tasks.push_back(Box::new(task));
        self.0.more.notify_one();
        Ok(())
    }

    /// A task that [`WorkerPool::start`] was given has ended.
    pub fn finished(&self) {
        let mut queue = self.0.queue.lock();
        queue.limit = queue.limit.saturating_sub(1);
    }

    /// Takes task `number` over from a thread that is in a request, also beyond the limit of threads.
    pub fn force_takeover(&self, number: usize) {
        let workers = self.0.workers.lock().clone();
        let of = |worker: &&Arc<Worker<T>>| worker.number.load(Ordering::Acquire) == number;
        if let Some(task) = workers.iter().filter(of).find_map(|worker| worker.take()) {
            self.0.hand_over(task);
        }
    }

    /// Runs `wait`, which may take as long as it likes, for the request that `worker` handles: another thread takes its
    /// task at once. The thread is one more than the pool may have otherwise.
    pub fn wait_apart<R>(&self, worker: &Worker<T>, wait: impl FnOnce() -> R) -> R {
        self.0.queue.lock().limit += 1;
        if let Some(task) = worker.take() {
            self.0.hand_over(task);
        }
        let result = wait();
        self.finished();
        result
    }

    /// Interrupts the request with this `unique`, if it is late or becomes so.
    pub fn interrupt(&self, unique: u64) {
        if !self.0.signals {
            return;
        }
        let mut interrupts = self.0.interrupts.lock();
        if interrupts.len() == MAX_INTERRUPTS {
            interrupts.pop_front();
        }
        interrupts.push_back((unique, Instant::now()));
        drop(interrupts);
        self.0.watcher.wake();
    }

    /// Tells all threads to end. What waits for a thread is dropped.
    pub fn stop(&self) {
        let mut queue = self.0.queue.lock();
        queue.stopping = true;
        let waiting = std::mem::take(&mut queue.tasks);
        drop(queue);
        drop(waiting);
        self.0.more.notify_all();
        self.0.watcher.wake();
    }

    /// Waits until all threads have ended, for `limit` at the most. Late requests are interrupted.
    pub fn join(&self, limit: Duration) -> bool {
        let workers = self.0.workers.lock().clone();
        if self.0.signals {
            workers.iter().for_each(|worker| worker.interrupt(|_| true));
        }
        let until = Instant::now() + limit;
        let mut queue = self.0.queue.lock();
        while queue.threads > 0 {
            if self.0.ended.wait_until(&mut queue, until).timed_out() {
                return false;
            }
        }
        let handles = std::mem::take(&mut queue.handles);
        drop(queue);
        self.0.watcher.wake();
        for handle in handles {
            handle.thread().unpark();
            let _ = handle.join();
        }
        true
    }
}

impl<T: Task> PoolState<T> {
    fn spawn(self: &Arc<Self>, queue: &mut TaskQueue<T>) -> io::Result<()> {
        queue.handles.retain(|handle| !handle.is_finished());
        let state = self.clone();
        let thread = tunnelfs_program::thread::spawn("queue", move || state.work())?;
        queue.handles.push(thread);
        queue.threads += 1;
        Ok(())
    }

    fn work(self: &Arc<Self>) {
        let worker = Arc::new(Worker::new(self.watcher.clone()));
        self.workers.lock().push(worker.clone());
        while let Some(task) = self.next() {
            task.run(&worker);
            worker.set_number(usize::MAX);
        }
        self.workers.lock().retain(|other| !Arc::ptr_eq(other, &worker));
        self.queue.lock().threads -= 1;
        self.ended.notify_all();
    }

    fn next(&self) -> Option<Box<T>> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(task) = queue.tasks.pop_front() {
                return Some(task);
            }
            if queue.stopping || queue.idle >= MAX_IDLE {
                return None;
            }
            queue.idle += 1;
            self.more.wait(&mut queue);
            queue.idle -= 1;
        }
    }

    fn spares(&self) -> usize {
        self.spares.load(Ordering::Relaxed).max(1)
    }

    /// Whether another thread is idle, or could be started.
    fn has_spare(self: &Arc<Self>) -> bool {
        let mut queue = self.queue.lock();
        queue.idle > queue.tasks.len() || queue.threads < queue.limit + self.spares() && self.spawn(&mut queue).is_ok()
    }

    /// Gives a late thread's task to another one.
    fn hand_over(self: &Arc<Self>, task: Box<T>) {
        let mut queue = self.queue.lock();
        queue.tasks.push_back(task);
        if queue.idle < queue.tasks.len() && queue.threads < MAX_THREADS {
            // If the system has no thread left, the task waits for an idle one.
            let _ = self.spawn(&mut queue);
        }
        self.more.notify_one();
    }
}

/// The thread that looks for late requests.
struct Watcher<T> {
    state: Arc<PoolState<T>>,
    /// Looks without a request.
    idle: u32,
    /// Whether a warning has been logged that all threads are held up.
    logged: bool,
}

impl<T: Task> Watcher<T> {
    fn new(state: Arc<PoolState<T>>) -> Self {
        Watcher { state, idle: 0, logged: false }
    }

    fn run(mut self) {
        loop {
            {
                let queue = self.state.queue.lock();
                if queue.stopping && queue.threads == 0 {
                    return;
                }
            }
            let workers = self.state.workers.lock().clone();
            let mut busy = false;
            for worker in &workers {
                busy |= self.look(worker);
            }
            let interrupts = self.interrupt(&workers);
            self.idle = if busy || interrupts { 0 } else { self.idle + 1 };
            if self.idle < IDLE_TICKS {
                std::thread::park_timeout(TICK);
            } else {
                self.sleep();
            }
        }
    }

    /// Takes a late request's task over. Returns whether the thread has a request, or has had one since the last look.
    fn look(&mut self, worker: &Arc<Worker<T>>) -> bool {
        let sequence = worker.current.sequence.load(Ordering::Relaxed);
        if worker.seen.swap(sequence, Ordering::Relaxed) != sequence {
            return true;
        }
        if !worker.is_lent() {
            return false;
        }
        if self.state.has_spare() {
            if let Some(task) = worker.take() {
                self.state.hand_over(task);
            }
        } else if !std::mem::replace(&mut self.logged, true) {
            tracing::warn!("all threads are held up by slow requests: the next ones wait (host.thread_pool_size)");
        }
        true
    }

    /// Signals the threads of late requests that are to be interrupted. Returns whether there are INTERRUPTs to keep.
    fn interrupt(&self, workers: &[Arc<Worker<T>>]) -> bool {
        let mut interrupts = self.state.interrupts.lock();
        if interrupts.is_empty() {
            return false;
        }
        for (unique, since) in interrupts.iter_mut() {
            for worker in workers {
                worker.interrupt(|late| {
                    late == *unique && {
                        *since = Instant::now();
                        true
                    }
                });
            }
        }
        interrupts.retain(|(_, since)| since.elapsed() < KEEP_INTERRUPT);
        true
    }

    fn sleep(&mut self) {
        let watcher = &self.state.watcher;
        watcher.asleep.store(true, Ordering::SeqCst);
        // Pairs with `Worker::lend`, `WorkerPool::interrupt` and `WorkerPool::stop`.
        let workers = self.state.workers.lock().clone();
        let work = || {
            workers.iter().any(|worker| worker.is_lent())
                || !self.state.interrupts.lock().is_empty()
                || self.state.queue.lock().stopping
        };
        if work() {
            watcher.asleep.store(false, Ordering::SeqCst);
        }
        while watcher.asleep.load(Ordering::SeqCst) {
            std::thread::park();
        }
        self.idle = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicI32;

    /// Requests that take about as long as the bound, so that the watcher and the thread meet.
    struct Borderline {
        left: u32,
        /// Tasks taken away whose late answers have not been delivered.
        late: Arc<AtomicI32>,
        takeovers: Arc<AtomicU32>,
    }

    impl Task for Borderline {
        fn run(mut self: Box<Self>, worker: &Worker<Self>) {
            while self.left > 0 {
                self.left -= 1;
                let (late, began) = (self.late.clone(), Instant::now());
                let length = BOUND * (5 + self.left % 10) / 10;
                worker.lend(self, 1);
                while began.elapsed() < length {
                    std::hint::spin_loop();
                }
                match worker.reclaim() {
                    Some(task) => self = task,
                    None => {
                        assert!(late.fetch_sub(1, Ordering::AcqRel) > 0, "an answer before the task was taken");
                        return worker.leave();
                    }
                }
            }
        }

        fn taken(&mut self) {
            // Long enough for the other thread to come first, if it may.
            std::thread::sleep(BOUND / 5);
            self.late.fetch_add(1, Ordering::AcqRel);
            self.takeovers.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_task_is_taken_before_the_late_answer_is_delivered() {
        let (late, takeovers) = (Arc::new(AtomicI32::new(0)), Arc::new(AtomicU32::new(0)));
        let pool = WorkerPool::new(Arc::new(AtomicUsize::new(8))).unwrap();
        pool.start(Borderline { left: 300, late: late.clone(), takeovers: takeovers.clone() }).unwrap();
        let ended = Instant::now() + Duration::from_secs(60);
        while Arc::strong_count(&takeovers) > 1 && Instant::now() < ended {
            std::thread::sleep(Duration::from_millis(5));
        }
        pool.stop();
        assert!(pool.join(Duration::from_secs(60)));
        assert!(takeovers.load(Ordering::Relaxed) > 0);
        assert_eq!(late.load(Ordering::Acquire), 0);
    }
}
